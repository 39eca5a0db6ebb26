//! Ops that read their operand through a strided view: Transpose, Slice, Split, Expand, Tile.
//!
//! Each builds one [`View`] from shapes and parameters, and the same view moves a tensor's elements at run time
//! and small symbolic contents in inference.

use super::util::{
    Ints, axes, axis, broadcast_dims, fact, infer_ints, ints_or, known_shape, shape_of, small_count, sym,
};
use crate::ir::Dim;
use crate::kernels::strided::{broadcast_shape, broadcast_strides, count, gather, strides};
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// A way to read a contiguous tensor.
struct View {
    shape: Vec<usize>,
    strides: Vec<isize>,
    base: isize,
}

impl View {
    fn read(&self, t: &Tensor) -> Result<Tensor, OpError> {
        count(&self.shape)?;
        let data = map_data!(t.data(), v => gather(v, &self.shape, &self.strides, self.base));
        Ok(Tensor::with_elem(t.elem(), &self.shape, data)?)
    }

    fn symbols(&self, s: &[Dim]) -> Option<Vec<Dim>> {
        small_count(&self.shape)?;
        Some(gather(s, &self.shape, &self.strides, self.base))
    }
}

/// The result of reading operand 0: its element type, `dims`, and its small contents through `view`.
fn viewed(cx: &InferCx, dims: Option<Vec<Dim>>, view: impl Fn(&[usize]) -> Option<View>) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let contents = sym(cx, 0).and_then(|(s, shape)| view(&shape)?.symbols(s));
    Ok(vec![fact(elem, dims, contents)])
}

fn permutation(attrs: &crate::ir::Attrs, rank: usize) -> Result<Vec<usize>, OpError> {
    match attrs.ints("perm") {
        None => Ok((0..rank).rev().collect()),
        Some(p) if p.len() == rank => axes(p, rank),
        Some(p) => Err(OpError::Invalid(format!("perm {p:?} is not a permutation of {rank} dims"))),
    }
}

fn transposed(shape: &[usize], perm: &[usize]) -> View {
    let own = strides(shape);
    View {
        shape: perm.iter().map(|&p| shape[p]).collect(),
        strides: perm.iter().map(|&p| own[p]).collect(),
        base: 0,
    }
}

fn eval_transpose(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let perm = permutation(cx.attrs, t.rank())?;
    cx.one(transpose(t, &perm)?)
}

/// `t` with its dims in the order `perm`.
pub(crate) fn transpose(t: &Tensor, perm: &[usize]) -> Result<Tensor, OpError> {
    let view = transposed(t.shape(), perm);
    // Moving dims of size one moves no element.
    let kept = perm.iter().filter(|&&p| t.shape()[p] != 1);
    if kept.is_sorted() { Ok(t.reshape(&view.shape)?) } else { view.read(t) }
}

fn infer_transpose(cx: &InferCx) -> Inferred {
    let perm = cx.dims(0).map(|d| permutation(cx.attrs, d.len())).transpose()?;
    let dims = cx.dims(0).zip(perm.as_ref()).map(|(d, p)| p.iter().map(|&i| d[i].clone()).collect());
    viewed(cx, dims, |shape| Some(transposed(shape, perm.as_ref()?)))
}

/// The elements `start, start + step, ..` of a dim of `size`, clamped as ONNX says: the first one and how many.
fn span(size: usize, start: i64, end: i64, step: i64) -> Result<(isize, usize), OpError> {
    let n = size as i64;
    let from_front = |i: i64| if i < 0 { i.saturating_add(n) } else { i };
    let (start, end) = (from_front(start), from_front(end));
    let steps = |distance: i64, step: i64| (distance.max(0) as u64).div_ceil(step as u64) as usize;
    match step {
        0 => Err(OpError::invalid("a step is zero")),
        1.. => {
            let (start, end) = (start.clamp(0, n), end.clamp(0, n));
            Ok((start as isize, steps(end - start, step)))
        }
        _ => {
            let (start, end) = (start.clamp(-1, n - 1), end.clamp(-1, n - 1));
            Ok((start as isize, steps(start - end, step.checked_neg().unwrap_or(i64::MAX))))
        }
    }
}

/// One dim that a Slice cuts: its number, start, end and step.
type Cut = (usize, i64, i64, i64);

fn sliced(shape: &[usize], cuts: &[Cut]) -> Result<View, OpError> {
    let mut view = View { shape: shape.to_vec(), strides: strides(shape), base: 0 };
    for &(i, start, end, step) in cuts {
        let (first, n) = span(shape[i], start, end, step)?;
        if n > 0 {
            view.base += first * view.strides[i];
        }
        view.strides[i] = view.strides[i].saturating_mul(step as isize);
        view.shape[i] = n;
    }
    Ok(view)
}

/// Starts and ends are attributes before opset 10, without steps.
fn eval_slice(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let missing = |what: &str| OpError::Invalid(format!("{what} are missing"));
    let starts = ints_or(cx, "starts", 1)?.ok_or_else(|| missing("starts"))?;
    let ends = ints_or(cx, "ends", 2)?.ok_or_else(|| missing("ends"))?;
    let along = match ints_or(cx, "axes", 3)? {
        Some(v) => axes(&v, t.rank())?,
        None => (0..starts.len().min(t.rank())).collect(),
    };
    let steps = ints_or(cx, "steps", 4)?.unwrap_or_else(|| vec![1; starts.len()].into());
    if [ends.len(), along.len(), steps.len()].iter().any(|&n| n != starts.len()) {
        return Err(OpError::invalid("starts, ends, axes and steps have different lengths"));
    }
    let cuts: Vec<Cut> = (0..starts.len()).map(|i| (along[i], starts[i], ends[i], steps[i])).collect();
    cx.one(sliced(t.shape(), &cuts)?.read(t)?)
}

/// Exporters write 2^31 - 1 or more for "to the end", tf2onnx 10^9.
const FAR: i64 = 1_000_000_000;

/// Where a slice in steps of one begins, and how long it is; `None` where that depends on more than is known.
pub fn cut(size: &Dim, start: &Dim, end: &Dim) -> Option<(Dim, Dim)> {
    if let (Dim::Known(n), Dim::Known(s), Dim::Known(e)) = (size, start, end) {
        let (from, length) = span(usize::try_from(*n).ok()?, *s, *e, 1).ok()?;
        return Some((Dim::Known(from as i64), Dim::from(length)));
    }
    let place = |d: &Dim| {
        let d = match d {
            Dim::Known(n) if *n >= FAR => size.clone(),
            Dim::Known(n) if *n < 0 => size.add(d),
            d => d.clone(),
        };
        (d.nonnegative() && size.sub(&d).nonnegative()).then_some(d)
    };
    let (from, to) = (place(start)?, place(end)?);
    let length = to.sub(&from);
    length.nonnegative().then_some((from, length))
}

/// The size that a slice leaves of a dim.
fn sliced_dim(size: &Dim, start: &Dim, end: &Dim, step: &Dim) -> Result<Dim, OpError> {
    if let Some((_, length)) = (step.known() == Some(1)).then(|| cut(size, start, end)).flatten() {
        return Ok(length);
    }
    let (Some(s), Some(k)) = (start.known(), step.known()) else { return Ok(Dim::Unknown) };
    let whole = match end {
        Dim::Known(e) => (k == 1 && s == 0 && *e >= FAR) || (k == -1 && s == -1 && *e <= -FAR),
        end => k == 1 && s == 0 && end.same(size),
    };
    match (size, end) {
        (size, _) if whole => Ok(size.clone()),
        (Dim::Known(n), Dim::Known(e)) => Ok(Dim::from(span(*n as usize, s, *e, k)?.1)),
        // From the end on nothing is left.
        (_, Dim::Known(e)) if k == 1 && *e == 0 => Ok(Dim::Known(0)),
        _ => Ok(Dim::Unknown),
    }
}

fn infer_slice(cx: &InferCx) -> Inferred {
    let Some(size) = cx.dims(0) else { return viewed(cx, None, |_| None) };
    let unknown = || viewed(cx, Some(vec![Dim::Unknown; size.len()]), |_| None);
    let symbols = |name: &str, i: usize| match cx.attrs.ints(name) {
        Some(v) => Some(v.iter().map(|&n| Dim::Known(n)).collect()),
        None => cx.sym(i).map(<[Dim]>::to_vec),
    };
    let along = match infer_ints(cx, "axes", 3) {
        Ints::Known(v) => axes(&v, size.len())?,
        Ints::Unknown => return unknown(),
        Ints::Absent => match symbols("starts", 1) {
            Some(s) => (0..s.len().min(size.len())).collect(),
            None => return unknown(),
        },
    };
    let part = |name: &str, i: usize| symbols(name, i).unwrap_or_else(|| vec![Dim::Unknown; along.len()]);
    let (starts, ends) = (part("starts", 1), part("ends", 2));
    let steps = if cx.has(4) { part("steps", 4) } else { vec![Dim::Known(1); along.len()] };
    if [starts.len(), ends.len(), steps.len()].iter().any(|&n| n != along.len()) {
        return Err(OpError::invalid("starts, ends, axes and steps have different lengths"));
    }
    let mut dims = size.to_vec();
    let mut cuts: Option<Vec<Cut>> = Some(Vec::new());
    for (j, &i) in along.iter().enumerate() {
        dims[i] = sliced_dim(&size[i], &starts[j], &ends[j], &steps[j])?;
        let cut = (starts[j].known(), ends[j].known(), steps[j].known());
        cuts = cuts.and_then(|mut cuts| {
            let (Some(s), Some(e), Some(k)) = cut else { return None };
            cuts.push((i, s, e, k));
            Some(cuts)
        });
    }
    viewed(cx, Some(dims), |shape| sliced(shape, cuts.as_ref()?).ok())
}

/// The sizes that a Split cuts a dim into: given, or equal but for the last (from opset 18 on, which may be smaller).
fn parts(size: usize, given: Option<&[i64]>, n: usize) -> Result<Vec<usize>, OpError> {
    match given {
        Some(v) => {
            let v = shape_of(v)?;
            if v.iter().try_fold(0usize, |n, &d| n.checked_add(d)) != Some(size) {
                return Err(OpError::Invalid(format!("the parts {v:?} do not add up to {size}")));
            }
            Ok(v)
        }
        None if n == 0 => Err(OpError::invalid("a split into no parts")),
        None => {
            let each = size.div_ceil(n);
            Ok((0..n).map(|i| size.saturating_sub(i * each).min(each)).collect())
        }
    }
}

fn split_count(attrs: &crate::ir::Attrs, outputs: usize) -> usize {
    attrs.int("num_outputs").and_then(|n| usize::try_from(n).ok()).unwrap_or(outputs).min(outputs.max(1))
}

fn eval_split(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let i = axis(cx.int_or("axis", 0), t.rank())?;
    let given = ints_or(cx, "split", 1)?;
    let parts = parts(t.shape()[i], given.as_deref(), split_count(cx.attrs, cx.outputs))?;
    let mut from = 0;
    let mut out = Vec::new();
    for n in parts {
        let cut = (i, from as i64, (from + n) as i64, 1);
        out.push(sliced(t.shape(), &[cut])?.read(t)?.into());
        from += n;
    }
    Ok(out)
}

fn infer_split(cx: &InferCx) -> Inferred {
    let (Some(elem), Some(dims)) = (cx.elem(0), cx.dims(0)) else {
        return Ok(vec![viewed(cx, None, |_| None)?.pop().unwrap_or_default(); cx.outputs]);
    };
    let i = axis(cx.attrs.int("axis").unwrap_or(0), dims.len())?;
    let n = split_count(cx.attrs, cx.outputs);
    let sizes: Vec<Dim> = match (infer_ints(cx, "split", 1), dims[i].known()) {
        (Ints::Known(v), Some(size)) => {
            parts(size as usize, Some(&v), n)?.into_iter().map(Dim::from).collect()
        }
        (Ints::Known(v), None) => v.iter().map(|&n| Dim::Known(n)).collect(),
        (Ints::Absent, Some(size)) => parts(size as usize, None, n)?.into_iter().map(Dim::from).collect(),
        _ => vec![Dim::Unknown; cx.outputs],
    };
    let mut from = 0;
    let mut out = Vec::new();
    for size in sizes {
        let mut dims = dims.to_vec();
        dims[i] = size.clone();
        let contents = sym(cx, 0).zip(size.known()).and_then(|((s, shape), n)| {
            let cut = (i, from, from + n, 1);
            from += n;
            sliced(&shape, &[cut]).ok()?.symbols(s)
        });
        out.push(fact(elem, Some(dims), contents));
    }
    Ok(out)
}

fn expanded(shape: &[usize], to: &[usize]) -> Result<View, OpError> {
    let shape_out = broadcast_shape(&[shape, to])?;
    Ok(View { strides: broadcast_strides(shape, &shape_out), shape: shape_out, base: 0 })
}

fn eval_expand(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let view = expanded(t.shape(), &shape_of(&cx.input(1)?.to_i64()?)?)?;
    if count(&view.shape)? == t.len() {
        return cx.one(t.reshape(&view.shape)?);
    }
    cx.one(view.read(t)?)
}

fn infer_expand(cx: &InferCx) -> Inferred {
    let to: Option<Vec<Dim>> = match (cx.sym(1), known_shape(cx, 1).as_deref()) {
        (Some(s), _) => Some(s.to_vec()),
        (None, Some(&[rank])) if rank <= 64 => Some(vec![Dim::Unknown; rank]),
        _ => None,
    };
    let dims = match (cx.dims(0), &to) {
        (Some(d), Some(to)) => Some(broadcast_dims(&[d, to])?),
        _ => None,
    };
    viewed(cx, dims, |shape| {
        let to: Option<Vec<usize>> = to.as_ref()?.iter().map(|d| usize::try_from(d.known()?).ok()).collect();
        expanded(shape, &to?).ok()
    })
}

fn tiled(shape: &[usize], repeats: &[usize]) -> (View, Vec<usize>) {
    let own = strides(shape);
    let view = View {
        shape: shape.iter().zip(repeats).flat_map(|(&d, &r)| [r, d]).collect(),
        strides: own.iter().flat_map(|&s| [0, s]).collect(),
        base: 0,
    };
    (view, shape.iter().zip(repeats).map(|(&d, &r)| d.saturating_mul(r)).collect())
}

fn eval_tile(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let given = shape_of(&cx.input(1)?.to_i64()?)?;
    let repeats = match cx.opt(2)? {
        // Before opset 6: a number of times, and the one axis along which.
        Some(along) if cx.opset < 6 => {
            let (&[n], &[along]) = (&given[..], &along.to_i64()?[..]) else {
                return Err(OpError::invalid("tiles and axis must be one number each"));
            };
            let mut repeats = vec![1; t.rank()];
            repeats[axis(along, t.rank())?] = n;
            repeats
        }
        _ => given,
    };
    if repeats.len() != t.rank() {
        return Err(OpError::Invalid(format!("{} repeats for {} dims", repeats.len(), t.rank())));
    }
    let (view, shape) = tiled(t.shape(), &repeats);
    cx.one(view.read(t)?.reshape(&shape)?)
}

fn infer_tile(cx: &InferCx) -> Inferred {
    let Some(d) = cx.dims(0) else { return viewed(cx, None, |_| None) };
    let known = cx.sym(1).filter(|_| cx.opset >= 6);
    let repeats = known.map_or_else(|| vec![Dim::Unknown; d.len()], <[Dim]>::to_vec);
    if repeats.len() != d.len() {
        return Err(OpError::Invalid(format!("{} repeats for {} dims", repeats.len(), d.len())));
    }
    let dims = d.iter().zip(&repeats).map(|(d, r)| d.mul(r)).collect();
    viewed(cx, Some(dims), |shape| {
        let repeats: Option<Vec<usize>> = repeats.iter().map(|d| usize::try_from(d.known()?).ok()).collect();
        Some(tiled(shape, &repeats?).0)
    })
}

/// The operands' dims joined along an axis.
fn eval_concat(cx: &EvalCx) -> Evaluated {
    let all: Vec<&Tensor> = (0..cx.inputs.len()).map(|n| cx.input(n)).collect::<Result<_, _>>()?;
    let i = axis(cx.int_or("axis", 1), cx.input(0)?.rank())?;
    cx.one(join(&all, i)?)
}

/// Elements `from..from + n` of `t` along dim `i`.
pub(super) fn part(t: &Tensor, i: usize, from: usize, n: usize) -> Result<Tensor, OpError> {
    sliced(t.shape(), &[(i, from as i64, (from + n) as i64, 1)])?.read(t)
}

/// Tensors, at least one, joined along dim `i`.
pub(super) fn join(all: &[&Tensor], i: usize) -> Result<Tensor, OpError> {
    let &[first, ..] = all else { return Err(OpError::invalid("nothing to join")) };
    let mut shape = first.shape().to_vec();
    shape[i] = 0;
    for t in all {
        let same = t.elem() == first.elem()
            && t.rank() == shape.len()
            && (0..shape.len()).all(|d| d == i || t.shape()[d] == shape[d]);
        if !same {
            let (a, b) = (first.shape(), t.shape());
            return Err(OpError::Invalid(format!(
                "{} {a:?} and {} {b:?} do not join along dim {i}",
                first.elem(),
                t.elem()
            )));
        }
        shape[i] = shape[i].saturating_add(t.shape()[i]);
    }
    count(&shape)?;
    let outer: usize = shape[..i].iter().product();
    macro_rules! join {
        ($($variant:ident)*) => {
            match first.data() {
                $(crate::tensor::Data::$variant(_) => {
                    let parts: Vec<_> = all.iter().map(|t| match t.data() {
                        crate::tensor::Data::$variant(v) => v.as_slice(),
                        _ => &[],
                    }).collect();
                    crate::tensor::Data::$variant(joined(&parts, outer))
                })*
            }
        };
    }
    let data = join!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 Bool C64 C128 Str);
    Ok(Tensor::with_elem(first.elem(), &shape, data)?)
}

/// Contiguous parts, each of `outer` blocks, joined block by block.
fn joined<T: Clone>(parts: &[&[T]], outer: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
    for i in 0..outer {
        for p in parts {
            let n = p.len() / outer;
            out.extend_from_slice(&p[i * n..(i + 1) * n]);
        }
    }
    out
}

fn infer_concat(cx: &InferCx) -> Inferred {
    let n = cx.inputs.len();
    let Some(elem) = (0..n).find_map(|i| cx.elem(i)) else { return Ok(Vec::new()) };
    // The rank of any operand is that of all.
    let Some(rank) = (0..n).find_map(|i| cx.dims(i)).map(<[Dim]>::len) else {
        return Ok(vec![fact(elem, None, None)]);
    };
    let along = axis(cx.attrs.int("axis").unwrap_or(1), rank)?;
    let mut dims = vec![Dim::Unknown; rank];
    dims[along] = Dim::Known(0);
    for i in 0..n {
        let Some(d) = cx.dims(i) else {
            dims[along] = Dim::Unknown;
            continue;
        };
        if d.len() != rank {
            return Err(OpError::Invalid(format!("operands of {rank} and of {} dims do not join", d.len())));
        }
        for (j, (o, d)) in dims.iter_mut().zip(d).enumerate() {
            *o = match j == along {
                true => o.add(d),
                false => o.unify(d).ok_or_else(|| {
                    OpError::Invalid(format!(
                        "dims {o} and {d} do not join, since they are not along axis {along}"
                    ))
                })?,
            };
        }
    }
    let parts: Option<Vec<&[Dim]>> = (0..n).map(|i| cx.sym(i)).collect();
    let outer = dims[..along].iter().try_fold(1, |n, d| Some(n * usize::try_from(d.known()?).ok()?));
    let contents = parts.zip(outer.filter(|&o| o > 0)).map(|(p, outer)| joined(&p, outer));
    Ok(vec![fact(elem, Some(dims), contents)])
}

/// Ops that read through a strided view, and Concat.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.Transpose", infer: infer_transpose, eval: eval_transpose, ..OpDef::NEW },
    OpDef { name: "onnx.Slice", operands: (1, 5), infer: infer_slice, eval: eval_slice, ..OpDef::NEW },
    OpDef {
        name: "onnx.Split",
        operands: (1, 2),
        results: (1, usize::MAX),
        infer: infer_split,
        eval: eval_split,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Expand", operands: (2, 2), infer: infer_expand, eval: eval_expand, ..OpDef::NEW },
    OpDef { name: "onnx.Tile", operands: (2, 3), infer: infer_tile, eval: eval_tile, ..OpDef::NEW },
    OpDef {
        name: "onnx.Concat",
        operands: (1, usize::MAX),
        infer: infer_concat,
        eval: eval_concat,
        ..OpDef::NEW
    },
];

#[cfg(test)]
mod tests {
    use crate::tensor::Tensor;
    use crate::testing::Case;

    #[test]
    fn a_shape_that_overflows_is_refused() {
        let x = Tensor::new(&[1], vec![1f32]).unwrap();
        for shape in [vec![1i64 << 31; 3], vec![1 << 62, 4, 1]] {
            let shape = Tensor::new(&[3], shape).unwrap();
            let case = Case::new("onnx.Expand", 21, &[], vec![Some(x.clone()), Some(shape)]);
            let e = case.eval(false).unwrap_err();
            assert!(e.to_string().contains("too many elements"), "{e}");
        }
    }
}
