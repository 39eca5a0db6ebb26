//! Calibration data on its way through a model. What later ops read is kept beside the output's disk, so that a pass that
//! quantizes layer after layer runs each op once, and holds no activations in memory.

use crate::data::lm::inputs_of;
use crate::env::DriverEnv;
use crate::files;
use bytes::Bytes;
use dialects::exec::{ExecError, Executor, Prepared};
use dialects::ir::interp::Interpreter;
use dialects::ir::{ConstData, Elem, Module, Value, graph};
use dialects::ops::Item;
use dialects::tensor::Tensor;
use passes::{CalibSink, Leg, PassError, Stream};
use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

/// Tensors up to this many bytes stay in memory.
const IN_MEMORY: u64 = 1 << 16;

/// A value of one batch.
enum Kept {
    Item(Item),
    Spilled(ConstData),
}

/// The data, standing somewhere in the model.
pub struct DataStream<'e> {
    env: &'e DriverEnv,
    exec: Interpreter,
    /// Values that are there, beside the inputs.
    live: BTreeSet<Value>,
    /// For each batch those values.
    kept: Vec<Vec<(Value, Kept)>>,
}

impl<'e> DataStream<'e> {
    /// The data before the first op.
    pub fn new(env: &'e DriverEnv) -> Result<DataStream<'e>, PassError> {
        let batches = env.data()?.batches().len();
        let kept = (0..batches).map(|_| Vec::new()).collect();
        Ok(DataStream { env, exec: Interpreter::new(env.ops.clone()), live: BTreeSet::new(), kept })
    }
}

impl Stream for DataStream<'_> {
    fn advance<'s>(
        &'s mut self,
        m: &'s Module,
        to: &[Value],
        peek: &[Value],
    ) -> Result<Box<dyn Leg + 's>, PassError> {
        let there = reached(m, &self.live, to);
        let next = frontier(m, &there);
        let given: Vec<Value> = self.live.iter().copied().collect();
        let told: HashSet<Value> = to.iter().chain(peek).copied().collect();
        let wanted: Vec<Value> = told.iter().chain(&next).copied().collect();
        let DataStream { env, exec, live, kept } = self;
        let prepared = exec.prepare_from(m, &given, &wanted)?;
        Ok(Box::new(DataLeg { m, env, prepared, told, live, next, kept, batch: 0 }))
    }
}

/// A run of all batches from where the stream stood.
struct DataLeg<'s> {
    m: &'s Module,
    env: &'s DriverEnv,
    prepared: Box<dyn Prepared + 's>,
    /// Values that the caller is told.
    told: HashSet<Value>,
    live: &'s mut BTreeSet<Value>,
    next: BTreeSet<Value>,
    kept: &'s mut Vec<Vec<(Value, Kept)>>,
    batch: usize,
}

impl Leg for DataLeg<'_> {
    fn step(&mut self, sink: &mut CalibSink) -> Result<bool, PassError> {
        let Some(kept) = self.kept.get_mut(self.batch) else {
            self.live.clone_from(&self.next);
            return Ok(false);
        };
        let batch = self.env.data()?.batch(self.batch, usize::MAX);
        let mut given = inputs_of(self.m, batch.map_err(|e| PassError::Env(e.message))?);
        for (v, item) in kept.drain(..) {
            given.push((v, item.restore()?));
        }
        let scratch = &self.env.scratch;
        let (next, told) = (&self.next, &self.told);
        self.prepared.run(&given, &mut |v, item| {
            if next.contains(&v) {
                kept.push((v, Kept::of(item, scratch).map_err(ExecError::Sink)?));
            }
            if told.contains(&v) { sink(v, item) } else { Ok(()) }
        })?;
        self.batch += 1;
        Ok(true)
    }
}

impl Kept {
    fn of(item: &Item, folder: &Path) -> Result<Kept, String> {
        let Ok(tensor) = item.tensor() else { return Ok(Kept::Item(item.clone())) };
        let konst = tensor.to_const();
        if konst.byte_len() <= IN_MEMORY || konst.elem == Elem::String {
            return Ok(Kept::Item(item.clone()));
        }
        let bytes = konst.read().map_err(|e| e.to_string())?;
        let mut map = files::scratch(folder, bytes.len()).map_err(|e| e.to_string())?;
        map.copy_from_slice(&bytes);
        let source = Arc::new(Bytes::from_owner(map));
        ConstData::new(konst.elem, konst.dims.clone(), source).map(Kept::Spilled).map_err(|e| e.to_string())
    }

    fn restore(self) -> Result<Item, PassError> {
        match self {
            Kept::Item(item) => Ok(item),
            Kept::Spilled(konst) => {
                let tensor = Tensor::from_const(&konst);
                Ok(tensor.map_err(|e| PassError::Env(format!("a kept activation: {e}")))?.into())
            }
        }
    }
}

/// All values of the top region that are there once `to` are computed from `live` and the inputs.
fn reached(m: &Module, live: &BTreeSet<Value>, to: &[Value]) -> HashSet<Value> {
    let mut there: HashSet<Value> = live.iter().copied().collect();
    let mut open: Vec<Value> = to.to_vec();
    while let Some(v) = open.pop() {
        let Some((op, _)) = m.def_op(v).filter(|_| !there.contains(&v)) else { continue };
        there.extend(m.ops[op].results.iter().copied().flatten());
        open.extend(graph::reads(m, op));
    }
    there
}

/// Those of `there` that the rest of the model reads; constants are read anew.
fn frontier(m: &Module, there: &HashSet<Value>) -> BTreeSet<Value> {
    let (mut out, mut seen) = (BTreeSet::new(), HashSet::new());
    let mut open: Vec<Value> = m.regions[m.top].results.clone();
    while let Some(v) = open.pop() {
        if !seen.insert(v) || m.const_of(v).is_some() {
            continue;
        }
        if there.contains(&v) {
            out.insert(v);
        } else if let Some((op, _)) = m.def_op(v) {
            open.extend(graph::reads(m, op));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::{Calibration, Options};
    use crate::term::Term;
    use crate::{driver, registry};
    use passes::Env;
    use std::collections::HashMap;

    fn tinylm() -> (Module, DriverEnv) {
        let registry = registry();
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/models/tinylm.onnx"));
        let term = Term::new(true);
        let m = driver::read(path, &registry, &term).unwrap();
        let options = Options {
            calib: Some("random".into()),
            calib_samples: Some(5),
            seq_len: Some(12),
            ..Options::default()
        };
        let calibration = Calibration::open(&options, &m, registry.ops(), &term).unwrap();
        let env =
            DriverEnv { calibration: Some(calibration), ..DriverEnv::without_data(registry.ops(), term) };
        (m, env)
    }

    type Found = HashMap<Value, Vec<Item>>;

    fn lead(stream: &mut DataStream, m: &Module, to: &[Value], peek: &[Value], found: &mut Found) {
        let mut leg = stream.advance(m, to, peek).unwrap();
        let mut sink = |v, item: &Item| {
            found.entry(v).or_default().push(item.clone());
            Ok(())
        };
        while leg.step(&mut sink).unwrap() {}
    }

    fn same(a: &Found, b: &Found, v: Value) -> bool {
        let floats = |f: &Found| -> Vec<Vec<f32>> {
            f[&v].iter().map(|i| i.tensor().unwrap().to_f32().unwrap().into_owned()).collect()
        };
        floats(a) == floats(b)
    }

    #[test]
    fn leg_by_leg_gives_what_one_run_gives() {
        let (m, env) = tinylm();
        let mut xs: Vec<Value> = passes::linear::linears(&m).iter().map(|l| l.x).collect();
        xs.dedup();
        let mut want = Found::new();
        env.calibrate(&m, &xs, &mut |v, item| {
            want.entry(v).or_default().push(item.clone());
            Ok(())
        })
        .unwrap();
        let mut stream = DataStream::new(&env).unwrap();
        let mut got = Found::new();
        for &x in &xs {
            lead(&mut stream, &m, &[x], &[], &mut got);
            // What is kept is what the rest of the model reads, not all that was ever computed.
            let (kept, all) = (stream.live.len(), m.values.len());
            assert!(stream.live.contains(&x) && kept * 10 < all, "{kept} of {all} values are kept");
        }
        assert_eq!(got.len(), xs.len());
        assert!(xs.iter().all(|&x| same(&got, &want, x)));
    }

    #[test]
    fn what_is_peeked_at_is_computed_again() {
        let (mut m, env) = tinylm();
        let linear = passes::linear::linears(&m)[0].clone();
        let y = m.ops[linear.op].result(0).unwrap();
        let mut stream = DataStream::new(&env).unwrap();
        let (mut first, mut then) = (Found::new(), Found::new());
        lead(&mut stream, &m, &[linear.x], &[y], &mut first);
        assert_eq!(first.len(), 2);
        // Another weight, and the outputs are those of that one.
        let other = passes::linear::linears(&m).into_iter().find(|l| {
            l.op != linear.op && (l.n, l.k, l.operand_is_nk) == (linear.n, linear.k, linear.operand_is_nk)
        });
        m.ops[linear.op].operands[linear.operand_index] = Some(other.unwrap().operand);
        lead(&mut stream, &m, &[y], &[], &mut then);
        assert!(!same(&first, &then, y));
        let mut want = Found::new();
        env.calibrate(&m, &[y], &mut |v, item| {
            want.entry(v).or_default().push(item.clone());
            Ok(())
        })
        .unwrap();
        assert!(same(&then, &want, y));
    }
}
