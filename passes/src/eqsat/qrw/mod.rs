//! Rewrites as text: `rewrite "name" LEFT => RIGHT if CONDITIONS`.
//!
//! The left side is a term of ops; a variable `?x` stands for any value, a number for a constant that holds it
//! throughout, `_` for an operand that is left out, `<A | B>` for one of several terms. The right side is a term equal to it wherever the conditions hold.
//! `docs/rules.md` describes the language. A rule is an equality over the reals, and [`check`](check::check) tries to
//! refute it before it is used. A rule matches as it is written, but that Add and Mul match in both operand orders.

mod build;
pub mod check;
mod expr;
mod instance;
mod matching;
#[cfg(test)]
mod mutants;
pub mod parse;
mod term;
#[cfg(test)]
mod tests;

use super::graph::{Graph, Id};
use super::lang::Node;
use super::rules::{Rule, short};
pub use check::Refused;
use std::sync::Arc;
pub use term::{RuleError, TextRule};

/// Rules that a user gave, each of which passed the check.
#[derive(Clone, Debug, Default)]
pub struct UserRules(pub Vec<Arc<TextRule>>);

impl UserRules {
    /// The hash of all that they say; `None` where there are none.
    pub fn content(&self) -> Option<[u8; 32]> {
        let mut hash = blake3::Hasher::new();
        for rule in &self.0 {
            hash.update(&(rule.text.len() as u64).to_le_bytes()).update(rule.text.as_bytes());
        }
        (!self.0.is_empty()).then(|| *hash.finalize().as_bytes())
    }
}

impl Rule for TextRule {
    fn name(&self) -> &str {
        &self.name
    }

    fn heads(&self) -> Vec<&str> {
        let mut heads: Vec<&str> = self.left.iter().map(|op| short(&op.name)).collect();
        heads.sort_unstable();
        heads.dedup();
        heads
    }

    fn apply(&self, g: &mut Graph, node: &Node) -> Vec<Id> {
        let mut out = Vec::new();
        for found in self.matches(g, node) {
            // A constant or an attribute that the right side needs may be none that can be written down.
            if let Ok(right) = build::term(&mut build::InGraph(g), self, &found) {
                out.push(right);
            }
        }
        out
    }
}
