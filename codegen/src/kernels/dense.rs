//! MatMul and Gemm with a constant matrix of floats, and the elementwise ops after them on their sums.
//!
//! Where every weight is a number of bf16 or f16 it is stored as one, in half the bytes, and widened in registers, which is exact.

use super::epilogue::{Epilogue, Spot};
use super::panel::{self, Form, Store};
use super::{Args, Lowered, elementwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Val};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::tensor::Tensor;

/// What a product is: its sizes, and how its result is scaled.
struct Product {
    n: usize,
    k: usize,
    /// Whether W is `[N, K]`.
    transposed: bool,
    alpha: f32,
    beta: f32,
    bias: Option<Value>,
}

/// f32 rows by a constant matrix of f32.
pub fn supports(m: &Module, op: Op) -> bool {
    of(m, op).is_some()
}

fn of(m: &Module, op: Op) -> Option<Product> {
    let data = &m.ops[op];
    let (x, w) = (data.operand(0)?, data.operand(1)?);
    let float = |v: Value| m.ty(v).elem() == Some(Elem::F32);
    let (from, own) = (Size::shape(m.ty(x))?, m.consts[m.const_of(w)?].shape());
    let [ref lead @ .., rows, cols] = own[..] else { return None };
    let gemm = data.is("onnx.Gemm");
    let int = |name: &str| data.attrs.int(name).filter(|_| gemm).unwrap_or(0);
    let scale = |name: &str| data.attrs.float(name).filter(|_| gemm).unwrap_or(1.0);
    let transposed = int("transB") != 0;
    let (k, n) = if transposed { (cols, rows) } else { (rows, cols) };
    let bias = data.operand(2).filter(|_| gemm);
    // A bias meets the result as an operand of an elementwise op does.
    let result = Size::shape(m.ty(data.result(0)?))?;
    let meets = |v: Value| {
        float(v) && Size::shape(m.ty(v)).is_some_and(|s| elementwise::steps(&s, &result).is_some())
    };
    let fits = float(x)
        && float(w)
        && int("transA") == 0
        && lead.iter().all(|&d| d == 1)
        && from.last() == Some(&Size::from(k))
        && result.last() == Some(&Size::from(n))
        && bias.is_none_or(meets);
    let (alpha, beta) = (scale("alpha"), scale("beta"));
    fits.then_some(Product { n, k, transposed, alpha, beta, bias })
}

/// The kernels: rows are brought together, then multiplied.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let product = of(m, op)?;
    let domain = fused.domain()?;
    let rows = Size::product(&domain[..domain.len() - 1]);
    let (n, k) = (product.n, product.k);
    let w = Tensor::from_const(&m.consts[m.const_of(m.ops[op].operand(1)?)?]).ok()?;
    let w = w.f32s().ok()?;
    let form = Form { n, k, lanes: target.lanes(), store: Store::of(w, target) };
    let at = |k: usize, n: usize| if product.transposed { n * form.k + k } else { k * form.n + n };
    let packed = form.pack(|k, n, out| form.store.write(w[at(k, n)], out));

    let mut lowered = Lowered::default();
    let x = fused.buffer(m.ops[op].operand(0)?, &mut lowered.blobs)?;
    let epilogue = Epilogue::new(fused, &domain, n, product.bias)?;
    let mut read = Vec::new();
    for &v in &epilogue.operands {
        read.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    let scaled = |b: &mut Body, v: Val, by: f32| match by {
        1.0 => v,
        by => {
            let by = b.splat(v.ty, by.into());
            b.mul(v, by)
        }
    };
    let finish = |b: &mut Body, a: &Args, first: usize, spot: Spot, sum: Val| {
        epilogue.emit(b, a, first, spot, form.lanes, |b, values| {
            let sum = scaled(b, sum, product.alpha);
            match product.bias {
                Some(bias) => {
                    let bias = scaled(b, values[&bias], product.beta);
                    b.add(sum, bias)
                }
                None => sum,
            }
        })
    };
    panel::product(&mut lowered, target, &form, x, packed, &rows, (fused.results().len(), read), &finish);
    Some(lowered)
}
