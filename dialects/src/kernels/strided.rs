//! Walks over strided and broadcast operands, the one loop behind every elementwise and data-moving op.
//!
//! A walk is a list of dims with one stride per operand, merged as far as the strides allow, so that a
//! contiguous operand becomes one long row. Row-major throughout; strides and offsets count elements.

use super::buffers;
use crate::ops::OpError;
use rayon::prelude::*;

/// Elements that one task computes.
pub const CHUNK: usize = 16 * 1024;

/// Outputs of fewer elements are computed by one thread.
const PARALLEL: usize = 4 * CHUNK;

/// No op makes a tensor of more elements: a shape from a broken model must not exhaust memory.
const MAX_COUNT: usize = 1 << 32;

/// The number of elements of `shape`, if a tensor of that size may be allocated. An empty tensor's other sizes must be
/// small enough too, since ops make tables of a dim, or multiply the sizes around an axis.
pub fn count(shape: &[usize]) -> Result<usize, OpError> {
    let sizes = shape.iter().filter(|&&d| d > 0).try_fold(1usize, |n, &d| n.checked_mul(d));
    match sizes.filter(|&n| n <= MAX_COUNT) {
        Some(n) => Ok(if shape.contains(&0) { 0 } else { n }),
        None => Err(OpError::Unsupported(format!("a tensor of shape {shape:?}: too many elements"))),
    }
}

/// A vector of `len` elements filled by `f(start, chunk)`, in fixed chunks on all threads when it is long. What a chunk holds
/// before is anything: `f` writes every element.
pub fn build<T: Clone + Default + Send + 'static>(len: usize, f: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    build_by(len, &f)
}

/// [`build`], compiled once for each element type rather than for each op: the difference is minutes of build time.
fn build_by<T: Clone + Default + Send + 'static>(len: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) -> Vec<T> {
    let mut out = buffers::take(len);
    if len < PARALLEL {
        f(0, &mut out);
    } else {
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, c)| f(i * CHUNK, c));
    }
    out
}

/// Strides of a contiguous tensor.
pub fn strides(shape: &[usize]) -> Vec<isize> {
    let mut out = vec![1isize; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i] as isize;
    }
    out
}

/// Strides with which a contiguous tensor of `shape` reads as one of shape `out`, which it broadcasts to.
pub fn broadcast_strides(shape: &[usize], out: &[usize]) -> Vec<isize> {
    let lead = out.len() - shape.len();
    let own = strides(shape);
    (0..out.len()).map(|i| if i < lead || shape[i - lead] == 1 { 0 } else { own[i - lead] }).collect()
}

/// The shape that shapes broadcast to.
pub fn broadcast_shape(shapes: &[&[usize]]) -> Result<Vec<usize>, OpError> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![1; rank];
    for shape in shapes {
        let lead = rank - shape.len();
        for (o, &d) in out[lead..].iter_mut().zip(*shape) {
            if *o == 1 {
                *o = d;
            } else if d != 1 && d != *o {
                return Err(OpError::Invalid(format!("the shapes {shapes:?} do not broadcast")));
            }
        }
    }
    Ok(out)
}

/// A walk over `K` operands in the order of an output.
pub struct Walk<const K: usize> {
    shape: Vec<usize>,
    strides: Vec<[isize; K]>,
    base: [isize; K],
}

impl<const K: usize> Walk<K> {
    /// A walk over an output of `shape`, where operand `k` starts at element `base[k]` and moves by `strides[k]`.
    pub fn new(shape: &[usize], strides: [&[isize]; K], base: [isize; K]) -> Walk<K> {
        let mut walk = Walk { shape: Vec::new(), strides: Vec::new(), base };
        for (i, &n) in shape.iter().enumerate() {
            let step: [isize; K] = std::array::from_fn(|k| strides[k][i]);
            if n == 1 {
                continue;
            }
            match (walk.shape.last_mut(), walk.strides.last_mut()) {
                (Some(m), Some(last)) if (0..K).all(|k| last[k] == step[k] * n as isize) => {
                    *m *= n;
                    *last = step;
                }
                _ => {
                    walk.shape.push(n);
                    walk.strides.push(step);
                }
            }
        }
        if walk.shape.is_empty() {
            walk.shape.push(1);
            walk.strides.push([1; K]);
        }
        walk
    }

    /// A walk over contiguous operands of these shapes, broadcast to `shape`.
    pub fn broadcast(shape: &[usize], operands: [&[usize]; K]) -> Walk<K> {
        let strides = operands.map(|s| broadcast_strides(s, shape));
        Walk::new(shape, std::array::from_fn(|k| strides[k].as_slice()), [0; K])
    }

    /// The strides within a row.
    pub fn inner(&self) -> [isize; K] {
        *self.strides.last().expect("a walk has a dim")
    }

    /// Calls `f(at, n, offsets)` for the pieces of rows that make up the output elements `start .. start + len`:
    /// `n` elements, `at` counted from `start`, whose operands begin at `offsets`.
    pub fn rows(&self, start: usize, len: usize, mut f: impl FnMut(usize, usize, [usize; K])) {
        self.rows_by(start, len, &mut f);
    }

    /// [`Walk::rows`], compiled once rather than for each op.
    fn rows_by(&self, start: usize, len: usize, f: &mut dyn FnMut(usize, usize, [usize; K])) {
        if len == 0 {
            return;
        }
        let last = self.shape.len() - 1;
        let mut index = vec![0usize; self.shape.len()];
        let mut rest = start;
        for (i, &n) in self.shape.iter().enumerate().rev() {
            index[i] = rest % n;
            rest /= n;
        }
        let mut offset = self.base;
        let shift = |offset: &mut [isize; K], dim: usize, by: isize| {
            offset.iter_mut().zip(&self.strides[dim]).for_each(|(o, s)| *o += s * by);
        };
        for (i, &n) in index.iter().enumerate() {
            shift(&mut offset, i, n as isize);
        }
        let mut at = 0;
        loop {
            let n = (self.shape[last] - index[last]).min(len - at);
            f(at, n, offset.map(|o| o as usize));
            at += n;
            if at == len {
                return;
            }
            // Back to the row's start, then on to the next row, carrying outwards.
            shift(&mut offset, last, -(index[last] as isize));
            index[last] = 0;
            for i in (0..last).rev() {
                index[i] += 1;
                shift(&mut offset, i, 1);
                if index[i] < self.shape[i] {
                    break;
                }
                shift(&mut offset, i, -(self.shape[i] as isize));
                index[i] = 0;
            }
        }
    }
}

/// The elements of `x` in the order of a strided view: element `base`, then steps of `strides` through `shape`.
pub fn gather<T: Clone + Default + Send + Sync + 'static>(
    x: &[T],
    shape: &[usize],
    strides: &[isize],
    base: isize,
) -> Vec<T> {
    let len = shape.iter().product();
    let walk = Walk::new(shape, [strides], [base]);
    let [step] = walk.inner();
    build(len, |start, out| {
        walk.rows(start, out.len(), |at, n, [i]| {
            let out = &mut out[at..at + n];
            match step {
                1 => out.clone_from_slice(&x[i..i + n]),
                0 => out.fill(x[i].clone()),
                _ => {
                    let mut j = i as isize;
                    for o in out {
                        *o = x[j as usize].clone();
                        j += step;
                    }
                }
            }
        })
    })
}

/// `f` of every element.
pub fn map<A: Sync, C: Clone + Default + Send + 'static>(x: &[A], f: impl Fn(&A) -> C + Sync) -> Vec<C> {
    build(x.len(), |start, out| {
        for (o, a) in out.iter_mut().zip(&x[start..]) {
            *o = f(a);
        }
    })
}

/// `f` of pairs of elements of contiguous operands, each with its shape, broadcast to `shape`.
pub fn map2<A: Sync, B: Sync, C: Clone + Default + Send + 'static>(
    (a, sa): (&[A], &[usize]),
    (b, sb): (&[B], &[usize]),
    shape: &[usize],
    f: impl Fn(&A, &B) -> C + Sync,
) -> Vec<C> {
    let walk = Walk::broadcast(shape, [sa, sb]);
    let steps = walk.inner();
    build(shape.iter().product(), |start, out| {
        walk.rows(start, out.len(), |at, n, [i, j]| {
            let out = &mut out[at..at + n];
            match steps {
                [0, 0] => out.fill(f(&a[i], &b[j])),
                [_, 0] => {
                    let y = &b[j];
                    out.iter_mut().zip(&a[i..i + n]).for_each(|(o, x)| *o = f(x, y));
                }
                [0, _] => {
                    let x = &a[i];
                    out.iter_mut().zip(&b[j..j + n]).for_each(|(o, y)| *o = f(x, y));
                }
                _ => {
                    let rows = a[i..i + n].iter().zip(&b[j..j + n]);
                    out.iter_mut().zip(rows).for_each(|(o, (x, y))| *o = f(x, y));
                }
            }
        })
    })
}

/// `f` of triples of elements of contiguous operands, each with its shape, broadcast to `shape`.
pub fn map3<A: Sync, B: Sync, D: Sync, C: Clone + Default + Send + 'static>(
    (a, sa): (&[A], &[usize]),
    (b, sb): (&[B], &[usize]),
    (d, sd): (&[D], &[usize]),
    shape: &[usize],
    f: impl Fn(&A, &B, &D) -> C + Sync,
) -> Vec<C> {
    let walk = Walk::broadcast(shape, [sa, sb, sd]);
    let steps = walk.inner();
    build(shape.iter().product(), |start, out| {
        walk.rows(start, out.len(), |at, n, [i, j, l]| {
            let out = &mut out[at..at + n];
            match steps {
                // One of two values for a mask, as a guard or a choice has it.
                [1, 0, 1] => {
                    let (y, rows) = (&b[j], a[i..i + n].iter().zip(&d[l..l + n]));
                    out.iter_mut().zip(rows).for_each(|(o, (x, z))| *o = f(x, y, z));
                }
                [1, 1, 0] => {
                    let (z, rows) = (&d[l], a[i..i + n].iter().zip(&b[j..j + n]));
                    out.iter_mut().zip(rows).for_each(|(o, (x, y))| *o = f(x, y, z));
                }
                _ => {
                    let [ia, ib, id] = steps.map(|s| s as usize);
                    for (t, o) in out.iter_mut().enumerate() {
                        *o = f(&a[i + t * ia], &b[j + t * ib], &d[l + t * id]);
                    }
                }
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_broadcasts_agree_with_index_arithmetic_across_chunk_borders() {
        // 3 * 251 * 131 elements: several chunks, none of whose borders falls on a row.
        let shape = [3, 251, 131];
        let a: Vec<i64> = (0..3 * 131).collect();
        let b: Vec<i64> = (0..251).map(|i| i * 1000).collect();
        let got = map2((&a, &[3, 1, 131]), (&b, &[251, 1]), &shape, |x, y| x + y);
        for (i, &g) in got.iter().enumerate() {
            let (p, q, r) = (i / (251 * 131), i / 131 % 251, i % 131);
            assert_eq!(g, (p * 131 + r) as i64 + q as i64 * 1000, "element {i}");
        }
    }

    #[test]
    fn negative_strides_walk_backwards() {
        assert_eq!(gather(&[0, 1, 2, 3, 4, 5], &[2, 2], &[3, -2], 2), [2, 0, 5, 3]);
    }

    #[test]
    fn empty_outputs_touch_nothing() {
        assert!(gather::<i32>(&[], &[0, 3], &[3, 1], 0).is_empty());
        assert!(map2((&[0i32; 0], &[0, 3]), (&[1], &[]), &[0, 3], |a, b| a + b).is_empty());
    }

    #[test]
    fn shapes_that_do_not_broadcast_are_refused() {
        assert!(broadcast_shape(&[&[2, 3], &[2]]).is_err());
        assert_eq!(broadcast_shape(&[&[2, 1], &[0], &[]]).unwrap(), [2, 0]);
        assert!(count(&[1 << 20, 1 << 20]).is_err());
        assert!(count(&[0, 1 << 40]).is_err());
        assert_eq!(count(&[0, 1 << 20]).unwrap(), 0);
    }
}
