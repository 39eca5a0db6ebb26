//! From a float weight to its quantized form in the graph: what every quantizing pass does once it has decided how.
//!
//! The weight is read once, its codes are written once, and every op that multiplies by it then reads one
//! `quant.dequantize` in its place. The float weight stays for whoever else uses it.

use crate::grid::{self, Float, GridError, Layout, Matrix, Parts, Quantizer, Spec, Stats};
use crate::linear::{Linear, Weighted, find};
use crate::qtensor::{QTensor, read};
use crate::{Filter, PassCx, PassError, WeightReport};
use dialects::ir::{ConstData, Elem, Module, Value};
use half::f16;
use serde::{Deserialize, Serialize};

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
}

impl Default for GridOptions {
    fn default() -> GridOptions {
        GridOptions { bits: 4, group: 32, symmetric: false }
    }
}

impl GridOptions {
    /// Whether these options make a grid that can be packed.
    pub fn check(&self, pass: &'static str) -> Result<(), PassError> {
        let fail = |option, why| Err(PassError::Option { pass, option, why });
        if !(2..=8).contains(&self.bits) {
            return fail("bits", format!("expected 2 to 8, found {}", self.bits));
        }
        if self.group != -1 && (!(16..=256).contains(&self.group) || self.group % 16 != 0) {
            return fail(
                "group",
                format!("expected a multiple of 16 up to 256, or -1, found {}", self.group),
            );
        }
        Ok(())
    }

    /// The grid of a weight with `k` inputs.
    pub fn spec(&self, k: usize, f16_scales: bool) -> Spec {
        let group_size = usize::try_from(self.group).unwrap_or(k);
        Spec { bits: self.bits, group_size, symmetric: self.symmetric, f16_scales }
    }
}

/// The ops that multiply by one weight in one way, in program order, all in one region.
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

    /// The weight's name.
    pub fn label(&self, m: &Module) -> String {
        m.value_label(self.first().weight)
    }
}

/// The weights that a pass is to quantize. What it is not to touch, and what cannot be quantized, is reported as left.
pub fn candidates(m: &Module, cx: &mut PassCx, filter: &Filter) -> Vec<Shared> {
    let mut out: Vec<Shared> = Vec::new();
    for weighted in find(m) {
        let l = match weighted {
            Weighted::Linear(l) => l,
            Weighted::Other { op, why, .. } => {
                cx.left(m, op, why);
                continue;
            }
        };
        let data = &m.ops[l.op];
        let name = m.value_label(l.weight);
        if let Some(why) = filter.refuses(&[&data.node, &data.loc, &name], &data.name) {
            cx.left(m, l.op, why);
            continue;
        }
        if float(l.elem).is_none() || m.ty(l.operand).elem().and_then(float).is_none() {
            cx.left(m, l.op, format!("weights of {} are not quantized", l.elem));
            continue;
        }
        let key = |l: &Linear| (l.konst, l.rows_are_outputs, l.operand_is_nk, m.ops[l.op].region);
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

/// Quantizes one weight as `method` chooses, puts it in the place of the float weight at every use, and reports it.
pub fn quantize<Q: Quantizer>(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    shared: &Shared,
    options: &GridOptions,
    method: &Q,
    notes: Notes,
) -> Result<(QTensor, Stats), PassError> {
    let bytes = m.consts[shared.first().konst].read().map_err(|e| PassError::At {
        pass,
        what: shared.label(m),
        why: e.to_string(),
    })?;
    let w = matrix(shared.first(), &bytes);
    quantize_matrix(m, cx, pass, shared, &w, options, method, notes)
}

/// The same, with other values than the constant's: a weight that was scaled.
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
    let half = elem == Elem::F16;
    let spec = options.spec(w.k, half || cx.settings.f16_scales);
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

    let scale_elem = if half { Elem::F16 } else { Elem::F32 };
    let mut stored = cx.env.scratch(groups * scale_elem.bits() / 8)?;
    match half {
        false => stored.bytes().copy_from_slice(bytemuck::cast_slice(&scales)),
        true => {
            for (b, &s) in stored.bytes().chunks_exact_mut(2).zip(&scales) {
                b.copy_from_slice(&f16::from_f32(s).to_le_bytes());
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
    let value = place(m, pass, shared, &q, &label, elem)?;
    cx.env.quantized(value, &|| w.tensor(l.operand_is_nk));

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
        weight_error: stats.relative(),
        output_error: notes.output_error,
        notes: notes.notes,
    };
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
        _ => bytemuck::pod_collect_to_vec(&scales),
    };
    let spec = Spec { bits: q.bits, group_size: q.group_size, symmetric: false, f16_scales: false };
    let mut out = vec![0.0; q.n * q.k];
    grid::pack::dequantize(&spec, q.n, q.k, &read(&q.codes)?, &scales, &q.zero_point_bytes()?, &mut out)
        .map_err(|e| PassError::Env(e.to_string()))?;
    Ok(out)
}

/// Puts the quantized tensor in the place of the float weight.
fn place(
    m: &mut Module,
    pass: &'static str,
    shared: &Shared,
    q: &QTensor,
    label: &str,
    elem: Elem,
) -> Result<Value, PassError> {
    let l = shared.first();
    let shape = m.ty(l.operand).as_tensor().and_then(|t| t.known_shape());
    let shape = shape.unwrap_or_else(|| match l.operand_is_nk {
        true => vec![l.n, l.k],
        false => vec![l.k, l.n],
    });
    let axis = shape.len() - if l.operand_is_nk { 1 } else { 2 };
    if shape.get(axis) != Some(&l.k) {
        let why = format!("this is a bug: a weight of {} inputs with the shape {shape:?}", l.k);
        return Err(PassError::At { pass, what: label.into(), why });
    }
    let value = q.insert(m, l.op, label, &shape, axis, elem);
    for l in &shared.uses {
        m.ops[l.op].operands[l.operand_index] = Some(value);
    }
    Ok(value)
}

fn float(elem: Elem) -> Option<Float> {
    match elem {
        Elem::F32 => Some(Float::F32),
        Elem::F16 => Some(Float::F16),
        Elem::BF16 => Some(Float::BF16),
        _ => None,
    }
}
