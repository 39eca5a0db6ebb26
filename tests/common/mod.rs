//! What several test files need.

use dialects::ir::{Dim, Module, Type, Value};
use dialects::tensor::Tensor;
use std::collections::HashMap;
use std::sync::Arc;

/// Inference must be true of what came out: sizes, contents, and every symbol always the same size.
pub fn check_facts(
    m: &Module,
    v: Value,
    t: &Tensor,
    symbols: &mut HashMap<Arc<str>, i64>,
) -> Result<(), String> {
    let data = &m.values[v];
    let found = Type::of_shape(t.elem(), t.shape());
    if data.ty.unify(&found).is_none() {
        return Err(format!("is inferred {}, but is {found}", data.ty));
    }
    let mut check = |dim: &Dim, n: i64| match dim {
        Dim::Known(k) if *k != n => Err(format!("{k} is inferred, but it is {n}")),
        Dim::Sym(s) => match *symbols.entry(s.clone()).or_insert(n) {
            k if k == n => Ok(()),
            k => Err(format!("{s} is inferred, which is {k} elsewhere, but here it is {n}")),
        },
        _ => Ok(()),
    };
    for (dim, &n) in data.ty.dims().unwrap_or_default().iter().zip(t.shape()) {
        check(dim, n as i64)?;
    }
    if let Some(sym) = &data.sym {
        let contents = t.to_i64().map_err(|e| e.to_string())?;
        assert_eq!(sym.len(), contents.len());
        sym.iter().zip(contents.iter()).try_for_each(|(d, &n)| check(d, n))?;
    }
    Ok(())
}
