//! Facts about constants, computed when a rule asks: positive, finite, constant along an axis, orthogonal.
//!
//! A constant expression is never evaluated for this. Its *pattern* says which of its elements are surely equal:
//! numbers by their bits, symbolic scales by their class. A rule that fails only because a symbolic scale varies
//! along an axis leaves a wish: the classes that would have to be one.

use super::graph::{Graph, Id};
use super::lang::{Head, Node};
use dialects::ir::Elem;
use dialects::tensor::{Data, Tensor};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

/// Constants with more elements than this have no pattern.
const LARGEST: usize = 1 << 18;

/// In a pattern: an element that no symbolic scale is part of.
const NO_SCALE: u32 = u32::MAX;

/// Which elements of a constant are equal: those with equal `number` and equal `scale`.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// The shape.
    pub shape: Vec<usize>,
    number: Vec<u32>,
    scale: Vec<u32>,
}

/// Classes of a symbolic scale that a rule would need to be one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wish(pub Vec<Vec<u32>>);

/// A constant matrix that is known to be orthogonal, and what is made from it.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// `Q`.
    pub matrix: Id,
    /// Its transpose, which is its inverse.
    pub inverse: Id,
    /// `Q` with the mean of each of its columns subtracted.
    pub centered: Id,
}

/// Numbers things in the order they are first seen.
fn number<T: Hash + Eq>(items: impl Iterator<Item = T>) -> Vec<u32> {
    let mut seen = HashMap::new();
    items
        .map(|x| {
            let next = seen.len() as u32;
            *seen.entry(x).or_insert(next)
        })
        .collect()
}

fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= LARGEST)
}

/// For each element of `shape`, row-major, the element of `from` that broadcasts to it.
fn broadcast(from: &[usize], shape: &[usize]) -> Option<Vec<usize>> {
    let lead = shape.len().checked_sub(from.len())?;
    let mut out = vec![0; count(shape)?];
    for (i, o) in out.iter_mut().enumerate() {
        let (mut rest, mut stride) = (i, 1);
        for axis in (0..shape.len()).rev() {
            let at = rest % shape[axis];
            rest /= shape[axis];
            if axis >= lead {
                let d = from[axis - lead];
                if d != 1 {
                    *o += at * stride;
                }
                stride *= d;
            }
        }
    }
    Some(out)
}

/// The number that a tensor is throughout, with the relative precision of its element type.
fn splat(t: &Tensor) -> Option<(f64, f64)> {
    let within = match t.elem() {
        Elem::F16 => 1e-3,
        Elem::BF16 => 8e-3,
        _ => 1e-6,
    };
    let numbers: Vec<f64> = match t.data() {
        Data::F64(v) => v.clone(),
        Data::Bool(_) => return None,
        _ if t.elem().is_float() => t.to_f32().ok()?.iter().map(|&x| f64::from(x)).collect(),
        _ => t.to_i64().ok()?.iter().map(|&x| x as f64).collect(),
    };
    let first = *numbers.first()?;
    numbers.iter().all(|x| *x == first).then_some((first, within))
}

impl Pattern {
    /// The class of the symbolic scale that each element has, `None` for an element without one.
    pub fn scales(&self) -> impl Iterator<Item = Option<u32>> + '_ {
        self.scale.iter().map(|&s| (s != NO_SCALE).then_some(s))
    }

    fn pick(&self, shape: &[usize], index: &[usize]) -> Pattern {
        let take = |v: &[u32]| index.iter().map(|&i| v[i]).collect();
        Pattern { shape: shape.to_vec(), number: take(&self.number), scale: take(&self.scale) }
    }

    /// Elements along `axis`, one list per place of the other axes.
    fn lines(&self, axis: usize) -> Vec<Vec<usize>> {
        let inner: usize = self.shape[axis + 1..].iter().product();
        let n = self.shape[axis];
        let outer: usize = self.shape[..axis].iter().product();
        let line = |o: usize, i: usize| (0..n).map(|k| (o * n + k) * inner + i).collect();
        (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))).map(|(o, i)| line(o, i)).collect()
    }
}

impl Graph<'_> {
    /// The pattern of a constant class, if it can be told without evaluating.
    pub fn pattern(&self, id: Id) -> Option<Arc<Pattern>> {
        let id = self.find(id);
        if let Some(p) = self.patterns.borrow().get(&id) {
            return p.clone();
        }
        count(&self.shape(id)?)?;
        // A class may contain itself; while it is being looked at, it has no pattern.
        self.patterns.borrow_mut().insert(id, None);
        let found = self.nodes(id).iter().find_map(|n| self.pattern_of(id, n)).map(Arc::new);
        self.patterns.borrow_mut().insert(id, found.clone());
        found
    }

    fn pattern_of(&self, id: Id, node: &Node) -> Option<Pattern> {
        let shape = self.shape(id)?;
        let child = |i: usize| self.pattern(*node.children.get(i)?);
        match node.head {
            Head::Absent | Head::Input(_) => None,
            Head::Scale(i) => {
                let scale = self.world().scales[i as usize].classes.to_vec();
                Some(Pattern { number: vec![0; scale.len()], shape, scale })
            }
            Head::Literal(_) | Head::Const(_) => {
                let t = self.tensor(node.head)?;
                let bits = |t: &Tensor| Some(number(t.to_f32().ok()?.iter().map(|x| x.to_bits())));
                let number = bits(&t)?;
                Some(Pattern { scale: vec![NO_SCALE; number.len()], shape, number })
            }
            Head::Op { .. } => match self.name(node).strip_prefix("onnx.")? {
                "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Cast" | "Reciprocal"
                | "Neg" | "Sqrt" => Some(Pattern { shape, ..(*child(0)?).clone() }),
                "Expand" => {
                    let p = child(0)?;
                    Some(p.pick(&shape, &broadcast(&p.shape, &shape)?))
                }
                "Transpose" => {
                    let p = child(0)?;
                    let perm = self.perm(node, p.shape.len())?;
                    let strides: Vec<usize> =
                        (0..p.shape.len()).map(|i| p.shape[i + 1..].iter().product()).collect();
                    let at = |mut i: usize| {
                        perm.iter().rev().fold(0, |sum, &axis| {
                            let k = i % p.shape[axis];
                            i /= p.shape[axis];
                            sum + k * strides[axis]
                        })
                    };
                    Some(p.pick(&shape, &(0..p.number.len()).map(at).collect::<Vec<_>>()))
                }
                "Gather" => {
                    let p = child(0)?;
                    let axis = usize::try_from(self.attrs(node).int("axis").unwrap_or(0)).ok()?;
                    let index = self.index(node.children[1])?;
                    let lines = p.lines(axis);
                    let inner: usize = p.shape[axis + 1..].iter().product();
                    let outer = lines.len() / inner.max(1);
                    let mut picked = Vec::with_capacity(outer * index.len() * inner);
                    for o in 0..outer {
                        for &k in &index {
                            for line in &lines[o * inner..(o + 1) * inner] {
                                picked.push(*line.get(k)?);
                            }
                        }
                    }
                    (picked.len() == count(&shape)?).then(|| p.pick(&shape, &picked))
                }
                "Concat" => {
                    let axis = usize::try_from(self.attrs(node).int("axis")?).ok()?;
                    let parts: Vec<_> = (0..node.children.len())
                        .map(|i| self.pattern(node.children[i]))
                        .collect::<Option<_>>()?;
                    let inner: usize = shape[axis + 1..].iter().product();
                    let outer: usize = shape[..axis].iter().product();
                    let mut pairs = Vec::new();
                    for o in 0..outer {
                        for (which, p) in parts.iter().enumerate() {
                            let n = p.shape[axis] * inner;
                            // Numbers of different parts are not compared: at worst, equal ones look different.
                            pairs.extend((o * n..(o + 1) * n).map(|i| ((which, p.number[i]), p.scale[i])));
                        }
                    }
                    let scale = pairs.iter().map(|p| p.1).collect();
                    Some(Pattern { shape, number: number(pairs.iter().map(|p| p.0)), scale })
                }
                "Mul" | "Div" | "Add" | "Sub" => {
                    let (a, b) = (child(0)?, child(1)?);
                    let a = a.pick(&shape, &broadcast(&a.shape, &shape)?);
                    let b = b.pick(&shape, &broadcast(&b.shape, &shape)?);
                    let number = number(a.number.iter().zip(&b.number));
                    // Two symbolic scales in one element cannot be told apart by one class.
                    let one = |(&x, &y): (&u32, &u32)| match (x, y) {
                        (x, y) if x == y || y == NO_SCALE => Some(x),
                        (NO_SCALE, y) => Some(y),
                        _ => None,
                    };
                    let scale = a.scale.iter().zip(&b.scale).map(one).collect::<Option<_>>()?;
                    Some(Pattern { shape, number, scale })
                }
                _ => None,
            },
        }
    }

    /// The elements of a constant leaf.
    pub fn tensor(&self, head: Head) -> Option<Tensor> {
        let world = self.world();
        match head {
            Head::Literal(i) => Some(world.literals[i as usize].tensor.clone()),
            Head::Const(i) => {
                world.looked.borrow_mut().insert(i);
                let data = &world.m.consts[world.consts[i as usize].0];
                (data.count() <= LARGEST as u64).then(|| Tensor::from_const(data).ok()).flatten()
            }
            _ => None,
        }
    }

    /// The contents of an integer literal.
    fn index(&self, id: Id) -> Option<Vec<usize>> {
        let t = self.nodes(id).iter().find_map(|n| self.tensor(n.head))?;
        let ints = t.to_i64().ok()?;
        ints.iter().map(|&i| usize::try_from(i).ok()).collect()
    }

    /// The permutation of a Transpose of `rank` dims; `None` if it is none.
    pub fn perm(&self, node: &Node, rank: usize) -> Option<Vec<usize>> {
        let Some(perm) = self.attrs(node).ints("perm") else { return Some((0..rank).rev().collect()) };
        let perm: Vec<usize> = perm.iter().map(|&i| usize::try_from(i).ok()).collect::<Option<_>>()?;
        let mut sorted = perm.clone();
        sorted.sort_unstable();
        sorted.into_iter().eq(0..rank).then_some(perm)
    }

    /// The constant `s` with `axis` brought to size one, if `s` is constant along it. A symbolic scale that varies
    /// leaves a wish.
    pub fn constant_along(&mut self, s: Id, axis: usize) -> Option<Id> {
        let shape = self.shape(s)?;
        if shape[axis] == 1 {
            return Some(s);
        }
        let p = self.pattern(s)?;
        let lines = p.lines(axis);
        if lines.iter().any(|l| l.iter().any(|&i| p.number[i] != p.number[l[0]])) {
            return None;
        }
        let ties: Vec<Vec<u32>> = lines.iter().map(|l| l.iter().map(|&i| p.scale[i]).collect()).collect();
        if ties.iter().all(|t: &Vec<u32>| t.iter().all(|&c| c == t[0])) {
            return self.sliced(s, axis, 0, 1);
        }
        if ties.iter().flatten().all(|&c| c != NO_SCALE) {
            let wish = Wish(ties);
            let mut wishes = self.wishes.borrow_mut();
            if !wishes.contains(&wish) {
                wishes.push(wish);
            }
        }
        None
    }

    /// Whether every element of a constant surely satisfies `test`; `scale` says whether a symbolic scale does.
    /// Products, quotients and square roots keep the property where `closed` names them.
    fn every(&self, id: Id, test: fn(f32) -> bool, closed: &[&str], depth: u32) -> bool {
        let keeps = ["Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Identity", "Cast"];
        depth > 0
            && self.nodes(id).iter().any(|n| match n.head {
                Head::Scale(_) => true,
                Head::Literal(_) | Head::Const(_) => {
                    self.tensor(n.head).is_some_and(|t| t.to_f32().is_ok_and(|v| v.iter().all(|&x| test(x))))
                }
                Head::Op { .. } => match self.name(n).strip_prefix("onnx.") {
                    Some("Gather") => self.every(n.children[0], test, closed, depth - 1),
                    Some(op) if keeps.contains(&op) => self.every(n.children[0], test, closed, depth - 1),
                    Some("Concat") => n.children.iter().all(|&c| self.every(c, test, closed, depth - 1)),
                    Some(op) if closed.contains(&op) => {
                        n.children.iter().all(|&c| self.every(c, test, closed, depth - 1))
                    }
                    _ => false,
                },
                Head::Absent | Head::Input(_) => false,
            })
    }

    /// Whether every element of a constant is surely positive.
    pub fn positive(&self, id: Id) -> bool {
        self.every(id, |x| x > 0.0, &["Mul", "Div", "Reciprocal", "Sqrt", "Add"], 16)
    }

    /// Whether every element of a constant is surely finite.
    pub fn finite(&self, id: Id) -> bool {
        // A product of finite numbers is finite over the reals.
        self.every(id, f32::is_finite, &["Mul", "Add", "Sub", "Neg"], 16)
            || (self.positive(id) && self.every(id, f32::is_finite, &["Mul", "Add", "Div", "Reciprocal"], 16))
    }

    /// Whether every element of a constant leaf is `x`.
    pub fn all(&self, id: Id, x: f32) -> bool {
        let same = |t: Tensor| t.to_f32().is_ok_and(|v| v.iter().all(|&y| y == x));
        self.nodes(id).iter().any(|n| self.tensor(n.head).is_some_and(same))
    }

    /// The number that a small constant is throughout, and how far from it, relative to it, the number may be that was
    /// meant: constants are written in their element type.
    pub fn splat(&self, id: Id) -> Option<(f64, f64)> {
        self.splat_of(id, 4)
    }

    fn splat_of(&self, id: Id, depth: u32) -> Option<(f64, f64)> {
        if depth == 0 || !self.is_const(id) {
            return None;
        }
        self.nodes(id).iter().find_map(|n| match n.head {
            Head::Literal(i) => splat(&self.world().literals[i as usize].tensor),
            Head::Op { .. } => match self.name(n).strip_prefix("onnx.")? {
                "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Expand" | "Cast" => {
                    let to_float = self.elem(id)?.is_float();
                    self.splat_of(*n.children.first()?, depth - 1).filter(|_| to_float)
                }
                "Sqrt" => {
                    let (x, within) = self.splat_of(*n.children.first()?, depth - 1)?;
                    Some((x.sqrt(), within))
                }
                "Mul" | "Reciprocal" if self.elem(id)?.is_float() => {
                    let one = |i: usize| self.splat_of(*n.children.get(i)?, depth - 1);
                    let (x, within) = one(0)?;
                    match n.children.len() {
                        1 => Some((1.0 / x, within)),
                        _ => one(1).map(|(y, w)| (x * y, within + w)),
                    }
                }
                _ => None,
            },
            _ => None,
        })
    }

    /// The inverse of a constant matrix that is known to be orthogonal.
    pub fn inverse(&self, a: Id) -> Option<Id> {
        let a = self.find(a);
        self.rotations.iter().find_map(|r| match a {
            a if a == self.find(r.matrix) => Some(r.inverse),
            a if a == self.find(r.inverse) => Some(r.matrix),
            _ => None,
        })
    }

    /// A rotation with the mean of each of its columns subtracted.
    pub fn centered(&self, a: Id) -> Option<Id> {
        self.rotations.iter().find(|r| self.find(r.matrix) == self.find(a)).map(|r| r.centered)
    }

    /// Whether a constant is a rotation, or what remains of one behind a value whose rows have their mean subtracted.
    pub fn moves(&self, a: Id) -> bool {
        let a = self.find(a);
        let known = |r: &Rotation| [r.matrix, r.inverse, r.centered].iter().any(|&c| self.find(c) == a);
        self.rotations.iter().any(known)
    }

    /// Whether a constant is zero throughout.
    pub fn zero(&self, id: Id) -> bool {
        self.all(id, 0.0)
    }

    /// Whether a constant is one throughout.
    pub fn ones(&self, id: Id) -> bool {
        self.all(id, 1.0)
    }
}
