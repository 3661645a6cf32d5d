//! What a person sees while a model trains: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::Evaluation;
use crate::error::{quiet, say};

/// Figures of one optimizer step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) step: u64,
    /// Mean token loss of the whole batch.
    pub(crate) loss: f64,
    pub(crate) lr: f64,
    pub(crate) grad_norm: f64,
    /// Inputs since step 1.
    pub(crate) tokens: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) step_time_s: f64,
    /// Share of this machine's measured rate of matrix products in the compute dtype; NaN: of a device whose rate is not known.
    pub(crate) mfu: f64,
    /// Where one was due after this step.
    pub(crate) evaluation: Option<Evaluation>,
}

/// Shows steps on stderr.
pub(crate) enum Progress {
    Bar(ProgressBar),
    Lines { every: u64, first: u64, last: u64, started: std::time::Instant },
}

impl Progress {
    /// Steps `first` to `max_steps`.
    pub(crate) fn new(first: u64, max_steps: u64, every: u64) -> Self {
        if quiet() || !std::io::stderr().is_terminal() {
            return Self::Lines { every, first, last: max_steps, started: std::time::Instant::now() };
        }
        let style = ProgressStyle::with_template("step {pos}/{len} {bar:24} {msg}  ETA {eta}")
            .expect("the template is constant");
        let bar =
            ProgressBar::new(max_steps).with_position(first - 1).with_style(style.progress_chars("━╸ "));
        bar.reset_eta();
        bar.enable_steady_tick(Duration::from_millis(250));
        Self::Bar(bar)
    }

    pub(crate) fn step(&self, f: &Figures) {
        self.figures(f);
        if let Some(evaluation) = &f.evaluation {
            let line = format!("evaluation after step {}: {evaluation}", f.step);
            match self {
                Self::Bar(bar) => bar.println(line),
                Self::Lines { .. } => say(line),
            }
        }
    }

    fn figures(&self, f: &Figures) {
        let mfu = if f.mfu.is_nan() { String::new() } else { format!("  MFU {:.0} %", 100.0 * f.mfu) };
        let speed = format!("{:.0} tokens/s{mfu}", f.tokens_per_s);
        match self {
            Self::Bar(bar) => {
                bar.set_message(format!("loss {:.4}  {speed}", f.loss));
                bar.set_position(f.step);
            }
            Self::Lines { every, first, last, started } => {
                if f.step == *first || f.step.is_multiple_of(*every) || f.step == *last {
                    let done = f.step + 1 - first;
                    let left = started.elapsed().mul_f64((last - f.step) as f64 / done as f64);
                    say(format_args!(
                        "step {}/{last}  loss {:.4}  lr {:.2e}  grad norm {:.3}  {speed}  ETA {}",
                        f.step,
                        f.loss,
                        f.lr,
                        f.grad_norm,
                        HumanDuration(left)
                    ));
                }
            }
        }
    }

    pub(crate) fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish();
        }
    }
}
