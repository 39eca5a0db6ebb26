//! The terminal: what is said on stderr, progress bars, and the way out on an interrupt.
//!
//! Results go to stdout; everything else goes through here. Bars are drawn only when both stdout and stderr are
//! terminals, and only for what takes longer than a second.

use crate::files;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use passes::Progress;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

/// How long a task may take before it gets a bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// All bars that are shown: one task may run inside another.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Whether the user asked to stop.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The exit status after an interrupt: 128 and the number of SIGINT, as shells have it.
const INTERRUPT_STATUS: i32 = 130;

/// Makes Ctrl-C remove what is half-written and leave.
pub fn handle_interrupts() {
    // Fails only where a handler is set already; then it is not ours to replace.
    let _ = ctrlc::set_handler(|| {
        INTERRUPTED.store(true, Ordering::Relaxed);
        files::remove_unfinished();
        std::process::exit(INTERRUPT_STATUS);
    });
}

/// What may be said to the user, and how.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    quiet: bool,
    bars: bool,
}

impl Term {
    /// The terminal as it is; `quiet` keeps all but errors and what was asked for by name.
    pub fn new(quiet: bool) -> Term {
        let bars = !quiet && io::stdout().is_terminal() && io::stderr().is_terminal();
        Term { quiet, bars }
    }

    /// Whether only errors and what was asked for by name are to be said.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// Says something that was asked for by name, such as the IR after a pass.
    pub fn trace(&self, text: &str) {
        let mut err = io::stderr().lock();
        // A reader that went away is no reason to stop the work.
        let _ = err.write_all(text.as_bytes());
        if !text.ends_with('\n') {
            let _ = err.write_all(b"\n");
        }
    }

    /// Starts a task that gets a bar if it lasts.
    pub fn task(&self, name: &str, total: u64) -> Box<dyn Progress> {
        if !self.bars {
            return Box::new(Silent);
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let style = "{prefix:24} {bar:32.cyan/blue} {pos:>6}/{len:<6} {elapsed:>4} (left {eta})";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        bar.set_prefix(name.to_string());
        Box::new(Bar { bar, started: Instant::now(), shown: Mutex::new(false) })
    }
}

struct Silent;

impl Progress for Silent {
    fn advance(&self, _: u64) -> bool {
        !INTERRUPTED.load(Ordering::Relaxed)
    }
}

struct Bar {
    bar: ProgressBar,
    started: Instant,
    shown: Mutex<bool>,
}

impl Progress for Bar {
    fn advance(&self, steps: u64) -> bool {
        self.bar.inc(steps);
        if self.started.elapsed() > PATIENCE {
            let mut shown = self.shown.lock().unwrap_or_else(|e| e.into_inner());
            if !*shown {
                *shown = true;
                BARS.add(self.bar.clone());
            }
        }
        !INTERRUPTED.load(Ordering::Relaxed)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
    }
}
