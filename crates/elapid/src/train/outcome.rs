//! What a run came to.

use std::path::PathBuf;

use super::Evaluation;

/// What a finished run left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// Inputs trained on.
    pub tokens: u64,
    /// Seconds in steps.
    pub seconds: f64,
    /// The exported Hugging Face folder.
    pub model_dir: PathBuf,
    /// The evaluation after the last step.
    pub evaluation: Option<Evaluation>,
    /// Predicted peak of resident memory, in bytes.
    pub predicted_memory: u64,
    /// Measured peak; None where the system does not say.
    pub peak_memory: Option<u64>,
}

impl Outcome {
    /// That of a run that has not begun.
    pub(super) fn new(model_dir: PathBuf) -> Self {
        Self {
            first_loss: f64::NAN,
            last_loss: f64::NAN,
            tokens: 0,
            seconds: 0.0,
            model_dir,
            evaluation: None,
            predicted_memory: 0,
            peak_memory: None,
        }
    }
}
