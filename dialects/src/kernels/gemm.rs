//! Matrix products of floats: the one place that calls the GEMM library.
//!
//! The library promises the same bits only for the same call, not for another number of threads. So it is called
//! single-threaded on tiles of the result whose size depends on the shape alone, and threads share out tiles.
//! The library's interface is raw pointers: views check their bounds once, when they are made, and everything
//! outside this file is safe.

use rayon::prelude::*;
use std::marker::PhantomData;

/// Rows of the result that one task computes.
const TILE_ROWS: usize = 128;
/// From here on tasks are made of rows even where there are columns enough.
const MANY_ROWS: usize = 1024;
/// Columns of the result that one task computes, where there are too few rows to share out.
const TILE_COLS: usize = 256;
/// Fewer multiplications than this are not worth a task of their own.
const SMALL: usize = 1 << 16;
/// Rows of the data summed in single precision before they join a Gram matrix held in double.
pub const GRAM_ROWS: usize = 256;

/// An element type that the GEMM library multiplies.
pub trait Scalar: Copy + Default + Send + Sync + 'static {
    /// One.
    const ONE: Self;
}

impl Scalar for f32 {
    const ONE: f32 = 1.0;
}

impl Scalar for f64 {
    const ONE: f64 = 1.0;
}

/// A view of a matrix: element `[i, j]` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A contiguous row-major `[rows, cols]` at the start of `data`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Mat<'a, T> {
        Mat::strided(data, rows, cols, cols, 1)
    }

    /// A matrix with these strides, in elements. All of it must lie inside `data`.
    pub fn strided(
        data: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Mat<'a, T> {
        let end = match (rows, cols) {
            (0, _) | (_, 0) => 0,
            (r, c) => (r - 1) * row_stride + (c - 1) * col_stride + 1,
        };
        assert!(end <= data.len(), "a matrix view reaches {end} elements into {}", data.len());
        Mat { data, rows, cols, row_stride, col_stride }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Mat<'a, T> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `from..to`.
    pub fn rows(self, from: usize, to: usize) -> Mat<'a, T> {
        assert!(from <= to && to <= self.rows, "rows {from}..{to} of {}", self.rows);
        let start = if self.cols == 0 || from == to { 0 } else { from * self.row_stride };
        Mat { data: &self.data[start..], rows: to - from, ..self }
    }

    /// Columns `from..to`.
    pub fn cols(self, from: usize, to: usize) -> Mat<'a, T> {
        self.t().rows(from, to).t()
    }
}

impl<T: Copy + Default> Mat<'_, T> {
    /// `c = self * b` element by element, for types that the library does not multiply:
    /// `c[i, j]` is folded with `add(sum, self[i, k], b[k, j])` over `k` in order.
    pub fn multiply_into(self, b: Mat<T>, c: &mut [T], add: impl Fn(T, T, T) -> T) {
        c.fill(T::default());
        for (i, c) in c.chunks_exact_mut(b.cols.max(1)).enumerate() {
            for k in 0..self.cols {
                let x = self.data[i * self.row_stride + k * self.col_stride];
                for (j, c) in c.iter_mut().enumerate() {
                    *c = add(*c, x, b.data[k * b.row_stride + j * b.col_stride]);
                }
            }
        }
    }
}

/// `c = a * b`, on threads. `a` is `[M, K]`, `b` is `[K, N]`, `c` is row-major `[M, N]`.
pub fn matmul<T: Scalar>(a: Mat<T>, b: Mat<T>, c: &mut [T]) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!((k, m * n), (b.rows, c.len()), "the shapes of a product do not fit");
    if m * n * k <= SMALL {
        tile(a, b, c);
    } else if m >= MANY_ROWS || n <= TILE_COLS {
        // Every task packs `b` anew, so it takes as many rows as leave a few tasks.
        let rows = (m / 8).clamp(TILE_ROWS / 2, 2 * TILE_ROWS).next_multiple_of(16);
        c.par_chunks_mut(rows * n).enumerate().for_each(|(i, c)| {
            tile(a.rows(i * rows, (i * rows + rows).min(m)), b, c);
        });
    } else {
        strips(c, n, TILE_COLS, |from, c| {
            let b = b.cols(from, from + c.cols);
            tile_into(a, b, c);
        });
    }
}

/// Some columns of a row-major matrix that a task may write.
pub struct Strip<'a, T> {
    start: *mut T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    lives: PhantomData<&'a mut T>,
}

#[allow(unsafe_code)]
// SAFETY: a strip is the only way to its elements, like the `&mut [T]` it was cut from.
unsafe impl<T: Send> Send for Strip<'_, T> {}

impl<'a, T> Strip<'a, T> {
    /// All of a contiguous row-major `[rows, cols]`.
    fn whole(data: &'a mut [T], rows: usize, cols: usize) -> Strip<'a, T> {
        assert_eq!(data.len(), rows * cols, "the shapes of a product do not fit");
        Strip { start: data.as_mut_ptr(), rows, cols, row_stride: cols, lives: PhantomData }
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The rows, in order.
    #[allow(unsafe_code)]
    pub fn rows_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        let (start, cols, row_stride) = (self.start, self.cols, self.row_stride);
        // SAFETY: row `i` of a strip lies inside the matrix that it was cut from, and rows do not overlap.
        (0..self.rows)
            .map(move |i| unsafe { std::slice::from_raw_parts_mut(start.add(i * row_stride), cols) })
    }
}

/// Calls `f(from, strip)` on threads for the strips of `width` columns of `c`, a row-major matrix of `n` columns;
/// `from` is a strip's first column.
pub fn strips<T: Send>(c: &mut [T], n: usize, width: usize, f: impl Fn(usize, &mut Strip<T>) + Sync) {
    if c.is_empty() {
        return;
    }
    assert_eq!(c.len() % n, 0, "the matrix has no whole number of rows");
    let (rows, whole) = (c.len() / n, Strip::whole(c, c.len() / n, n));
    let cut = |from: usize| Strip {
        // Stays inside the first row, since `from < n`.
        start: whole.start.wrapping_add(from),
        rows,
        cols: width.min(n - from),
        row_stride: n,
        lives: PhantomData,
    };
    let cut: Vec<(usize, Strip<T>)> = (0..n).step_by(width).map(|from| (from, cut(from))).collect();
    cut.into_par_iter().for_each(|(from, mut strip)| f(from, &mut strip));
}

/// `c = a * b` on this thread alone; shapes as [`matmul`].
pub fn tile<T: Scalar>(a: Mat<T>, b: Mat<T>, c: &mut [T]) {
    tile_into(a, b, &mut Strip::whole(c, a.rows, b.cols));
}

/// `c = a * b` on this thread alone; shapes as [`matmul`].
#[allow(unsafe_code)]
pub fn tile_into<T: Scalar>(a: Mat<T>, b: Mat<T>, c: &mut Strip<T>) {
    assert_eq!((a.cols, a.rows, b.cols), (b.rows, c.rows, c.cols), "the shapes of a product do not fit");
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    if a.cols == 0 {
        c.rows_mut().for_each(|row| row.fill(T::default()));
        return;
    }
    // SAFETY: the views were checked against their slices when they were made, `c` has the result's shape,
    // and `Scalar` is implemented only for types that the library multiplies.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.start,
            1,
            c.row_stride as isize,
            false,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::default(),
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Adds the diagonal of `x^T x` and what is above it to `acc`, a row-major `[k, k]` matrix; `x` is row-major `[rows, k]`.
/// [`mirror`] fills in the rest.
///
/// Products are summed in single precision over a fixed number of rows, and those sums in double, so that neither
/// the number of calls' rows nor of threads drowns small entries.
pub fn gram(acc: &mut [f64], x: &[f32], k: usize) {
    assert_eq!(acc.len(), k * k, "the Gram matrix is not [k, k]");
    if k == 0 {
        return;
    }
    let x = Mat::new(x, x.len() / k, k);
    acc.par_chunks_mut(TILE_ROWS * k).enumerate().for_each(|(i, acc)| {
        let from = i * TILE_ROWS;
        let height = acc.len() / k;
        let mut sum = vec![0f32; height * (k - from)];
        for r in (0..x.rows).step_by(GRAM_ROWS) {
            let block = x.rows(r, (r + GRAM_ROWS).min(x.rows));
            tile(block.cols(from, from + height).t(), block.cols(from, k), &mut sum);
            for (acc, sum) in acc.chunks_exact_mut(k).zip(sum.chunks_exact(k - from)) {
                acc[from..].iter_mut().zip(sum).for_each(|(a, &s)| *a += f64::from(s));
            }
        }
    });
}

/// Copies what is above the diagonal of a row-major `[k, k]` matrix below it.
pub fn mirror(acc: &mut [f64], k: usize) {
    const SIDE: usize = 32;
    for from in (0..k).step_by(SIDE) {
        let to = k.min(from + SIDE);
        let (above, rows) = acc.split_at_mut(from * k);
        for left in (0..from).step_by(SIDE) {
            for i in from..to {
                (left..left + SIDE).for_each(|j| rows[(i - from) * k + j] = above[j * k + i]);
            }
        }
        for i in from..to {
            (from..i).for_each(|j| rows[(i - from) * k + j] = rows[(j - from) * k + i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers: every product and sum is exact, so any order gives the same.
    fn numbers(n: usize, step: usize) -> Vec<f32> {
        (0..n).map(|i| (i * step % 7) as f32 - 3.0).collect()
    }

    fn naive(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
        let dot = |i: usize, j: usize| (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum();
        (0..m * n).map(|at| dot(at / n, at % n)).collect()
    }

    #[test]
    fn every_way_of_cutting_gives_the_product() {
        // One tile; rows with a rest; columns with a rest; a single row; nothing to sum; nothing at all.
        for (m, k, n) in
            [(3, 4, 5), (301, 9, 70), (1100, 3, 40), (5, 40, 700), (1, 90, 1000), (4, 0, 3), (0, 4, 3)]
        {
            let (a, b) = (numbers(m * k, 5), numbers(k * n, 3));
            let want = naive(&a, &b, m, k, n);
            let mut c = vec![f32::NAN; m * n];
            matmul(Mat::new(&a, m, k), Mat::new(&b, k, n), &mut c);
            assert_eq!(c, want, "{m}x{k}x{n}");
            let bt: Vec<f32> = (0..k * n).map(|i| b[i % k.max(1) * n + i / k.max(1)]).collect();
            c.fill(f32::NAN);
            matmul(Mat::new(&a, m, k), Mat::new(&bt, n, k).t(), &mut c);
            assert_eq!(c, want, "{m}x{k}x{n} by a transpose");
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let (m, k, n) = (1200, 65, 300);
        let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i as f32 * 0.11).cos()).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut c, mut g) = (vec![0f32; m * n], vec![0f64; k * k]);
                matmul(Mat::new(&a, m, k), Mat::new(&b, k, n), &mut c);
                gram(&mut g, &a, k);
                mirror(&mut g, k);
                let c: Vec<u32> = c.iter().map(|x| x.to_bits()).collect();
                (c, g.iter().map(|x| x.to_bits()).collect::<Vec<u64>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }

    #[test]
    fn gram_adds_to_what_is_there_and_is_symmetric() {
        let (rows, k) = (700, 150);
        let x = numbers(rows * k, 11);
        let mut acc: Vec<f64> = (0..k * k).map(|i| ((i / k) * (i % k)) as f64).collect();
        gram(&mut acc, &x, k);
        mirror(&mut acc, k);
        for i in 0..k {
            for j in 0..k {
                let sum: f64 = (0..rows).map(|r| f64::from(x[r * k + i] * x[r * k + j])).sum();
                assert_eq!(acc[i * k + j], sum + (i * j) as f64, "[{i}, {j}]");
            }
        }
    }

    #[test]
    #[should_panic(expected = "a matrix view reaches")]
    fn a_view_beyond_its_data_is_refused() {
        Mat::new(&[0f32; 5], 2, 3);
    }
}
