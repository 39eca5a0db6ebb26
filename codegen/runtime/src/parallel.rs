//! How units of work are divided among threads. The result does not depend on it.

use rayon::prelude::*;

/// Work, in nanoseconds or so, below which another thread is not woken.
pub const GRAIN: u64 = 1 << 15;

/// Calls `run(from, to)` for parts of `0..units`, of which each takes `work`.
pub fn divide(units: usize, work: u64, run: impl Fn(usize, usize) + Sync) {
    let grain = GRAIN.div_ceil(work.max(1)).max(1) as usize;
    let threads = rayon::current_num_threads();
    let parts = (units / grain).clamp(1, 4 * threads);
    match threads == 1 || parts == 1 {
        true => run(0, units),
        false => {
            let at = |i: usize| i * units / parts;
            (0..parts).into_par_iter().with_max_len(1).for_each(|i| run(at(i), at(i + 1)));
        }
    }
}
