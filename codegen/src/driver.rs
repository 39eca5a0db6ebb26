//! The function that runs a whole compiled model: it checks its dims, works out the sizes, and calls kernel after kernel.
//!
//! ```c
//! int32_t qcc_run(const int64_t *dims, void *const *inputs, void *const *outputs, void *arena, const void *weights,
//!                 qcc_parallel parallel, void *context);
//! ```
//!
//! It returns 0; or 1 + i where dim i is negative or beyond its bound; or -1 where the weights are those of another build:
//! nothing is written then, nor with -100, where the processor runs none of the versions ([`version`]). Or -2 where an index in the inputs is out of range, -3 where a length in them is not the one that
//! the model declares ([`runtime::Fault`]): nothing outside of any buffer was touched, but the outputs are worthless. `parallel` may be null: all units of a kernel are then done by the caller's thread.

mod version;

use crate::plan::{Place, Plan, Version};
use crate::size::{Atom, Size};
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Val, scalar};
use std::collections::HashMap;

/// Bytes at the start of the weights that say which build they are of.
pub const ID: usize = 32;

/// The function as a module, with the text `about` as the symbol `qcc_model`. Every processor of the architecture can run it.
pub fn module(plan: &Plan, target: &Target, id: &[u8; ID], about: &str) -> String {
    let mut out = String::from("module {\n");
    for k in plan.versions.iter().flat_map(|v| &v.kernels) {
        out.push_str(&format!("llvm.func @{}(!llvm.ptr, !llvm.ptr, i64, i64)\n", k.name));
    }
    let text: String = about.bytes().map(|b| format!("\\{b:02X}")).collect();
    out.push_str(&format!(
        "llvm.mlir.global constant @qcc_model(\"{text}\\00\") {{addr_space = 0 : i32}} : !llvm.array<{} x i8>\n",
        about.len() + 1
    ));
    out.push_str(&version::function(&plan.versions));
    let params = [Scalar::Ptr; 7].map(scalar);
    for v in &plan.versions {
        out.push_str(&Body::returning(target, &name(v), &params, scalar(Scalar::I32), |b, p| {
            run(b, plan, v, id, p)
        }));
    }
    out.push_str(&Body::returning(target, "qcc_run", &params, scalar(Scalar::I32), |b, p| {
        choose(b, &plan.versions, p)
    }));
    out.push_str("}\n");
    out
}

/// The function that runs one version.
fn name(version: &Version) -> String {
    format!("qcc_run_{}", version.target.symbol())
}

/// The version that this processor runs, run.
fn choose(b: &mut Body, versions: &[Version], p: &[Val]) -> Val {
    let code = b.room(1);
    let number = b.op(scalar(Scalar::I32), "llvm.call @qcc_version() : () -> i32");
    b.store(number, code);
    let args = p.iter().map(Val::to_string).collect::<Vec<_>>().join(", ");
    let types = vec!["!llvm.ptr"; p.len()].join(", ");
    for (i, v) in versions.iter().enumerate() {
        let i = b.int(Scalar::I32, i as i64);
        let this = b.cmp(Cmp::Eq, number, i);
        b.when(this, |b| {
            let call = format!("llvm.call @{}({args}) : ({types}) -> i32", name(v));
            let found = b.op(scalar(Scalar::I32), call);
            b.store(found, code);
        });
    }
    b.load(code, scalar(Scalar::I32))
}

fn run(b: &mut Body, plan: &Plan, version: &Version, id: &[u8; ID], p: &[Val]) -> Val {
    let &[dims, inputs, outputs, arena, weights, parallel, context] = p else {
        unreachable!("seven parameters")
    };
    let (zero, one) = (b.size(0), b.size(1));
    let mut code = b.int(Scalar::I32, 0);
    for (i, chunk) in id.chunks_exact(8).enumerate() {
        let at = b.at_const(weights, 8 * i);
        let found = b.load_bytes_as(at, Scalar::I64);
        let expected = b.int(Scalar::I64, i64::from_le_bytes(chunk.try_into().expect("eight bytes")));
        let same = b.cmp(Cmp::Eq, found, expected);
        let other = b.int(Scalar::I32, -1);
        code = b.select(same, code, other);
    }
    let mut sizes = HashMap::new();
    for (i, (name, bound)) in plan.dims.iter().enumerate().rev() {
        let at = b.at_const(dims, 8 * i);
        let size = b.load(at, scalar(Scalar::I64));
        let bound = b.int(Scalar::I64, *bound as i64);
        let bad = b.int(Scalar::I32, 1 + i as i64);
        let low = b.cmp(Cmp::Lt, size, zero);
        code = b.select(low, bad, code);
        let high = b.cmp(Cmp::Gt, size, bound);
        code = b.select(high, bad, code);
        sizes.insert(name.as_str(), size);
    }
    let buffers = version.steps.iter().map(|s| s.buffers.len()).max().unwrap_or(1).max(1);
    let most = version.steps.iter().map(|s| s.dims.len()).max().unwrap_or(1).max(1);
    let (table, numbers, fault) = (b.room(buffers), b.room(most), b.room(1));
    let none = b.int(Scalar::I32, 0);
    b.store_shared(none, fault);
    let fine = b.int(Scalar::I32, 0);
    let fine = b.cmp(Cmp::Eq, code, fine);
    let null = b.op(scalar(Scalar::Ptr), "llvm.mlir.zero : !llvm.ptr");
    let alone = b.op(scalar(Scalar::I1), format_args!("llvm.icmp \"eq\" {parallel}, {null} : !llvm.ptr"));
    b.when(fine, |b| {
        for s in &version.steps {
            for (i, place) in s.buffers.iter().enumerate() {
                let ptr = match *place {
                    Place::Input(n) => {
                        let at = b.at_const(inputs, 8 * n);
                        b.load(at, scalar(Scalar::Ptr))
                    }
                    Place::Output(n) => {
                        let at = b.at_const(outputs, 8 * n);
                        b.load(at, scalar(Scalar::Ptr))
                    }
                    Place::Arena(n) => b.at_const(arena, n as usize),
                    Place::Weights(n) => b.at_const(weights, n as usize),
                    Place::Fault => fault,
                };
                let at = b.at_const(table, 8 * i);
                b.store(ptr, at);
            }
            for (i, size) in s.dims.iter().enumerate() {
                let value = emit(b, size, &sizes);
                let at = b.at_const(numbers, 8 * i);
                b.store(value, at);
            }
            let units = emit(b, &s.units, &sizes);
            let work = emit(b, &s.work, &sizes);
            let work = b.max(work, one);
            let some = b.cmp(Cmp::Gt, units, zero);
            b.when(some, |b| {
                b.when_else(
                    alone,
                    |b| b.line(format_args!("llvm.call @{}({table}, {numbers}, {zero}, {units}) : (!llvm.ptr, !llvm.ptr, i64, i64) -> ()", s.kernel)),
                    |b| {
                        let kernel = b.op(scalar(Scalar::Ptr), format_args!("llvm.mlir.addressof @{} : !llvm.ptr", s.kernel));
                        b.line(format_args!("llvm.call {parallel}({context}, {kernel}, {table}, {numbers}, {units}, {work}) : !llvm.ptr, (!llvm.ptr, !llvm.ptr, !llvm.ptr, !llvm.ptr, i64, i64) -> ()"));
                    },
                );
            });
        }
    });
    let found = b.load(fault, scalar(Scalar::I32));
    let minus = b.int(Scalar::I32, -1);
    let faulty = b.sub(minus, found);
    let some = b.cmp(Cmp::Ne, found, none);
    b.select(some, faulty, code)
}

/// The value of a size.
fn emit(b: &mut Body, size: &Size, dims: &HashMap<&str, Val>) -> Val {
    let mut sum = None;
    for (atoms, factor) in size.terms() {
        let mut product = (factor != 1 || atoms.is_empty()).then(|| b.int(Scalar::I64, factor));
        for a in &atoms {
            let value = match a {
                Atom::Dim(name) => dims[name.as_str()],
                Atom::DivUp(size, by) => {
                    let x = emit(b, size, dims);
                    let (more, by) = (b.int(Scalar::I64, *by as i64 - 1), b.int(Scalar::I64, *by as i64));
                    let x = b.add(x, more);
                    b.div(x, by)
                }
                Atom::Lost => unreachable!("sizes were computed at their bounds when the model was planned"),
            };
            product = Some(product.map_or(value, |p| b.mul(p, value)));
        }
        let product = product.expect("a product has a factor or an atom");
        sum = Some(sum.map_or(product, |s| b.add(s, product)));
    }
    sum.unwrap_or_else(|| b.size(0))
}
