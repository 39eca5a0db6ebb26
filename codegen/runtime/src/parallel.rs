//! How units of work are divided among threads. The result does not depend on it.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Work, in nanoseconds or so, below which no other thread is woken: that takes half as long.
const ALONE: u64 = 1 << 17;

/// Work of a part, in nanoseconds or so, that is worth asking for.
const GRAIN: u64 = 1 << 13;

/// Calls `run(from, to)` for parts of `0..units`, of which each takes `work`. The caller takes parts too, from the start: to
/// wake another thread takes as long as many a kernel.
pub fn divide(units: usize, work: u64, run: impl Fn(usize, usize) + Sync) {
    let threads = rayon::current_num_threads();
    let grain = GRAIN.div_ceil(work.max(1)).max(1) as usize;
    let parts = (units / grain).clamp(1, 4 * threads);
    if threads == 1 || parts == 1 || work.saturating_mul(units as u64) < ALONE {
        return run(0, units);
    }
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= parts {
                break;
            }
            run(i * units / parts, (i + 1) * units / parts);
        }
    };
    rayon::in_place_scope(|s| {
        (1..threads.min(parts)).for_each(|_| s.spawn(|_| take()));
        take();
    });
}
