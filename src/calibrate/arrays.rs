//! Arrays for the inputs of a model, from a `.npz` file whose names are those of the inputs. What a language model
//! takes beside its tokens may be left out: it is filled in as for tokens.

use super::{Batch, CalibError};
use crate::data::lm::{Lm, RUN_TOKENS, free_inputs, inputs_of};
use crate::data::npy::{self, Array};
use crate::data::tokens::{Rows, Take};
use crate::pipeline::nearest;
use dialects::exec::{ExecError, Executor};
use dialects::ir::{Dim, Module, Symbol, Type};
use dialects::tensor::Tensor;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// Elements of all inputs in one run, where more than one sample goes into it.
const RUN_COUNT: usize = 1 << 20;

/// More samples than this in one run gain no speed.
const MAX_ROWS: usize = 16;

/// How an array holds the samples of an input.
enum Layout {
    /// Samples lie along the input's first dim.
    Stacked,
    /// The array has one dim more than the input: each row is a whole input.
    Apart,
    /// The input is a scalar, and the array its value in every sample.
    Same,
}

/// Arrays of samples.
pub(super) struct Arrays {
    inputs: Vec<(Symbol, Array, Layout)>,
    /// The language model, where some of its inputs are filled in.
    lm: Option<Lm>,
    /// The samples to feed, by their rows.
    order: Vec<usize>,
    per_run: usize,
}

impl Arrays {
    /// Opens the file, with what the user may want to know of it.
    pub(super) fn open(path: &Path, m: &Module, take: Take) -> Result<(Arrays, Vec<String>), CalibError> {
        let bad = |what: String| CalibError::plain(format!("{}: {what}", path.display()));
        let wanted: Vec<(Symbol, Type)> =
            free_inputs(m).map(|v| (m.values[v].name.clone(), m.ty(v).clone())).collect();
        let is_input = |name: &str| wanted.iter().any(|(n, _)| &**n == name);
        let (mut found, names) = npy::read_npz(path, is_input).map_err(CalibError::plain)?;
        let extra: Vec<&str> = names.iter().map(String::as_str).filter(|n| !is_input(n)).collect();
        let given: Vec<String> = found.iter().map(|(n, _)| n.to_string()).collect();
        let lm = Lm::of(m).ok().filter(|lm| given.len() < wanted.len() && lm.fills_beside(&given));
        let mut inputs = Vec::new();
        for (name, ty) in &wanted {
            let Some(at) = found.iter().position(|(n, _)| **n == **name) else {
                if lm.is_some() {
                    continue;
                }
                return Err(missing(path, name, ty, &names));
            };
            let array = found.swap_remove(at).1;
            let layout = layout(&array, ty).map_err(|what| bad(format!("array {name:?}: {what}")))?;
            inputs.push((name.clone(), array, layout));
        }
        check_ids(path, m, &inputs)?;
        let samples = samples(&inputs).map_err(bad)?;
        let mut order: Vec<usize> = (0..samples).collect();
        if take.random {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(take.seed));
        }
        order.truncate(take.rows);
        let mut notes: Vec<String> = lm.iter().filter_map(|lm| lm.filled_beside(&given)).collect();
        if !extra.is_empty() {
            let list = extra.join(", ");
            notes.push(format!("{}: no inputs of the model, left aside: {list}", path.display()));
        }
        let mut arrays = Arrays { inputs, lm, order, per_run: 1 };
        arrays.per_run = arrays.run_size(&wanted).map_err(bad)?;
        Ok((arrays, notes))
    }

    /// Samples in a run: as many as the model's batch, where it is fixed.
    fn run_size(&self, wanted: &[(Symbol, Type)]) -> Result<usize, String> {
        let stacked = self.inputs.iter().filter(|(_, _, l)| matches!(l, Layout::Stacked));
        let mut fixed = stacked.filter_map(|(name, ..)| {
            let (_, ty) = wanted.iter().find(|(n, _)| n == name)?;
            Some((name, ty.dims()?.first()?.known()? as usize))
        });
        if self.inputs.iter().any(|(_, _, l)| matches!(l, Layout::Apart)) {
            return Ok(1);
        }
        if let Some((name, batch)) = fixed.next() {
            if batch == 0 || !self.order.len().is_multiple_of(batch) {
                let found = self.order.len();
                return Err(format!(
                    "the input {name:?} takes {batch} samples at once, and {found} do not divide"
                ));
            }
            return Ok(batch);
        }
        let of_sample = |a: &Array| a.count() / a.shape.first().map_or(1, |&n| n.max(1));
        let count: usize = self.inputs.iter().map(|(_, a, _)| of_sample(a)).sum();
        // An integer is looked up in a table: it is as much to the model as a row of floats, as a token is.
        let looked_up = self.inputs.iter().filter(|(_, a, _)| a.elem.is_int()).map(|(_, a, _)| of_sample(a));
        let tokens = looked_up.max().unwrap_or(0);
        Ok((RUN_COUNT / count.max(1)).min(RUN_TOKENS / tokens.max(1)).clamp(1, MAX_ROWS))
    }

    /// Feeds one sample at a time when the model fails on more.
    pub(super) fn probe(
        mut self,
        exec: &dyn Executor,
        m: &Module,
    ) -> Result<(Arrays, Option<String>), ExecError> {
        let open = |(name, _, l): &(Symbol, Array, Layout)| {
            let input = free_inputs(m).find(|&v| m.values[v].name == *name);
            matches!(l, Layout::Stacked) && input.and_then(|v| m.ty(v).dims()?.first()?.known()).is_none()
        };
        if self.per_run == 1 || !self.inputs.iter().any(open) {
            return Ok((self, None));
        }
        let prepared = exec.prepare(m, &m.regions[m.top].results)?;
        let Err(e) = prepared.run(&inputs_of(m, self.batch(0)), &mut |_, _| Ok(())) else {
            return Ok((self, None));
        };
        let why = format!("the model is fed one sample at a time: it fails on {}: {e}", self.per_run);
        self.per_run = 1;
        Ok((self, Some(why)))
    }

    pub(super) fn samples(&self) -> usize {
        self.order.len()
    }

    pub(super) fn per_run(&self) -> usize {
        self.per_run
    }

    pub(super) fn runs(&self) -> usize {
        self.order.len().div_ceil(self.per_run)
    }

    pub(super) fn batch(&self, run: usize) -> Batch {
        let rows = self.order.chunks(self.per_run).nth(run).expect("runs are counted by the samples");
        let value = |array: &Array, layout: &Layout| -> Tensor {
            match layout {
                Layout::Same => array.tensor(),
                Layout::Stacked => array.rows(rows),
                Layout::Apart => {
                    let one = array.rows(rows);
                    one.reshape(&array.shape[1..]).expect("runs of whole inputs take one sample")
                }
            }
        };
        let given: Batch =
            self.inputs.iter().map(|(name, array, layout)| (name.clone(), value(array, layout))).collect();
        match &self.lm {
            Some(lm) => lm.filled_in(given),
            None => given,
        }
    }
}

fn missing(path: &Path, name: &str, ty: &Type, names: &[String]) -> CalibError {
    let known: Vec<&str> = names.iter().map(String::as_str).collect();
    let found = if known.is_empty() { "no arrays".to_string() } else { known.join(", ") };
    let near =
        nearest(name, &known).map(|n| format!("; did you mean {n:?} to be {name:?}?")).unwrap_or_default();
    CalibError::new(
        format!(
            "{}: expected an array for the input {name:?} of type {ty}, found {found}{near}",
            path.display()
        ),
        "the names in the archive must be those of the model's inputs",
    )
}

/// Refuses token ids that the model's embedding does not have.
fn check_ids(path: &Path, m: &Module, inputs: &[(Symbol, Array, Layout)]) -> Result<(), CalibError> {
    let ids = inputs.iter().find(|(name, ..)| &**name == "input_ids");
    let (Ok(lm), Some((_, array, _))) = (Lm::of(m), ids) else { return Ok(()) };
    let len = array.shape.last().copied().unwrap_or(1);
    if len > 0 {
        let ids = array.tensor();
        let ids = ids.to_i64().map_err(CalibError::plain)?.into_owned();
        Rows::new(len, ids).check(path, lm.vocab)?;
    }
    Ok(())
}

/// How the array holds samples of an input of type `ty`, or what is wrong with it.
fn layout(array: &Array, ty: &Type) -> Result<Layout, String> {
    let wrong = || format!("expected {ty}, found {} {:?}", array.elem, array.shape);
    if ty.elem() != Some(array.elem) {
        return Err(wrong());
    }
    let Some(dims) = ty.dims() else { return Ok(Layout::Stacked) };
    let fits = |dims: &[Dim], shape: &[usize]| {
        dims.iter().zip(shape).all(|(d, &n)| d.known().is_none_or(|k| usize::try_from(k) == Ok(n)))
    };
    match (dims.len(), array.shape.len()) {
        (0, 0) => Ok(Layout::Same),
        (a, b) if a == b && fits(&dims[1..], &array.shape[1..]) => Ok(Layout::Stacked),
        (a, b) if a + 1 == b && fits(dims, &array.shape[1..]) => Ok(Layout::Apart),
        _ => Err(wrong()),
    }
}

/// The number of samples, which all arrays share.
fn samples(inputs: &[(Symbol, Array, Layout)]) -> Result<usize, String> {
    let mut counts =
        inputs.iter().filter(|(_, _, l)| !matches!(l, Layout::Same)).map(|(n, a, _)| (n, a.shape[0]));
    let Some((first, count)) = counts.next() else { return Ok(1) };
    if count == 0 {
        return Err(format!("array {first:?}: expected samples, found none"));
    }
    match counts.find(|&(_, n)| n != count) {
        Some((other, n)) => Err(format!("array {first:?} has {count} samples, but {other:?} has {n}")),
        None => Ok(count),
    }
}
