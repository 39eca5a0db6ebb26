//! `dce`: removes ops whose results nobody uses, and constants that nobody reads.
//!
//! Inputs and outputs of every graph stay, and so does a constant that stands among a graph's inputs: they are the
//! model's contract. ONNX ops have no side effects, so an op without a used result computes nothing.

use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::{ConstId, Module, Value, ValueDef, graph};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashSet};

/// The pass; it has no options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dce {}

impl Pass for Dce {
    fn name(&self) -> &'static str {
        "dce"
    }

    fn summary(&self) -> &'static str {
        "remove ops and constants that nothing uses"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let (ops, consts) = sweep(m);
        cx.count("dce.ops", ops);
        cx.count("dce.constants", consts);
        Ok(if ops + consts > 0 { Changed::Yes } else { Changed::No })
    }
}

/// Removes what is dead; returns how many ops and constants that was.
pub fn sweep(m: &mut Module) -> (u64, u64) {
    let mut used: HashSet<Value> = HashSet::new();
    let mut dead = 0;
    // Outer regions first: a dead op takes its nested graphs with it. Within a region from the end, so that a
    // chain of dead ops goes at once.
    let mut regions = vec![m.top];
    regions.extend(m.functions.iter().map(|f| f.body));
    let mut i = 0;
    while i < regions.len() {
        let region = regions[i];
        i += 1;
        used.extend(m.regions[region].results.iter().copied());
        let ops = std::mem::take(&mut m.regions[region].ops);
        let mut live = Vec::with_capacity(ops.len());
        for op in ops.into_iter().rev() {
            let results: Vec<Value> = m.ops[op].results.iter().copied().flatten().collect();
            if !results.is_empty() && results.iter().all(|v| !used.contains(v)) {
                for v in results {
                    m.values[v].def = ValueDef::Erased;
                }
                dead += 1;
                continue;
            }
            used.extend(graph::reads(m, op));
            regions.extend(m.ops[op].attrs.regions());
            live.push(op);
        }
        live.reverse();
        m.regions[region].ops = live;
    }
    let mut unread = 0;
    for region in regions {
        let data = &mut m.regions[region];
        let before = data.consts.len();
        let args = &data.args;
        data.consts.retain(|v| used.contains(v) || args.contains(v));
        unread += before - data.consts.len();
    }
    (dead, unread as u64)
}

/// Every constant that `m` holds, each once: initializers, and tensors in attributes.
pub fn constants(m: &Module) -> BTreeSet<ConstId> {
    let regions = m.live_regions();
    let initializers = regions.iter().flat_map(|&r| &m.regions[r].consts).filter_map(|&v| m.const_of(v));
    initializers.chain(m.live_ops().into_iter().flat_map(|op| m.ops[op].attrs.consts())).collect()
}

/// The bytes of all constants that `m` holds, as a file holds them.
pub fn bytes(m: &Module) -> u64 {
    constants(m).into_iter().map(|id| m.consts[id].byte_len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::{Elem, OpBuilder, Type};
    use dialects::tensor::Tensor;

    #[test]
    fn a_dead_chain_goes_and_the_contract_stays() {
        let mut m = Module::default();
        let top = m.top;
        let f32s = |n| Type::of_shape(Elem::F32, &[n]);
        let konst = |m: &mut Module, name: &str| {
            m.add_const(top, name, Tensor::new(&[2], vec![1f32, 2.0]).unwrap().to_const())
        };
        let x = m.add_arg(top, "x", f32s(2));
        let unused = m.add_arg(top, "unused", f32s(2));
        let (a, b, default) = (konst(&mut m, "a"), konst(&mut m, "b"), konst(&mut m, "default"));
        m.regions[top].args.push(default);
        let op = |m: &mut Module, x: Value, y: Value| {
            let op = m.push(top, OpBuilder::new("onnx.Add", &"n".into()).operands([x, y]).result(f32s(2)));
            m.ops[op].result(0).unwrap()
        };
        let y = op(&mut m, x, a);
        let d = op(&mut m, y, b);
        op(&mut m, d, d);
        m.regions[top].results.push(y);

        assert_eq!(sweep(&mut m), (2, 1));
        assert_eq!(m.regions[top].ops.len(), 1);
        assert_eq!(m.regions[top].args, [x, unused, default]);
        assert_eq!(m.regions[top].consts, [a, default]);
        assert_eq!(m.values[d].def, ValueDef::Erased);
        assert_eq!(sweep(&mut m), (0, 0));
    }

    #[test]
    fn what_a_nested_graph_reads_is_live() {
        let mut m = Module::default();
        let top = m.top;
        let f32s = || Type::of_shape(Elem::F32, &[2]);
        let x = m.add_arg(top, "x", f32s());
        let cond = m.add_arg(top, "cond", Type::of_shape(Elem::Bool, &[]));
        let neg = m.push(top, OpBuilder::new("onnx.Neg", &"neg".into()).operands([x]).result(f32s()));
        let neg = m.ops[neg].result(0).unwrap();
        let branch = |m: &mut Module| {
            let r = m.add_region(None);
            let op = m.push(r, OpBuilder::new("onnx.Abs", &"abs".into()).operands([neg]).result(f32s()));
            let v = m.ops[op].result(0).unwrap();
            m.regions[r].results.push(v);
            r
        };
        let (a, b) = (branch(&mut m), branch(&mut m));
        let mut build = OpBuilder::new("onnx.If", &"if".into()).operands([cond]).result(f32s());
        build = build.attrs(
            [("then_branch", dialects::ir::Attr::Graph(a)), ("else_branch", dialects::ir::Attr::Graph(b))]
                .into_iter()
                .collect(),
        );
        let op = m.push(top, build);
        let out = m.ops[op].result(0).unwrap();
        m.regions[top].results.push(out);
        assert_eq!(sweep(&mut m), (0, 0));
    }
}
