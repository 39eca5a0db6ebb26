//! Ranges of activations for integers of 8 bits: what a tensor's values are clipped to.
//!
//! Nothing is kept of the calibration data but a histogram of each tensor ([`Histogram`]), whose bins double when a value
//! lies beyond them. A [`Method`] then chooses a range.

mod entropy;
mod histogram;
mod mse;

pub use histogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Histograms of activations, by the names of their values, and how ranges are chosen from them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Which model was run: BLAKE3 of its text and constants, in hexadecimal digits.
    pub model: String,
    /// How.
    pub method: Method,
    /// For [`Method::Percentile`], in percent.
    pub percentile: f64,
    /// The histograms.
    pub tensors: BTreeMap<String, Histogram>,
    /// Of the same tensors, what was seen of each channel, if that was asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub channels: BTreeMap<String, Channels>,
}

/// What was seen of each channel of a tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Channels {
    /// The dim of the channels.
    pub axis: usize,
    /// The least value of each, at most zero.
    pub min: Vec<f32>,
    /// The greatest, at least zero.
    pub max: Vec<f32>,
    /// The mean of the values' magnitudes.
    pub magnitude: Vec<f32>,
}

impl Channels {
    /// Why these are of no values.
    fn check(&self) -> Result<(), String> {
        let Channels { min, max, magnitude, .. } = self;
        if max.len() != min.len() || magnitude.len() != min.len() {
            return Err(format!(
                "{} least values of channels, {} greatest and {} means",
                min.len(),
                max.len(),
                magnitude.len()
            ));
        }
        for (c, ((&min, &max), &mean)) in min.iter().zip(max).zip(magnitude).enumerate() {
            let range = min.is_finite() && max.is_finite() && min <= 0.0 && max >= 0.0;
            if !range || !(0.0..=max.max(-min)).contains(&mean) {
                return Err(format!(
                    "channel {c}: expected a finite range with zero in it, found {min} to {max}"
                ));
            }
        }
        Ok(())
    }
}

impl Statistics {
    /// The text of a file that keeps them (JSON): for each tensor the bins that hold something.
    pub fn text(&self) -> Result<String, String> {
        serde_json::to_string(self).map(|text| text + "\n").map_err(|e| e.to_string())
    }

    /// Reads such a text. What no values can have is refused: a range that is NaN, infinite or upside down.
    pub fn parse(text: &str) -> Result<Statistics, String> {
        let read: Statistics = serde_json::from_str(text).map_err(|e| e.to_string())?;
        for (name, histogram) in &read.tensors {
            histogram.check().map_err(|why| format!("{name:?}: {why}"))?;
        }
        for (name, channels) in &read.channels {
            channels.check().map_err(|why| format!("{name:?}: {why}"))?;
        }
        Ok(read)
    }
}

/// How a range is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The least and the greatest value.
    #[default]
    Minmax,
    /// The moving averages of each batch's least and greatest values.
    Moving,
    /// Where a given share of the values lies.
    Percentile,
    /// Where the distribution of the quantized values diverges least from that of the values (Migacz, "8-bit Inference
    /// with TensorRT", GTC 2017).
    Entropy,
    /// Where the mean squared error is least.
    Mse,
}

/// The form of the integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Values and their negatives have codes of the same distance from zero's.
    pub symmetric: bool,
    /// Codes.
    pub levels: u32,
}

/// A range of values: zero lies in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// The least, at most zero.
    pub min: f32,
    /// The greatest, at least zero.
    pub max: f32,
}

impl Range {
    /// The range from `min` to `max`, widened to hold zero, and its mirror image where that is asked for.
    pub fn new(min: f32, max: f32, symmetric: bool) -> Range {
        let (min, max) = (min.min(0.0), max.max(0.0));
        match symmetric {
            true => Range { min: min.min(-max), max: max.max(-min) },
            false => Range { min, max },
        }
    }
}

/// The range of a tensor by a method; `percentile` of its values, in percent, are within it if that is the method.
/// `None` where no value was seen.
pub fn range(h: &Histogram, method: Method, percentile: f64, form: Form) -> Option<Range> {
    let whole = Range::new(h.min()?, h.max()?, form.symmetric);
    let within = |min: f32, max: f32| Range::new(min.max(whole.min), max.min(whole.max), form.symmetric);
    Some(match method {
        Method::Minmax => whole,
        Method::Moving => {
            let (min, max) = h.moving()?;
            within(min, max)
        }
        Method::Percentile if form.symmetric => {
            let end = h.magnitudes().quantile(percentile / 100.0);
            within(-end, end)
        }
        Method::Percentile => {
            let beyond = (1.0 - percentile / 100.0) / 2.0;
            within(h.quantile(beyond), h.quantile(1.0 - beyond))
        }
        Method::Entropy => {
            // Codes of one sign: half of them, unless the values have one sign only.
            let one_sided = !form.symmetric && (whole.min == 0.0 || whole.max == 0.0);
            let levels = if one_sided { form.levels } else { form.levels / 2 };
            let end = entropy::threshold(&h.magnitudes(), levels as usize);
            within(-end, end)
        }
        Method::Mse => mse::range(h, whole, form),
    })
}

#[cfg(test)]
mod tests;
