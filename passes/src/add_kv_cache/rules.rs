//! What an op reads when only some rows of its result are wanted: per op, how axes of operands and results belong
//! together.
//!
//! A [`View`] of a value says along which of its axes only the new positions are there. Along its other axes of the
//! sequence it has past and new ones.

use super::sizes::{Size, Sizes};
use dialects::ir::{Module, Op, OpData, Value};
use std::collections::HashSet;

/// A set of axes, as bits: those that hold the new positions only.
pub type View = u64;

/// The op reads the whole length of everything.
pub const WHOLE: View = 0;

/// The view with the axis `i` cut; none has more axes than a view has bits.
pub fn axis(i: usize) -> View {
    if i < RANK { 1 << i } else { 0 }
}

/// Axes that a value has at most, of which anything can be said.
pub const RANK: usize = View::BITS as usize;

/// Ops each of whose elements depends on one element of every operand, broadcast.
const ELEMENTWISE: &[&str] = &[
    "onnx.Abs",
    "onnx.Add",
    "onnx.And",
    "onnx.BitwiseAnd",
    "onnx.BitwiseNot",
    "onnx.BitwiseOr",
    "onnx.Cast",
    "onnx.Ceil",
    "onnx.Celu",
    "onnx.Clip",
    "onnx.Cos",
    "onnx.DequantizeLinear",
    "onnx.Div",
    "onnx.Dropout",
    "onnx.Elu",
    "onnx.Equal",
    "onnx.Erf",
    "onnx.Exp",
    "onnx.Expand",
    "onnx.Floor",
    "onnx.Gelu",
    "onnx.Greater",
    "onnx.GreaterOrEqual",
    "onnx.HardSigmoid",
    "onnx.HardSwish",
    "onnx.Identity",
    "onnx.IsInf",
    "onnx.IsNaN",
    "onnx.LeakyRelu",
    "onnx.Less",
    "onnx.LessOrEqual",
    "onnx.Log",
    "onnx.Max",
    "onnx.Mean",
    "onnx.Min",
    "onnx.Mish",
    "onnx.Mod",
    "onnx.Mul",
    "onnx.Neg",
    "onnx.Not",
    "onnx.Or",
    "onnx.PRelu",
    "onnx.Pow",
    "onnx.QuantizeLinear",
    "onnx.Reciprocal",
    "onnx.Relu",
    "onnx.Round",
    "onnx.Selu",
    "onnx.Sigmoid",
    "onnx.Sign",
    "onnx.Sin",
    "onnx.Softplus",
    "onnx.Softsign",
    "onnx.Sqrt",
    "onnx.Sub",
    "onnx.Sum",
    "onnx.Swish",
    "onnx.Tanh",
    "onnx.Where",
    "onnx.Xor",
    "com.microsoft.BiasGelu",
    "com.microsoft.FastGelu",
    "com.microsoft.Gelu",
    "com.microsoft.QuickGelu",
];

/// Ops that work along their last axes, from `axis` on, and on each row alone.
const ROWWISE: &[&str] = &[
    "onnx.LayerNormalization",
    "onnx.LogSoftmax",
    "onnx.RMSNormalization",
    "onnx.SimplifiedLayerNormalization",
    "onnx.Softmax",
    "com.microsoft.SkipLayerNormalization",
    "com.microsoft.SkipSimplifiedLayerNormalization",
];

/// Ops that move elements without changing their order.
pub const RESHAPES: &[&str] = &["onnx.Flatten", "onnx.Reshape", "onnx.Squeeze", "onnx.Unsqueeze"];

/// Products of rows with a weight that has codes, scales and more.
const PACKED: &[&str] = &["com.microsoft.MatMulBnb4", "com.microsoft.MatMulNBits"];

/// What the rules know of a module.
pub struct Facts<'a> {
    /// The module.
    pub m: &'a Module,
    /// The lengths of its axes.
    pub sizes: &'a Sizes,
    /// Values whose contents depend on the tokens.
    pub main: &'a HashSet<Value>,
}

/// A number of steps: a constant, and how often batch and sequence are factors.
type Steps = (i64, u32, u32);

/// What each operand is to be, or why nothing can be said.
pub type Rule = Result<Vec<View>, String>;

impl Facts<'_> {
    /// The axes' lengths; an error where the rank is unknown.
    fn sizes(&self, v: Value) -> Result<&[Option<Size>], String> {
        self.sizes.of(v).ok_or_else(|| format!("expected {:?} of a known rank", self.m.value_label(v)))
    }

    /// Integers that an operand holds, when they are known.
    pub fn ints(&self, v: Value) -> Option<Vec<i64>> {
        if let Some(sym) = &self.m.values[v].sym {
            return sym.iter().map(|d| d.known()).collect();
        }
        let konst = &self.m.consts[self.m.const_of(v)?];
        let t = dialects::tensor::Tensor::from_const(konst).ok()?;
        t.to_i64().ok().map(|v| v.into_owned())
    }

    /// Whether the sequence lies along this axis; axes of unknown length are none of our business.
    fn lies(&self, v: Value, i: usize) -> bool {
        self.sizes.of(v).and_then(|s| s.get(i).copied().flatten()).is_some_and(|s| s.seq)
    }

    /// The views of the operands of `op`, when the view `out` of its first result is wanted.
    pub fn operands(&self, op: Op, out: View) -> Rule {
        let data = &self.m.ops[op];
        let name = data.name.as_str();
        let y = data.results.iter().flatten().next().copied().ok_or("an op without results")?;
        let views = match name {
            "onnx.Transpose" => self.transpose(data, y, out)?,
            "onnx.Gather" | "com.microsoft.GatherBlockQuantized" => self.gather(data, y, out)?,
            "onnx.Slice" => self.slice(data, y, out)?,
            "onnx.Split" | "onnx.Concat" => self.along(data, y, out)?,
            "onnx.MatMul" | "onnx.MatMulInteger" => self.product(data, y, out)?,
            "onnx.Gemm" => self.gemm(data, y, out)?,
            "onnx.RotaryEmbedding" => self.rotary(data, out, [1, 2], 3)?,
            "com.microsoft.RotaryEmbedding" => self.rotary(data, out, [2, 3], 1)?,
            _ if name.starts_with("onnx.Reduce") => self.reduce(data, y, out)?,
            _ if RESHAPES.contains(&name) => self.reshape(data, y, out)?,
            _ if PACKED.contains(&name) => self.rows(data, y, out)?,
            _ if ROWWISE.contains(&name) => {
                let rank = self.sizes(y)?.len();
                let from = place(data.attrs.int("axis").unwrap_or(-1), rank);
                let alone = matches!(name, "onnx.Softmax" | "onnx.LogSoftmax");
                let to = if alone { from + 1 } else { rank };
                self.free(y, from..to, out)?;
                self.broadcast(data, y, out)?
            }
            _ if ELEMENTWISE.contains(&name) => self.broadcast(data, y, out)?,
            _ => return Err("it is not known how it treats a sequence".into()),
        };
        debug_assert_eq!(views.len(), data.operands.len());
        Ok(views)
    }

    /// Refuses where only new positions are there along an axis that the op works along, or where it mixes positions.
    fn free(&self, v: Value, axes: impl IntoIterator<Item = usize>, view: View) -> Result<(), String> {
        match axes.into_iter().find(|&i| view & axis(i) != 0) {
            Some(i) => Err(format!("it works along axis {i}, along which the sequence lies")),
            None if self.sizes.of(v).is_none() => Err("expected a known rank".into()),
            None => Ok(()),
        }
    }

    /// Operands that broadcast to the result.
    fn broadcast(&self, data: &OpData, y: Value, out: View) -> Rule {
        let rank = self.sizes(y)?.len();
        let shape = data.is("onnx.Expand").then_some(1);
        let one = |(i, v): (usize, &Option<Value>)| -> Result<View, String> {
            let Some(v) = v.filter(|_| Some(i) != shape) else { return Ok(WHOLE) };
            let own = self.sizes(v)?.len();
            let mut view = WHOLE;
            for a in (0..own).filter(|a| out & axis(a + rank - own) != 0) {
                match self.sizes(v)?[a] {
                    Some(s) if s.seq => view |= axis(a),
                    Some(s) if s == Size::fixed(1) => {}
                    _ => return Err(format!("axis {a} of {:?} is not the sequence", self.m.value_label(v))),
                }
            }
            Ok(view)
        };
        if data.operands.iter().flatten().any(|&v| self.sizes.of(v).is_some_and(|s| s.len() > rank)) {
            return Err("an operand of a higher rank than the result".into());
        }
        data.operands.iter().enumerate().map(one).collect()
    }

    fn transpose(&self, data: &OpData, y: Value, out: View) -> Rule {
        let rank = self.sizes(y)?.len();
        let default: Vec<i64> = (0..rank as i64).rev().collect();
        let perm = data.attrs.ints("perm").unwrap_or(&default);
        let from = |(i, &p): (usize, &i64)| if out & axis(i) != 0 { axis(place(p, rank)) } else { 0 };
        Ok(vec![perm.iter().enumerate().map(from).fold(WHOLE, |a, b| a | b)])
    }

    /// The axis of `x` with the sequence that becomes that of each axis of `y`: elements keep their order, so as many
    /// must stand before it.
    fn reshape(&self, data: &OpData, y: Value, out: View) -> Rule {
        let x = data.operand(0).ok_or("an operand is missing")?;
        let (from, to) = (self.sequence_axes(x)?, self.sequence_axes(y)?);
        let mut views = vec![WHOLE; data.operands.len()];
        for (i, before) in to.iter().filter(|(i, _)| out & axis(*i) != 0) {
            let (j, _) = from
                .iter()
                .find(|(_, b)| b == before)
                .ok_or_else(|| format!("axis {i} of its result mixes the sequence with other axes"))?;
            views[0] |= axis(*j);
        }
        Ok(views)
    }

    /// The axes along which the sequence lies, with the number of steps of all that is slower.
    fn sequence_axes(&self, v: Value) -> Result<Vec<(usize, Steps)>, String> {
        let (mut before, mut found) = (Some((1i64, 0u32, 0u32)), Vec::new());
        for (i, size) in self.sizes(v)?.iter().enumerate() {
            if let (Some(Size { fixed, batch, seq: true }), Some((n, b, s))) = (size, before) {
                found.push((i, (n.saturating_mul(*fixed), b + u32::from(*batch), s)));
            }
            before = before.zip(*size).map(|((n, b, s), size)| {
                (n.saturating_mul(size.fixed), b + u32::from(size.batch), s + u32::from(size.seq))
            });
        }
        Ok(found)
    }

    fn gather(&self, data: &OpData, y: Value, out: View) -> Rule {
        let (Some(table), Some(index)) = (data.operand(0), data.operand(1)) else {
            return Err("an operand is missing".into());
        };
        let (rank, wide) = (self.sizes(table)?.len(), self.sizes(index)?.len());
        let name = if data.is("onnx.Gather") { "axis" } else { "gather_axis" };
        let at = place(data.attrs.int(name).unwrap_or(0), rank);
        if self.main.contains(&table) && self.lies(table, at) {
            return Err("it picks positions of the sequence".into());
        }
        let mut views = vec![WHOLE; data.operands.len()];
        for i in (0..self.sizes(y)?.len()).filter(|&i| out & axis(i) != 0) {
            match i {
                _ if i < at => views[0] |= axis(i),
                _ if i < at + wide => views[1] |= axis(i - at),
                _ => views[0] |= axis(i + 1 - wide),
            }
        }
        Ok(views)
    }

    fn slice(&self, data: &OpData, y: Value, out: View) -> Rule {
        let rank = self.sizes(y)?.len();
        let ints = |i: usize| data.operand(i).map(|v| self.ints(v));
        let count = ints(1).flatten().map_or(rank, |v| v.len());
        let axes = match ints(3) {
            None => (0..count as i64).collect(),
            Some(axes) => axes.ok_or("expected known axes")?,
        };
        for a in axes.into_iter().map(|a| place(a, rank)) {
            if self.main.contains(&y) && data.operand(0).is_some_and(|x| self.lies(x, a)) {
                return Err(format!("it cuts the sequence, along axis {a}"));
            }
            self.free(y, [a], out)?;
        }
        let mut views = vec![WHOLE; data.operands.len()];
        views[0] = out;
        Ok(views)
    }

    /// Split and Concat: all axes but one are alike.
    fn along(&self, data: &OpData, y: Value, out: View) -> Rule {
        let at = place(data.attrs.int("axis").unwrap_or(0), self.sizes(y)?.len());
        let cuts = data.operands.iter().flatten().any(|&v| self.main.contains(&v) && self.lies(v, at));
        if cuts {
            return Err(format!("it cuts or joins the sequence, along axis {at}"));
        }
        self.free(y, [at], out)?;
        let split = data.is("onnx.Split");
        let view = |i: usize| if split && i > 0 { WHOLE } else { out };
        Ok((0..data.operands.len()).map(view).collect())
    }

    fn reduce(&self, data: &OpData, y: Value, out: View) -> Rule {
        let x = data.operand(0).ok_or("an operand is missing")?;
        let rank = self.sizes(x)?.len();
        let given = data.attrs.ints("axes").map(<[i64]>::to_vec);
        let axes = match (given, data.operand(1)) {
            (Some(axes), _) => axes,
            (None, Some(v)) => self.ints(v).ok_or("expected known axes")?,
            (None, None) => (0..rank as i64).collect(),
        };
        let axes: HashSet<usize> = axes.into_iter().map(|a| place(a, rank)).collect();
        if self.main.contains(&x) && axes.iter().any(|&a| self.lies(x, a)) {
            return Err("it reduces over the sequence".into());
        }
        let kept = data.attrs.int("keepdims").unwrap_or(1) != 0;
        let left: Vec<usize> = (0..rank).filter(|a| kept || !axes.contains(a)).collect();
        self.free(y, left.iter().enumerate().filter(|(_, a)| axes.contains(a)).map(|(i, _)| i), out)?;
        let mut views = vec![WHOLE; data.operands.len()];
        views[0] =
            left.iter().enumerate().filter(|(i, _)| out & axis(*i) != 0).fold(0, |v, (_, a)| v | axis(*a));
        Ok(views)
    }

    /// The product of matrices: rows belong to the first operand, columns to the second, and what is summed over is
    /// there in its whole length.
    fn product(&self, data: &OpData, y: Value, out: View) -> Rule {
        let (Some(a), Some(b)) = (data.operand(0), data.operand(1)) else {
            return Err("an operand is missing".into());
        };
        let (ra, rb, r) = (self.sizes(a)?.len(), self.sizes(b)?.len(), self.sizes(y)?.len());
        if ra < 2 || rb < 2 {
            return Err("a product with a vector".into());
        }
        let mut views = vec![WHOLE; data.operands.len()];
        for i in (0..r).filter(|&i| out & axis(i) != 0) {
            match r - i {
                1 => views[1] |= axis(rb - 1),
                2 => views[0] |= axis(ra - 2),
                back => {
                    for (which, (v, rank)) in [(a, ra), (b, rb)].into_iter().enumerate() {
                        if back <= rank && self.lies(v, rank - back) {
                            views[which] |= axis(rank - back);
                        }
                    }
                }
            }
        }
        Ok(views)
    }

    fn gemm(&self, data: &OpData, y: Value, out: View) -> Rule {
        if data.attrs.int("transA").unwrap_or(0) != 0 || out & axis(1) != 0 {
            return Err("its first operand is transposed".into());
        }
        let mut views =
            self.broadcast(&OpData { operands: vec![data.operand(2)], ..data.clone() }, y, out)?;
        views.splice(0..0, [out, WHOLE]);
        views.truncate(data.operands.len());
        Ok(views)
    }

    /// A product whose other operands are a weight.
    fn rows(&self, data: &OpData, y: Value, out: View) -> Rule {
        self.free(y, self.sizes(y)?.len().checked_sub(1), out)?;
        let mut views = vec![WHOLE; data.operands.len()];
        views[0] = out;
        Ok(views)
    }

    /// Rotary embedding: tables that are as long as the sequence are cut as the rows are, and so are positions.
    fn rotary(&self, data: &OpData, out: View, tables: [usize; 2], positions: usize) -> Rule {
        let mut views = vec![WHOLE; data.operands.len()];
        views[0] = out;
        let rank = |i: usize| data.operand(i).and_then(|v| self.sizes.of(v)).map(<[_]>::len);
        let along = |i: usize, a: usize| data.operand(i).is_some_and(|v| self.lies(v, a));
        if rank(positions) == Some(2) {
            views[positions] = if along(positions, 1) { axis(1) } else { WHOLE };
            return Ok(views);
        }
        for t in tables {
            let a = rank(t).and_then(|r| r.checked_sub(2)).ok_or("tables of an unknown rank")?;
            if !along(t, a) {
                return Err(
                    "its positions are those of a table's rows, from the first: expected a table as long \
                            as the sequence, or positions"
                        .into(),
                );
            }
            views[t] = axis(a);
        }
        Ok(views)
    }
}

/// An axis counted from the front.
pub fn place(a: i64, rank: usize) -> usize {
    usize::try_from(if a < 0 { a + rank as i64 } else { a }).unwrap_or(0)
}
