//! `const-fold`: evaluates what is known before the model runs.
//!
//! Two sources: ops whose operands are all constants, evaluated by their own definition; and small integer values
//! that inference followed to numbers (`Shape -> Gather -> Concat`, with symbolic dims elsewhere). Folding never
//! makes the model much larger: an `Expand` of a constant, or the `Transpose` of a weight that another op still reads,
//! stays. Quantized weights stay quantized: `quant.*` and the Quantize/DequantizeLinear ops are never folded.

use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::interp::Interpreter;
use dialects::ir::{
    ConstData, Dim, Elem, Module, Op, OpData, OpName, Region, Use, Uses, Value, ValueDef, infer,
};
use dialects::ops::Item;
use dialects::tensor::{Data, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConstFold {
    /// Bytes by which folding one op may make the model larger.
    pub max_growth: u64,
}

impl Default for ConstFold {
    fn default() -> Self {
        ConstFold { max_growth: 4096 }
    }
}

impl Pass for ConstFold {
    fn name(&self) -> &'static str {
        "const-fold"
    }

    fn summary(&self) -> &'static str {
        "evaluate ops on constants, and shape arithmetic whose result is known"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        // Contradictions are the verifier's to report; what is known is known.
        infer::infer(m, cx.ops);
        let exec = Interpreter::new(cx.ops.clone()).exact(true);
        let mut folded = 0;
        for region in m.live_regions() {
            let inside = m.functions.iter().any(|f| f.body == region);
            if !inside {
                folded += self.region(m, &exec, region);
            }
        }
        cx.count("const-fold.values", folded);
        if folded > 0 {
            crate::dce::sweep(m);
        }
        Ok(if folded > 0 { Changed::Yes } else { Changed::No })
    }
}

/// Values that became constants, by the value they replace. The graph is rewired once, at the end of a region.
type Folded = HashMap<Value, Value>;

impl ConstFold {
    fn region(&self, m: &mut Module, exec: &Interpreter, region: Region) -> u64 {
        let uses = m.uses();
        let results = m.live_regions().into_iter().flat_map(|r| m.regions[r].results.clone());
        let outputs: HashSet<Value> = results.collect();
        let mut folded = Folded::new();
        let mut gone = HashSet::new();
        for op in m.regions[region].ops.clone() {
            if !foldable(m, &outputs, op) {
                continue;
            }
            let known = known(m, op).or_else(|| self.evaluate(m, exec, &uses, &folded, op));
            let Some(tensors) = known else { continue };
            let results = m.ops[op].results.clone();
            let results = results.into_iter().zip(tensors).filter_map(|(v, t)| Some((v?, t)));
            for (old, data) in results {
                // The name moves to the constant: nothing else can want it, as the value is no graph output.
                let name = std::mem::replace(&mut m.values[old].name, "".into());
                let new = m.add_const(region, name, data);
                m.values[new].sym = m.values[old].sym.clone();
                m.values[old].def = ValueDef::Erased;
                folded.insert(old, new);
            }
            gone.insert(op);
        }
        m.regions[region].ops.retain(|op| !gone.contains(op));
        for operand in m.ops.values_mut().flat_map(|op| op.operands.iter_mut().flatten()) {
            *operand = *folded.get(operand).unwrap_or(operand);
        }
        folded.len() as u64
    }

    /// The results of an op whose operands are all constants.
    fn evaluate(
        &self,
        m: &Module,
        exec: &Interpreter,
        uses: &Uses,
        folded: &Folded,
        op: Op,
    ) -> Option<Vec<ConstData>> {
        let data = &m.ops[op];
        let konst = |v: Value| m.const_of(*folded.get(&v).unwrap_or(&v));
        let operands: Vec<_> = data.operands.iter().map(|v| v.map(|v| (v, konst(v)))).collect();
        if operands.iter().flatten().any(|(_, c)| c.is_none()) {
            return None;
        }
        // Constants that only this op reads go away with it.
        let sole = |v: Value| uses.of(v).iter().all(|u| matches!(u, Use::Operand(o, _) if *o == op));
        let freed: u64 = operands
            .iter()
            .flatten()
            .filter(|(v, _)| sole(*v))
            .filter_map(|(_, c)| Some(m.consts[(*c)?].byte_len()))
            .sum();
        let limit = freed + self.max_growth;
        // Sizes are asked of the types first, so that nothing large is made only to be thrown away.
        let mut bytes = 0u64;
        for v in data.results.iter().flatten() {
            let t = m.ty(*v).as_tensor()?;
            let count = t.known_shape()?.into_iter().try_fold(1u64, |n, d| n.checked_mul(d as u64))?;
            bytes = bytes.checked_add(t.elem.byte_len(count)?)?;
        }
        if bytes > limit {
            return None;
        }
        let inputs: Vec<Option<Item>> = operands
            .iter()
            .map(|o| match o {
                None => Some(None),
                Some((_, c)) => Some(Some(Tensor::from_const(&m.consts[(*c)?]).ok()?.into())),
            })
            .collect::<Option<_>>()?;
        let items = exec.evaluate(m, op, &inputs).ok()?;
        let items = items.iter().map(|i| Some(i.tensor().ok()?.to_const()));
        let tensors: Vec<ConstData> = items.collect::<Option<_>>()?;
        let wanted = data.results.iter().rposition(Option::is_some)? + 1;
        let found: u64 = tensors.iter().map(ConstData::byte_len).sum();
        (tensors.len() >= wanted && found <= limit).then_some(tensors)
    }
}

/// Whether folding is allowed at all: a plain op without nested graphs, or a call of a function that is made of such
/// ops, whose results are no graph outputs.
fn foldable(m: &Module, outputs: &HashSet<Value>, op: Op) -> bool {
    let results = m.ops[op].results.iter().flatten();
    !m.ops[op].is("onnx.Constant")
        && results.clone().next().is_some()
        && !results.clone().any(|v| outputs.contains(v))
        && plain(m, op, &mut HashSet::new())
}

/// `seen` holds what was looked at before: functions may call the same ones many times.
fn plain(m: &Module, op: Op, seen: &mut HashSet<Op>) -> bool {
    let data = &m.ops[op];
    if data.attrs.regions().next().is_some() {
        return false;
    }
    if !seen.insert(op) {
        return true;
    }
    if let Some(f) = m.functions.iter().find(|f| f.name == data.name) {
        return m.regions[f.body].ops.iter().all(|&op| plain(m, op, seen));
    }
    !is_quantization(&data.name) && !is_random(data)
}

/// Whether an op is not of ONNX proper, or one that takes part in quantization: its result is not computed early.
pub fn is_quantization(name: &OpName) -> bool {
    name.dialect() != "onnx"
        || name.op().ends_with("QuantizeLinear")
        || name.op().ends_with("DequantizeLinear")
}

/// Whether an op gives something else every time it runs.
pub fn is_random(data: &OpData) -> bool {
    data.name.op().starts_with("Random") || matches!(data.name.op(), "Bernoulli" | "Multinomial" | "Dropout")
}

/// The results of an op whose contents inference knows as numbers.
fn known(m: &Module, op: Op) -> Option<Vec<ConstData>> {
    let results = m.ops[op].results.iter();
    results
        .map(|v| {
            let v = &m.values[(*v)?];
            let ty = v.ty.as_tensor()?;
            let shape = ty.known_shape()?;
            let values: Vec<i64> = v.sym.as_ref()?.iter().map(Dim::known).collect::<Option<_>>()?;
            let data = match ty.elem {
                Elem::I64 => Data::I64(values),
                Elem::I32 => {
                    Data::I32(values.into_iter().map(|x| i32::try_from(x).ok()).collect::<Option<_>>()?)
                }
                _ => return None,
            };
            Some(Tensor::new(&shape, data).ok()?.to_const())
        })
        .collect()
}
