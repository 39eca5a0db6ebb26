//! What no op may answer with a panic: the cases of `testdata/` with operands left out, emptied or reshaped, and with
//! attributes left out or out of range. An op refuses them, or makes of them what it can.

use crate::ir::{Attr, ConstData, Type};
use crate::ops::Item;
use crate::tensor::Tensor;
use crate::testing::{Case, cases};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A tensor of this shape, with the first elements of `t`; `None` where there are too few.
fn cut(t: &Tensor, shape: &[usize]) -> Option<Tensor> {
    let count = shape.iter().product::<usize>();
    let bytes = t.to_const().read().ok()?;
    let len = usize::try_from(t.elem().byte_len(count as u64)?).ok()?;
    let dims = shape.iter().map(|&n| n as u64).collect();
    let bytes = (len <= bytes.len()).then(|| bytes.slice(..len))?;
    Tensor::from_const(&ConstData::new(t.elem(), dims, Arc::new(bytes)).ok()?).ok()
}

/// Other tensors where `t` belongs.
fn others(t: &Tensor) -> Vec<Option<Item>> {
    let (rank, shape) = (t.rank(), t.shape());
    let wider: Vec<usize> = [1].iter().chain(shape).copied().collect();
    let reversed: Vec<usize> = shape.iter().rev().copied().collect();
    let shorter = |by: usize| shape.iter().map(|&n| n.saturating_sub(by)).collect::<Vec<_>>();
    let shapes =
        [vec![0; rank], vec![1; rank], vec![t.len()], vec![], wider, reversed, shorter(1), shorter(2)];
    let reshaped = shapes.iter().filter_map(|s| cut(t, s)).map(|t| Some(t.into()));
    [None, Some(Item::Sequence(Vec::new()))].into_iter().chain(reshaped).collect()
}

/// Other values of an attribute.
fn values(a: &Attr) -> Vec<Option<Attr>> {
    let odd = [0, -1, 3, i64::MAX, i64::MIN];
    let mut out: Vec<Option<Attr>> = vec![None];
    out.extend(odd.map(|n| Some(Attr::Int(n))));
    match a {
        Attr::Ints(list) => {
            out.push(Some(Attr::Ints(Vec::new())));
            out.extend(odd.map(|n| Some(Attr::Ints(vec![n; list.len()]))));
        }
        Attr::Str(_) => out.push(Some(Attr::from("nonsense"))),
        _ => out.push(Some(Attr::Float(f32::NAN))),
    }
    out
}

/// Runs a case in every way, and says what panicked.
fn survives(case: &Case) -> Result<(), String> {
    let tried = catch_unwind(AssertUnwindSafe(|| {
        let _ = case.eval(false);
        let tensors = case.inputs.iter().all(|i| i.as_ref().is_none_or(|i| i.tensor().is_ok()));
        if tensors {
            let _ = case.infer(&case.facts(|_, t| Type::of_shape(t.elem(), t.shape()), true));
        }
    }));
    tried.map_err(|_| {
        let inputs = case.inputs.iter().map(|i| match i {
            Some(Item::Tensor(t)) => format!("{}{:?}", t.elem(), t.shape()),
            other => format!("{other:?}"),
        });
        format!("{}: {} {:?}", case.label, inputs.collect::<Vec<_>>().join(" "), case.attrs)
    })
}

#[test]
fn nothing_panics() {
    let folder = format!("{}/testdata", env!("CARGO_MANIFEST_DIR"));
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let (mut tried, mut failures) = (0, Vec::new());
    for path in paths {
        let mut seen = std::collections::HashSet::new();
        for mut case in cases(path.to_str().unwrap()) {
            // A few cases of each form of an op are enough.
            let form = (
                case.op.clone(),
                case.inputs.len(),
                case.attrs.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>(),
            );
            if !seen.insert(form) {
                continue;
            }
            for i in 0..case.inputs.len() {
                let Some(Item::Tensor(t)) = case.inputs[i].clone() else { continue };
                for other in others(&t) {
                    case.inputs[i] = other;
                    tried += 1;
                    failures.extend(survives(&case).err());
                }
                case.inputs[i] = Some(t.into());
            }
            let attrs = case.attrs.clone();
            for (name, value) in attrs.iter() {
                for other in values(value) {
                    match other {
                        Some(other) => case.attrs.set(name.clone(), other),
                        None => _ = case.attrs.remove(name),
                    }
                    tried += 1;
                    failures.extend(survives(&case).err());
                }
                case.attrs = attrs.clone();
            }
        }
    }
    assert!(tried > 5000, "only {tried} forms were tried");
    assert!(
        failures.is_empty(),
        "{} panics, such as\n{}",
        failures.len(),
        failures[..failures.len().min(40)].join("\n")
    );
}
