//! `add-kv-cache`: a causal language model that reads its whole sequence becomes one that reads new positions only, and
//! keeps the keys and values of those before.
//!
//! For the `N`-th attention there are inputs `past_key_values.N.key` and `.value`, floats `[batch, heads, past,
//! size]`, and outputs `present.N.key` and `.value`, the same with the new positions behind (the names of optimum and
//! of ONNX Runtime GenAI). Heads are those before they are repeated for grouped queries; keys are kept as rotary
//! embedding leaves them. Tokens (and `position_ids`) are given for the new positions, `attention_mask` for past and
//! new ones. With an empty past the model computes what it did.
//!
//! Nothing is recognized by name. Lengths of axes are found by inference at several sizes ([`sizes`]); from the outputs
//! back, it is followed along which axes the new positions are wanted and along which all ([`rules`], [`plan`]).
//! What does not depend on the tokens (masks, positions, tables) is computed for the whole length, and cut where rows
//! are wanted. Then it is run at small lengths ([`causal`]): the masks must keep every position from later ones, and what
//! is read of a longer sequence must be what a shorter one has there. A model that is not causal, or one whose positions
//! depend on the whole length, is refused, since a cache would change what it computes.

mod build;
mod causal;
mod plan;
mod rules;
mod sizes;

use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::{Dim, Elem, Module, Value, infer};
use plan::{Planner, Stuck};
use serde::{Deserialize, Serialize};
use sizes::Sizes;
use std::collections::HashSet;

const NAME: &str = "add-kv-cache";

/// The version of ONNX that has a Shape of some axes.
const OPSET: i64 = 15;

/// The pass; it has no options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AddKvCache {}

impl Pass for AddKvCache {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "give a causal language model inputs and outputs for past keys and values"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let fail = |s: Stuck| PassError::At { pass: NAME, what: s.what, why: s.why };
        let nothing = |why: &str| match cx.settings.allow_noop {
            true => Ok(Changed::No),
            false => Err(PassError::Nothing { pass: NAME, why: why.into() }),
        };
        let tokens = tokens(m);
        if tokens.is_empty() {
            return nothing(
                "expected an input of token ids that look up an embedding, or of embeddings, found none",
            );
        }
        let inputs = inputs(m).map_err(fail)?;
        if m.opset("onnx") < OPSET {
            let why = format!("expected operators of version {OPSET} or newer, found {}", m.opset("onnx"));
            return Err(fail(Stuck { what: "opset".into(), why }));
        }
        infer::infer(m, cx.ops);
        let sizes = Sizes::probe(m, cx.ops, &inputs);
        // An input is given for the new positions where that works out, and else for all: an attention mask.
        let others: Vec<Value> = inputs.iter().copied().filter(|v| !tokens.contains(v)).collect();
        let mut last = None;
        for whole in 0..1u32 << others.len().min(4) {
            let given_new =
                |v: &Value| others.iter().position(|o| o == v).is_none_or(|i| whole >> i.min(31) & 1 == 0);
            let rows: Vec<Value> = inputs.iter().copied().filter(given_new).collect();
            let mut rows: Vec<Value> = tokens.iter().copied().chain(rows).collect();
            let mut seen = HashSet::new();
            rows.retain(|v| seen.insert(*v));
            let (main, varies) = plan::dependence(m, &inputs, &rows.iter().copied().collect());
            let found = match Planner::new(m, &sizes, &main, &varies).run() {
                Ok(plan) => plan,
                Err(stuck) => {
                    last = Some(stuck);
                    continue;
                }
            };
            if found.layers.is_empty() {
                return nothing("expected attention, found none");
            }
            let mut new = m.clone();
            let found =
                build::Found { sizes: &sizes, main: &main, varies: &varies, rows: &rows, plan: &found };
            let built = build::build(&mut new, &found);
            infer::infer(&mut new, cx.ops);
            causal::check(m, &main, &sizes, found.plan, &new, &built, cx.ops).map_err(fail)?;
            let layers = found.plan.layers.len();
            cx.count("attentions with a cache", layers as u64);
            let whole = inputs.iter().filter(|v| !rows.contains(v)).map(|&v| new.value_label(v));
            let whole: Vec<String> =
                whole.map(|v| format!("; {v} is given for past and new positions")).collect();
            cx.report
                .note(format!("{NAME}: keys and values of {layers} attentions are kept{}", whole.concat()));
            crate::dce::sweep(&mut new);
            *m = new;
            return Ok(Changed::Yes);
        }
        Err(fail(last.expect("at least one choice was tried")))
    }
}

/// Whether an input of the model holds past keys or values: it has a cache already.
pub fn has_cache(m: &Module) -> bool {
    free(m).any(|v| is_cache(m, v))
}

fn free(m: &Module) -> impl Iterator<Item = Value> + '_ {
    m.regions[m.top].args.iter().copied().filter(|&v| m.const_of(v).is_none())
}

fn is_cache(m: &Module, v: Value) -> bool {
    m.ty(v).dims().is_some_and(|d| d.len() >= 4)
}

/// The inputs, each of which must be `[batch, sequence, ...]`.
fn inputs(m: &Module) -> Result<Vec<Value>, Stuck> {
    let inputs: Vec<Value> = free(m).collect();
    for &v in &inputs {
        let stuck = |why: String| Err(Stuck { what: m.value_label(v), why });
        let open = |d: &Dim| d.known().is_none();
        match m.ty(v).dims() {
            _ if is_cache(m, v) => {
                return stuck(format!("the model has a cache already: an input {}", m.ty(v)));
            }
            Some([_, s]) if open(s) => {}
            Some([_, s, Dim::Known(_)]) if open(s) && m.ty(v).elem().is_some_and(Elem::is_float) => {}
            _ => {
                return stuck(format!(
                    "expected an input [batch, sequence] with a sequence of any length, found {}",
                    m.ty(v)
                ));
            }
        }
    }
    Ok(inputs)
}

/// Inputs that look up a table, or are what tables give, `[batch, sequence, size]`: they stand for tokens.
fn tokens(m: &Module) -> Vec<Value> {
    let looks_up = |v: Value| {
        let mut same = HashSet::from([v]);
        m.regions[m.top].ops.iter().map(|&op| &m.ops[op]).any(|data| {
            let gather = data.is("onnx.Gather") || data.is("com.microsoft.GatherBlockQuantized");
            if gather && data.operand(1).is_some_and(|i| same.contains(&i)) {
                return data.operand(0).is_some_and(|t| m.ty(t).dims().is_some_and(|d| d.len() == 2));
            }
            let view = rules::RESHAPES.contains(&data.name.as_str())
                || data.is("onnx.Cast")
                || data.is("onnx.Identity");
            if view && data.operand(0).is_some_and(|x| same.contains(&x)) {
                same.extend(data.results.iter().flatten());
            }
            false
        })
    };
    let embedded = |v: Value| {
        let float = m.ty(v).elem().is_some_and(Elem::is_float);
        float && matches!(m.ty(v).dims(), Some([_, s, Dim::Known(_)]) if s.known().is_none())
    };
    free(m).filter(|&v| embedded(v) || looks_up(v)).collect()
}
