//! What a layer may become, as text: `4/32` is 4 bits in groups of 32.

use crate::quantize::{Clipping, GridOptions};
use crate::{Filter, PASSES, Pass, f16_weights};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};
use std::fmt;

/// What may become of a layer's weight. As text, `BITS/GROUP`, with `row` for a whole row and then in any order a method
/// and `sym` for zero points in the middle; `16` for a weight of f16, `float` for one that stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub enum Choice {
    /// It stays as it is.
    Float,
    /// It is stored as f16.
    Half,
    /// It is quantized.
    Codes {
        /// The grid.
        grid: GridOptions,
        /// How codes are found; `None` leaves it to the pass's option.
        method: Option<Method>,
    },
}

/// How the codes of a layer are found: a quantizing pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Method(&'static Known);

/// A method: its name, its pass, and options of that pass.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    name: &'static str,
    pass: &'static str,
    /// A JSON object.
    options: &'static str,
}

/// Passes that touch nothing but the weights they are to quantize: a scale in another layer's weight would make the
/// choice for one layer the other's business.
const METHODS: &[Known] = &[
    Known { name: "rtn", pass: "rtn", options: "{}" },
    Known { name: "clip", pass: "awq", options: r#"{"grid": 0, "clip": true}"# },
    // One layer is measured at a time, in the float model.
    Known { name: "gptq", pass: "gptq", options: r#"{"sequential": "off", "clip": true}"# },
];

impl Default for Method {
    fn default() -> Method {
        Method(&METHODS[0])
    }
}

impl Method {
    /// Whether it is `gptq`.
    pub fn is_gptq(&self) -> bool {
        self.0.pass == "gptq"
    }

    /// Whether it looks at calibration data.
    pub fn needs_data(&self) -> bool {
        self.0.pass != "rtn"
    }
}

impl TryFrom<String> for Method {
    type Error = String;
    fn try_from(name: String) -> Result<Method, String> {
        let known: Vec<&str> = METHODS.iter().map(|k| k.name).collect();
        let found = METHODS.iter().find(|k| k.name == name);
        found
            .map(Method)
            .ok_or_else(|| format!("method: expected one of {}, found {name:?}", known.join(", ")))
    }
}

impl From<Method> for String {
    fn from(m: Method) -> String {
        m.to_string()
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

impl Choice {
    /// The choice with a method, where it needs one.
    pub fn with(&self, default: Method) -> Choice {
        match self {
            Choice::Codes { grid, method } => {
                Choice::Codes { grid: grid.clone(), method: Some(method.unwrap_or(default)) }
            }
            other => other.clone(),
        }
    }

    /// The grid that gptq is to round on, where that is the method.
    pub(super) fn gptq(&self) -> Option<GridOptions> {
        match self {
            Choice::Codes { grid, method: Some(method) } if method.is_gptq() => {
                Some(GridOptions { clip: Clipping::Search, ..grid.clone() })
            }
            _ => None,
        }
    }

    /// The pass that makes it of the weights that `filter` lets through; `None` when nothing is to be done.
    pub fn pass(&self, filter: &Filter) -> Result<Option<Box<dyn Pass>>, String> {
        let (name, mut options) = match self {
            Choice::Float => return Ok(None),
            Choice::Half => (f16_weights::NAME, json!({})),
            Choice::Codes { grid, method } => {
                let known = method.unwrap_or_default().0;
                let own: Map<String, Json> =
                    serde_json::from_str(known.options).map_err(|e| e.to_string())?;
                let mut options = serde_json::to_value(grid).map_err(|e| e.to_string())?;
                own.into_iter().for_each(|(key, value)| options[key] = value);
                (known.pass, options)
            }
        };
        options["only"] = json!(filter.only);
        options["skip"] = json!(filter.skip);
        let def = PASSES.iter().map(|def| def()).find(|def| def.name == name);
        let def = def.ok_or_else(|| format!("there is no pass {name:?}"))?;
        (def.make)(options).map(Some)
    }

    pub(super) fn parse(text: &str) -> Result<Choice, String> {
        let expected = "expected BITS/GROUP such as 4/32, with a method and `sym` after it, or 16, or float";
        let wrong = |why: String| format!("the choice {text:?}: {why}");
        match text {
            "float" => return Ok(Choice::Float),
            "16" => return Ok(Choice::Half),
            _ => {}
        }
        let mut parts = text.split('/').map(str::trim);
        let bits = parts.next().and_then(|b| b.parse().ok());
        let group = match parts.next() {
            Some("row") => Some(-1),
            group => group.and_then(|g| g.parse().ok()),
        };
        let (Some(bits), Some(group)) = (bits, group) else { return Err(wrong(expected.into())) };
        let mut grid = GridOptions { bits, group, ..GridOptions::default() };
        let mut method = None;
        for part in parts {
            match part {
                "sym" if !grid.symmetric => grid.symmetric = true,
                name if method.is_none() => {
                    method = Some(Method::try_from(name.to_string()).map_err(&wrong)?);
                }
                other => return Err(wrong(format!("found {other:?} once more; {expected}"))),
            }
        }
        grid.check("mixed").map_err(|e| wrong(e.to_string()))?;
        Ok(Choice::Codes { grid, method })
    }
}

impl TryFrom<Json> for Choice {
    type Error = String;
    fn try_from(value: Json) -> Result<Choice, String> {
        Choice::parse(&value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    }
}

impl From<Choice> for Json {
    fn from(c: Choice) -> Json {
        c.to_string().into()
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Float => f.write_str("float"),
            Choice::Half => f.write_str("16"),
            Choice::Codes { grid, method } => {
                match grid.group {
                    -1 => write!(f, "{}/row", grid.bits)?,
                    group => write!(f, "{}/{group}", grid.bits)?,
                }
                if let Some(method) = method {
                    write!(f, "/{method}")?;
                }
                f.write_str(if grid.symmetric { "/sym" } else { "" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_read_back_as_they_print() {
        for text in ["2/32", "4/row", "8/128/rtn", "4/32/sym", "3/16/clip/sym", "16", "float"] {
            assert_eq!(Choice::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Choice::try_from(json!(16)).unwrap(), Choice::Half);
        assert_eq!(Choice::parse("4/32/sym/rtn").unwrap().to_string(), "4/32/rtn/sym");
        assert_eq!(Choice::parse("4/32").unwrap().with(Method::default()).to_string(), "4/32/rtn");
        assert_eq!(Choice::Half.with(Method::default()), Choice::Half);
    }

    #[test]
    fn what_is_no_choice() {
        for (text, why) in [
            ("4", "expected BITS/GROUP"),
            ("9/32", "expected 2 to 8, found 9"),
            ("16/32", "expected 2 to 8, found 16"),
            ("4/33", "expected a multiple of 16"),
            ("4/32/rnt", "expected one of rtn"),
            ("4/32/rtn/rtn", "once more"),
            ("4/32/sym/sym", "expected one of"),
            ("four/32", "expected BITS/GROUP"),
        ] {
            let error = Choice::parse(text).unwrap_err();
            assert!(error.contains(why) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn every_method_has_a_pass() {
        let grid = GridOptions { bits: 3, group: 64, symmetric: true, ..GridOptions::default() };
        for known in METHODS {
            let choice = Choice::Codes { grid: grid.clone(), method: Some(Method(known)) };
            let pass = choice.pass(&Filter::default()).unwrap().unwrap();
            assert_eq!(pass.name(), known.pass);
        }
        assert_eq!(Choice::Half.pass(&Filter::default()).unwrap().unwrap().name(), f16_weights::NAME);
        assert!(Choice::Float.pass(&Filter::default()).unwrap().is_none());
    }
}
