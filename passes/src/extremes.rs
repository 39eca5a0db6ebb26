//! What activations are like channel by channel: the least, the greatest and the mean magnitude of each, gathered in one
//! run over the calibration data, of which a few rows are kept where that is asked for.

use crate::eqsat::Channels;
use crate::{PassCx, PassError};
use dialects::exec::ExecError;
use dialects::ir::{Module, Value};
use std::collections::HashMap;

/// Bytes of rows kept at once, over all values.
const BUDGET: usize = 1 << 29;

/// What was seen of one value.
#[derive(Clone, Debug, PartialEq)]
pub struct Extremes {
    /// The least of each channel, or zero if that is less.
    pub min: Vec<f32>,
    /// The greatest of each channel, or zero if that is more.
    pub max: Vec<f32>,
    /// The sum of each channel's values.
    pub sums: Vec<f64>,
    /// The sum of each channel's magnitudes.
    pub magnitudes: Vec<f64>,
    /// Values of each channel.
    pub rows: u64,
    /// Some rows, `[.., K]`, evenly spaced; of channels that are the last dim alone.
    pub sample: Vec<f32>,
    /// Values that are NaN or infinite.
    not_finite: u64,
    /// Every so many rows one is kept.
    stride: u64,
    /// Rows that are kept at least, once there were as many; fewer than twice as many are.
    room: usize,
}

impl Extremes {
    /// Of `k` channels, with at least `room` rows kept.
    pub fn new(k: usize, room: usize) -> Extremes {
        Extremes {
            min: vec![0.0; k],
            max: vec![0.0; k],
            sums: vec![0.0; k],
            magnitudes: vec![0.0; k],
            rows: 0,
            sample: Vec::new(),
            not_finite: 0,
            stride: 1,
            room,
        }
    }

    /// Adds values of which `inner` following each other are of one channel, then as many of the next.
    pub fn add(&mut self, x: &[f32], inner: usize) {
        let k = self.min.len();
        for row in x.chunks_exact((k * inner).max(1)) {
            for (c, x) in row.chunks_exact(inner.max(1)).enumerate() {
                for &x in x {
                    self.not_finite += u64::from(!x.is_finite());
                    self.min[c] = self.min[c].min(x);
                    self.max[c] = self.max[c].max(x);
                    self.sums[c] += f64::from(x);
                    self.magnitudes[c] += f64::from(x.abs());
                }
            }
            if inner == 1 && self.room > 0 && self.rows.is_multiple_of(self.stride) {
                self.sample.extend_from_slice(row);
                if self.sample.len() >= 2 * self.room * k {
                    // Every second one stays, whatever is still to come.
                    self.sample =
                        self.sample.chunks_exact(2 * k).flat_map(|two| &two[..k]).copied().collect();
                    self.stride *= 2;
                }
            }
            self.rows += inner as u64;
        }
    }

    /// The largest magnitude of each channel.
    pub fn largest(&self) -> Vec<f32> {
        self.min.iter().zip(&self.max).map(|(min, max)| max.max(-min)).collect()
    }
}

/// Runs the calibration data once and looks at each value, with `rows` of each kept at least while there is room. No row
/// may reach a value, such as what an expert is given that was never chosen. A value that is NaN or infinite is refused.
pub fn collect(
    m: &Module,
    cx: &PassCx,
    values: &[(Value, Channels)],
    rows: usize,
    pass: &'static str,
) -> Result<HashMap<Value, Extremes>, PassError> {
    let mut counts: HashMap<Value, (usize, Channels)> = HashMap::new();
    for &(v, along) in values {
        let count = along.of(m.ty(v)).map(|(count, _)| count);
        let why = || "the number of its channels is unknown".to_string();
        let count = count.ok_or_else(|| PassError::At { pass, what: m.value_label(v), why: why() })?;
        counts.insert(v, (count, along));
    }
    let width: usize = counts.values().map(|c| c.0).sum();
    let room = rows.min(BUDGET / size_of::<f32>() / (2 * width.max(1)));
    let mut found: HashMap<Value, Extremes> =
        counts.iter().map(|(&v, &(k, _))| (v, Extremes::new(k, room))).collect();
    let wanted: Vec<Value> = values.iter().map(|&(v, _)| v).collect();
    if wanted.is_empty() {
        return Ok(found);
    }
    cx.env.calibrate(m, &wanted, &mut |v, item| {
        let refuse = |why: String| ExecError::Sink(format!("the activation {:?}: {why}", m.value_label(v)));
        let t = item.tensor().map_err(|e| refuse(e.to_string()))?;
        let (of, (k, along)) =
            found.get_mut(&v).zip(counts.get(&v)).ok_or_else(|| refuse("was not asked for".into()))?;
        let shape = t.shape();
        let axis = if *along == Channels::Last { shape.len().saturating_sub(1) } else { 1 };
        if shape.get(axis) != Some(k) {
            return Err(refuse(format!("expected {k} channels in dim {axis}, found the shape {shape:?}")));
        }
        let inner = shape[axis + 1..].iter().product();
        of.add(&t.to_f32().map_err(|e| refuse(e.to_string()))?, inner);
        Ok(())
    })?;
    for v in wanted {
        let n = found[&v].not_finite;
        if n > 0 {
            let why = format!("{n} of its values are NaN or infinite on the calibration data");
            return Err(PassError::At { pass, what: m.value_label(v), why });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_by_hand() {
        let mut last = Extremes::new(2, 2);
        last.add(&[1.0, -2.0, 3.0, 4.0], 1);
        last.add(&[-5.0, 0.5], 1);
        assert_eq!((&last.min[..], &last.max[..], last.rows), (&[-5.0, -2.0][..], &[3.0, 4.0][..], 3));
        assert_eq!((last.largest(), &last.magnitudes[..]), (vec![5.0, 4.0], &[9.0, 6.5][..]));
        assert_eq!(last.sums, [-1.0, 2.5]);
        // [2, 2, 2]: the channels are the second dim.
        let mut second = Extremes::new(2, 2);
        second.add(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0], 2);
        assert_eq!((&second.min[..], &second.max[..]), (&[0.0, -8.0][..], &[6.0, 7.0][..]));
        assert_eq!((second.rows, second.sample.len()), (4, 0));
    }

    #[test]
    fn rows_that_are_kept_are_evenly_spaced() {
        let mut e = Extremes::new(1, 4);
        let x: Vec<f32> = (0..100).map(|i| i as f32).collect();
        x.chunks(7).for_each(|x| e.add(x, 1));
        assert_eq!(e.sample, [0.0, 16.0, 32.0, 48.0, 64.0, 80.0, 96.0]);
        assert_eq!((e.rows, e.max[0]), (100, 99.0));
    }

    #[test]
    fn what_is_not_finite_is_counted() {
        let mut e = Extremes::new(2, 0);
        e.add(&[f32::NAN, f32::INFINITY, 1.0, 2.0], 1);
        assert_eq!(e.not_finite, 2);
    }
}
