//! Values that are sizes: what inference knows to be sums and products of the model's named dims, such as what Shape gives
//! and what is computed from it.

use super::{Buffer, Kernel, Lowered, Step};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::Scalar;
use dialects::ir::{Dim, Elem, Module, Op};

/// Whether all that `op` gives is known up to named dims.
pub fn supports(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let [Some(v)] = data.results[..] else { return false };
    let integer = m.ty(v).elem() == Some(Elem::I64);
    let known = |s: &[Dim]| s.iter().all(|d| *d != Dim::Unknown);
    integer && Size::shape(m.ty(v)).is_some() && m.values[v].sym.as_deref().is_some_and(known)
}

/// One kernel, of one unit, that writes the sizes it is given. Buffers: the result.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let v = fused.module.ops[fused.anchor()?].result(0)?;
    let contents = fused.module.values[v].sym.clone()?;
    let mut dims = Vec::new();
    let mut places = Vec::new();
    for d in contents.iter() {
        places.push(match d.known() {
            Some(n) => Err(n),
            None => {
                dims.push(Size::of(d)?);
                Ok(dims.len() - 1)
            }
        });
    }
    let kernel = Kernel::new(target, "sizes", |b, a| {
        let result = a.buffer(b, 0);
        for (i, place) in places.iter().enumerate() {
            let value = match *place {
                Ok(dim) => a.dim(b, dim),
                Err(n) => b.int(Scalar::I64, n),
            };
            let at = b.at_const(result, 8 * i);
            b.store(value, at);
        }
    });
    let step = Step { kernel, buffers: vec![Buffer::Result(0)], dims, units: 1.into(), work: 1.into() };
    Some(Lowered { steps: vec![step], ..Lowered::default() })
}
