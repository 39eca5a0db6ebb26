//! `linears`: linears that read one value become one, or one that is cut into parts becomes several.
//!
//! Q, K and V, or the gate and the up projection, are linears of their own in most exports and one linear in some.
//! `form=merge` writes the weights `[K, N1]`, `[K, N2]`, .. side by side as `[K, N1 + N2 + ..]` and a Split behind the one
//! product; `form=split` undoes that. Every column of a product is computed from the same numbers as before, so both are
//! exact. Which one a runtime likes better depends on it and on the sizes (`docs/canonicalize.md`): neither is done unless
//! it is asked for.

use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::{Attr, ConstData, Elem, Module, Op, OpBuilder, Type, Use, Uses, Value};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};

const NAME: &str = "linears";

/// What becomes of linears.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinearsForm {
    /// Those that read one value become one.
    #[default]
    Merge,
    /// One that only a Split reads becomes one for each part.
    Split,
}

/// The pass and its options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Linears {
    /// `merge` or `split`.
    pub form: LinearsForm,
}

impl Pass for Linears {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "merge linears that read one value into one, or split one that is cut into parts"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let changed = match self.form {
            LinearsForm::Merge => merge(m, cx)?,
            LinearsForm::Split => split(m, cx)?,
        };
        crate::dce::sweep(m);
        Ok(if changed { Changed::Yes } else { Changed::No })
    }
}

/// A product `x W` with a constant matrix that nothing else reads.
struct Product {
    op: Op,
    x: Value,
    weight: Value,
    elem: Elem,
    k: usize,
    n: usize,
}

/// Whether an op is such a product; an error says why a product with a constant is none.
fn product(m: &Module, uses: &Uses, op: Op) -> Option<Result<Product, &'static str>> {
    let data = &m.ops[op];
    let (x, weight) = (data.operand(0)?, data.operand(1).filter(|_| data.is("onnx.MatMul"))?);
    let c = &m.consts[m.const_of(weight)?];
    let [k, n] = c.dims[..] else { return Some(Err("its weight is no matrix")) };
    if !c.elem.is_float() || !c.elem.bits().is_multiple_of(8) || m.const_of(x).is_some() {
        return None;
    }
    if uses.of(weight).len() != 1 {
        return Some(Err("something else reads its weight too"));
    }
    let (k, n) = (usize::try_from(k).ok()?, usize::try_from(n).ok()?);
    Some(Ok(Product { op, x, weight, elem: c.elem, k, n }))
}

fn fail(m: &Module, v: Value, why: impl ToString) -> PassError {
    PassError::At { pass: NAME, what: m.value_label(v), why: why.to_string() }
}

/// Writes a matrix of `k` rows, each made by `row` of `width` bytes.
fn matrix(
    m: &Module,
    cx: &PassCx,
    [k, n]: [usize; 2],
    like: &Product,
    row: impl Fn(usize, &mut [u8]),
) -> Result<ConstData, PassError> {
    let width = n * like.elem.bits() / 8;
    let mut scratch = cx.env.scratch(k * width)?;
    for (i, out) in scratch.bytes().chunks_exact_mut(width.max(1)).enumerate() {
        row(i, out);
    }
    ConstData::new(like.elem, vec![k as u64, n as u64], scratch.freeze()).map_err(|e| fail(m, like.weight, e))
}

/// The type of a product, with `n` columns.
fn columns(m: &Module, result: Value, n: usize) -> Type {
    match m.ty(result).as_tensor() {
        Some(t) => {
            let mut t = t.clone();
            if let Some(last) = t.dims.as_mut().and_then(|d| d.last_mut()) {
                *last = n.into();
            }
            Type::Tensor(t)
        }
        None => Type::Unknown,
    }
}

/// The product that an op is. One that cannot be merged or split is reported.
fn product_or_left(m: &Module, cx: &mut PassCx, uses: &Uses, op: Op) -> Option<Product> {
    product(m, uses, op)?.map_err(|why| cx.left(m, op, why)).ok()
}

fn merge(m: &mut Module, cx: &mut PassCx) -> Result<bool, PassError> {
    let uses = m.uses();
    let mut groups: Vec<Vec<Product>> = Vec::new();
    for op in m.live_ops() {
        let Some(p) = product_or_left(m, cx, &uses, op) else { continue };
        let same = |g: &&mut Vec<Product>| {
            let first = &g[0];
            let region = m.ops[first.op].region == m.ops[op].region;
            first.x == p.x && first.elem == p.elem && first.k == p.k && region
        };
        match groups.iter_mut().find(same) {
            Some(g) => g.push(p),
            None => groups.push(vec![p]),
        }
    }
    let mut changed = false;
    for group in groups {
        let first = &group[0];
        if group.len() < 2 {
            cx.left(m, first.op, "no other linear reads what it reads");
            continue;
        }
        let mut parts = Vec::new();
        for p in &group {
            let c = m.const_of(p.weight).expect("the weight of a product is a constant");
            parts.push((m.consts[c].read().map_err(|e| fail(m, p.weight, e))?, p.n * p.elem.bits() / 8));
        }
        let n = group.iter().map(|p| p.n).sum();
        let data = matrix(m, cx, [first.k, n], first, |i, out| {
            let mut at = 0;
            for (bytes, width) in &parts {
                out[at..at + width].copy_from_slice(&bytes[i * width..(i + 1) * width]);
                at += width;
            }
        })?;
        let name = m.fresh_name(&format!("{}.merged", m.value_label(first.weight)));
        let region = m.ops[first.op].region;
        let weight = m.add_const(region, name, data);
        let loc = m.ops[first.op].loc.clone();
        let results: Vec<Value> =
            group.iter().map(|p| m.ops[p.op].result(0).expect("a product has a result")).collect();
        let ty = columns(m, results[0], n);
        let all = OpBuilder::new("onnx.MatMul", &loc).operands([Some(first.x), Some(weight)]).result(ty);
        let all = m.insert_before(first.op, all);
        let sizes: Vec<i64> = group.iter().map(|p| p.n as i64).collect();
        let mut cut = OpBuilder::new("onnx.Split", &loc);
        let mut attrs = dialects::ir::Attrs::default();
        attrs.set("axis", Attr::Int(-1));
        let mut operands = vec![m.ops[all].result(0)];
        if m.opset("onnx") < 13 {
            attrs.set("split", Attr::Ints(sizes));
        } else {
            let sizes = Tensor::new(&[sizes.len()], sizes).map_err(|e| fail(m, first.weight, e))?;
            operands.push(Some(m.add_const(region, "", sizes.to_const())));
        }
        cut = cut.operands(operands).attrs(attrs);
        for &v in &results {
            cut = cut.result(m.ty(v).clone());
        }
        let cut = m.insert_before(first.op, cut);
        for (i, (p, v)) in group.iter().zip(results).enumerate() {
            let part = m.ops[cut].result(i).expect("a part for each product");
            m.replace_uses(v, part);
            m.erase(p.op);
        }
        cx.count("linears.merged", group.len() as u64);
        changed = true;
    }
    Ok(changed)
}

/// The Split along the last dim that alone reads a value.
fn only_split(m: &Module, uses: &Uses, v: Value) -> Option<Op> {
    let [Use::Operand(op, 0)] = uses.of(v)[..] else { return None };
    let data = &m.ops[op];
    let rank = m.ty(v).dims()?.len() as i64;
    let axis = data.attrs.int("axis").unwrap_or(0);
    (data.is("onnx.Split") && (axis == -1 || axis == rank - 1)).then_some(op)
}

fn split(m: &mut Module, cx: &mut PassCx) -> Result<bool, PassError> {
    let mut changed = false;
    for op in m.live_ops() {
        let uses = m.uses();
        let Some(p) = product_or_left(m, cx, &uses, op) else { continue };
        let result = m.ops[op].result(0).expect("a product has a result");
        let Some(cut) = only_split(m, &uses, result) else {
            cx.left(m, op, "no Split of its columns alone reads it");
            continue;
        };
        let width = |v: &Option<Value>| {
            let n = (*v).and_then(|v| m.ty(v).dims()?.last()?.known());
            n.and_then(|n| usize::try_from(n).ok())
        };
        let sizes: Option<Vec<usize>> = m.ops[cut].results.iter().map(width).collect();
        let Some(sizes) = sizes.filter(|s| s.iter().sum::<usize>() == p.n) else {
            cx.left(m, op, "the sizes of the parts are not known");
            continue;
        };
        let c = m.const_of(p.weight).expect("the weight of a product is a constant");
        let bytes = m.consts[c].read().map_err(|e| fail(m, p.weight, e))?;
        let one = p.elem.bits() / 8;
        let mut from = 0;
        for (i, n) in sizes.into_iter().enumerate() {
            let data = matrix(m, cx, [p.k, n], &p, |row, out| {
                let start = (row * p.n + from) * one;
                out.copy_from_slice(&bytes[start..start + n * one]);
            })?;
            from += n;
            let name = m.fresh_name(&format!("{}.{i}", m.value_label(p.weight)));
            let region = m.ops[op].region;
            let weight = m.add_const(region, name, data);
            let part = m.ops[cut].results[i].expect("its size is known");
            let loc = m.ops[op].loc.clone();
            let product = OpBuilder::new("onnx.MatMul", &loc).operands([Some(p.x), Some(weight)]);
            let product = m.insert_before(op, product.result(columns(m, result, n)));
            m.replace_uses(part, m.ops[product].result(0).expect("a product has a result"));
        }
        m.erase(cut);
        m.erase(op);
        cx.count("linears.split", 1);
        changed = true;
    }
    Ok(changed)
}
