//! A model of which every weight is quantized, and of which each weight can be switched back to float: what measuring
//! the sensitivity of single layers needs.
//!
//! Passes run once, on all weights. A weight is switched by putting one or the other value into the operands that read
//! it: both stay in the module. A pass that scales weights before it rounds them (`awq`) says so through
//! [`Env::quantized`], and the float weight is then the scaled one, since the model around it was scaled too.

use crate::linear::{Weighted, find};
use crate::qtensor::QTensor;
use crate::quantize::{float, matrix};
use crate::trial::Trial;
use crate::{Env, Pass, PassCx, PassError, Report, WeightReport, dce};
use bytes::Bytes;
use dialects::ir::infer::infer;
use dialects::ir::{ConstData, ConstError, ConstId, Module, Op, Use, Value};
use dialects::tensor::Tensor;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

/// The model and its switches.
pub struct Variant {
    m: Module,
    switches: Vec<Vec<Operand>>,
    weights: Vec<WeightReport>,
}

/// An operand that reads a weight.
#[derive(Clone, Copy, Debug)]
struct Operand {
    op: Op,
    index: usize,
    float: Value,
    quantized: Value,
}

/// The error of a pass that quantizes nothing that can be switched.
const NAME: &str = "sensitivity";

impl Variant {
    /// Quantizes every weight of `m` by `pass`. What the pass reports goes into the variant; what it leaves and warns of
    /// goes into `cx` as always.
    pub fn new(m: &Module, cx: &mut PassCx, pass: &dyn Pass) -> Result<Variant, PassError> {
        Variant::of(m, cx, &[pass])
    }

    /// The same by several passes, each after the other, such as `rtn,rtn{bits=8}`.
    pub fn of(m: &Module, cx: &mut PassCx, passes: &[&dyn Pass]) -> Result<Variant, PassError> {
        let mut out = m.clone();
        // A weight that may be given as an input too would be swept away with it.
        let (top, consts) = (out.top, out.regions[out.top].args.clone());
        let given: Vec<Value> = consts.into_iter().filter(|&v| out.const_of(v).is_some()).collect();
        out.regions[top].args.retain(|v| !given.contains(v));
        let unscaled = hashes(m)?;
        let known: HashSet<[u8; 32]> = unscaled.values().copied().collect();
        let found = Mutex::new(Vec::new());
        let seen = |value: Value, weight: &dyn Fn() -> Result<Tensor, PassError>| {
            let float = Float::of(weight()?, &known, cx.env)?;
            found.lock().unwrap_or_else(PoisonError::into_inner).push((value, float));
            Ok(())
        };
        let env = Trial::new(cx.env).watched(&seen).resuming();
        let mut report = Report::default();
        for pass in passes {
            let mut cx =
                PassCx { ops: cx.ops, env: &env, settings: cx.settings, report: &mut report, rest: &[] };
            pass.run(&mut out, &mut cx)?;
            infer(&mut out, cx.ops);
        }
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.warnings.drain(..).for_each(|w| cx.report.warn(w));
        for l in report.left.drain(..) {
            cx.report.left.retain(|o| (&o.node, &o.op) != (&l.node, &l.op));
            cx.report.left.push(l);
        }
        Variant::switches(out, m, &unscaled, found, report.weights)
    }

    fn switches(
        mut m: Module,
        before: &Module,
        unscaled: &HashMap<(Op, usize), [u8; 32]>,
        found: Vec<(Value, Float)>,
        weights: Vec<WeightReport>,
    ) -> Result<Variant, PassError> {
        let uses = m.uses();
        let live: HashSet<Op> = before.live_ops().into_iter().collect();
        let mut out: Vec<Option<Vec<Operand>>> = vec![None; weights.len()];
        for (value, float) in found {
            let what = m.value_label(value);
            let bug = |why: &str| PassError::At {
                pass: NAME,
                what: what.clone(),
                why: format!("this is a bug: {why}"),
            };
            // A weight that is only stored in fewer bits has no codes; its readers alone tell which it is.
            let label = QTensor::of(&m, value).map(|(_, placed)| placed.label);
            // A kernel is read through a Reshape of the codes' matrix.
            let mut quantized = value;
            while let [Use::Operand(op, 0)] = *uses.of(quantized)
                && !live.contains(&op)
                && m.ops[op].is("onnx.Reshape")
            {
                quantized = m.ops[op].result(0).ok_or_else(|| bug("a Reshape has no result"))?;
            }
            let readers: Vec<(Op, usize)> = uses
                .of(quantized)
                .iter()
                .filter_map(|u| match *u {
                    Use::Operand(op, index) => Some((op, index)),
                    Use::Result(..) => None,
                })
                .collect();
            let entry = |w: &WeightReport| {
                label.as_ref().is_none_or(|l| w.weight == *l)
                    && readers.iter().any(|r| *m.ops[r.0].loc == *w.node)
            };
            let Some(at) = weights.iter().position(entry) else { return Err(bug("no pass reported it")) };
            let (hash, made) = match float {
                Float::Unscaled(hash) => (Some(hash), None),
                Float::Scaled(weight) => (None, Some(scaled(&mut m, quantized, weight)?)),
            };
            let operand = |(op, index): (Op, usize)| {
                let known = hash.is_some() && unscaled.get(&(op, index)).copied() == hash;
                let original = || before.ops.get(op)?.operand(index).filter(|_| known);
                let float = made
                    .or_else(original)
                    .ok_or_else(|| bug("the op that reads it is not the one that did"))?;
                Ok(Operand { op, index, float, quantized })
            };
            let operands: Vec<Operand> =
                readers.into_iter().map(operand).collect::<Result<_, PassError>>()?;
            out[at].get_or_insert_default().extend(operands);
        }
        let (switches, weights): (Vec<_>, Vec<_>) =
            out.into_iter().zip(weights).filter_map(|(s, w)| Some((s?, w))).unzip();
        if weights.is_empty() {
            let why = "no weight that a pass quantized can be switched back to float".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        Ok(Variant { m, switches, weights })
    }

    /// The weights that can be switched, in program order. `bytes_after` is as the passes left it until
    /// [`Variant::pack`] says what will be written.
    pub fn weights(&self) -> &[WeightReport] {
        &self.weights
    }

    /// The model with weight `i` alone quantized.
    pub fn only(&mut self, i: usize) -> &Module {
        self.set(|w| w == i)
    }

    /// The model with all weights quantized but `i`.
    pub fn all_but(&mut self, i: usize) -> &Module {
        self.set(|w| w != i)
    }

    /// The model with all weights quantized.
    pub fn all(&mut self) -> &Module {
        self.set(|_| true)
    }

    /// The model with the weights quantized for which `quantized` holds.
    pub fn set(&mut self, quantized: impl Fn(usize) -> bool) -> &Module {
        for (i, operands) in self.switches.iter().enumerate() {
            for o in operands {
                let value = if quantized(i) { o.quantized } else { o.float };
                self.m.ops[o.op].operands[o.index] = Some(value);
            }
        }
        &self.m
    }

    /// The model in the form that `packers` write, with the weights quantized for which `quantized` holds. Their
    /// `bytes_after` is then what their parts take in that form.
    pub fn pack(
        &mut self,
        cx: &mut PassCx,
        packers: &[&dyn Pass],
        quantized: impl Fn(usize) -> bool,
    ) -> Result<Module, PassError> {
        let mut packed = self.set(&quantized).clone();
        dce::sweep(&mut packed);
        let weights = (0..self.weights.len()).filter(|&i| quantized(i)).map(|i| self.weights[i].clone());
        let mut report = Report { weights: weights.collect(), ..Report::default() };
        for packer in packers {
            let mut cx =
                PassCx { ops: cx.ops, env: cx.env, settings: cx.settings, report: &mut report, rest: &[] };
            packer.run(&mut packed, &mut cx)?;
        }
        dce::sweep(&mut packed);
        report.warnings.into_iter().for_each(|w| cx.report.warn(w));
        for (i, weight) in (0..self.weights.len()).filter(|&i| quantized(i)).zip(report.weights) {
            self.weights[i].bytes_after = weight.bytes_after;
        }
        Ok(packed)
    }
}

/// What a weight was before it was rounded.
enum Float {
    /// That of the model, with this hash.
    Unscaled([u8; 32]),
    /// Another, of the shape of the operand or of its matrix.
    Scaled(ConstData),
}

impl Float {
    /// The weight that a pass quantizes; `unscaled` are those of the model.
    fn of(weight: Tensor, unscaled: &HashSet<[u8; 32]>, env: &dyn Env) -> Result<Float, PassError> {
        let konst = weight.to_const();
        let fail = |e: ConstError| PassError::Env(e.to_string());
        let hash = konst.hash().map_err(fail)?;
        if unscaled.contains(&hash) {
            return Ok(Float::Unscaled(hash));
        }
        let bytes = konst.read().map_err(fail)?;
        let mut kept = env.scratch(bytes.len())?;
        kept.bytes().copy_from_slice(&bytes);
        Ok(Float::Scaled(ConstData::new(konst.elem, konst.dims.clone(), kept.freeze()).map_err(fail)?))
    }
}

/// Puts a scaled weight into the module, as the value that stands for `quantized`.
fn scaled(m: &mut Module, quantized: Value, weight: ConstData) -> Result<Value, PassError> {
    let ty = m.ty(quantized).as_tensor().cloned();
    let what = m.value_label(quantized);
    let fail = |why: String| PassError::At { pass: NAME, what: what.clone(), why };
    let known = ty.and_then(|t| Some((t.elem, t.known_shape()?)));
    let (elem, shape) = known.ok_or_else(|| fail("this is a bug: a weight of unknown shape".into()))?;
    let mut konst = weight;
    if elem != konst.elem {
        let values = Tensor::floats(&konst);
        let narrow = values.and_then(|v| Tensor::from_f32(elem, &shape, v));
        konst = narrow.map_err(|e| fail(e.to_string()))?.to_const();
    }
    let dims = shape.iter().map(|&d| d as u64).collect();
    let konst = ConstData::new(elem, dims, konst.source).map_err(|e| fail(e.to_string()))?;
    Ok(m.add_const(m.top, "", konst))
}

/// What of `m` each operand reads that is a weight, by the hash of what [`Env::quantized`] gives of it.
fn hashes(m: &Module) -> Result<HashMap<(Op, usize), [u8; 32]>, PassError> {
    let mut known: HashMap<(ConstId, bool, bool, usize), [u8; 32]> = HashMap::new();
    let mut out = HashMap::new();
    for weighted in find(m) {
        let (Weighted::Linear(l) | Weighted::Kernel(l)) = weighted else { continue };
        if float(l.elem).is_none() {
            continue;
        }
        let key = (l.konst, l.rows_are_outputs, l.operand_is_nk, l.n);
        let hash = match known.get(&key) {
            Some(hash) => *hash,
            None => {
                let of = |bytes: Bytes| matrix(&l, &bytes).tensor(l.operand_is_nk).to_const().hash();
                let hash = m.consts[l.konst].read().and_then(of);
                let fail = |e: ConstError| PassError::At {
                    pass: NAME,
                    what: m.value_label(l.weight),
                    why: e.to_string(),
                };
                *known.entry(key).or_insert(hash.map_err(fail)?)
            }
        };
        out.insert((l.op, l.operand_index), hash);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::{self, Float as Elements, Layout, Matrix};
    use crate::linear::linears;
    use crate::pack_int4::PackInt4;
    use crate::quantize::{GridOptions, Notes, each, quantize_matrix};
    use crate::rtn::Rtn;
    use crate::testing::NoData;
    use crate::{Changed, Exactness, Filter, Settings};
    use dialects::exec::run_once;
    use dialects::ir::interp::Interpreter;
    use dialects::ir::{OpBuilder, parse};
    use dialects::ops::{Item, Ops};

    /// Numbers between -1 and 1 that follow no line.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        (1..=count as u64).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    /// Weights of every kind: read once (`a`), by two ops (`b`), as rows (`c`), behind a view (`d`), as kernels (`e`),
    /// and one that may be given as an input (`f`).
    fn model() -> Module {
        let konst = |name: &str, ty: &str, count: usize, seed: u64| {
            format!("  const %{name} : tensor<{ty}xf32> {:?}\n", numbers(count, seed))
        };
        let consts = [
            konst("a", "16x16", 256, 1),
            konst("b", "16x16", 256, 2),
            konst("c", "16x16", 256, 3),
            konst("d", "16x16", 256, 4),
            konst("e", "4x2x3", 24, 5),
            konst("f", "16x16", 256, 6),
        ];
        let text = format!(
            "module ir_version=10 opsets {{onnx=21}}\n\
             graph @main(%x : tensor<4x16xf32>, %s : tensor<1x2x9xf32>) {{\n{}  \
             %h1 = onnx.MatMul(%x, %a) : ?\n  \
             %h2 = onnx.MatMul(%h1, %b) : ?\n  \
             %h3 = onnx.MatMul(%h2, %b) : ?\n  \
             %h4 = onnx.Gemm(%h3, %c) {{transB=1}} : ?\n  \
             %t = onnx.Transpose(%d) : ?\n  \
             %h5 = onnx.MatMul(%h4, %t) : ?\n  \
             %y = onnx.MatMul(%h5, %f) : ?\n  \
             %z = onnx.Conv(%s, %e) : ?\n  \
             return %y, %z\n}}\n",
            consts.concat()
        );
        let mut m = parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
        assert!(infer(&mut m, &Ops::standard()).is_empty());
        let f = m.regions[m.top].consts.iter().copied().find(|&v| &*m.values[v].name == "f").unwrap();
        let top = m.top;
        m.regions[top].args.push(f);
        m
    }

    fn with<T>(run: impl FnOnce(&mut PassCx) -> T) -> T {
        let (ops, settings, mut report) = (Ops::standard(), Settings::default(), Report::default());
        run(&mut PassCx { ops: &ops, env: &NoData, settings: &settings, report: &mut report, rest: &[] })
    }

    fn outputs(m: &Module) -> Vec<Item> {
        let shapes: [&[usize]; 2] = [&[4, 16], &[1, 2, 9]];
        let inputs: Vec<(Value, Item)> = m.regions[m.top]
            .args
            .iter()
            .zip(shapes)
            .map(|(&v, shape)| (v, Tensor::new(shape, numbers(shape.iter().product(), 9)).unwrap().into()))
            .collect();
        run_once(&Interpreter::new(Ops::standard()), m, &inputs, &m.regions[m.top].results).unwrap()
    }

    fn rtn(bits: u32, only: &[&str], skip: &[&str]) -> Rtn {
        let names = |list: &[&str]| list.iter().map(|s| s.to_string()).collect();
        let grid = GridOptions { bits, group: 16, ..GridOptions::default() };
        Rtn { grid, filter: Filter { only: names(only), skip: names(skip) } }
    }

    fn quantized(m: &Module, pass: &Rtn) -> Vec<Item> {
        let mut out = m.clone();
        with(|cx| pass.run(&mut out, cx)).unwrap();
        outputs(&out)
    }

    #[test]
    fn a_switched_weight_is_as_if_it_alone_had_been_quantized() {
        let m = model();
        for (bits, names) in [(4, &["a", "b", "c", "d", "f"][..]), (8, &["a", "b", "c", "d", "f", "e"])] {
            let mut v = with(|cx| Variant::new(&m, cx, &rtn(bits, &[], &[]))).unwrap();
            let found: Vec<String> = v.weights().iter().map(|w| w.weight.clone()).collect();
            assert_eq!(found, names);
            assert_eq!(outputs(v.all()), quantized(&m, &rtn(bits, &[], &[])));
            for (i, name) in names.iter().enumerate() {
                let only = quantized(&m, &rtn(bits, &[name], &[]));
                assert_ne!(only, outputs(&m), "{name}");
                assert_eq!(outputs(v.only(i)), only, "{name}");
                assert_eq!(outputs(v.all_but(i)), quantized(&m, &rtn(bits, &[], &[name])), "{name}");
            }
            assert_eq!(outputs(v.set(|_| false)), outputs(&m));
        }
    }

    #[test]
    fn several_passes_make_one_variant() {
        let (first, rest) = (rtn(3, &["b", "d"], &[]), rtn(8, &[], &[]));
        let mut v = with(|cx| Variant::of(&model(), cx, &[&first, &rest])).unwrap();
        let bits: Vec<(&str, u32)> = v.weights().iter().map(|w| (w.weight.as_str(), w.bits)).collect();
        assert_eq!(bits, [("b", 3), ("d", 3), ("a", 8), ("c", 8), ("f", 8), ("e", 8)]);
        let m = model();
        assert_eq!(outputs(v.only(1)), quantized(&m, &rtn(3, &["d"], &[])));
        assert_eq!(outputs(v.only(5)), quantized(&m, &rtn(8, &["e"], &[])));
    }

    #[test]
    fn bytes_are_those_of_the_packed_form() {
        let m = model();
        let mut v = with(|cx| Variant::new(&m, cx, &rtn(3, &[], &["f"]))).unwrap();
        let all = with(|cx| v.pack(cx, &[&PackInt4 {}], |_| true)).unwrap();
        // 3-bit codes in 4-bit containers, a scale of 4 bytes and a zero point of a byte for each of 16 rows.
        let each = 16 * 8 + 16 * 4 + 16;
        assert!(v.weights().iter().all(|w| w.bytes_after == each), "{:?}", v.weights());
        let float = 256 * 4;
        let stays = float + 24 * 4;
        assert_eq!(dce::bytes(&all), 4 * each + stays);
        let one = with(|cx| v.pack(cx, &[&PackInt4 {}], |w| w == 2)).unwrap();
        assert_eq!(dce::bytes(&one), each + 3 * float + stays);
        assert_eq!(dce::bytes(&m), 4 * float + stays);
    }

    /// Quantizes twice the weight for half the activation.
    struct Doubling;

    impl Pass for Doubling {
        fn name(&self) -> &'static str {
            "doubling"
        }

        fn summary(&self) -> &'static str {
            "a test"
        }

        fn exactness(&self) -> Exactness {
            Exactness::Lossy
        }

        fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
            let half = m.add_const(m.top, "half", Tensor::scalar(0.5f32).to_const());
            each(m, cx, "doubling", &Filter::default(), false, |m, cx, weights| {
                for w in weights {
                    let (l, bytes) = (w.first().clone(), m.consts[w.first().konst].read().unwrap());
                    let doubled: Vec<f32> =
                        bytemuck::pod_collect_to_vec::<u8, f32>(&bytes).iter().map(|x| x * 2.0).collect();
                    let layout = if l.rows_are_outputs { Layout::Nk } else { Layout::Kn };
                    let bytes = bytemuck::cast_slice(&doubled);
                    let matrix = Matrix { bytes, float: Elements::F32, layout, n: l.n, k: l.k };
                    let options = GridOptions { group: 16, ..GridOptions::default() };
                    quantize_matrix(m, cx, "doubling", &w, &matrix, &options, &grid::Rtn, Notes::default())?;
                    for l in &w.uses {
                        let loc = m.ops[l.op].loc.clone();
                        let mul =
                            OpBuilder::new("onnx.Mul", &loc).operands([l.x, half]).result(m.ty(l.x).clone());
                        let mul = m.insert_before(l.op, mul);
                        m.ops[l.op].operands[0] = m.ops[mul].result(0);
                    }
                }
                Ok(())
            })
        }
    }

    /// The float weight is the one that the pass made of it, in a model that it changed around it.
    #[test]
    fn scaled_weights_stay_scaled() {
        let m = model();
        let mut v = with(|cx| Variant::new(&m, cx, &Doubling)).unwrap();
        assert_eq!(outputs(v.set(|_| false)), outputs(&m));
        // Doubling is exact in floats, and rounding is as fine.
        for (i, name) in ["a", "b", "c", "d", "f"].iter().enumerate() {
            assert_eq!(outputs(v.only(i)), quantized(&m, &rtn(4, &[name], &[])), "{name}");
        }
    }

    #[test]
    fn a_pass_that_quantizes_nothing_is_refused() {
        let error = |pass: &dyn Pass| with(|cx| Variant::new(&model(), cx, pass)).err().unwrap().to_string();
        assert!(error(&crate::dce::Dce {}).contains("no weight that a pass quantized"));
        assert!(error(&rtn(4, &["none"], &[])).contains("matched nothing"));
        assert!(error(&rtn(9, &[], &[])).contains("bits"));
        assert_eq!(linears(&model()).len(), 6);
    }
}
