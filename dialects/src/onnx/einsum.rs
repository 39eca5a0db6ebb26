//! Einsum: operands multiplied two by two, from the left, as batches of matrices.
//!
//! Of two operands' indices, those in both are a batch where they are needed later and are summed otherwise; the rest
//! are rows of the left operand and columns of the right one. An index of one operand alone is summed first.

use super::{matmul, util};
use crate::ir::{Attrs, Dim, Elem};
use crate::kernels::strided;
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef {
    name: "onnx.Einsum",
    operands: (1, usize::MAX),
    infer,
    verify: |cx| Terms::of(cx.attrs, cx.inputs.len()).map(|_| ()),
    eval,
    ..OpDef::NEW
}];

/// An index of an equation: a letter, or a dim of the ellipsis, counted from its end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Index {
    Ellipsis(usize),
    Letter(u8),
}

/// One term: letters, and where among them the ellipsis stands.
struct Term {
    letters: Vec<u8>,
    ellipsis: Option<usize>,
}

impl Term {
    fn of(text: &[u8], equation: &str) -> Result<Term, OpError> {
        let wrong = |what: &str| OpError::invalid(format!("the equation {equation:?} {what}"));
        let mut term = Term { letters: Vec::new(), ellipsis: None };
        let mut rest = text;
        while let [first, tail @ ..] = rest {
            rest = match first {
                b'.' if tail.starts_with(b"..") && term.ellipsis.is_none() => {
                    term.ellipsis = Some(term.letters.len());
                    &tail[2..]
                }
                b'.' if tail.starts_with(b"..") => return Err(wrong("has two ellipses in a term")),
                c if c.is_ascii_alphabetic() => {
                    term.letters.push(*c);
                    tail
                }
                c => return Err(wrong(&format!("has {:?} where an index is expected", char::from(*c)))),
            };
        }
        Ok(term)
    }

    /// The indices of an operand of `rank` dims; the ellipsis is all that the letters leave.
    fn indices(&self, rank: usize) -> Result<Vec<Index>, OpError> {
        let free = rank.checked_sub(self.letters.len()).filter(|&n| n == 0 || self.ellipsis.is_some());
        let free = free.ok_or_else(|| {
            let letters = String::from_utf8_lossy(&self.letters);
            OpError::invalid(format!("the term {letters:?} for an operand of {rank} dims"))
        })?;
        Ok(self.spread(free))
    }

    /// The indices with an ellipsis of `free` dims.
    fn spread(&self, free: usize) -> Vec<Index> {
        let at = self.ellipsis.unwrap_or(0);
        let free = if self.ellipsis.is_some() { free } else { 0 };
        let letters = |part: &[u8]| part.iter().map(|&c| Index::Letter(c)).collect::<Vec<_>>();
        let dims = (0..free).rev().map(Index::Ellipsis);
        letters(&self.letters[..at]).into_iter().chain(dims).chain(letters(&self.letters[at..])).collect()
    }
}

/// An equation.
struct Terms {
    inputs: Vec<Term>,
    output: Term,
}

impl Terms {
    fn of(attrs: &Attrs, operands: usize) -> Result<Terms, OpError> {
        let text =
            attrs.str("equation").ok_or_else(|| OpError::invalid("the attribute equation is missing"))?;
        let equation: String = text.chars().filter(|c| *c != ' ').collect();
        let (left, right) = match equation.split_once("->") {
            Some((left, right)) => (left, Some(right)),
            None => (equation.as_str(), None),
        };
        let inputs: Vec<Term> =
            left.split(',').map(|t| Term::of(t.as_bytes(), text)).collect::<Result<_, _>>()?;
        if inputs.len() != operands {
            let message = format!("the equation {text:?} has {} terms for {operands} operands", inputs.len());
            return Err(OpError::invalid(message));
        }
        let all: Vec<u8> = inputs.iter().flat_map(|t| t.letters.iter().copied()).collect();
        let any = inputs.iter().any(|t| t.ellipsis.is_some());
        let output = match right {
            Some(right) => Term::of(right.as_bytes(), text)?,
            // What occurs once, in the order of its code, behind the ellipsis.
            None => {
                let mut once: Vec<u8> = all.clone();
                once.retain(|c| all.iter().filter(|o| *o == c).count() == 1);
                once.sort_unstable();
                Term { letters: once, ellipsis: any.then_some(0) }
            }
        };
        let repeated = (1..output.letters.len()).any(|i| output.letters[..i].contains(&output.letters[i]));
        if repeated || output.letters.iter().any(|c| !all.contains(c)) {
            let message =
                format!("the result of the equation {text:?} repeats an index, or has one of its own");
            return Err(OpError::invalid(message));
        }
        if output.ellipsis.is_some() && !any {
            return Err(OpError::invalid(format!(
                "only the result of the equation {text:?} has an ellipsis"
            )));
        }
        Ok(Terms { inputs, output })
    }

    /// The most dims that an ellipsis of the operands stands for.
    fn free(&self, ranks: impl Iterator<Item = usize>) -> usize {
        let free = |(t, rank): (&Term, usize)| t.ellipsis.map_or(0, |_| rank.saturating_sub(t.letters.len()));
        self.inputs.iter().zip(ranks).map(free).max().unwrap_or(0)
    }
}

/// The size that index `i` has in all of the operands.
fn unite<D: Clone + std::fmt::Display>(
    old: Option<&D>,
    new: &D,
    broadcast: impl Fn(&D, &D) -> Option<D>,
) -> Result<D, OpError> {
    match old {
        None => Ok(new.clone()),
        Some(old) => broadcast(old, new)
            .ok_or_else(|| OpError::invalid(format!("an index stands for {old} and for {new} elements"))),
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let terms = Terms::of(cx.attrs, cx.inputs.len())?;
    let elem = (0..cx.inputs.len()).find_map(|i| cx.elem(i));
    let mut sizes: Vec<(Index, Dim)> = Vec::new();
    let known = (0..cx.inputs.len()).all(|i| cx.dims(i).is_some());
    for (i, term) in terms.inputs.iter().enumerate() {
        let Some(dims) = cx.dims(i) else { continue };
        for (index, d) in term.indices(dims.len())?.into_iter().zip(dims) {
            let old = sizes.iter().position(|(i, _)| *i == index);
            let size = unite(old.map(|at| &sizes[at].1), d, Dim::broadcast)?;
            match old {
                Some(at) => sizes[at].1 = size,
                None => sizes.push((index, size)),
            }
        }
    }
    // Without all ranks, the length of an ellipsis is not known.
    if !known && terms.output.ellipsis.is_some() {
        return util::one(elem, None);
    }
    let free = terms.free((0..cx.inputs.len()).map(|i| cx.dims(i).map_or(0, <[Dim]>::len)));
    let size =
        |i: &Index| sizes.iter().find(|(index, _)| index == i).map_or(Dim::Unknown, |(_, d)| d.clone());
    // A size of one may be broadcast by an operand that is not known.
    let size = |i: &Index| Some(size(i)).filter(|d| known || *d != Dim::Known(1)).unwrap_or(Dim::Unknown);
    util::one(elem, Some(terms.output.spread(free).iter().map(size).collect()))
}

/// A tensor whose dims have names. No name occurs twice.
struct Named {
    tensor: Tensor,
    indices: Vec<Index>,
}

impl Named {
    /// The dims of the names `order`, in that order; one that this tensor lacks, or where it is one, is repeated to
    /// its size.
    fn ordered(&self, order: &[(Index, usize)]) -> Result<Tensor, OpError> {
        let (own, from) = (strided::strides(self.tensor.shape()), self.tensor.shape());
        let step = |(i, _): &(Index, usize)| match self.indices.iter().position(|o| o == i) {
            Some(at) if from[at] != 1 => own[at],
            _ => 0,
        };
        let shape: Vec<usize> = order.iter().map(|o| o.1).collect();
        strided::count(&shape)?;
        read(&self.tensor, &shape, &order.iter().map(step).collect::<Vec<_>>())
    }

    /// An operand, with the diagonal of the dims that share a name.
    fn of(tensor: &Tensor, indices: &[Index]) -> Result<Named, OpError> {
        let own = strided::strides(tensor.shape());
        let (mut names, mut shape, mut steps): (Vec<Index>, Vec<usize>, Vec<isize>) = Default::default();
        for (d, &i) in indices.iter().enumerate() {
            let (n, step) = (tensor.shape()[d], own[d]);
            match names.iter().position(|o| *o == i) {
                Some(at) if shape[at] == n => steps[at] += step,
                Some(at) => {
                    return Err(OpError::invalid(format!("a diagonal of {} by {n} elements", shape[at])));
                }
                None => {
                    names.push(i);
                    shape.push(n);
                    steps.push(step);
                }
            }
        }
        Ok(Named { tensor: read(tensor, &shape, &steps)?, indices: names })
    }

    /// Summed over all names but those that `keep` wants.
    fn summed(self, keep: impl Fn(Index) -> bool) -> Result<Named, OpError> {
        let sized = || self.indices.iter().copied().zip(self.tensor.shape().iter().copied());
        let (kept, gone): (Vec<_>, Vec<_>) = sized().partition(|(i, _)| keep(*i));
        if gone.is_empty() {
            return Ok(self);
        }
        // Of an empty tensor there is nothing to sum, however long the other dims.
        let n: usize = if self.tensor.is_empty() { 0 } else { gone.iter().map(|g| g.1).product() };
        let shape: Vec<usize> = kept.iter().map(|k| k.1).collect();
        let rows: usize = shape.iter().product();
        let indices = kept.iter().map(|k| k.0).collect();
        let x = self.ordered(&[kept, gone].concat())?.reshape(&[rows, n])?;
        let ones = super::cast::convert(&Tensor::new(&[n, 1], vec![1f32; n])?, x.elem(), true)?;
        Ok(Named { tensor: matmul::product(&x, &ones)?.reshape(&shape)?, indices })
    }

    /// The product with `other`, summed over what both have and `keep` does not want.
    fn times(&self, other: &Named, keep: impl Fn(Index) -> bool) -> Result<Named, OpError> {
        let size =
            |of: &Named, i: Index| of.indices.iter().position(|o| *o == i).map(|at| of.tensor.shape()[at]);
        let (mut batch, mut rows, mut inner) = (Vec::new(), Vec::new(), Vec::new());
        for &i in &self.indices {
            let own = size(self, i).unwrap_or(1);
            match size(other, i) {
                None => rows.push((i, own)),
                Some(theirs) => {
                    let n = if own == 1 { theirs } else { own };
                    if keep(i) { batch.push((i, n)) } else { inner.push((i, n)) }
                }
            }
        }
        let columns: Vec<(Index, usize)> = other
            .indices
            .iter()
            .filter(|i| !self.indices.contains(i))
            .map(|&i| (i, size(other, i).unwrap_or(1)))
            .collect();
        let product = |dims: &[(Index, usize)]| dims.iter().map(|d| d.1).product::<usize>();
        let (b, m, k, n) = (product(&batch), product(&rows), product(&inner), product(&columns));
        strided::count(&[b, m, n])?;
        let left = self.ordered(&[&batch[..], &rows, &inner].concat())?.reshape(&[b, m, k])?;
        let right = other.ordered(&[&batch[..], &inner, &columns].concat())?.reshape(&[b, k, n])?;
        let all = [batch, rows, columns].concat();
        let shape: Vec<usize> = all.iter().map(|d| d.1).collect();
        let tensor = matmul::product(&left, &right)?.reshape(&shape)?;
        Ok(Named { tensor, indices: all.into_iter().map(|d| d.0).collect() })
    }
}

fn read(t: &Tensor, shape: &[usize], steps: &[isize]) -> Result<Tensor, OpError> {
    if t.shape() == shape && strided::strides(shape) == steps {
        return Ok(t.clone());
    }
    let data = map_data!(t.data(), v => strided::gather(v, shape, steps, 0));
    Ok(Tensor::with_elem(t.elem(), shape, data)?)
}

fn eval(cx: &EvalCx) -> Evaluated {
    let terms = Terms::of(cx.attrs, cx.inputs.len())?;
    let elem = cx.input(0)?.elem();
    // Half types are summed in single precision, narrow integers in wide ones.
    let wide = match elem {
        Elem::F16 | Elem::BF16 => Elem::F32,
        Elem::I16 | Elem::I8 | Elem::U16 | Elem::U8 => Elem::I64,
        e => e,
    };
    let mut operands = Vec::new();
    let mut sizes: Vec<(Index, usize)> = Vec::new();
    for (i, term) in terms.inputs.iter().enumerate() {
        let t = cx.input(i)?;
        if t.elem() != elem {
            return Err(util::wrong_elem(elem.name(), t));
        }
        let named = Named::of(&super::cast::convert(t, wide, true)?, &term.indices(t.rank())?)?;
        for (&i, n) in named.indices.iter().zip(named.tensor.shape()) {
            let old = sizes.iter().position(|s| s.0 == i);
            let both =
                |a: &usize, b: &usize| if *b == 1 || a == b { Some(*a) } else { (*a == 1).then_some(*b) };
            let n = unite(old.map(|at| &sizes[at].1), n, both)?;
            match old {
                Some(at) => sizes[at].1 = n,
                None => sizes.push((i, n)),
            }
        }
        operands.push(named);
    }
    let free = terms
        .free(cx.inputs.iter().map(|i| i.as_ref().and_then(|i| i.tensor().ok()).map_or(0, Tensor::rank)));
    let output = terms.output.spread(free);
    let needed: Vec<Vec<Index>> = operands.iter().map(|o| o.indices.clone()).collect();
    let later = |at: usize, i: Index| output.contains(&i) || needed[at..].iter().any(|n| n.contains(&i));
    let mut product: Option<Named> = None;
    for (at, operand) in operands.into_iter().enumerate() {
        let before = product.as_ref().map_or(Vec::new(), |p| p.indices.clone());
        let operand = operand.summed(|i| before.contains(&i) || later(at + 1, i))?;
        product = Some(match product {
            None => operand,
            Some(p) => {
                let p = p.summed(|i| operand.indices.contains(&i) || later(at + 1, i))?;
                p.times(&operand, |i| later(at + 1, i))?
            }
        });
    }
    let product = product.ok_or_else(|| OpError::invalid("there are no operands"))?;
    let size = |i: &Index| sizes.iter().find(|s| s.0 == *i).map_or(1, |s| s.1);
    let order: Vec<(Index, usize)> = output.iter().map(|i| (*i, size(i))).collect();
    cx.one(super::cast::convert(&product.ordered(&order)?, elem, true)?)
}

#[cfg(test)]
mod tests {
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("einsum");
    }

    #[test]
    fn wrong_equations_are_refused() {
        let case = |equation: &str, shapes: &[&[usize]]| {
            let t = |s: &&[usize]| Some(Tensor::new(s, vec![1f32; s.iter().product()]).unwrap());
            Case::new("onnx.Einsum", 12, &[("equation", equation.into())], shapes.iter().map(t).collect())
        };
        refused(&case("ij,jk->ik", &[&[2, 3]]), "2 terms for 1 operands");
        refused(&case("ij->ik", &[&[2, 3]]), "one of its own");
        refused(&case("ij->ii", &[&[2, 3]]), "repeats an index");
        refused(&case("i1->i", &[&[2, 3]]), "'1' where an index is expected");
        refused(&case("i..->i", &[&[2, 3]]), "'.' where an index is expected");
        refused(&case("...i...->i", &[&[2, 3]]), "two ellipses");
        refused(&case("ij->...", &[&[2, 3]]), "only the result");
        refused(&case("ijk->i", &[&[2, 3]]), "an operand of 2 dims");
        refused(&case("i->i", &[&[2, 3]]), "an operand of 2 dims");
        refused(&case("ij->i->j", &[&[2, 3]]), "where an index is expected");
        refused(&case("ij,jk->ik", &[&[2, 3], &[4, 5]]), "stands for 3 and for 4");
        assert!(case("ii->i", &[&[2, 3]]).eval(false).is_err());
        let wide: &[usize] = &[1 << 12];
        assert!(case("a,b,c->abc", &[wide, wide, wide]).eval(false).is_err());
    }
}
