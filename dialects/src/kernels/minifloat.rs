//! Floats of 8 bits and fewer, one code per byte: exact decoding, and rounding to nearest even.
//!
//! The formats are those of the ONNX float8, float6 and float4 specifications. A format is described by its
//! widths, its bias and what its last codes mean; one codec serves all.

use crate::ir::Elem;

/// What the codes at the top of the range mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    /// Every code is a number.
    None,
    /// The last code of each sign is NaN; there is no infinity ("FN").
    Nan,
    /// The negative zero is NaN; there is no infinity and no negative zero ("FNUZ").
    NanAtNegativeZero,
    /// The last exponent holds infinity and NaN, as in IEEE 754.
    Ieee,
    /// No sign and no mantissa: the code is an exponent, the last one NaN.
    Exponent,
}

/// How a narrow float is coded.
#[derive(Clone, Copy, Debug)]
pub struct Codec {
    mantissa: u32,
    bias: i32,
    /// The bit of the sign; 0 when there is none.
    sign: u8,
    /// The largest finite magnitude's code.
    max: u8,
    special: Special,
}

impl Codec {
    /// The codec of a float type of 8 bits and fewer.
    pub fn of(elem: Elem) -> Option<Codec> {
        let (mantissa, bias, sign, max, special) = match elem {
            Elem::F8E4M3FN => (3, 7, 0x80, 0x7e, Special::Nan),
            Elem::F8E4M3FNUZ => (3, 8, 0x80, 0x7f, Special::NanAtNegativeZero),
            Elem::F8E5M2 => (2, 15, 0x80, 0x7b, Special::Ieee),
            Elem::F8E5M2FNUZ => (2, 16, 0x80, 0x7f, Special::NanAtNegativeZero),
            Elem::F8E8M0 => (0, 127, 0, 0xfe, Special::Exponent),
            Elem::F6E2M3 => (3, 1, 0x20, 0x1f, Special::None),
            Elem::F6E3M2 => (2, 3, 0x20, 0x1f, Special::None),
            Elem::F4E2M1 => (1, 1, 0x08, 0x07, Special::None),
            _ => return None,
        };
        Some(Codec { mantissa, bias, sign, max, special })
    }

    /// The value of a code.
    pub fn decode(&self, code: u8) -> f32 {
        let negative = self.sign != 0 && code & self.sign != 0;
        let low = if self.sign == 0 { code } else { code & (self.sign - 1) };
        match self.special {
            Special::Exponent if code == 0xff => return f32::NAN,
            Special::Exponent => return (i32::from(code) as f64 - 127.0).exp2() as f32,
            Special::NanAtNegativeZero if negative && low == 0 => return f32::NAN,
            Special::Nan if low > self.max => return f32::NAN,
            Special::Ieee if low == self.max + 1 => {
                return if negative { f32::NEG_INFINITY } else { f32::INFINITY };
            }
            Special::Ieee if low > self.max => return f32::NAN,
            _ => {}
        }
        let fraction = (low & ((1 << self.mantissa) - 1)) as i32;
        let exponent = (low >> self.mantissa) as i32;
        let (significand, exponent) =
            if exponent == 0 { (fraction, 1) } else { (fraction + (1 << self.mantissa), exponent) };
        let magnitude = significand as f32 * ((exponent - self.bias - self.mantissa as i32) as f32).exp2();
        if negative { -magnitude } else { magnitude }
    }

    /// The code nearest to `x`, ties to the even code. What is beyond the largest number becomes that number if
    /// `saturate` is set (infinities included), and otherwise infinity or NaN, where the format has them.
    pub fn encode(&self, x: f64, saturate: bool) -> u8 {
        if self.special == Special::Exponent {
            return self.encode_exponent(x, Round::Nearest, saturate);
        }
        let negative = x.is_sign_negative();
        let sign = if negative { self.sign } else { 0 };
        if x.is_nan() {
            return match self.special {
                Special::Nan => sign | 0x7f,
                // A quiet NaN: the first bit of the fraction is set.
                Special::Ieee => sign | (self.max + 3),
                // Formats without a NaN get the negative zero, as the specification's reference does.
                _ => self.sign,
            };
        }
        let overflow = match self.special {
            Special::Nan => sign | 0x7f,
            Special::Ieee => sign | (self.max + 1),
            Special::NanAtNegativeZero => self.sign,
            _ => sign | self.max,
        };
        if x.is_infinite() {
            return if saturate { sign | self.max } else { overflow };
        }
        let a = x.abs();
        // The exponent of a number's leading bit, but no less than that of the subnormals.
        let least = 1 - self.bias;
        let exponent = (((a.to_bits() >> 52) as i32) - 1023).max(least);
        let quantum = f64::from(exponent - self.mantissa as i32).exp2();
        let significand = (a / quantum).round_ties_even() as i64;
        let code = (i64::from(exponent - least) << self.mantissa) + significand;
        if code > i64::from(self.max) {
            return if saturate { sign | self.max } else { overflow };
        }
        if code == 0 && self.special == Special::NanAtNegativeZero {
            return 0;
        }
        sign | code as u8
    }

    /// The exponent code of a positive number, rounded in the way asked for. What is out of range, zero and infinity
    /// included, becomes the nearest code if `saturate` is set, and NaN otherwise; so does a negative number.
    pub fn encode_exponent(&self, x: f64, round: Round, saturate: bool) -> u8 {
        if x.is_nan() || x < 0.0 {
            return 0xff;
        }
        if x.is_infinite() {
            return if saturate { 0xfe } else { 0xff };
        }
        let bits = x.to_bits();
        let exponent = (bits >> 52) as i32 - 1023;
        let fraction = bits & ((1 << 52) - 1);
        let up = match round {
            Round::Down => false,
            Round::Up => fraction != 0,
            Round::Nearest => fraction >= 1 << 51,
        };
        match exponent + i32::from(up) + 127 {
            code @ 0..=0xfe => code as u8,
            _ if !saturate => 0xff,
            code => code.clamp(0, 0xfe) as u8,
        }
    }
}

/// How a number becomes a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// To the nearer exponent; halfway goes up.
    Nearest,
    /// To the next larger power.
    Up,
    /// To the next smaller power.
    Down,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_decoding_and_encoding() {
        for elem in Elem::all() {
            let Some(codec) = Codec::of(elem) else { continue };
            let codes = if elem == Elem::F4E2M1 {
                16
            } else if codec.sign == 0x20 {
                64
            } else {
                256
            };
            for code in 0..codes {
                let x = codec.decode(code as u8);
                let back = codec.encode(x.into(), false);
                // A NaN may have several codes.
                let same = if x.is_nan() { codec.decode(back).is_nan() } else { back == code as u8 };
                assert!(same, "{elem} {code:#x} is {x}, which encodes to {back:#x}");
            }
        }
    }

    #[test]
    fn published_values() {
        let code = |e, x, s| Codec::of(e).unwrap().encode(x, s);
        let value = |e, c| Codec::of(e).unwrap().decode(c);
        assert_eq!(value(Elem::F8E4M3FN, 0x7e), 448.0);
        assert_eq!(value(Elem::F8E4M3FNUZ, 0x7f), 240.0);
        assert_eq!(value(Elem::F8E5M2, 0x7b), 57344.0);
        assert_eq!(value(Elem::F8E5M2FNUZ, 0x7f), 57344.0);
        assert_eq!(value(Elem::F4E2M1, 0x07), 6.0);
        assert_eq!(value(Elem::F6E2M3, 0x1f), 7.5);
        assert_eq!(value(Elem::F6E3M2, 0x1f), 28.0);
        assert_eq!(value(Elem::F8E8M0, 0), 2f32.powi(-127));
        // Beyond the range: the specification's table of Cast.
        assert_eq!(code(Elem::F8E4M3FN, 1e6, true), 0x7e);
        assert_eq!(code(Elem::F8E4M3FN, -1e6, false), 0xff);
        assert_eq!(code(Elem::F8E5M2, f64::INFINITY, true), 0x7b);
        assert_eq!(code(Elem::F8E5M2, -1e6, false), 0xfc);
        assert_eq!(code(Elem::F8E4M3FNUZ, 1e6, false), 0x80);
        assert_eq!(code(Elem::F8E4M3FNUZ, -0.0, true), 0);
        // Halfway between 2^-9 * 1 and 2^-9 * 2 goes to the even code.
        assert_eq!(code(Elem::F8E4M3FN, 1.5 / 512.0, true), 2);
        assert_eq!(code(Elem::F8E4M3FN, 0.5 / 512.0, true), 0);
    }
}
