//! What the user gives a model to run on: one file a value, or an archive of arrays.
//!
//! numpy has no type for some elements; such a value is read from, and written as, the next wider type that it has.

use super::npy;
use crate::calibrate::{self, Calibration};
use crate::data::lm::{free_inputs, inputs_of};
use crate::error::Error;
use crate::onnx::values;
use crate::pipeline::nearest;
use crate::term::Term;
use dialects::ir::{Elem, Module, Value};
use dialects::onnx::cast::convert;
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use std::path::{Path, PathBuf};

/// The inputs of one run.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// A value of an input: NAME=x.npy, NAME=x.pb (a TensorProto), or x.npz with arrays named like the inputs
    #[arg(long, short, value_name = "[NAME=]FILE")]
    pub input: Vec<String>,
    /// Seed of the inputs that are made when none is given: tokens, or noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// Inputs of a model, and what to tell the user of them.
pub struct Inputs {
    /// The values.
    pub values: Vec<(Value, Item)>,
    /// Where they are from, when they were made.
    pub made: Option<String>,
}

/// The type that numpy has for elements of type `elem`: itself, or the next wider one.
pub fn widened(elem: Elem) -> Elem {
    match elem {
        Elem::BF16 => Elem::F32,
        e if e.is_float() && e.bits() <= 8 => Elem::F32,
        e if e.is_int() && e.bits() < 8 && e.is_signed_int() => Elem::I8,
        e if e.is_int() && e.bits() < 8 => Elem::U8,
        e => e,
    }
}

impl Options {
    /// Reads the values for `m`, or makes some if none are given.
    pub fn read(&self, m: &Module, ops: &Ops, term: &Term) -> Result<Inputs, Error> {
        if self.input.is_empty() {
            return self.made(m, ops, term);
        }
        let mut values: Vec<(Value, Item)> = Vec::new();
        for given in &self.input {
            for (v, item) in one(given, m)? {
                if values.iter().any(|(known, _)| *known == v) {
                    let message = format!("--input: {:?} is given twice", m.values[v].name);
                    return Err(Error::Usage { message, help: None });
                }
                values.push((v, item));
            }
        }
        let missing = free_inputs(m).filter(|v| values.iter().all(|(known, _)| known != v));
        let missing: Vec<String> =
            missing.map(|v| format!("{:?} of type {}", m.values[v].name, m.ty(v))).collect();
        if !missing.is_empty() {
            let message = format!("no value for the input {}", missing.join(", "));
            return Err(Error::usage(message, "give --input NAME=FILE for each input"));
        }
        Ok(Inputs { values, made: None })
    }

    /// The files that are read.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.input.iter().map(|given| split(given).1.into())
    }

    fn made(&self, m: &Module, ops: &Ops, term: &Term) -> Result<Inputs, Error> {
        if free_inputs(m).next().is_none() {
            return Ok(Inputs { values: Vec::new(), made: None });
        }
        let options = calibrate::Options {
            calib: Some("random".into()),
            calib_samples: Some(1),
            seed: self.seed,
            ..calibrate::Options::default()
        };
        let refused = |message: String| Error::usage(message, "give --input NAME=FILE for each input");
        let data = Calibration::open(&options, m, ops, term).map_err(|e| refused(e.message))?;
        let batch =
            data.batches().next().expect("one sample is one batch").map_err(|e| refused(e.message))?;
        let notes = std::iter::once(data.description.clone()).chain(data.notes.clone());
        Ok(Inputs { values: inputs_of(m, batch), made: Some(notes.collect::<Vec<_>>().join("; ")) })
    }
}

/// The name of the input, if one is given, and the file. What stands before `=` is a name unless it is part of a path.
fn split(given: &str) -> (Option<&str>, &str) {
    match given.split_once('=') {
        Some((name, path)) if !Path::new(given).exists() => (Some(name), path),
        _ => (None, given),
    }
}

/// What one `--input` gives.
fn one(given: &str, m: &Module) -> Result<Vec<(Value, Item)>, Error> {
    let data = |e: &dyn std::fmt::Display| Error::Data(e.to_string());
    let (name, path) = split(given);
    let Some(name) = name else {
        let path = Path::new(path);
        if path.extension().is_none_or(|e| e != "npz") {
            let message = format!("--input {given}: which input is it?");
            return Err(Error::usage(message, "give NAME=FILE, or an .npz archive whose arrays are named"));
        }
        let (arrays, names) = npy::read_npz(path, |name| input(m, name).is_ok()).map_err(|e| data(&e))?;
        if arrays.is_empty() {
            let found = names.join(", ");
            return Err(Error::Data(format!(
                "{given}: no array is named like an input of the model; found {found}"
            )));
        }
        return arrays
            .into_iter()
            .map(|(name, a)| Ok((input(m, &name)?, fit(m, &name, a.tensor(), path)?)))
            .collect();
    };
    let v = input(m, name)?;
    let path = PathBuf::from(path);
    let item = match path.extension().and_then(|e| e.to_str()) {
        Some("pb") => values::read(&path, m.ty(v)).map_err(|e| data(&e))?,
        Some("npy") => fit(m, name, npy::read(&path).map_err(|e| data(&e))?.tensor(), &path)?,
        _ => {
            let message = format!("--input {name}: {} is neither .npy nor .pb", path.display());
            return Err(Error::usage(message, "give an array of numpy, or a TensorProto"));
        }
    };
    Ok(vec![(v, item)])
}

/// The input called `name`; an initializer that is listed as an input may be given, too.
fn input(m: &Module, name: &str) -> Result<Value, Error> {
    let args = &m.regions[m.top].args;
    args.iter().copied().find(|&v| &*m.values[v].name == name).ok_or_else(|| {
        let known: Vec<&str> = args.iter().map(|&v| &*m.values[v].name).collect();
        let near = nearest(name, &known).map(|n| format!("did you mean {n:?}? ")).unwrap_or_default();
        let help = format!("{near}the model has {}", known.join(", "));
        Error::usage(format!("--input: the model has no input {name:?}"), help)
    })
}

/// An array as a value of the input, narrowed where numpy could not hold its type.
fn fit(m: &Module, name: &str, t: Tensor, path: &Path) -> Result<Item, Error> {
    let v = input(m, name)?;
    let Some(elem) = m.ty(v).elem().filter(|&e| e != t.elem()) else { return Ok(t.into()) };
    if t.elem() != widened(elem) {
        let (path, ty, found) = (path.display(), m.ty(v), t.elem());
        let shape = t.shape();
        return Err(Error::Data(format!(
            "{path}: the input {name:?} has type {ty}, found {found} {shape:?}"
        )));
    }
    Ok(convert(&t, elem, true).map_err(|e| Error::Data(format!("{}: {e}", path.display())))?.into())
}
