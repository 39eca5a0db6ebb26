//! LSTM, GRU and RNN: one or two directions over a sequence, in single precision.
//!
//! Every cell multiplies the whole input by its weights first, and then walks the sequence, multiplying the state.
//! `H` is the hidden size; a cell has `G` gates in ONNX's order (LSTM: i o f c; GRU: z r h; RNN: one).

use crate::ir::{Dim, Type};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use std::borrow::Cow;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.LSTM",
        operands: (3, 8),
        results: (0, 3),
        infer: |cx| infer(cx, 4),
        eval: |cx| eval(cx, Cell::Lstm),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GRU",
        operands: (3, 6),
        results: (0, 2),
        infer: |cx| infer(cx, 3),
        eval: |cx| eval(cx, Cell::Gru),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.RNN",
        operands: (3, 6),
        results: (0, 2),
        infer: |cx| infer(cx, 1),
        eval: |cx| eval(cx, Cell::Rnn),
        ..OpDef::NEW
    },
];

#[derive(Clone, Copy, PartialEq)]
enum Cell {
    Lstm,
    Gru,
    Rnn,
}

impl Cell {
    fn gates(self) -> usize {
        match self {
            Cell::Lstm => 4,
            Cell::Gru => 3,
            Cell::Rnn => 1,
        }
    }

    /// Names of the activations where none are given.
    fn activations(self) -> &'static [&'static str] {
        match self {
            Cell::Lstm => &["Sigmoid", "Tanh", "Tanh"],
            Cell::Gru => &["Sigmoid", "Tanh"],
            Cell::Rnn => &["Tanh"],
        }
    }
}

fn infer(cx: &InferCx, gates: i64) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let unknown = |n: usize| vec![Dim::Unknown; n];
    let dims = |i: usize, n: usize| match cx.dims(i) {
        Some(d) if d.len() == n => Ok(d.to_vec()),
        Some(d) => Err(OpError::invalid(format!("operand {i} has {} dims, expected {n}", d.len()))),
        None => Ok(unknown(n)),
    };
    let (x, w) = (dims(0, 3)?, dims(1, 3)?);
    let batch_first = cx.attrs.int("layout").unwrap_or(0) != 0;
    let (seq, batch) = if batch_first { (&x[1], &x[0]) } else { (&x[0], &x[1]) };
    let hidden = cx.attrs.int("hidden_size").map(Dim::Known);
    let hidden = hidden.unwrap_or_else(|| w[1].div(&Dim::Known(gates)));
    let directions = Dim::Known(if cx.attrs.str("direction") == Some("bidirectional") { 2 } else { 1 });
    let (y, state) = match batch_first {
        false => ([seq, &directions, batch, &hidden], [&directions, batch, &hidden]),
        true => ([batch, seq, &directions, &hidden], [batch, &directions, &hidden]),
    };
    let state = Type::tensor(elem, state.map(Dim::clone));
    Ok(vec![Type::tensor(elem, y.map(Dim::clone)).into(), state.clone().into(), state.into()])
}

/// An activation with its parameters.
#[derive(Clone, Copy)]
struct Activation {
    f: fn(f32, f32, f32) -> f32,
    alpha: f32,
    beta: f32,
}

impl Activation {
    /// The activation `name` (case does not count), with the defaults of its parameters, and how many it takes.
    fn of(name: &str) -> Result<(Activation, usize), OpError> {
        let make = |f, taken, alpha, beta| Ok((Activation { f, alpha, beta }, taken));
        match name.to_ascii_lowercase().as_str() {
            "sigmoid" => make(|x, _, _| 1.0 / (1.0 + (-x).exp()), 0, 0.0, 0.0),
            "tanh" => make(|x, _, _| x.tanh(), 0, 0.0, 0.0),
            "relu" => make(|x, _, _| x.max(0.0), 0, 0.0, 0.0),
            "affine" => make(|x, a, b| a * x + b, 2, 1.0, 0.0),
            "leakyrelu" => make(|x, a, _| if x >= 0.0 { x } else { a * x }, 1, 0.01, 0.0),
            "thresholdedrelu" => make(|x, a, _| if x > a { x } else { 0.0 }, 1, 1.0, 0.0),
            "scaledtanh" => make(|x, a, b| a * (b * x).tanh(), 2, 1.0, 1.0),
            "hardsigmoid" => make(|x, a, b| (a * x + b).clamp(0.0, 1.0), 2, 0.2, 0.5),
            "elu" => make(|x, a, _| if x >= 0.0 { x } else { a * x.exp_m1() }, 1, 1.0, 0.0),
            "softsign" => make(|x, _, _| x / (1.0 + x.abs()), 0, 0.0, 0.0),
            "softplus" => make(|x, _, _| x.max(0.0) + (-x.abs()).exp().ln_1p(), 0, 0.0, 0.0),
            _ => Err(OpError::invalid(format!("unknown activation {name:?}"))),
        }
    }

    fn call(self, x: f32) -> f32 {
        (self.f)(x, self.alpha, self.beta)
    }
}

/// The activations of each direction, in order.
fn activations(cx: &EvalCx, defaults: &[&str], directions: usize) -> Result<Vec<Activation>, OpError> {
    let given: Option<Vec<String>> = match cx.attrs.get("activations") {
        Some(crate::ir::Attr::Strs(v)) => {
            Some(v.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect())
        }
        _ => None,
    };
    let wanted = defaults.len() * directions;
    let names =
        given.unwrap_or_else(|| defaults.iter().cycle().take(wanted).map(|s| s.to_string()).collect());
    if names.len() != wanted {
        return Err(OpError::invalid(format!("{} activations are given, expected {wanted}", names.len())));
    }
    let (mut alphas, mut betas) =
        ["activation_alpha", "activation_beta"].map(|n| cx.attrs.floats(n).unwrap_or(&[]).iter()).into();
    let one = |name: &String| {
        let (mut a, taken) = Activation::of(name)?;
        if taken > 0 {
            a.alpha = alphas.next().copied().unwrap_or(a.alpha);
        }
        if taken > 1 {
            a.beta = betas.next().copied().unwrap_or(a.beta);
        }
        Ok(a)
    };
    names.iter().map(one).collect()
}

/// Where the rows of sequences and states stand.
struct Shape {
    seq: usize,
    batch: usize,
    directions: usize,
    /// Whether the batch is the first dim of sequences and states.
    batch_first: bool,
}

impl Shape {
    fn x_row(&self, t: usize, b: usize) -> usize {
        if self.batch_first { b * self.seq + t } else { t * self.batch + b }
    }

    fn y_row(&self, t: usize, d: usize, b: usize) -> usize {
        match self.batch_first {
            false => (t * self.directions + d) * self.batch + b,
            true => (b * self.seq + t) * self.directions + d,
        }
    }

    fn state_row(&self, d: usize, b: usize) -> usize {
        if self.batch_first { b * self.directions + d } else { d * self.batch + b }
    }
}

/// Operand `i`, which must have `n` elements; `None` when it is left out.
fn operand<'a>(cx: &EvalCx<'a>, i: usize, n: usize) -> Result<Option<Cow<'a, [f32]>>, OpError> {
    let Some(t) = cx.opt(i)? else { return Ok(None) };
    match t.len() == n {
        true => Ok(Some(t.to_f32()?)),
        false => {
            Err(OpError::invalid(format!("operand {i} has shape {:?}, expected {n} elements", t.shape())))
        }
    }
}

fn eval(cx: &EvalCx, cell: Cell) -> Evaluated {
    let x = cx.input(0)?;
    let (&[first, second, input], &[directions, width, _]) = (x.shape(), cx.input(1)?.shape()) else {
        return Err(OpError::invalid("X and W must have 3 dims"));
    };
    let reverse_first = match (cx.attrs.str("direction").unwrap_or("forward"), directions) {
        ("forward", 1) | ("bidirectional", 2) => false,
        ("reverse", 1) => true,
        (other, n) => return Err(OpError::invalid(format!("direction {other:?} with weights for {n}"))),
    };
    let batch_first = cx.int_or("layout", 0) != 0;
    let (seq, batch) = if batch_first { (second, first) } else { (first, second) };
    let (gates, hidden) = (cell.gates(), width / cell.gates());
    let s = Shape { seq, batch, directions, batch_first };
    let need = |i: usize, n: usize| {
        operand(cx, i, n)?.ok_or_else(|| OpError::invalid(format!("operand {i} is missing")))
    };
    let w = need(1, directions * gates * hidden * input)?;
    let r = need(2, directions * gates * hidden * hidden)?;
    let bias = operand(cx, 3, directions * 2 * gates * hidden)?;
    let lengths: Vec<usize> = match cx.opt(4)? {
        None => vec![seq; batch],
        Some(t) => {
            let fits = |&n: &i64| usize::try_from(n).ok().filter(|&n| n <= seq);
            let lengths: Option<Vec<usize>> = t.to_i64()?.iter().map(fits).collect();
            let lengths = lengths.filter(|l| l.len() == batch);
            lengths.ok_or_else(|| OpError::invalid(format!("sequence_lens do not fit {batch} x {seq}")))?
        }
    };
    let states = strided::count(&[directions, batch, hidden])?;
    let zeros = || Cow::Owned(vec![0f32; states]);
    let mut h = operand(cx, 5, states)?.unwrap_or_else(zeros).into_owned();
    let lstm = cell == Cell::Lstm;
    let mut c = if lstm { operand(cx, 6, states)? } else { None }.unwrap_or_else(zeros).into_owned();
    let peepholes = if lstm { operand(cx, 7, directions * 3 * hidden)? } else { None };
    let functions = activations(cx, cell.activations(), directions)?;
    let clip = cx.attrs.float("clip").filter(|c| *c > 0.0).unwrap_or(f32::INFINITY);
    let values = x.to_f32()?;
    let mut y = vec![0f32; strided::count(&[seq, directions, batch, hidden])?];
    strided::count(&[seq, batch, gates * hidden])?;
    let gate_width = gates * hidden;
    for d in 0..directions {
        let reverse = reverse_first || d == 1;
        let bias = bias.as_ref().map(|b| &b[d * 2 * gate_width..][..2 * gate_width]);
        let mut from_x = vec![0f32; seq * batch * gate_width];
        let w = Mat::new(&w[d * gate_width * input..], gate_width, input);
        gemm::matmul(Mat::new(&values, seq * batch, input), w.t(), &mut from_x);
        let step = Step {
            cell,
            hidden,
            r: &r[d * gate_width * hidden..][..gate_width * hidden],
            bias,
            peepholes: peepholes.as_ref().map(|p| &p[d * 3 * hidden..][..3 * hidden]),
            functions: &functions[d * cell.activations().len()..],
            clip,
            flag: cx.int_or(if lstm { "input_forget" } else { "linear_before_reset" }, 0) != 0,
        };
        // Rows of one step stand together, whatever the layout of the states.
        let mut now_h = vec![0f32; batch * hidden];
        let mut now_c = vec![0f32; batch * hidden];
        let rows = |b: usize| (s.state_row(d, b) * hidden, b * hidden);
        for b in 0..batch {
            let (from, to) = rows(b);
            now_h[to..to + hidden].copy_from_slice(&h[from..from + hidden]);
            now_c[to..to + hidden].copy_from_slice(&c[from..from + hidden]);
        }
        for i in 0..seq {
            let recurrent = step.recurrent(&now_h, batch);
            for b in (0..batch).filter(|&b| i < lengths[b]) {
                let t = if reverse { lengths[b] - 1 - i } else { i };
                let x = &from_x[s.x_row(t, b) * gate_width..][..gate_width];
                let state = b * hidden..(b + 1) * hidden;
                let recurrent = &recurrent[b * gate_width..][..gate_width];
                step.advance(x, recurrent, &mut now_h[state.clone()], &mut now_c[state.clone()]);
                y[s.y_row(t, d, b) * hidden..][..hidden].copy_from_slice(&now_h[state]);
            }
        }
        for b in 0..batch {
            let (from, to) = rows(b);
            h[from..from + hidden].copy_from_slice(&now_h[to..to + hidden]);
            c[from..from + hidden].copy_from_slice(&now_c[to..to + hidden]);
        }
    }
    let (y_shape, state_shape) = match batch_first {
        false => ([seq, directions, batch, hidden], [directions, batch, hidden]),
        true => ([batch, seq, directions, hidden], [batch, directions, hidden]),
    };
    let elem = x.elem();
    let mut out =
        vec![Tensor::from_f32(elem, &y_shape, y)?.into(), Tensor::from_f32(elem, &state_shape, h)?.into()];
    if lstm {
        out.push(Tensor::from_f32(elem, &state_shape, c)?.into());
    }
    Ok(out)
}

/// One direction's weights, applied to one step.
struct Step<'a> {
    cell: Cell,
    hidden: usize,
    /// `[G * H, H]`.
    r: &'a [f32],
    /// Of the input and of the state, `[G * H]` each.
    bias: Option<&'a [f32]>,
    /// For the gates i, o and f.
    peepholes: Option<&'a [f32]>,
    functions: &'a [Activation],
    clip: f32,
    /// `input_forget` or `linear_before_reset`.
    flag: bool,
}

impl Step<'_> {
    /// The states `[batch, H]` times the recurrent weights: `[batch, G * H]`.
    fn recurrent(&self, h: &[f32], batch: usize) -> Vec<f32> {
        let width = self.cell.gates() * self.hidden;
        let mut out = vec![0f32; batch * width];
        gemm::matmul(Mat::new(h, batch, self.hidden), Mat::new(self.r, width, self.hidden).t(), &mut out);
        out
    }

    fn bias(&self, gate: usize, j: usize) -> [f32; 2] {
        let at = gate * self.hidden + j;
        self.bias.map_or([0.0; 2], |b| [b[at], b[b.len() / 2 + at]])
    }

    fn call(&self, function: usize, x: f32) -> f32 {
        // A NaN passes `clamp`, and infinity is no clip.
        self.functions[function].call(x.clamp(-self.clip, self.clip))
    }

    /// One row: `x` and `recurrent` are its `[G * H]` products; `h` and `c` become the next state.
    fn advance(&self, x: &[f32], recurrent: &[f32], h: &mut [f32], c: &mut [f32]) {
        let n = self.hidden;
        let sum = |gate: usize, j: usize| {
            let [wb, rb] = self.bias(gate, j);
            x[gate * n + j] + recurrent[gate * n + j] + wb + rb
        };
        match self.cell {
            Cell::Rnn => (0..n).for_each(|j| h[j] = self.call(0, sum(0, j))),
            Cell::Lstm => {
                for j in 0..n {
                    let peep = |gate: usize, c: f32| self.peepholes.map_or(0.0, |p| p[gate * n + j] * c);
                    let i = self.call(0, sum(0, j) + peep(0, c[j]));
                    let f = if self.flag { 1.0 - i } else { self.call(0, sum(2, j) + peep(2, c[j])) };
                    c[j] = f * c[j] + i * self.call(1, sum(3, j));
                    let o = self.call(0, sum(1, j) + peep(1, c[j]));
                    h[j] = o * self.functions[2].call(c[j]);
                }
            }
            Cell::Gru => {
                let z: Vec<f32> = (0..n).map(|j| self.call(0, sum(0, j))).collect();
                let r: Vec<f32> = (0..n).map(|j| self.call(0, sum(1, j))).collect();
                let candidate: Vec<f32> = if self.flag {
                    let part = |j: usize| {
                        let [wb, rb] = self.bias(2, j);
                        x[2 * n + j] + wb + r[j] * (recurrent[2 * n + j] + rb)
                    };
                    (0..n).map(part).collect()
                } else {
                    let reset: Vec<f32> = r.iter().zip(h.iter()).map(|(r, h)| r * h).collect();
                    let part = |j: usize| {
                        let row = &self.r[(2 * n + j) * n..][..n];
                        let [wb, rb] = self.bias(2, j);
                        x[2 * n + j] + row.iter().zip(&reset).map(|(a, b)| a * b).sum::<f32>() + wb + rb
                    };
                    (0..n).map(part).collect()
                };
                (0..n).for_each(|j| h[j] = (1.0 - z[j]) * self.call(1, candidate[j]) + z[j] * h[j]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("recurrent");
    }
}
