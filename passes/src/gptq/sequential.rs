//! Calibration that sees what is quantized already: layer after layer, on the activations `x'` that the quantized layers
//! before it make.
//!
//! The float model runs beside the quantized one, and a weight is to give the *float* model's output from `x'`, not its
//! own (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025; Zhang et al.,
//! "Qronos", 2025): `min |Z - (R' + V X')|^2` over `V`, where `Z` is the float model's value after the linear, and after the
//! residual connection that its output joins, whose error in the quantized model is `R'`'s. With the difference
//! `D = Z - Z'` of the two models, while the weight `W` is still float in both, the solution is
//! `V = W + D X'^T (X' X'^T + damp)^-1`, and `V` is then rounded under `X' X'^T`.

use super::NAME;
use crate::gram::Gram;
use crate::group::Group;
use crate::quantize::Shared;
use crate::{Leg, PassCx, PassError, Stream};
use dialects::exec::ExecError;
use dialects::ir::{Module, Op, Use, Uses, Value, graph};
use dialects::kernels::gemm::{self, Mat};
use dialects::ops::Item;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};

/// What the data says of one group.
pub struct Seen {
    /// The Gram matrix of what the quantized model gives to the group.
    pub gram: Gram,
    /// For each weight `D^T X'`, `[N, K]`, unless it is used more than once.
    pub pull: Vec<Option<Vec<f32>>>,
}

/// The data on its way through the float model and the one that is being quantized.
pub struct Pair<'e> {
    float: Module,
    /// Whether the two models differ: before the first weight is quantized there is nothing to make up for.
    pub differ: bool,
    exact: Box<dyn Stream + 'e>,
    quantized: Box<dyn Stream + 'e>,
}

/// A weight's place in the comparison: after its linear, or after the residual connection.
fn target(m: &Module, uses: &Uses, op: Op) -> Option<Value> {
    let mut y = m.ops[op].result(0)?;
    // A bias stands between in many exports.
    for _ in 0..2 {
        let [Use::Operand(next, index)] = uses.of(y) else { return Some(y) };
        let data = &m.ops[*next];
        let other = data.operand(1 - (*index).min(1));
        let Some(other) = other.filter(|_| data.is("onnx.Add") && data.region == m.top) else {
            return Some(y);
        };
        let sum = data.result(0)?;
        // A sum that spreads the output over more dims is another thing.
        let shape = |v: Value| m.ty(v).dims().map(|d| (d.len(), d.last().cloned()));
        if shape(sum) != shape(y) {
            return Some(y);
        }
        y = sum;
        if m.const_of(other).is_none() {
            return Some(y);
        }
    }
    Some(y)
}

impl<'e> Pair<'e> {
    /// The data before the model, of which nothing is quantized yet.
    pub fn new(m: &Module, cx: &PassCx<'e>) -> Result<Pair<'e>, PassError> {
        let env = cx.env;
        Ok(Pair { float: m.clone(), differ: false, exact: env.stream()?, quantized: env.stream()? })
    }

    /// Leads the data to the value `to`, and looks from there at what these groups are given.
    pub fn see(&mut self, m: &Module, to: Value, groups: &[&Group]) -> Result<Vec<Seen>, PassError> {
        let uses = m.uses();
        let target = |w: &Shared| match &w.uses[..] {
            [one] => target(m, &uses, one.op),
            _ => None,
        };
        // Models that do not differ yet are not compared, nor is what only a comparison reads computed.
        let target = |w: &Shared| self.differ.then(|| target(w)).flatten();
        let targets: Vec<Vec<Option<Value>>> =
            groups.iter().map(|g| g.weights.iter().map(target).collect()).collect();
        let to = [to];
        let mut peek: Vec<Value> = groups.iter().map(|g| g.x).filter(|x| !to.contains(x)).collect();
        peek.extend(targets.iter().flatten().flatten());
        let all: Vec<Value> = to.iter().chain(&peek).copied().collect();
        // Nothing is changed in the float model, which is led as far as it is looked at.
        let mut exact = match self.differ {
            true => Some(self.exact.advance(&self.float, &all, &[])?),
            false => None,
        };
        let mut quantized = self.quantized.advance(m, &to, &peek)?;
        let mut sums: Vec<Sums> = groups.iter().zip(&targets).map(|(g, t)| Sums::new(g, t)).collect();
        while let Some(found) = batch(&mut *quantized)? {
            let float = match &mut exact {
                Some(exact) => batch(&mut **exact)?,
                None => None,
            };
            let values = |from: &HashMap<Value, Item>, v: Value| -> Result<Vec<f32>, PassError> {
                let fail = |why: String| PassError::At { pass: NAME, what: m.value_label(v), why };
                let item = from.get(&v).ok_or_else(|| fail("was not computed".into()))?;
                let t = item.tensor().map_err(|e| fail(e.to_string()))?;
                Ok(t.to_f32().map_err(|e| fail(e.to_string()))?.into_owned())
            };
            for ((group, targets), sums) in groups.iter().zip(&targets).zip(&mut sums) {
                let x = values(&found, group.x)?;
                if x.len() % group.k.max(1) != 0 {
                    let why = format!("{} numbers are no rows of {}", x.len(), group.k);
                    return Err(PassError::At { pass: NAME, what: m.value_label(group.x), why });
                }
                let mut differences = Vec::new();
                for target in targets {
                    let (Some(float), Some(v)) = (&float, target) else {
                        differences.push(None);
                        continue;
                    };
                    let (z, now) = (values(float, *v)?, values(&found, *v)?);
                    differences.push(Some(z.iter().zip(&now).map(|(a, b)| a - b).collect()));
                }
                sums.add(&x, &differences);
            }
        }
        if let Some(mut exact) = exact {
            // Its end is the end of the leg.
            batch(&mut *exact)?;
        }
        let seen: Vec<Seen> = sums.into_iter().map(Sums::finish).collect();
        groups.iter().zip(&seen).try_for_each(|(g, s)| s.gram.check(m, g.x, NAME))?;
        Ok(seen)
    }
}

/// What is summed over the data for one group.
struct Sums {
    k: usize,
    gram: Gram,
    pull: Vec<Option<Vec<f32>>>,
    /// Rows that are yet to be added: few at a time would cost as much as many.
    x: Vec<f32>,
    differences: Vec<Vec<f32>>,
}

impl Sums {
    fn new(g: &Group, targets: &[Option<Value>]) -> Sums {
        let pull = g.weights.iter().zip(targets).map(|(w, t)| t.map(|_| vec![0f32; w.first().n * g.k]));
        let differences = targets.iter().map(|_| Vec::new()).collect();
        Sums { k: g.k, gram: Gram::new(g.k), pull: pull.collect(), x: Vec::new(), differences }
    }

    /// Adds rows of `x`, and for each weight that has a place to compare those of its differences.
    fn add(&mut self, x: &[f32], differences: &[Option<Vec<f32>>]) {
        self.gram.add(x);
        if differences.iter().all(Option::is_none) {
            return;
        }
        self.x.extend_from_slice(x);
        for (own, new) in self.differences.iter_mut().zip(differences) {
            own.extend(new.iter().flatten());
        }
        if self.x.len() >= gemm::GRAM_ROWS * self.k {
            self.flush();
        }
    }

    fn flush(&mut self) {
        for (pull, d) in self.pull.iter_mut().zip(&mut self.differences) {
            if let Some(pull) = pull {
                add_product(pull, d, &self.x, self.k);
            }
            d.clear();
        }
        self.x.clear();
    }

    fn finish(mut self) -> Seen {
        self.flush();
        Seen { gram: self.gram.finish(), pull: self.pull }
    }
}

/// The values of the next batch.
fn batch(leg: &mut dyn Leg) -> Result<Option<HashMap<Value, Item>>, PassError> {
    let mut out = HashMap::new();
    let more = leg.step(&mut |v, item| -> Result<(), ExecError> {
        out.insert(v, item.clone());
        Ok(())
    })?;
    Ok(more.then_some(out))
}

/// Outputs that one task adds to.
const TILE: usize = 64;

/// `sum += d^T x` for `d` of `[rows, N]` and `x` of `[rows, K]`.
fn add_product(sum: &mut [f32], d: &[f32], x: &[f32], k: usize) {
    let n = sum.len() / k.max(1);
    let rows = x.len() / k.max(1);
    let (d, x) = (Mat::new(d, rows, n), Mat::new(x, rows, k));
    sum.par_chunks_mut(TILE * k).enumerate().for_each(|(i, sum)| {
        let from = i * TILE;
        let mut part = vec![0f32; sum.len()];
        gemm::tile(d.cols(from, from + sum.len() / k).t(), x, &mut part);
        sum.iter_mut().zip(&part).for_each(|(s, p)| *s += p);
    });
}

/// Cuts groups, in program order, into blocks: from one to the next there is a place in the program where a single value
/// that depends on a linear of them is still to be read, such as the sum that runs through a transformer.
pub fn blocks(m: &Module, groups: &[Group]) -> Vec<usize> {
    let ops = &m.regions[m.top].ops;
    let place: HashMap<Op, usize> = ops.iter().enumerate().map(|(i, &op)| (op, i)).collect();
    let linears = |g: &Group| {
        g.weights.iter().flat_map(|w| &w.uses).filter_map(|l| place.get(&l.op).copied()).collect::<Vec<_>>()
    };
    let starts: Vec<usize> = groups.iter().map(|g| linears(g).into_iter().min().unwrap_or(0)).collect();
    let own: HashSet<usize> = groups.iter().flat_map(linears).collect();
    let mut last: HashMap<Value, usize> = HashMap::new();
    for (i, &op) in ops.iter().enumerate() {
        last.extend(graph::reads(m, op).into_iter().map(|v| (v, i)));
    }
    last.extend(m.regions[m.top].results.iter().map(|&v| (v, ops.len())));
    let (mut touched, mut live) = (HashSet::new(), HashSet::new());
    // Whether a single value was live at some place since the last cut.
    let (mut narrow, mut cuts) = (false, vec![0]);
    for (i, &op) in ops.iter().enumerate() {
        if let Some(g) = starts.iter().position(|&s| s == i)
            && narrow
            && g > 0
        {
            cuts.push(g);
        }
        if own.contains(&i) {
            narrow = false;
        }
        if own.contains(&i) || graph::reads(m, op).iter().any(|v| touched.contains(v)) {
            for v in m.ops[op].results.iter().flatten() {
                touched.insert(*v);
                live.insert(*v);
            }
        }
        live.retain(|v| last.get(v).is_some_and(|&at| at > i));
        narrow |= live.len() == 1;
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::groups;
    use crate::linear::linears;
    use dialects::ir::{infer, parse::parse};
    use dialects::ops::Ops;

    fn model(text: &str) -> Module {
        let mut m = parse(text).unwrap().module;
        infer::infer(&mut m, &Ops::standard());
        m
    }

    fn all(m: &Module) -> Vec<Group> {
        groups(m, linears(m).into_iter().map(|l| Shared { uses: vec![l] }).collect())
    }

    const RESIDUAL: &str = "module ir_version=10 opsets {onnx=23}
graph @main(%x : tensor<3x2xf32>) {
  const %a : tensor<2x2xf32> [1, 2, 3, 4]
  const %b : tensor<2x2xf32> [1, 2, 3, 5]
  const %c : tensor<2x2xf32> [1, 2, 3, 6]
  const %d : tensor<2x2xf32> [1, 2, 3, 7]
  const %bias : tensor<2xf32> [1, 2]
  %q = onnx.MatMul(%x, %a) : tensor<3x2xf32>
  %k = onnx.MatMul(%x, %b) : tensor<3x2xf32>
  %s = onnx.Mul(%q, %k) : tensor<3x2xf32>
  %r = onnx.Add(%s, %x) : tensor<3x2xf32>
  %h = onnx.MatMul(%r, %c) : tensor<3x2xf32>
  %g = onnx.Relu(%h) : tensor<3x2xf32>
  %o = onnx.MatMul(%g, %d) : tensor<3x2xf32>
  %p = onnx.Add(%o, %bias) : tensor<3x2xf32>
  %y = onnx.Add(%r, %p) : tensor<3x2xf32>
  return %y
}
";

    /// One product passes between `q`, `k` and what follows; between `c` and `d` the sum passes beside.
    #[test]
    fn blocks_end_where_one_value_passes() {
        let m = model(RESIDUAL);
        let groups = all(&m);
        assert_eq!(groups.iter().map(|g| g.weights.len()).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!(blocks(&m, &groups), [0, 1]);
    }

    /// A linear is compared behind its bias and the residual connection, or where it is read by something else.
    #[test]
    fn targets_reach_over_the_residual() {
        let m = model(RESIDUAL);
        let names: Vec<String> =
            linears(&m).iter().map(|l| m.value_label(target(&m, &m.uses(), l.op).unwrap())).collect();
        assert_eq!(names, ["q", "k", "h", "y"]);
    }

    #[test]
    fn products_add_up() {
        // D = [[1, 2], [3, 4]], X = [[5, 6, 7], [8, 9, 10]]: D^T X = [[29, 33, 37], [42, 48, 54]], by hand.
        let mut sum = vec![1f32; 6];
        add_product(&mut sum, &[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 3);
        assert_eq!(sum, [30.0, 34.0, 38.0, 43.0, 49.0, 55.0]);
    }
}
