//! `inject-outliers`: outlier channels like those of large language models, in a small model that has none, for tests and
//! demonstrations of what they do to 8-bit activations (Dettmers et al., "LLM.int8()", NeurIPS 2022, section 4, says what they look like).
//!
//! A few channels of each value that linears read are multiplied, and the weights behind them divided. What is upstream (the
//! gain of a norm, a weight) takes the factor where the e-graph finds a place, so that the model computes what it did, with as
//! many ops. Channels that must have one scale, such as those of heads that share a key and value, are chosen together.

use crate::scale;
use crate::{Changed, Exactness, Filter, Pass, PassCx, PassError, eqsat, report};
use dialects::ir::{Module, infer};
use dialects::random::Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const NAME: &str = "inject-outliers";

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct InjectOutliers {
    /// Channels of each value that are multiplied; where some must have one scale, no more of them than complete the last
    /// such set.
    pub channels: usize,
    /// By what. A power of two changes no bit of what the model computes.
    pub gain: f32,
    /// What the channels are drawn with.
    pub seed: u64,
    /// Before which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Default for InjectOutliers {
    fn default() -> InjectOutliers {
        InjectOutliers { channels: 6, gain: 100.0, seed: 0, filter: Filter::default() }
    }
}

impl Pass for InjectOutliers {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "give activations outlier channels, as large language models have them, without changing the function"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let fail = |option, why| Err(PassError::Option { pass: NAME, option, why });
        if self.channels == 0 {
            return fail("channels", "expected at least 1, found 0".into());
        }
        if !(self.gain.is_finite() && self.gain > 0.0 && (1.0 / self.gain).is_normal()) {
            return fail("gain", format!("expected a positive number, found {}", self.gain));
        }
        // Contradictions are the verifier's to report.
        infer::infer(m, cx.ops);
        let groups = scale::found(m, cx, &self.filter);
        if let Some(small) = groups.iter().find(|g| g.k < self.channels) {
            let what = m.value_label(small.x);
            return fail(
                "channels",
                format!("expected up to {}, the channels of {what:?}, found {}", small.k, self.channels),
            );
        }
        let constants = m.consts.len();
        let nodes: Vec<_> = groups.iter().map(|g| scale::nodes(m, g)).collect();
        let mut left: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut made = 0u64;
        for (i, found) in groups.iter().enumerate().rev() {
            let group = scale::current(m, cx, NAME, &self.filter, found, &nodes[i])?;
            let place = match group.weights.iter().any(|w| scale::is_tied(m, w)) {
                true => Err("its weight is an embedding too, of which a copy would be made".into()),
                false => scale::placement(m, cx, &group),
            };
            match place {
                Ok(place) => {
                    let mut rng = Rng(self.seed ^ (i as u64).rotate_left(32));
                    let gains = self.choose(group.k, place.freedom.as_deref(), &mut rng);
                    let inverse: Vec<f32> = gains.iter().map(|g| 1.0 / g).collect();
                    scale::apply(m, cx, NAME, &group, &inverse)?;
                    made += 1;
                }
                Err(why) => left.entry(why).or_default().push(m.value_label(group.x)),
            }
        }
        for (why, values) in &left {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            cx.report.note(format!("{NAME}: {} has no outliers: {why}", report::listed(&values)));
        }
        if made == 0 && !cx.settings.allow_noop {
            let why = "no linear reads a value whose channels can be scaled at no cost".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        eqsat::settle(m, cx, NAME, constants)?;
        cx.count("inject-outliers.values", made);
        cx.report.note(format!(
            "{NAME}: {} channels of each of {made} values that linears read are multiplied by {}",
            self.channels, self.gain
        ));
        Ok(if made > 0 { Changed::Yes } else { Changed::No })
    }
}

impl InjectOutliers {
    /// The factor of each of `k` channels; channels of one class have one.
    fn choose(&self, k: usize, classes: Option<&[u32]>, rng: &mut Rng) -> Vec<f32> {
        let class = |channel: usize| classes.map_or(channel, |c| c[channel] as usize);
        let mut order: Vec<usize> = (0..(0..k).map(class).max().map_or(0, |c| c + 1)).collect();
        let mut gains = vec![1.0; k];
        let mut chosen = 0;
        for i in 0..order.len() {
            if chosen >= self.channels {
                break;
            }
            let other = i + rng.below(order.len() - i);
            order.swap(i, other);
            for channel in (0..k).filter(|&c| class(c) == order[i]) {
                gains[channel] = self.gain;
                chosen += 1;
            }
        }
        gains
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_channels_as_asked_for() {
        let pass = InjectOutliers { channels: 5, gain: 8.0, ..InjectOutliers::default() };
        let count = |gains: &[f32]| gains.iter().filter(|&&g| g == 8.0).count();
        for seed in 0..20 {
            let free = pass.choose(32, None, &mut Rng(seed));
            assert_eq!((free.len(), count(&free)), (32, 5));
            assert!(free.iter().all(|&g| g == 1.0 || g == 8.0));
            // Pairs are chosen whole.
            let classes: Vec<u32> = (0..32).map(|c| c / 2).collect();
            let tied = pass.choose(32, Some(&classes), &mut Rng(seed));
            assert_eq!(count(&tied), 6);
            assert!(tied.chunks(2).all(|pair| pair[0] == pair[1]));
        }
        assert_ne!(pass.choose(32, None, &mut Rng(1)), pass.choose(32, None, &mut Rng(2)));
    }
}
