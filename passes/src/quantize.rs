//! From a float weight to its quantized form in the graph: what every quantizing pass does once it has decided how.
//!
//! The weight is read once, its codes are written once, and every op that multiplies by it then reads one
//! `quant.dequantize` in its place. The float weight stays for whoever else uses it.

use crate::errors::StepErrors;
use crate::grid::{self, Float, GridError, Layout, Matrix, Parts, Quantizer, Ranges, Spec, Stats};
use crate::linear::{Form, KERNEL_HINT, Linear, Weighted, find, kept};
use crate::qtensor::{QTensor, constant, container, read};
use crate::{Changed, Filter, PassCx, PassError, Report, Settings, WeightReport, computed, dce};
use dialects::ir::{ConstData, Elem, Module, Op, OpBuilder, Region, Type, Value};
use dialects::tensor::Tensor;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// The grid that a pass is asked for. Part of the options of every pass that quantizes weights (`#[serde(flatten)]` it).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GridOptions {
    /// Bits per code, 2 to 8.
    pub bits: u32,
    /// Weights along K that share a scale: a multiple of 16 up to 256, or -1 for a whole row.
    pub group: i64,
    /// Zero points fixed in the middle of the codes.
    pub symmetric: bool,
    /// Of a symmetric grid: it reaches as far above zero as below, with positive scales, as products of integers want it.
    pub narrow: bool,
    /// Whether each group's range is clipped, in place of one that spans its weights.
    pub clip: Clipping,
    /// In place of clipping, each group's grid is refined by half-quadratic splitting, which needs no data.
    pub hqq: bool,
}

/// How ranges are clipped: `false`, `true`, or the share that is kept of them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "Json", try_from = "Json")]
pub enum Clipping {
    /// Not at all.
    No,
    /// Where that loses less: less of the output where a pass has calibration data, less of the weights without.
    Search,
    /// Both ends of every range are moved to this share of it, above 0 and below 1.
    Share(f32),
}

impl From<Clipping> for Json {
    fn from(clip: Clipping) -> Json {
        match clip {
            Clipping::No => false.into(),
            Clipping::Search => true.into(),
            // The digits that were given, not those of the wider type.
            Clipping::Share(share) => share.to_string().parse::<f64>().unwrap_or(share.into()).into(),
        }
    }
}

impl TryFrom<Json> for Clipping {
    type Error = String;
    fn try_from(value: Json) -> Result<Clipping, String> {
        match (value.as_bool(), value.as_f64()) {
            (Some(true), _) => Ok(Clipping::Search),
            (Some(false), _) => Ok(Clipping::No),
            (_, Some(1.0)) => Ok(Clipping::No),
            (_, Some(share)) if share > 0.0 && share < 1.0 => Ok(Clipping::Share(share as f32)),
            _ => Err(format!(
                "expected true, false, or a share of the range above 0 and up to 1, found {value}"
            )),
        }
    }
}

impl Default for GridOptions {
    fn default() -> GridOptions {
        GridOptions { bits: 4, group: 32, symmetric: false, narrow: false, clip: Clipping::No, hqq: false }
    }
}

impl GridOptions {
    /// Whether these options make a grid that can be packed.
    pub fn check(&self, pass: &'static str) -> Result<(), PassError> {
        let fail = |option, why| Err(PassError::Option { pass, option, why });
        if !(2..=8).contains(&self.bits) {
            return fail("bits", format!("expected 2 to 8, found {}", self.bits));
        }
        if self.narrow && !self.symmetric {
            return fail("narrow", "expected false where symmetric=false, found true".into());
        }
        if self.group != -1 && (!(16..=256).contains(&self.group) || self.group % 16 != 0) {
            return fail(
                "group",
                format!("expected a multiple of 16 up to 256, or -1, found {}", self.group),
            );
        }
        Ok(())
    }

    /// The grid of a weight with `k` inputs, whose scales are of the type `scales`.
    pub fn spec(&self, k: usize, scales: Float) -> Spec {
        // A group reaches no further than the inputs do, but for the power of two that kernels read.
        let group_size = usize::try_from(self.group).unwrap_or(k).min(k.next_power_of_two().max(16));
        Spec { bits: self.bits, group_size, symmetric: self.symmetric, narrow: self.narrow, scales }
    }

    /// How the ranges of groups are found.
    pub fn ranges(&self) -> Ranges {
        match (self.hqq, self.clip) {
            (true, _) => Ranges::Hqq,
            (false, Clipping::Search) => Ranges::Clip,
            (false, Clipping::Share(share)) => Ranges::Share(share),
            (false, Clipping::No) => Ranges::Span,
        }
    }

    /// Whether kernels are quantized: no runtime computes with fewer bits of them.
    pub fn kernels(&self) -> bool {
        container(self.bits) == 8
    }
}

/// The type that scales of a weight are rounded to, which is read as `elem`.
pub fn scale_type(elem: Elem, settings: &Settings) -> Float {
    match float(elem) {
        Some(half @ (Float::F16 | Float::BF16)) => half,
        _ if settings.f16_scales => Float::F16,
        _ => Float::F32,
    }
}

/// The ops that multiply by one weight in one way, in program order.
#[derive(Clone, Debug)]
pub struct Shared {
    /// At least one.
    pub uses: Vec<Linear>,
}

impl Shared {
    /// The first use; the others agree with it on everything but op and activation.
    pub fn first(&self) -> &Linear {
        &self.uses[0]
    }

    /// The grid of the weight.
    pub fn spec(&self, m: &Module, cx: &PassCx, options: &GridOptions) -> Spec {
        let l = self.first();
        let elem = m.ty(l.operand).elem().unwrap_or(l.elem);
        options.spec(l.k, scale_type(elem, cx.settings))
    }

    /// The weight's name.
    pub fn label(&self, m: &Module) -> String {
        m.value_label(self.first().weight)
    }
}

/// The counter of weights that could be quantized and stay float for the speed of it, where that is all of them.
pub const NONE_GAINS: &str = "weights of which none gains speed";

/// Runs `quantize` on the weights that a pass is to quantize, those of kernels when it can, and clears up after it. A
/// weight that was an input of the graph too is none any more. Without any weight the pass fails, unless that is allowed, or
/// a later pass has them all stay float.
pub fn each(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    filter: &Filter,
    kernels: bool,
    quantize: impl FnOnce(&mut Module, &mut PassCx, Vec<Shared>) -> Result<(), PassError>,
) -> Result<Changed, PassError> {
    let forms = [Form::Rows, Form::Columns, Form::Kernel];
    computed::fold(m, cx, filter, if kernels { &forms } else { &forms[..2] });
    let weights = candidates(m, cx, filter, kernels);
    if weights.is_empty() {
        let mut unsaid = Report::default();
        let mut alone = PassCx { report: &mut unsaid, rest: &[], ..*cx };
        if let n @ 1.. = candidates(m, &mut alone, filter, kernels).len() {
            cx.count(NONE_GAINS, n as u64);
            cx.report.warn(format!("{pass}: all {n} weights stay float, for the reasons that are listed"));
        }
        if cx.may_find_nothing() {
            return Ok(Changed::No);
        }
        return Err(PassError::Nothing { pass, why: nothing(m, cx, filter, kernels) });
    }
    let uses = m.uses();
    let mut inputs = m.regions[m.top].args.clone();
    inputs.retain(|&v| m.const_of(v).is_some() && !uses.of(v).is_empty());
    let first = cx.report.weights.len();
    quantize(m, cx, weights)?;
    cx.count("quantized weights", (cx.report.weights.len() - first) as u64);
    if !inputs.is_empty() {
        retire(m, cx, inputs);
    }
    Ok(Changed::Yes)
}

/// Why there is no weight to quantize.
fn nothing(m: &Module, cx: &mut PassCx, filter: &Filter, kernels: bool) -> String {
    if let n @ 1.. = candidates(m, cx, &Filter::default(), kernels).len() {
        let weights = if n == 1 { "the only weight" } else { &format!("all {n} weights") };
        let Filter { only, skip } = filter;
        let filters =
            [("only", only), ("skip", skip)].into_iter().filter(|(_, patterns)| !patterns.is_empty());
        let filters: Vec<String> = filters.map(|(name, p)| format!("{name}=[{}]", p.join(", "))).collect();
        return format!("{} leaves out {weights} that could be quantized", filters.join(" with "));
    }
    let mut why = "no MatMul or Gemm with a constant float weight is left to quantize".to_string();
    if let n @ 1.. = kept(m) {
        let weights = if n == 1 { "weight is" } else { "weights are" };
        why.push_str(&format!(" ({n} {weights} quantized already)"));
    }
    why
}

/// Takes those of `inputs` that nothing reads any more from the model's inputs.
fn retire(m: &mut Module, cx: &mut PassCx, mut inputs: Vec<Value>) {
    dce::sweep(m);
    let uses = m.uses();
    inputs.retain(|&v| uses.of(v).is_empty());
    if !inputs.is_empty() {
        let top = m.top;
        m.regions[top].args.retain(|v| !inputs.contains(v));
        m.regions[top].consts.retain(|v| !inputs.contains(v));
        let n = inputs.len();
        cx.report.note(format!(
            "{n} weights that could be given as inputs are inputs no more: they are quantized"
        ));
    }
}

/// The weights that a pass can quantize, those of kernels when it says so. What it is not to touch, and what cannot be
/// quantized, is reported as left.
pub fn candidates(m: &Module, cx: &mut PassCx, filter: &Filter, kernels: bool) -> Vec<Shared> {
    let mut out: Vec<Shared> = Vec::new();
    for weighted in find(m) {
        let l = match weighted {
            Weighted::Linear(l) => l,
            Weighted::Kernel(l) if kernels => l,
            Weighted::Kernel(l) => {
                let op = m.ops[l.op].name.op().to_string();
                cx.left(m, l.op, format!("{op} {KERNEL_HINT}"));
                continue;
            }
            Weighted::Kept { .. } => continue,
            Weighted::Other { op, why, .. } => {
                cx.left(m, op, why);
                continue;
            }
        };
        let data = &m.ops[l.op];
        let name = m.value_label(l.weight);
        let refused = filter.refuses(&[&data.node, &data.loc, &name], &data.name);
        let later = || cx.rest.iter().find_map(|pass| pass.leaves_float(m, &l));
        if let Some(why) = refused.or_else(later) {
            cx.left(m, l.op, why);
            continue;
        }
        // Nothing is inferred inside functions; what is the constant itself has its type there too.
        let elem = m.ty(l.operand).elem().or((l.operand == l.weight).then_some(l.elem));
        if float(l.elem).is_none() || elem.and_then(float).is_none() {
            cx.left(m, l.op, format!("weights of {} are not quantized", l.elem));
            continue;
        }
        let key = |l: &Linear| (l.konst, l.rows_are_outputs, l.operand_is_nk, l.n, l.form == Form::Kernel);
        let same = |s: &&mut Shared| key(s.first()) == key(&l) && m.ty(s.first().operand) == m.ty(l.operand);
        match out.iter_mut().find(same) {
            Some(shared) => shared.uses.push(l),
            None => out.push(Shared { uses: vec![l] }),
        }
    }
    out
}

/// What a pass says of a weight that it quantizes.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// The method, such as `rtn`.
    pub method: String,
    /// |XW - XQ(W)| / |XW| on calibration data, where there is some.
    pub output_error: Option<f64>,
    /// What else is to be known.
    pub notes: Vec<String>,
}

/// Quantizes one weight without data, puts it in the place of the float weight at every use, and reports it.
pub fn quantize(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    shared: &Shared,
    options: &GridOptions,
    notes: Notes,
) -> Result<QTensor, PassError> {
    let fail = |what: String, why: String| PassError::At { pass, what, why };
    let bytes = m.consts[shared.first().konst].read();
    let bytes = bytes.map_err(|e| fail(shared.label(m), e.to_string()))?;
    let w = matrix(shared.first(), &bytes);
    let ranges = options.ranges();
    let mut steps = Vec::new();
    let mut step = |ranges: Ranges, stats: Stats| {
        let weight_error = stats.errors(w.n * w.k).relative;
        steps.push(StepErrors { step: ranges.name().into(), weight_error, output_error: None });
    };
    if ranges != Ranges::Span {
        let plain = grid::measure(&w, &shared.spec(m, cx, options), &Ranges::Span);
        step(Ranges::Span, plain.map_err(|e| fail(shared.label(m), e.to_string()))?);
    }
    let (q, stats) = quantize_matrix(m, cx, pass, shared, &w, options, &ranges, notes)?;
    step(ranges, stats);
    cx.report.weights.last_mut().expect("it was reported just now").steps = steps;
    Ok(q)
}

/// Quantizes one weight as `method` chooses, with these values, which need not be the constant's: it may have been
/// scaled.
#[allow(clippy::too_many_arguments)]
pub fn quantize_matrix<Q: Quantizer>(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    shared: &Shared,
    w: &Matrix,
    options: &GridOptions,
    method: &Q,
    notes: Notes,
) -> Result<(QTensor, Stats), PassError> {
    let label = shared.label(m);
    let l = shared.first();
    let elem = m.ty(l.operand).elem().unwrap_or(l.elem);
    let spec = shared.spec(m, cx, options);
    let too_large = || PassError::At { pass, what: label.clone(), why: "it is too large".into() };
    let (code_bytes, groups) = spec.lens(w.n, w.k).ok_or_else(too_large)?;
    let (code_dims, scale_dims) = QTensor::shapes(w.n, w.k, spec.bits, spec.group_size);

    let mut codes = cx.env.scratch(code_bytes)?;
    let mut zeros = if spec.symmetric { None } else { Some(cx.env.scratch(groups)?) };
    let mut scales = vec![0f32; groups];
    let parts =
        Parts { codes: codes.bytes(), scales: &mut scales, zero_points: zeros.as_mut().map(|z| z.bytes()) };
    let stats = grid::quantize(w, &spec, method, parts).map_err(|e: GridError| PassError::At {
        pass,
        what: label.clone(),
        why: e.to_string(),
    })?;

    // Scales of a model in half precision are of its type; those of another are narrowed when they are packed.
    let scale_elem = if matches!(elem, Elem::F16 | Elem::BF16) { elem } else { Elem::F32 };
    let mut stored = cx.env.scratch(groups * scale_elem.bits() / 8)?;
    let narrow: fn(f32) -> [u8; 2] = match scale_elem {
        Elem::F16 => |s| f16::from_f32(s).to_le_bytes(),
        _ => |s| bf16::from_f32(s).to_le_bytes(),
    };
    match scale_elem {
        Elem::F32 => stored.bytes().copy_from_slice(bytemuck::cast_slice(&scales)),
        _ => {
            for (b, &s) in stored.bytes().chunks_exact_mut(2).zip(&scales) {
                b.copy_from_slice(&narrow(s));
            }
        }
    }
    let konst = |elem, dims: &[u64], s: Box<dyn crate::Scratch>| {
        ConstData::new(elem, dims.to_vec(), s.freeze()).map_err(|e| PassError::Env(e.to_string()))
    };
    let q = QTensor {
        n: w.n,
        k: w.k,
        bits: spec.bits,
        group_size: spec.group_size,
        codes: konst(Elem::U8, &code_dims, codes)?,
        scales: konst(scale_elem, &scale_dims, stored)?,
        zero_points: zeros.map(|z| konst(Elem::U8, &scale_dims, z)).transpose()?,
    };
    install(m, cx, pass, shared, &q, &|_| Ok(w.tensor(l.operand_is_nk)))?;

    let mut report = WeightReport {
        weight: label,
        node: m.ops[l.op].loc.to_string(),
        n: w.n,
        k: w.k,
        method: notes.method,
        bits: spec.bits,
        group_size: spec.group_size,
        bytes_before: m.consts[l.konst].byte_len(),
        bytes_after: q.codes.byte_len()
            + q.scales.byte_len()
            + q.zero_points.as_ref().map_or(0, ConstData::byte_len),
        output_error: notes.output_error,
        notes: notes.notes,
        ..WeightReport::default()
    };
    report.set_errors(&stats.errors(w.n * w.k));
    match (spec.bits, spec.container()) {
        (bits, container) if bits == container => {}
        (bits, 8) => report.notes.push(format!("{bits}-bit codes in an 8-bit container")),
        (bits, container) => report.notes.push(format!("{bits}-bit codes in a {container}-bit container")),
    }
    if let [_, rest @ ..] = &shared.uses[..]
        && !rest.is_empty()
    {
        let nodes: Vec<&str> = rest.iter().map(|l| &*m.ops[l.op].loc).collect();
        report.notes.push(format!("also used by {}", nodes.join(", ")));
    }
    cx.report.weights.push(report);
    Ok((q, stats))
}

/// The constant of a linear as a matrix.
pub fn matrix<'a>(l: &Linear, bytes: &'a [u8]) -> Matrix<'a> {
    Matrix {
        bytes,
        float: float(l.elem).expect("candidates are of a float type that can be quantized"),
        layout: if l.rows_are_outputs { Layout::Nk } else { Layout::Kn },
        n: l.n,
        k: l.k,
    }
}

/// The float weight that a quantized tensor stands for, `[N, K]` row-major.
pub fn dequantize(q: &QTensor) -> Result<Vec<f32>, PassError> {
    let scales = read(&q.scales)?;
    let scales: Vec<f32> = match q.scales.elem {
        Elem::F16 => scales.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Elem::BF16 => scales.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytemuck::pod_collect_to_vec(&scales),
    };
    let spec =
        Spec { bits: q.bits, group_size: q.group_size, symmetric: false, narrow: false, scales: Float::F32 };
    let mut out = vec![0.0; q.n * q.k];
    grid::pack::dequantize(&spec, q.n, q.k, &read(&q.codes)?, &scales, &q.zero_point_bytes()?, &mut out)
        .map_err(|e| PassError::Env(e.to_string()))?;
    Ok(out)
}

/// Puts a quantized weight in the place of the float one at every use. `weight` is the float one as it is multiplied,
/// of as many elements in the same order.
pub fn install(
    m: &mut Module,
    cx: &PassCx,
    pass: &'static str,
    shared: &Shared,
    q: &QTensor,
    weight: &dyn Fn(&Module) -> Result<Tensor, PassError>,
) -> Result<(), PassError> {
    let l = shared.first();
    let elem = m.ty(l.operand).elem().unwrap_or(l.elem);
    let value = place(m, pass, shared, q, &shared.label(m), elem)?;
    cx.env.quantized(value, &|| weight(m))
}

/// The `quant.dequantize` of it in the graph.
fn place(
    m: &mut Module,
    pass: &'static str,
    shared: &Shared,
    q: &QTensor,
    label: &str,
    elem: Elem,
) -> Result<Value, PassError> {
    let l = shared.first();
    let flat = if l.operand_is_nk { [l.n, l.k] } else { [l.k, l.n] };
    let operand = m.ty(l.operand).as_tensor().and_then(|t| t.known_shape()).unwrap_or_else(|| flat.to_vec());
    let shape = if l.form == Form::Kernel { flat.to_vec() } else { operand.clone() };
    let axis = shape.len() - if l.operand_is_nk { 1 } else { 2 };
    if shape.get(axis) != Some(&l.k) {
        let why = format!("this is a bug: a weight of {} inputs with the shape {shape:?}", l.k);
        return Err(PassError::At { pass, what: label.into(), why });
    }
    let at = before_all(m, &shared.uses);
    let value = q.insert(m, at, label, &shape, axis, elem);
    let mut weight = value;
    if shape != operand {
        let dims: Vec<i64> = operand.iter().map(|&d| d as i64).collect();
        let dims = constant(Elem::I64, vec![dims.len() as u64], bytemuck::cast_slice(&dims).to_vec());
        let dims = m.add_const(m.ops[at].region, m.fresh_name(&format!("{label}.shape")), dims);
        let loc = m.ops[at].loc.clone();
        let reshape = OpBuilder::new("onnx.Reshape", &loc).operands([value, dims]);
        let reshape = m.insert_before(at, reshape.result(Type::of_shape(elem, &operand)));
        weight = m.ops[reshape].result(0).expect("a Reshape has a result");
    }
    for l in &shared.uses {
        m.ops[l.op].operands[l.operand_index] = Some(weight);
    }
    Ok(value)
}

/// The op before which a value must stand that all of these read, in whatever nested graphs they are.
pub(crate) fn before_all(m: &Module, uses: &[Linear]) -> Op {
    // An op with the ops that hold its region, the outermost last.
    let path = |l: &Linear| -> Vec<Op> {
        std::iter::successors(Some(l.op), |&op| m.regions[m.ops[op].region].parent).collect()
    };
    let region = |op: &Op| m.ops[*op].region;
    let first = path(&uses[0]);
    let others: Vec<Vec<Op>> = uses[1..].iter().map(path).collect();
    let shared = |r: Region| others.iter().all(|p| p.iter().any(|op| m.ops[*op].region == r));
    let common = first.iter().map(region).find(|&r| shared(r)).unwrap_or_else(|| region(&uses[0].op));
    let holders = std::iter::once(&first).chain(&others);
    let holders: Vec<Op> =
        holders.filter_map(|p| p.iter().copied().find(|op| region(op) == common)).collect();
    let ops = &m.regions[common].ops;
    ops.iter().copied().find(|op| holders.contains(op)).unwrap_or(uses[0].op)
}

/// The type of float that a weight of `elem` is read as; `None` for one that is not quantized.
pub fn float(elem: Elem) -> Option<Float> {
    match elem {
        Elem::F32 => Some(Float::F32),
        Elem::F16 => Some(Float::F16),
        Elem::BF16 => Some(Float::BF16),
        _ => None,
    }
}
