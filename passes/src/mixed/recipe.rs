//! What each layer becomes, as a file that a person can edit and have replayed: JSON with one line for each layer.

use super::choice::Choice;
use crate::PassError;
use crate::linear::{Weighted, find};
use crate::quantize::Shared;
use dialects::ir::Module;
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// A choice for each layer of a model. Layers that it leaves out stay float.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The layers, in any order.
    pub layers: Vec<Line>,
}

/// What one layer becomes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// The weight's name.
    pub weight: String,
    /// The source node of the first op that uses it.
    pub node: String,
    /// What becomes of it.
    pub choice: Choice,
    /// The bytes that it was predicted to take; for the reader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// What it was predicted to add to the KL divergence; for the reader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
}

impl Recipe {
    /// Reads a recipe. The error says where the text is wrong.
    pub fn parse(text: &str) -> Result<Recipe, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    /// As text that reads back, a line for each layer.
    pub fn text(&self) -> String {
        let mut out = String::from("{\"layers\": [\n");
        for (i, line) in self.layers.iter().enumerate() {
            let line = serde_json::to_string(line).expect("a line is plain data");
            let comma = if i + 1 < self.layers.len() { "," } else { "" };
            writeln!(out, "  {line}{comma}").expect("writing to a string succeeds");
        }
        out.push_str("]}\n");
        out
    }

    /// Whether some layer's method looks at calibration data, where `default` is the method of those that name none.
    pub fn needs_data(&self, default: super::choice::Method) -> bool {
        let needs = |line: &Line| match &line.choice {
            Choice::Codes { method, .. } => method.unwrap_or(default).needs_data(),
            Choice::Float | Choice::Half => false,
        };
        self.layers.iter().any(needs)
    }

    /// The choice for each of the weights; `None` for those that the recipe leaves out.
    ///
    /// # Errors
    /// A layer that is not among the weights, or is there twice.
    pub(super) fn choices(&self, m: &Module, weights: &[Shared]) -> Result<Vec<Option<Choice>>, PassError> {
        let names: Vec<(String, String)> =
            weights.iter().map(|w| (w.label(m), m.ops[w.first().op].loc.to_string())).collect();
        let mut out = vec![None; weights.len()];
        for line in &self.layers {
            let at = |why: String| PassError::At { pass: super::NAME, what: line.weight.clone(), why };
            let is = |(weight, node): &(String, String)| *weight == line.weight && *node == line.node;
            let Some(i) = names.iter().position(is) else {
                return Err(at(missing(m, line, &names)));
            };
            if out[i].replace(line.choice.clone()).is_some() {
                return Err(at(format!("the recipe names the layer at node {:?} twice", line.node)));
            }
        }
        Ok(out)
    }
}

/// Why a layer of the recipe is not found.
fn missing(m: &Module, line: &Line, names: &[(String, String)]) -> String {
    if let Some((_, node)) = names.iter().find(|(weight, _)| *weight == line.weight) {
        let found = &line.node;
        return format!("the recipe names it at node {found:?}, but in the model it is at node {node:?}");
    }
    let unfit = find(m).into_iter().find_map(|w| match w {
        Weighted::Other { weight, why, .. } if m.value_label(weight) == line.weight => Some(why),
        Weighted::Kept { weight, .. } if m.value_label(weight) == line.weight => {
            Some("it is quantized already".to_string())
        }
        _ => None,
    });
    if let Some(why) = unfit {
        return format!("the recipe names it, but it cannot be quantized: {why}");
    }
    let near = names.iter().min_by_key(|(weight, _)| strsim::damerau_levenshtein(weight, &line.weight));
    let near = near.map(|(weight, node)| format!("; the nearest is {weight:?} at node {node:?}"));
    format!("the recipe names a layer that the model does not have{}", near.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_read_back_as_they_print() {
        let line = |weight: &str, choice: &str, kl| Line {
            weight: weight.into(),
            node: format!("/{weight}"),
            choice: serde_json::from_value(choice.into()).unwrap(),
            bytes: None,
            kl,
        };
        let recipe = Recipe {
            layers: vec![
                line("a \"b\"", "4/32/rtn", Some(1.25e-5)),
                line("c", "16", None),
                line("d", "float", None),
            ],
        };
        let text = recipe.text();
        assert_eq!(
            text,
            "{\"layers\": [\n  {\"weight\":\"a \\\"b\\\"\",\"node\":\"/a \\\"b\\\"\",\"choice\":\"4/32/rtn\",\"kl\":0.0000125},\n  \
             {\"weight\":\"c\",\"node\":\"/c\",\"choice\":\"16\"},\n  {\"weight\":\"d\",\"node\":\"/d\",\"choice\":\"float\"}\n]}\n"
        );
        assert_eq!(Recipe::parse(&text).unwrap(), recipe);
        assert_eq!(Recipe::parse(&Recipe::default().text()).unwrap(), Recipe::default());
    }

    #[test]
    fn what_is_no_recipe() {
        let line = |rest: &str| format!("{{\"layers\": [\n{{\"weight\": \"w\", \"node\": \"n\", {rest}}}]}}");
        for (text, why) in [
            (line("\"choice\": \"9/32\""), "expected 2 to 8, found 9"),
            (line("\"choice\": \"4/32/gtpq\""), "found \"gtpq\""),
            (line("\"choise\": \"4/32\""), "unknown field `choise`"),
            ("{\"layers\": ".into(), "EOF"),
            ("{}".into(), "missing field `layers`"),
        ] {
            let error = Recipe::parse(&text).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!(Recipe::parse(&line("\"choice\": \"5\"")).unwrap_err().contains("line 2"));
    }
}
