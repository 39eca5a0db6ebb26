//! How units of work are divided among threads. The result does not depend on it.
//!
//! A model is many short kernels, and to wake a thread takes as long as several of them. So a [`Team`] borrows threads of
//! rayon once, for a run, and they stay awake between its kernels. The caller works too and waits for nobody who has not begun:
//! a thread that comes late, or never, costs nothing.
//!
//! `unsafe` is what lending a closure to threads takes that may outlive it: [`Shared`] says why they do not use it then.
#![allow(unsafe_code)]

use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Work of a run, in nanoseconds or so, before which no other thread is woken: that takes half as long.
const ALONE: u64 = 1 << 17;

/// Work, in nanoseconds or so, that is done before threads that are awake have taken their share of it.
const SHORT: u64 = 1 << 13;

/// Work of a part, in nanoseconds or so, that is worth asking for.
const GRAIN: u64 = 1 << 11;

/// Turns of waiting for work: some hundred microseconds of pauses, then of leaving the processor to others.
const PAUSES: u32 = 1 << 13;
const YIELDS: u32 = 1 << 8;

/// Threads for the kernels of one run.
pub struct Team {
    shared: Arc<Shared>,
    threads: usize,
    /// Work done alone so far.
    alone: Cell<u64>,
    /// The number of the last job.
    last: Cell<u64>,
}

/// What the caller shares with its helpers.
///
/// A helper counts itself as `inside` before it looks whether a job is `open`, and uses the job only if it is. The caller
/// closes a job before it waits for nobody to be inside, and writes the next one, or returns, after. Both do so in the one
/// order of all sequentially consistent operations: whoever does not see the other is seen by it.
#[derive(Default)]
struct Shared {
    /// The number of the job that may be taken; 0 for none.
    open: AtomicU64,
    inside: AtomicUsize,
    awake: AtomicUsize,
    dismissed: AtomicBool,
    job: UnsafeCell<Option<Job>>,
}

// SAFETY: the job is written by the caller alone, while nobody is inside; see above.
unsafe impl Sync for Shared {}
// SAFETY: the closure that a job points to may be called by any thread.
unsafe impl Send for Shared {}

struct Job {
    parts: usize,
    next: AtomicUsize,
    run: *const (dyn Fn(usize) + Sync),
}

impl Job {
    /// Takes parts until there are none.
    ///
    /// # Safety
    /// The closure must be alive.
    unsafe fn take(&self) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= self.parts {
                return;
            }
            // SAFETY: promised by the caller.
            unsafe { (*self.run)(part) }
        }
    }
}

impl Default for Team {
    fn default() -> Team {
        Team::new()
    }
}

impl Team {
    /// A team of as many threads as rayon has here. None is woken before there is work for it.
    pub fn new() -> Team {
        let threads = rayon::current_num_threads();
        Team { shared: Arc::default(), threads, alone: Cell::new(0), last: Cell::new(0) }
    }

    /// Calls `run(from, to)` for parts of `0..units`, of which each takes `work`, in nanoseconds or so.
    pub fn divide(&self, units: usize, work: u64, run: impl Fn(usize, usize) + Sync) {
        let all = work.saturating_mul(units as u64);
        let parts = (all / GRAIN).min(16 * self.threads as u64).min(units as u64) as usize;
        if self.threads == 1 || parts < 2 || all < SHORT || !self.gather(all) {
            return run(0, units);
        }
        let part = |i: usize| run(i * units / parts, (i + 1) * units / parts);
        let run: &(dyn Fn(usize) + Sync) = &part;
        // SAFETY: only the lifetime changes. No helper calls it after `close`, before which nobody returns or unwinds: code
        // that was generated does neither.
        let run: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run) };
        let job = Job { parts, next: AtomicUsize::new(0), run };
        // SAFETY: no job is open and nobody is inside.
        unsafe { *self.shared.job.get() = Some(job) };
        self.last.set(self.last.get() + 1);
        self.shared.open.store(self.last.get(), Ordering::SeqCst);
        let close = Close(&self.shared);
        self.shared.take();
        drop(close);
    }

    /// Whether there are helpers, or the work will be worth their coming.
    fn gather(&self, work: u64) -> bool {
        if self.shared.awake.load(Ordering::Relaxed) > 0 {
            return true;
        }
        self.alone.set(self.alone.get().saturating_add(work));
        if self.alone.get() < ALONE {
            return false;
        }
        self.alone.set(0);
        self.shared.dismissed.store(false, Ordering::Relaxed);
        for _ in 1..self.threads {
            self.shared.awake.fetch_add(1, Ordering::Relaxed);
            let shared = self.shared.clone();
            rayon::spawn(move || shared.help());
        }
        true
    }

    /// Sends the helpers away: others need the threads. They are called again when there is work for them.
    pub fn dismiss(&self) {
        self.shared.dismissed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.dismiss();
    }
}

/// Closes the job, and waits for those who are inside.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.open.store(0, Ordering::SeqCst);
        let mut turns = 0u32;
        while self.0.inside.load(Ordering::SeqCst) > 0 {
            turns += 1;
            // Whoever is inside may have lost its processor.
            if turns > PAUSES { std::thread::yield_now() } else { spin_loop() }
        }
    }
}

impl Shared {
    /// Takes parts of the open job.
    fn take(&self) {
        // SAFETY: the caller of `divide` is here, or is kept from leaving by `inside`; nobody writes the job meanwhile.
        unsafe {
            if let Some(job) = &*self.job.get() {
                job.take();
            }
        }
    }

    /// What a helper does.
    fn help(&self) {
        let (mut done, mut turns) = (0, 0u32);
        while turns < PAUSES + YIELDS && !self.dismissed.load(Ordering::Relaxed) {
            let open = self.open.load(Ordering::Relaxed);
            if open != 0 && open != done {
                self.inside.fetch_add(1, Ordering::SeqCst);
                let open = self.open.load(Ordering::SeqCst);
                if open != 0 {
                    (done, turns) = (open, 0);
                    self.take();
                }
                self.inside.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            turns += 1;
            if turns > PAUSES { std::thread::yield_now() } else { spin_loop() }
        }
        self.awake.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads")
    }

    /// Every unit of many short jobs is done once, whoever does it, and is done when `divide` returns.
    #[test]
    fn every_unit_is_done_once() {
        for threads in [1, 2, 5] {
            pool(threads).install(|| {
                let team = Team::new();
                for job in 0..2000usize {
                    let units = job % 37;
                    let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                    team.divide(units, 1 << 16, |from, to| {
                        for c in &counts[from..to] {
                            c.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "job {job}");
                    if job % 100 == 0 {
                        team.dismiss();
                    }
                }
            });
        }
    }

    /// Teams whose threads are all busy with other teams go on alone.
    #[test]
    fn callers_do_not_wait_for_busy_threads() {
        let sums: Vec<usize> = pool(2).install(|| {
            use rayon::prelude::*;
            (0..8usize)
                .into_par_iter()
                .map(|n| {
                    let team = Team::new();
                    let sum = AtomicUsize::new(0);
                    for _ in 0..200 {
                        team.divide(64, 1 << 14, |from, to| {
                            sum.fetch_add((from..to).sum::<usize>() * n, Ordering::Relaxed);
                        });
                    }
                    sum.into_inner()
                })
                .collect()
        });
        assert_eq!(sums, (0..8).map(|n| 200 * 2016 * n).collect::<Vec<_>>());
    }
}
