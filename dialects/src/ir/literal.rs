//! Literals of the text form: names, strings, and the elements of tensors. Every literal is exact: what is read
//! back has the same bytes, NaN payloads included.

use super::Elem;
use half::{bf16, f16};
use std::fmt::{self, Display, Write};

/// A name as the text form writes it: a plain word as it is, anything else quoted.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a>(pub &'a str);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match is_word(self.0) {
            true => f.write_str(self.0),
            false => Quoted(self.0.as_bytes()).fmt(f),
        }
    }
}

/// Whether `s` can stand unquoted: a letter, `_` or `/`, then letters, digits, `_`, `.`, `/`, `:`, `-`, of which
/// the last one is a letter, a digit or `_`.
pub fn is_word(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '/')
        && s.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'/' | b':' | b'-'))
}

/// Bytes as a string literal: UTF-8 text stays readable, other bytes are `\xNN`.
#[derive(Clone, Copy, Debug)]
pub struct Quoted<'a>(pub &'a [u8]);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '"' | '\\' => write!(f, "\\{c}")?,
                    '\n' => f.write_str("\\n")?,
                    '\r' => f.write_str("\\r")?,
                    '\t' => f.write_str("\\t")?,
                    // Other invisible characters: `escape_debug` knows which they are.
                    c if c != '\'' && c.escape_debug().len() > 1 => write!(f, "{}", c.escape_unicode())?,
                    c => f.write_char(c)?,
                }
            }
            for b in chunk.invalid() {
                write!(f, "\\x{b:02x}")?;
            }
        }
        f.write_char('"')
    }
}

/// The bytes of a string literal, quotes included in `text`; an error is the offset of a bad escape.
pub fn unquote(text: &str) -> Result<Vec<u8>, usize> {
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).ok_or(0usize)?;
    let mut out = Vec::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        let offset = 1 + inner.len() - rest.len() + at;
        let escape = &rest[at + 1..];
        let bad = || offset;
        let used = match escape.chars().next().ok_or_else(bad)? {
            c @ ('"' | '\\') => {
                out.push(c as u8);
                1
            }
            'n' => {
                out.push(b'\n');
                1
            }
            'r' => {
                out.push(b'\r');
                1
            }
            't' => {
                out.push(b'\t');
                1
            }
            'x' => {
                let digits = escape.get(1..3).ok_or_else(bad)?;
                out.push(hex(digits).ok_or_else(bad)?.try_into().map_err(|_| offset)?);
                3
            }
            'u' => {
                let end = escape.find('}').ok_or_else(bad)?;
                let digits = escape.get(2..end).filter(|_| escape.as_bytes()[1] == b'{').ok_or_else(bad)?;
                let code = hex(digits).and_then(|n| u32::try_from(n).ok()).ok_or_else(bad)?;
                let c = char::from_u32(code).ok_or_else(bad)?;
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                end + 1
            }
            _ => return Err(offset),
        };
        rest = &escape[used..];
    }
    out.extend_from_slice(rest.as_bytes());
    Ok(out)
}

fn hex(digits: &str) -> Option<u64> {
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

/// Bytes as hexadecimal digits, two each.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        s.push(char::from_digit((b >> 4).into(), 16).expect("four bits are a digit"));
        s.push(char::from_digit((b & 15).into(), 16).expect("four bits are a digit"));
        s
    })
}

/// The inverse of [`to_hex`].
pub fn from_hex(digits: &str) -> Option<Vec<u8>> {
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|i| hex(&digits[i..i + 2]).map(|b| b as u8)).collect()
}

/// A float literal: the shortest decimal that reads back to the same number, always with a point or an exponent;
/// `inf`, `nan`, and the bits in hexadecimal of any other NaN.
pub fn float(x: f32) -> String {
    match x.is_nan() && x.to_bits() != f32::NAN.to_bits() {
        true => format!("{:#x}", x.to_bits()),
        false => format!("{x:?}").replace("NaN", "nan"),
    }
}

/// Reads a float literal, or an integer as a float.
pub fn parse_float(text: &str) -> Option<f32> {
    match text.strip_prefix("0x") {
        Some(bits) => Some(f32::from_bits(u32::try_from(hex(bits)?).ok()?)),
        None => text.parse().ok(),
    }
}

/// One element literal per element of a tensor's bytes (two per complex number), or `None` when the bytes are not
/// exactly `count` elements as [`super::TensorSource`] lays them out.
pub fn elements(elem: Elem, count: u64, bytes: &[u8]) -> Option<Vec<String>> {
    if elem == Elem::String {
        return strings(count, bytes);
    }
    if elem.byte_len(count)? != bytes.len() as u64 {
        return None;
    }
    fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> String) -> Option<Vec<String>> {
        Some(bytes.as_chunks::<N>().0.iter().map(|c| f(*c)).collect())
    }
    match elem {
        Elem::F64 | Elem::C128 => each(bytes, |b| double(f64::from_le_bytes(b))),
        Elem::F32 | Elem::C64 => each(bytes, |b| float(f32::from_le_bytes(b))),
        Elem::F16 => each(bytes, |b| {
            let x = f16::from_le_bytes(b);
            narrow(x.to_f32(), x.to_bits(), f16::NAN.to_bits())
        }),
        Elem::BF16 => each(bytes, |b| {
            let x = bf16::from_le_bytes(b);
            narrow(x.to_f32(), x.to_bits(), bf16::NAN.to_bits())
        }),
        Elem::I64 => each(bytes, |b| i64::from_le_bytes(b).to_string()),
        Elem::I32 => each(bytes, |b| i32::from_le_bytes(b).to_string()),
        Elem::I16 => each(bytes, |b| i16::from_le_bytes(b).to_string()),
        Elem::I8 => each(bytes, |[b]| (b as i8).to_string()),
        Elem::U64 => each(bytes, |b| u64::from_le_bytes(b).to_string()),
        Elem::U32 => each(bytes, |b| u32::from_le_bytes(b).to_string()),
        Elem::U16 => each(bytes, |b| u16::from_le_bytes(b).to_string()),
        Elem::U8 => each(bytes, |[b]| b.to_string()),
        Elem::Bool => each(bytes, |[b]| match b {
            0 => "false".into(),
            1 => "true".into(),
            other => format!("{other:#x}"),
        }),
        _ => codes(elem, count, bytes),
    }
}

fn narrow(x: f32, bits: u16, nan: u16) -> String {
    match x.is_nan() && bits != nan {
        true => format!("{bits:#x}"),
        false => float(if x.is_nan() { f32::NAN } else { x }),
    }
}

fn double(x: f64) -> String {
    match x.is_nan() && x.to_bits() != f64::NAN.to_bits() {
        true => format!("{:#x}", x.to_bits()),
        false => format!("{x:?}").replace("NaN", "nan"),
    }
}

fn strings(count: u64, bytes: &[u8]) -> Option<Vec<String>> {
    let mut rest = bytes;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let (len, tail) = rest.split_first_chunk::<8>()?;
        let (s, tail) = tail.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        out.push(Quoted(s).to_string());
        rest = tail;
    }
    (out.len() as u64 == count).then_some(out)
}

/// Elements of at most a byte: small integers as numbers, small floats as codes in hexadecimal.
fn codes(elem: Elem, count: u64, bytes: &[u8]) -> Option<Vec<String>> {
    let bits = elem.bits();
    let per = 8 / bits;
    let code = |i: usize| (bytes[i / per] >> (i % per * bits)) & (0xff >> (8 - bits));
    // Bits behind the last element would be lost.
    let end = count as usize % per;
    if end > 0 && bytes.last().is_some_and(|b| b >> (end * bits) != 0) {
        return None;
    }
    let text = |c: u8| match elem {
        e if e.is_signed_int() => ((c << (8 - bits)) as i8 >> (8 - bits)).to_string(),
        e if e.is_int() => c.to_string(),
        _ => format!("{c:#x}"),
    };
    Some((0..count as usize).map(|i| text(code(i))).collect())
}

/// Collects element literals into the bytes of a tensor.
#[derive(Debug)]
pub struct ElementWriter {
    elem: Elem,
    bytes: Vec<u8>,
    count: u64,
}

impl ElementWriter {
    /// A writer of no elements.
    pub fn new(elem: Elem) -> ElementWriter {
        ElementWriter { elem, bytes: Vec::new(), count: 0 }
    }

    /// Adds one element, or half of a complex number. An error says what is expected.
    pub fn push(&mut self, text: &str) -> Result<(), String> {
        self.try_push(text).ok_or_else(|| match self.elem {
            Elem::String => "a string".into(),
            Elem::Bool => "true or false".into(),
            e if e.is_float() && e.bits() <= 8 => format!("the code of a {e} in hexadecimal, such as 0x3c"),
            e => format!("a number of type {e}"),
        })
    }

    fn try_push(&mut self, text: &str) -> Option<()> {
        let bits = text.strip_prefix("0x").map(hex);
        let as_f64 = || text.parse::<f64>().ok();
        match self.elem {
            Elem::String => {
                let s = unquote(text).ok()?;
                self.put(&(s.len() as u64).to_le_bytes());
                self.put(&s);
            }
            Elem::F64 | Elem::C128 => {
                let x = bits.map_or_else(as_f64, |b| b.map(f64::from_bits))?;
                self.put(&x.to_le_bytes());
            }
            Elem::F32 | Elem::C64 => self.put(&parse_float(text)?.to_le_bytes()),
            Elem::F16 => {
                let raw = bits.map(|b| u16::try_from(b?).ok()).unwrap_or_else(|| {
                    as_f64().map(|x| if x.is_nan() { f16::NAN } else { f16::from_f64(x) }.to_bits())
                })?;
                self.put(&raw.to_le_bytes());
            }
            Elem::BF16 => {
                let raw = bits.map(|b| u16::try_from(b?).ok()).unwrap_or_else(|| {
                    as_f64().map(|x| if x.is_nan() { bf16::NAN } else { bf16::from_f64(x) }.to_bits())
                })?;
                self.put(&raw.to_le_bytes());
            }
            Elem::I64 => self.put(&text.parse::<i64>().ok()?.to_le_bytes()),
            Elem::I32 => self.put(&text.parse::<i32>().ok()?.to_le_bytes()),
            Elem::I16 => self.put(&text.parse::<i16>().ok()?.to_le_bytes()),
            Elem::I8 => self.put(&text.parse::<i8>().ok()?.to_le_bytes()),
            Elem::U64 => self.put(&text.parse::<u64>().ok()?.to_le_bytes()),
            Elem::U32 => self.put(&text.parse::<u32>().ok()?.to_le_bytes()),
            Elem::U16 => self.put(&text.parse::<u16>().ok()?.to_le_bytes()),
            Elem::U8 => self.put(&text.parse::<u8>().ok()?.to_le_bytes()),
            Elem::Bool => {
                let b = match text {
                    "true" => 1,
                    "false" => 0,
                    _ => u8::try_from(bits??).ok()?,
                };
                self.put(&[b]);
            }
            _ => self.push_code(text, bits)?,
        }
        self.count += 1;
        Some(())
    }

    fn push_code(&mut self, text: &str, hex: Option<Option<u64>>) -> Option<()> {
        let width = self.elem.bits();
        let limit = 1i64 << width;
        let code = if self.elem.is_signed_int() {
            let x = text.parse::<i64>().ok().filter(|x| (-limit / 2..limit / 2).contains(x))?;
            x.rem_euclid(limit)
        } else if self.elem.is_int() {
            text.parse().ok()?
        } else {
            i64::try_from(hex??).ok()?
        };
        let code = u8::try_from(code).ok().filter(|_| code < limit)?;
        let at = self.count as usize % (8 / width) * width;
        match at {
            0 => self.bytes.push(code),
            _ => *self.bytes.last_mut()? |= code << at,
        }
        Some(())
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The number of elements written.
    pub fn count(&self) -> u64 {
        match self.elem {
            Elem::C64 | Elem::C128 => self.count / 2,
            _ => self.count,
        }
    }

    /// The bytes, or `None` when half of a complex number is missing.
    pub fn finish(self) -> Option<Vec<u8>> {
        let whole = !matches!(self.elem, Elem::C64 | Elem::C128) || self.count.is_multiple_of(2);
        whole.then_some(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_where_they_must_be() {
        let same = ["a", "_", "/layer/q", "onnx::MatMul_12", "layers.0.w", "a-b"];
        for s in same {
            assert_eq!(Name(s).to_string(), s);
        }
        for s in ["", "0", "a:", "a b", "/", "-a", "é", "a\"b", "a~1"] {
            let text = Name(s).to_string();
            assert!(text.starts_with('"'), "{text}");
            assert_eq!(unquote(&text).unwrap(), s.as_bytes());
        }
    }

    #[test]
    fn strings_read_back() {
        let odd: Vec<u8> = (0..=255).chain("é\u{200b}\u{301}日'\\".bytes()).collect();
        let text = Quoted(&odd).to_string();
        assert!(text.chars().all(|c| !c.is_control()) && text.contains("é"));
        assert_eq!(unquote(&text).unwrap(), odd);
        assert_eq!(Quoted(b"a\xffb\n").to_string(), r#""a\xffb\n""#);
        for (bad, at) in [(r#""\q""#, 1), (r#""ab\x4""#, 3), (r#""\u{d800}""#, 1), (r#""a\""#, 2)] {
            assert_eq!(unquote(bad), Err(at), "{bad}");
        }
    }

    #[test]
    fn elements_of_every_type_read_back() {
        for elem in Elem::all().filter(|&e| e != Elem::String) {
            // All byte values, and for wide types every 16-bit pattern in the high end, where exponents stand.
            let mut bytes: Vec<u8> = (0..=255).collect();
            for x in (0..=u16::MAX).step_by(7) {
                bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0]);
                bytes.extend_from_slice(&x.to_le_bytes());
            }
            bytes.truncate(bytes.len() / 16 * 16);
            let count = (bytes.len() * 8 / elem.bits()) as u64;
            let text = elements(elem, count, &bytes).unwrap();
            let mut w = ElementWriter::new(elem);
            text.iter().for_each(|t| w.push(t).unwrap());
            assert_eq!(w.count(), count, "{elem}");
            assert_eq!(w.finish().unwrap(), bytes, "{elem}");
        }
    }

    #[test]
    fn elements_that_do_not_fit_are_refused() {
        for (elem, bad) in [
            (Elem::I4, "8"),
            (Elem::I4, "-9"),
            (Elem::U4, "16"),
            (Elem::U8, "256"),
            (Elem::U8, "-1"),
            (Elem::F4E2M1, "0x10"),
            (Elem::F8E4M3FN, "1.0"),
            (Elem::F32, "0x100000000"),
            (Elem::Bool, "2"),
            (Elem::String, "1"),
        ] {
            assert!(ElementWriter::new(elem).push(bad).is_err(), "{elem} {bad}");
        }
        // One 4-bit element with something in the unused half, and a length that is not the count's.
        assert_eq!(elements(Elem::U4, 1, &[0x21]), None);
        assert_eq!(elements(Elem::U4, 1, &[0x01]).unwrap(), ["1"]);
        assert_eq!(elements(Elem::F32, 2, &[0; 4]), None);
        assert_eq!(elements(Elem::String, 1, &[9, 0, 0, 0, 0, 0, 0, 0, 1]), None);
    }

    #[test]
    fn floats_are_the_shortest_exact_decimals() {
        assert_eq!(float(0.1), "0.1");
        assert_eq!(float(-0.0), "-0.0");
        assert_eq!(float(1e-5), "1e-5");
        assert_eq!(float(f32::NAN), "nan");
        assert_eq!(float(f32::NEG_INFINITY), "-inf");
        assert_eq!(float(f32::from_bits(0xffc0_0001)), "0xffc00001");
        assert_eq!(elements(Elem::F16, 2, &[0, 0x3c, 1, 0x7e]).unwrap(), ["1.0", "0x7e01"]);
    }
}
