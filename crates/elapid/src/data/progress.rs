//! What a person sees while text is tokenized: a bar on a terminal, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::pack::Counts;
use crate::error::say;

/// Time between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows how far a split has come.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    /// Bytes of input in all, and those that were done before.
    total: u64,
    before: u64,
    started: Instant,
    last: Instant,
}

impl Progress {
    pub(super) fn new(total: u64, before: u64) -> Self {
        let now = Instant::now();
        let style = ProgressStyle::with_template("{percent:>3} % {bar:24} {msg}  ETA {eta}")
            .expect("the template is constant");
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_style(style.progress_chars("━╸ ")).with_position(before);
            bar.reset_eta();
            bar
        });
        Self { bar, total, before, started: now, last: now }
    }

    pub(super) fn show(&mut self, counts: Counts, tokens: u64) {
        if self.bar.is_none() && self.last.elapsed() < LINE_EVERY {
            return;
        }
        self.last = Instant::now();
        let time = self.started.elapsed();
        let read = counts.input_bytes.saturating_sub(self.before) as f64;
        let line = format!(
            "{} documents  {tokens} tokens  {:.1} MB/s",
            counts.documents,
            read / 1e6 / time.as_secs_f64().max(1e-9)
        );
        match &self.bar {
            Some(bar) => {
                bar.set_message(line);
                bar.set_position(counts.input_bytes);
            }
            None => {
                let done = (counts.input_bytes as f64 / self.total.max(1) as f64).min(1.0);
                let left = (self.total as f64 - counts.input_bytes as f64).max(0.0) / read.max(1.0);
                say(format_args!(
                    "{:3.0} %  {line}  ETA {}",
                    100.0 * done,
                    HumanDuration(time.mul_f64(left))
                ));
            }
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
