//! `equalize`: cross-layer equalization (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
//! Correction", ICCV 2019, section 4.1).
//!
//! Where a value stands between weights, channel `i` of it can be scaled by `1 / s_i` in those that make it and by `s_i` in
//! those that read it. `s = sqrt(r1 / r2)`, of the largest magnitudes `r1` before and `r2` behind the channel, makes both
//! `sqrt(r1 r2)`: one scale then serves all channels better, of either weight. Where that is an equality the e-graph proves,
//! through whatever stands between: a Relu, a pool, heads of attention, the gate of an MLP. Weights between two such values
//! are rescaled twice, so that values are gone through again until little changes.

use crate::eqsat::{self, Channels};
use crate::linear::{self, Form, Linear, Weighted};
use crate::{Changed, Exactness, Pass, PassCx, PassError, report};
use dialects::ir::{Elem, Module, Op, OpBuilder, Use, Uses, Value, infer};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const NAME: &str = "equalize";

/// A sweep in which no channel is scaled by more than this, or its inverse, is the last.
const SETTLED: f32 = 1.01;

/// No channel is scaled by more than this, or its inverse, at once: what is nearly dead stays so.
const MOST: f32 = 1e3;

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Equalize {
    /// How often all values are gone through, at most.
    pub sweeps: u32,
}

impl Default for Equalize {
    fn default() -> Equalize {
        Equalize { sweeps: 8 }
    }
}

impl Pass for Equalize {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "scale channels between consecutive weights so that both have the same range"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        // Contradictions are the verifier's to report.
        infer::infer(m, cx.ops);
        let constants = m.consts.len();
        let count = joints(m).len();
        // By the place in the list of joints: folding keeps that, but not always the value.
        let mut open: Vec<usize> = (0..count).collect();
        let mut left: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let (mut most, mut sweeps) = (1f32, 0);
        while sweeps < self.sweeps && !open.is_empty() {
            sweeps += 1;
            let mut largest = 1f32;
            let mut kept = Vec::new();
            for i in open {
                let Some(joint) = joints(m).into_iter().nth(i) else { continue };
                match joint.scale(m, cx) {
                    Ok(scale) => {
                        let by = scale.iter().fold(1f32, |most, s| most.max(*s).max(1.0 / s));
                        if by > SETTLED {
                            joint.apply(m, cx, &scale)?;
                            eqsat::settle(m, cx, NAME, constants)?;
                        }
                        largest = largest.max(by);
                        kept.push(i);
                    }
                    Err(why) => left.entry(why).or_default().push(m.value_label(joint.x)),
                }
            }
            open = kept;
            most = most.max(largest);
            if largest <= SETTLED {
                break;
            }
        }
        cx.count("equalize.values", open.len() as u64);
        cx.report.note(format!(
            "equalize: {} of {count} values that weights multiply stand between weights; channels are scaled by up to \
             {most:.2} at once, in {sweeps} sweeps",
            open.len()
        ));
        for (why, values) in left {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            cx.report.note(format!("equalize: {}: {why}", report::listed(&values)));
        }
        Ok(if most > SETTLED { Changed::Yes } else { Changed::No })
    }
}

/// A value that weights multiply, and how.
struct Joint {
    x: Value,
    along: Channels,
    readers: Vec<Op>,
}

/// The values of the top region that weights multiply, in program order of the first that does.
fn joints(m: &Module) -> Vec<Joint> {
    let mut out: Vec<Joint> = Vec::new();
    for weighted in linear::find(m) {
        let (Weighted::Linear(l) | Weighted::Kernel(l)) = weighted else { continue };
        let Some(along) = channels(m, &l) else { continue };
        match out.iter_mut().find(|j| j.x == l.x && j.along == along) {
            Some(j) => j.readers.push(l.op),
            None => out.push(Joint { x: l.x, along, readers: vec![l.op] }),
        }
    }
    out
}

/// The channels of what a weight multiplies, where a scale can go into the weight.
fn channels(m: &Module, l: &Linear) -> Option<Channels> {
    let data = &m.ops[l.op];
    match l.form {
        _ if data.region != m.top => None,
        Form::Rows => Some(Channels::Last),
        Form::Kernel if data.is("onnx.Conv") => Some(Channels::Second),
        Form::Columns | Form::Kernel => None,
    }
}

impl Joint {
    /// `sqrt(r1 / r2)` of each channel; 1 for one that is dead on either side.
    fn scale(&self, m: &Module, cx: &PassCx) -> Result<Vec<f32>, String> {
        let found = eqsat::between(m, cx.ops, self.x, self.along, &self.readers)?;
        let uses = m.uses();
        if let Some(shared) = found.weights.iter().find(|w| !read_once(m, &uses, **w)) {
            return Err(format!("{:?} has other readers", m.value_label(*shared)));
        }
        let of = |(r1, r2): (&f32, &f32)| {
            let s = (r1 / r2).sqrt();
            if s.is_finite() && s > 0.0 { s.clamp(1.0 / MOST, MOST) } else { 1.0 }
        };
        let by_class: Vec<f32> = found.before.iter().zip(&found.behind).map(of).collect();
        Ok(found.classes.iter().map(|&c| by_class[c as usize]).collect())
    }

    /// Divides the channels upstream and multiplies them in what reads them.
    fn apply(&self, m: &mut Module, cx: &mut PassCx, scale: &[f32]) -> Result<(), PassError> {
        let product = self.multiply(m, &self.readers, scale)?;
        let at = |m: &Module, why| PassError::At { pass: NAME, what: m.value_label(self.x), why };
        let outcome = eqsat::fold_into_readers(m, cx.ops, product).map_err(|why| at(m, why))?;
        if !outcome.absorbed || m.def_op(product).is_some() {
            return Err(at(m, "this is a bug in the pass: the readers did not take the scale".into()));
        }
        let readers: Vec<Op> = m.uses().of(self.x).iter().filter_map(op_of).collect();
        let inverse: Vec<f32> = scale.iter().map(|s| 1.0 / s).collect();
        let product = self.multiply(m, &readers, &inverse)?;
        let (mul, _) = m.def_op(product).expect("it was just made");
        eqsat::fold(m, cx, mul, NAME)
    }

    /// Puts `x * scale` in the place of `x` for `readers`, and returns it.
    fn multiply(&self, m: &mut Module, readers: &[Op], scale: &[f32]) -> Result<Value, PassError> {
        let at = |m: &Module, why| PassError::At { pass: NAME, what: m.value_label(self.x), why };
        let ty = m.ty(self.x).clone();
        let (count, behind) = self.along.of(&ty).ok_or_else(|| at(m, "it has no channels".into()))?;
        let mut dims = vec![1; behind + 1];
        dims[0] = count;
        let elem = ty.elem().unwrap_or(Elem::F32);
        let factor =
            Tensor::from_f32(elem, &dims, scale.to_vec()).map_err(|e| at(m, e.to_string()))?.to_const();
        let order = &m.regions[m.top].ops;
        let first = order.iter().copied().find(|op| readers.contains(op));
        let first = first.ok_or_else(|| at(m, "nothing reads it".into()))?;
        let name = m.fresh_name(&format!("{}.equalize", m.value_label(self.x)));
        let factor = m.add_const(m.top, name, factor);
        let loc = m.ops[first].loc.clone();
        let mul = OpBuilder::new("onnx.Mul", &loc).operands([self.x, factor]).result(ty);
        let mul = m.insert_before(first, mul);
        let product = m.ops[mul].result(0).expect("a Mul has a result");
        for op in readers {
            for operand in m.ops[*op].operands.iter_mut().filter(|v| **v == Some(self.x)) {
                *operand = Some(product);
            }
        }
        Ok(product)
    }
}

/// Whether one op alone reads a constant, through ops that one op alone reads. Another reader would need a copy.
fn read_once(m: &Module, uses: &Uses, v: Value) -> bool {
    let konst = m.const_of(v);
    let twins =
        m.values.keys().filter(|o| konst.is_some() && m.const_of(*o) == konst && !uses.of(*o).is_empty());
    if konst.is_some() && twins.count() > 1 {
        return false;
    }
    match uses.of(v) {
        [one] => {
            // A view of it: an op that reads nothing else but constants.
            let constant = |o: &Value| *o == v || m.const_of(*o).is_some();
            let view = op_of(one).filter(|op| m.ops[*op].operands.iter().flatten().all(constant));
            view.and_then(|op| m.ops[op].result(0)).is_none_or(|viewed| read_once(m, uses, viewed))
        }
        _ => false,
    }
}

fn op_of(u: &Use) -> Option<Op> {
    match u {
        Use::Operand(op, _) => Some(*op),
        Use::Result(..) => None,
    }
}
