//! Ctrl-C and SIGTERM: while a run trains, the first one waits for the end of the step and a checkpoint; a second one,
//! and any at another time, leaves at once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::Error;

/// Set by the handlers, which stay for the life of the process: the default action cannot be had back.
struct Flags {
    at_once: Arc<AtomicBool>,
    caught: Arc<AtomicUsize>,
}

static FLAGS: OnceLock<Flags> = OnceLock::new();

/// While this lives, the first signal waits.
pub(super) struct Graceful(&'static Flags);

impl Graceful {
    pub(super) fn new() -> Result<Self, Error> {
        if FLAGS.get().is_none() {
            let new = Flags { at_once: Arc::new(false.into()), caught: Arc::new(0.into()) };
            for signal in [SIGINT, SIGTERM] {
                // In this order: the first signal finds `at_once` false and sets it for the second.
                flag::register_conditional_shutdown(signal, 128 + signal, new.at_once.clone())
                    .and_then(|_| flag::register_usize(signal, new.caught.clone(), signal as usize))
                    .and_then(|_| flag::register(signal, new.at_once.clone()))
                    .map_err(|cause| Error::new(format!("cannot wait for signals: {cause}")))?;
            }
            // Another thread may have been first; its flags are as good.
            let _ = FLAGS.set(new);
        }
        let flags = FLAGS.get().expect("set above");
        flags.at_once.store(false, Ordering::SeqCst);
        Ok(Self(flags))
    }

    /// The signal that asks to leave.
    pub(super) fn caught(&self) -> Option<i32> {
        match self.0.caught.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal as i32),
        }
    }
}

impl Drop for Graceful {
    fn drop(&mut self) {
        self.0.at_once.store(true, Ordering::SeqCst);
    }
}

/// What is said of a run that a signal has stopped.
pub(super) fn after(step: u64, signal: i32, checkpoint: &Path) -> Error {
    Error::new(format!("{} after step {step}, saved in {}", name(signal), checkpoint.display()))
        .with_hint(
            "the same command with --resume auto goes on from here; name the run folder with --output-dir",
        )
        .by_signal(signal)
}

/// What is said where a signal came while the model was exported, which was completed.
pub(super) fn after_export(signal: i32, model: &Path) -> Error {
    Error::new(format!("{} after the last step, the model is whole in {}", name(signal), model.display()))
        .with_hint("the run is finished; nothing is left to do")
        .by_signal(signal)
}

fn name(signal: i32) -> &'static str {
    if signal == SIGINT { "Ctrl-C" } else { "SIGTERM" }
}
