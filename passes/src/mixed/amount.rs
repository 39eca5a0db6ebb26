//! Amounts as options: `budget=5.2bits`, `size=35MB`, `ppl=+1%`.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::fmt;

/// Bits for each weight: `5.2bits`, or the number alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct Bits(pub f64);

/// Bytes: `35MB` (of 10^6), `35MiB` (of 2^20), or the number alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct Size(pub u64);

/// What something may grow by: `+1%`, held as 0.01.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct Growth(pub f64);

/// Names of units and what they stand for.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// The number that a value begins with, and the rest of it.
fn split(value: &Json) -> Option<(f64, &str)> {
    let Json::String(s) = value else { return Some((value.as_f64()?, "")) };
    let unit = s.trim_start_matches(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    let number: f64 = s[..s.len() - unit.len()].parse().ok()?;
    Some((number, unit.trim()))
}

fn shown(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl TryFrom<Json> for Bits {
    type Error = String;
    fn try_from(value: Json) -> Result<Bits, String> {
        match split(&value) {
            Some((n, "" | "bit" | "bits")) if n > 0.0 && n.is_finite() => Ok(Bits(n)),
            _ => Err(format!(
                "budget: expected bits for each weight, such as 5.2bits, found {}",
                shown(&value)
            )),
        }
    }
}

impl TryFrom<Json> for Size {
    type Error = String;
    fn try_from(value: Json) -> Result<Size, String> {
        let unit = |unit: &str| UNITS.iter().find(|u| u.0 == unit).map(|u| u.1 as f64);
        let bytes = split(&value).and_then(|(n, u)| Some(n * unit(u)?));
        match bytes {
            // A file has whole bytes, and the user's limit is not to be passed.
            Some(n) if n >= 1.0 && n < i64::MAX as f64 => Ok(Size(n.floor() as u64)),
            _ => Err(format!("size: expected bytes, such as 35MB or 33.4MiB, found {}", shown(&value))),
        }
    }
}

impl TryFrom<Json> for Growth {
    type Error = String;
    fn try_from(value: Json) -> Result<Growth, String> {
        match split(&value) {
            Some((n, "%")) if n >= 0.0 && n.is_finite() => Ok(Growth(n / 100.0)),
            _ => Err(format!(
                "ppl: expected what perplexity may grow by, such as +1%, found {}",
                shown(&value)
            )),
        }
    }
}

impl From<Bits> for Json {
    fn from(b: Bits) -> Json {
        b.to_string().into()
    }
}

impl From<Size> for Json {
    fn from(s: Size) -> Json {
        s.0.into()
    }
}

impl From<Growth> for Json {
    fn from(g: Growth) -> Json {
        g.to_string().into()
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}bits", self.0)
    }
}

/// `34.12 MB (34123456 bytes)`.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("MB", 1e6), ("kB", 1e3)];
        match units.into_iter().find(|u| self.0 as f64 >= u.1) {
            Some((name, unit)) => write!(f, "{:.2} {name} ({} bytes)", self.0 as f64 / unit, self.0),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A product such as 0.07 * 100 has digits that nobody wrote.
        write!(f, "+{}%", (self.0 * 1e10).round() / 1e8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn amounts() {
        assert_eq!(Bits::try_from(json!("5.2bits")), Ok(Bits(5.2)));
        assert_eq!(Bits::try_from(json!(4)), Ok(Bits(4.0)));
        assert_eq!(Size::try_from(json!("35MB")), Ok(Size(35_000_000)));
        assert_eq!(Size::try_from(json!("1.5KiB")), Ok(Size(1536)));
        assert_eq!(Size::try_from(json!(12345)), Ok(Size(12345)));
        assert_eq!(Growth::try_from(json!("+1%")), Ok(Growth(0.01)));
        assert_eq!(Growth::try_from(json!("0.5%")), Ok(Growth(0.005)));
        for bad in [json!("bits"), json!("-4bits"), json!("5.2MB"), json!(0), json!(true), json!("1e400")] {
            assert!(Bits::try_from(bad.clone()).is_err(), "{bad}");
        }
        for bad in [json!("35Mb"), json!("35 parsecs"), json!(0.5), json!("-1MB"), json!("99999999999GB")] {
            assert!(Size::try_from(bad.clone()).is_err(), "{bad}");
        }
        for bad in [json!(1), json!("1"), json!("-1%"), json!("%")] {
            assert!(Growth::try_from(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn amounts_read_back_as_they_print() {
        for g in [0.01, 0.07, 0.0033, 0.0] {
            let text = Json::from(Growth(g));
            let read = Growth::try_from(text.clone()).unwrap().0;
            assert!((read - g).abs() < 1e-12, "{text}");
        }
        assert_eq!(Growth(0.07).to_string(), "+7%");
        assert_eq!(Bits::try_from(Json::from(Bits(5.2))), Ok(Bits(5.2)));
        assert_eq!(Size(34_123_456).to_string(), "34.12 MB (34123456 bytes)");
    }
}
