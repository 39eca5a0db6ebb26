//! Finished work that outlives the process: a run that was killed goes on where it stopped.
//!
//! Where [`Env::store`](crate::Env::store) gives a place, a quantizing pass keeps what it decided of each group of
//! weights, and asks for it before it gathers anything from the calibration data:
//!
//! ```text
//! let work = Work::begin(m, cx, NAME, self)?;              // before the pass changes the module
//! let key = work.key(m, &group.weights);                   // while these are as the pass found them
//! match work.finished(m, cx, &key, &group.weights)? {
//!     Some(done) => done.install(m, cx, NAME, &group.weights)?,
//!     None => {
//!         let mark = cx.report.mark();
//!         ...                                              // gather, decide, `quantize` each weight
//!         work.keep(&key, &Finished { scale, weights, said: cx.report.since(&mark) })?
//!     }
//! }
//! ```
//!
//! [`Work::once`] does all of that for a single weight. Invariants:
//! - A key is a hash of everything that the result depends on: the model as the pass found it, constants included, the
//!   pass with its options, the settings, and which weights. The data is what the place as a whole is bound to. So the
//!   results of one key are equal bit for bit, and nothing else can be found under it.
//! - An entry that cannot be read or does not fit its weights is no entry: the work is done again.
//! - Putting finished work in its place changes the module exactly as doing it does.

use crate::qtensor::{QTensor, read};
use crate::quantize::{Shared, install, matrix};
use crate::report::Said;
use crate::{PassCx, PassError};
use dialects::ir::print::{Style, print};
use dialects::ir::{ConstData, Elem, Module};
use dialects::tensor::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Names an entry.
pub type Key = [u8; 32];

/// A place where finished work is kept between runs. Entries never change: what is put under a key a second time is
/// equal to what was there.
pub trait Store: Sync {
    /// What was put under `key`, whole and as it was, or nothing.
    fn get(&self, key: &Key) -> Option<Vec<u8>>;

    /// Keeps `value`. Fails when the place cannot take it, and names the place.
    fn put(&self, key: &Key, value: &[u8]) -> Result<(), PassError>;
}

/// The hash of all that a module is: graph, names, attributes, and the bytes of its constants. Those are hashed once
/// and on threads; a clone of the module knows their hashes.
pub fn content(m: &Module) -> Key {
    let constants: Vec<&ConstData> = m.consts.values().collect();
    // One that cannot be read shows so in the text.
    constants.par_iter().for_each(|c| drop(c.hash()));
    *blake3::hash(print(m, Style::FULL).as_bytes()).as_bytes()
}

/// The work of one pass on one module.
pub struct Work<'a> {
    store: Option<&'a dyn Store>,
    pass: &'static str,
    base: Key,
}

/// What a pass decided of weights that it treats together.
#[derive(Clone, Debug, Default)]
pub struct Finished {
    /// What each of their K channels was multiplied by, when they were scaled first.
    pub scale: Option<Vec<f32>>,
    /// Each weight, in order; none where they are only scaled.
    pub weights: Vec<QTensor>,
    /// What the report says of it: one entry for each weight, and warnings.
    pub said: Said,
}

/// [`Finished`] as bytes, in CBOR.
#[derive(Serialize, Deserialize)]
struct Entry {
    scale: Option<Vec<f32>>,
    weights: Vec<Part>,
    said: Said,
}

/// A [`QTensor`] as bytes.
#[derive(Serialize, Deserialize)]
struct Part {
    n: usize,
    k: usize,
    bits: u32,
    group_size: usize,
    codes: ByteBuf,
    scale_type: String,
    scales: ByteBuf,
    zero_points: Option<ByteBuf>,
}

impl<'a> Work<'a> {
    /// The work that a pass is about to do on `m`. `options` is all that its results depend on beside the module, the
    /// settings and the calibration data.
    pub fn begin(
        m: &Module,
        cx: &PassCx<'a>,
        pass: &'static str,
        options: &impl Serialize,
    ) -> Result<Work<'a>, PassError> {
        let env = cx.env;
        let mut work = Work { store: env.store(), pass, base: Key::default() };
        if work.store.is_some() {
            let options = serde_json::to_string(options)
                .map_err(|e| PassError::Env(format!("this is a bug: the options of {pass}: {e}")))?;
            let mut hasher = blake3::Hasher::new_derive_key("qcc, finished work, format 1");
            let settings = format!("{:?}", cx.settings);
            for part in [pass.as_bytes(), options.as_bytes(), settings.as_bytes(), &content(m)] {
                hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
            }
            work.base = *hasher.finalize().as_bytes();
        }
        Ok(work)
    }

    /// The key of weights that are treated together. They must be as the pass found them.
    pub fn key(&self, m: &Module, weights: &[Shared]) -> Key {
        let mut hasher = blake3::Hasher::new_keyed(&self.base);
        if self.store.is_some() {
            for l in weights.iter().map(Shared::first) {
                let names = (m.value_label(l.weight), m.value_label(l.x));
                let what = (names, l.op, l.weight, l.operand, l.x, l.n, l.k, l.form);
                hasher.update(format!("{what:?}\n").as_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// What an earlier run decided of `weights`. An entry that does not fit them is reported and left out.
    pub fn finished(
        &self,
        m: &Module,
        cx: &mut PassCx,
        key: &Key,
        weights: &[Shared],
    ) -> Result<Option<Finished>, PassError> {
        let Some(bytes) = self.store.and_then(|s| s.get(key)) else { return Ok(None) };
        let entry = ciborium::from_reader(&bytes[..]).map_err(|e| e.to_string());
        match entry.and_then(|e: Entry| e.check(weights).map(|()| e)) {
            Ok(entry) => Ok(Some(entry.finished(cx)?)),
            Err(why) => {
                let what: Vec<String> = weights.iter().map(|w| w.label(m)).collect();
                let (pass, what) = (self.pass, what.join(", "));
                cx.report
                    .warn(format!("{pass}: the kept result of {what} does not fit and is made anew: {why}"));
                Ok(None)
            }
        }
    }

    /// Keeps what was decided.
    pub fn keep(&self, key: &Key, done: &Finished) -> Result<(), PassError> {
        let Some(store) = self.store else { return Ok(()) };
        let part = |q: &QTensor| -> Result<Part, PassError> {
            let bytes = |c: &ConstData| read(c).map(|b| ByteBuf::from(b.to_vec()));
            Ok(Part {
                n: q.n,
                k: q.k,
                bits: q.bits,
                group_size: q.group_size,
                codes: bytes(&q.codes)?,
                scale_type: q.scales.elem.to_string(),
                scales: bytes(&q.scales)?,
                zero_points: q.zero_points.as_ref().map(bytes).transpose()?,
            })
        };
        let weights = done.weights.iter().map(part).collect::<Result<_, _>>()?;
        let entry = Entry { scale: done.scale.clone(), weights, said: done.said.clone() };
        let mut bytes = Vec::new();
        ciborium::into_writer(&entry, &mut bytes)
            .map_err(|e| PassError::Env(format!("this is a bug: a result of {}: {e}", self.pass)))?;
        store.put(key, &bytes)
    }

    /// Puts one quantized weight in its place and returns it: by `quantize`, which also does that, or as an earlier run left it.
    pub fn once(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        shared: &Shared,
        quantize: impl FnOnce(&mut Module, &mut PassCx) -> Result<QTensor, PassError>,
    ) -> Result<QTensor, PassError> {
        let weights = std::slice::from_ref(shared);
        let key = self.key(m, weights);
        if let Some(done) = self.finished(m, cx, &key, weights)? {
            let q = done.weights[0].clone();
            done.install(m, cx, self.pass, weights)?;
            return Ok(q);
        }
        let mark = cx.report.mark();
        let q = quantize(m, cx)?;
        let weights = vec![q.clone()];
        self.keep(&key, &Finished { scale: None, weights, said: cx.report.since(&mark) })?;
        Ok(q)
    }
}

impl Finished {
    /// Puts the weights in their places and reports them. Returns the scale, which is to be divided out of what they
    /// are multiplied with.
    pub fn install(
        self,
        m: &mut Module,
        cx: &mut PassCx,
        pass: &'static str,
        weights: &[Shared],
    ) -> Result<Option<Vec<f32>>, PassError> {
        for (shared, q) in weights.iter().zip(&self.weights) {
            let original = |m: &Module| original(m, pass, shared, self.scale.as_deref());
            install(m, cx, pass, shared, q, &original)?;
        }
        cx.report.say(self.said);
        Ok(self.scale)
    }
}

/// The float weight as its operand is read, `[K, N]` or `[N, K]`, with its channels multiplied by `scale`.
pub(crate) fn original(
    m: &Module,
    pass: &'static str,
    shared: &Shared,
    scale: Option<&[f32]>,
) -> Result<Tensor, PassError> {
    let l = shared.first();
    let fail = |why: String| PassError::At { pass, what: shared.label(m), why };
    let bytes = m.consts[l.konst].read().map_err(|e| fail(e.to_string()))?;
    let weight = matrix(l, &bytes).tensor(l.operand_is_nk);
    let Some(scale) = scale else { return Ok(weight) };
    let channel = |i: usize| if l.operand_is_nk { i % l.k } else { i / l.n };
    let values = weight.f32s().map_err(|e| fail(e.to_string()))?;
    let values: Vec<f32> = values.iter().enumerate().map(|(i, x)| x * scale[channel(i)]).collect();
    Tensor::new(weight.shape(), values).map_err(|e| fail(e.to_string()))
}

/// Types that scales have.
const SCALES: [Elem; 3] = [Elem::F32, Elem::F16, Elem::BF16];

impl Entry {
    /// Whether this can be of `weights`: sizes, lengths, numbers.
    fn check(&self, weights: &[Shared]) -> Result<(), String> {
        let equal = |what: &str, expected: usize, found: usize| match expected == found {
            true => Ok(()),
            false => Err(format!("{what}: expected {expected}, found {found}")),
        };
        // Without any, they are scaled and not rounded.
        if !self.weights.is_empty() {
            equal("weights", weights.len(), self.weights.len())?;
        }
        equal("reports", self.weights.len(), self.said.weights.len())?;
        for (l, part) in weights.iter().map(Shared::first).zip(&self.weights) {
            equal("outputs", l.n, part.n)?;
            equal("inputs", l.k, part.k)?;
            let (codes, groups) = part.lens()?;
            equal("bytes of codes", codes, part.codes.len())?;
            equal("bytes of scales", groups * (part.scale_type()?.bits() / 8), part.scales.len())?;
            if let Some(z) = &part.zero_points {
                equal("zero points", groups, z.len())?;
            }
        }
        for (shared, scale) in weights.iter().zip(self.scale.iter().cycle()) {
            equal("scaled channels", shared.first().k, scale.len())?;
        }
        match self.scale.iter().flatten().find(|s| !s.is_finite() || **s <= 0.0) {
            Some(s) => Err(format!("a channel is scaled by {s}")),
            None => Ok(()),
        }
    }

    /// The work itself, in buffers that do not count as memory when they are large.
    fn finished(self, cx: &PassCx) -> Result<Finished, PassError> {
        let weights = self.weights.iter().map(|p| p.tensor(cx)).collect::<Result<_, _>>()?;
        Ok(Finished { scale: self.scale, weights, said: self.said })
    }
}

impl Part {
    /// Bytes of codes, and groups.
    fn lens(&self) -> Result<(usize, usize), String> {
        let possible = (2..=8).contains(&self.bits) && (1..=usize::MAX / 16).contains(&self.group_size);
        let lens = || {
            let (codes, _) = QTensor::shapes(self.n, self.k, self.bits, self.group_size);
            let [n, groups, blob] = codes.map(|d| d as usize);
            let groups = n.checked_mul(groups)?;
            // No scale takes more than 4 bytes.
            groups.checked_mul(4)?;
            Some((groups.checked_mul(blob)?, groups))
        };
        possible
            .then(lens)
            .flatten()
            .ok_or_else(|| format!("{} bits in groups of {}", self.bits, self.group_size))
    }

    fn scale_type(&self) -> Result<Elem, String> {
        let named = Elem::from_name(&self.scale_type).filter(|e| SCALES.contains(e));
        named.ok_or_else(|| format!("scales of the type {:?}", self.scale_type))
    }

    /// The tensor, when [`Entry::check`] found nothing.
    fn tensor(&self, cx: &PassCx) -> Result<QTensor, PassError> {
        let (code_dims, scale_dims) = QTensor::shapes(self.n, self.k, self.bits, self.group_size);
        let scale_elem = self.scale_type().map_err(PassError::Env)?;
        let konst = |elem, dims: &[u64], bytes: &[u8]| -> Result<ConstData, PassError> {
            let mut scratch = cx.env.scratch(bytes.len())?;
            scratch.bytes().copy_from_slice(bytes);
            let konst = ConstData::new(elem, dims.to_vec(), scratch.freeze());
            konst.map_err(|e| PassError::Env(e.to_string()))
        };
        let zero_points = self.zero_points.as_ref();
        Ok(QTensor {
            n: self.n,
            k: self.k,
            bits: self.bits,
            group_size: self.group_size,
            codes: konst(Elem::U8, &code_dims, &self.codes)?,
            scales: konst(scale_elem, &scale_dims, &self.scales)?,
            zero_points: zero_points.map(|z| konst(Elem::U8, &scale_dims, z)).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests;
