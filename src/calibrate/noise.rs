//! Noise of the types and shapes that a model declares, for models to which no data is at hand.

use super::{Batch, CalibError};
use crate::data::lm::free_inputs;
use crate::data::tokens::Rows;
use dialects::ir::{Dim, Elem, Module, Symbol};
use dialects::tensor::{Data, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A sample of noise has at most this many elements.
const MAX_COUNT: usize = 1 << 28;

/// Noise for every input: floats from the standard normal distribution, integers 0 or 1, one sample a run.
pub(super) struct Noise {
    inputs: Vec<(Symbol, Elem, Vec<usize>)>,
    samples: usize,
    seed: u64,
}

/// Rows of tokens, each drawn evenly from the vocabulary.
pub(super) fn tokens(vocab: usize, rows: usize, len: usize, seed: u64) -> Rows {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Rows::new(len, (0..rows * len).map(|_| rng.random_range(0..vocab.max(1)) as i64).collect())
}

impl Noise {
    /// Noise for the inputs of `m`. A dim that is not known is 1; with `size`, all of them but the first are `size`.
    pub(super) fn of(
        m: &Module,
        samples: usize,
        size: Option<usize>,
        seed: u64,
    ) -> Result<Noise, CalibError> {
        let input = |v| {
            let (name, ty) = (m.values[v].name.clone(), m.ty(v));
            let legal =
                |e: &Elem| e.is_float() && e.bits() >= 16 || e.is_int() && e.bits() >= 8 || *e == Elem::Bool;
            let (Some(elem), Some(dims)) = (ty.elem().filter(legal), ty.dims()) else {
                let message = format!("no noise can be made for the input {name:?} of type {ty}");
                return Err(CalibError::new(
                    message,
                    "give --calib inputs.npz, with an array for each input",
                ));
            };
            let open = |i: usize| if i == 0 { 1 } else { size.unwrap_or(1) };
            let dim =
                |(i, d): (usize, &Dim)| d.known().and_then(|n| usize::try_from(n).ok()).unwrap_or(open(i));
            let shape: Vec<usize> = dims.iter().enumerate().map(dim).collect();
            let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            if count.is_none_or(|n| n > MAX_COUNT) {
                let message = format!("the input {name:?} of shape {shape:?} is too large for noise");
                return Err(CalibError::plain(message));
            }
            Ok((name, elem, shape))
        };
        Ok(Noise { inputs: free_inputs(m).map(input).collect::<Result<_, _>>()?, samples, seed })
    }

    pub(super) fn runs(&self) -> usize {
        self.samples
    }

    pub(super) fn batch(&self, run: usize) -> Batch {
        let make = |(i, (name, elem, shape)): (usize, &(Symbol, Elem, Vec<usize>))| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream((run * self.inputs.len() + i) as u64);
            (name.clone(), tensor(*elem, shape, &mut rng))
        };
        self.inputs.iter().enumerate().map(make).collect()
    }
}

fn tensor(elem: Elem, shape: &[usize], rng: &mut ChaCha8Rng) -> Tensor {
    let count: usize = shape.iter().product();
    if elem.is_float() {
        let values = (0..count).map(|_| normal(rng)).collect();
        return Tensor::from_f32(elem, shape, values).expect("the element type was checked for");
    }
    let bits: Vec<u8> = (0..count).map(|_| rng.random_range(0..2)).collect();
    let data = match elem {
        Elem::Bool => Data::Bool(bits.iter().map(|&b| b != 0).collect()),
        Elem::I64 => Data::I64(bits.iter().map(|&b| b.into()).collect()),
        Elem::I32 => Data::I32(bits.iter().map(|&b| b.into()).collect()),
        Elem::I16 => Data::I16(bits.iter().map(|&b| b.into()).collect()),
        Elem::I8 => Data::I8(bits.iter().map(|&b| b as i8).collect()),
        Elem::U64 => Data::U64(bits.iter().map(|&b| b.into()).collect()),
        Elem::U32 => Data::U32(bits.iter().map(|&b| b.into()).collect()),
        Elem::U16 => Data::U16(bits.iter().map(|&b| b.into()).collect()),
        _ => Data::U8(bits),
    };
    Tensor::with_elem(elem, shape, data).expect("the element type was checked for")
}

/// A standard normal number, by the method of Box and Muller.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::Type;

    #[test]
    fn noise_has_the_declared_types_and_is_seeded() {
        let mut m = Module::default();
        let (b, s) = (Dim::Sym("b".into()), Dim::Sym("s".into()));
        let top = m.top;
        m.add_arg(top, "x", Type::tensor(Elem::F16, [b, s, Dim::Known(500)]));
        m.add_arg(top, "sr", Type::tensor(Elem::I64, []));
        let noise = Noise::of(&m, 3, None, 7).unwrap();
        let batch = noise.batch(2);
        assert_eq!((batch[0].1.elem(), batch[0].1.shape()), (Elem::F16, &[1, 1, 500][..]));
        assert!(batch[1].1.shape().is_empty() && batch[1].1.i64s().unwrap()[0] <= 1);
        assert_eq!(noise.batch(2), batch);
        assert_ne!(noise.batch(1), batch);
        assert_ne!(Noise::of(&m, 3, None, 8).unwrap().batch(2), batch);
        let x = batch[0].1.to_f32().unwrap();
        let mean = x.iter().sum::<f32>() / 500.0;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 500.0;
        assert!(mean.abs() < 0.2 && (var - 1.0).abs() < 0.3, "{mean} {var}");
        assert_eq!(Noise::of(&m, 1, Some(9), 0).unwrap().batch(0)[0].1.shape(), [1, 9, 500]);
    }

    #[test]
    fn no_noise_without_a_rank_or_beyond_reason() {
        let mut m = Module::default();
        let top = m.top;
        m.add_arg(top, "x", Type::unranked(Elem::F32));
        assert!(Noise::of(&m, 1, None, 0).is_err());
        let mut m = Module::default();
        let top = m.top;
        m.add_arg(top, "x", Type::tensor(Elem::F32, [Dim::Known(i64::MAX), Dim::Known(4)]));
        assert!(Noise::of(&m, 1, None, 0).err().unwrap().message.contains("too large"));
    }

    #[test]
    fn random_tokens_are_in_the_vocabulary() {
        let rows = tokens(5, 10, 20, 0);
        assert_eq!((rows.count(), rows.len), (10, 20));
        assert!((0..5).all(|id| rows.ids().contains(&id)) && rows.ids().iter().all(|id| (0..5).contains(id)));
    }
}
