//! Mean token loss of a model over a dataset.

use elapid_tensor::{Backend, Checkpointing, Tape};
use indicatif::{ProgressBar, ProgressStyle};

use super::Batch;
use crate::Error;
use crate::data::Dataset;
use crate::model::Mamba2ForCausalLM;

/// What an evaluation came to.
#[derive(Clone, Copy, Debug)]
pub struct Evaluation {
    /// Sum of token losses / number of labels, over the whole dataset.
    pub loss: f64,
    /// Number of labels.
    pub tokens: u64,
}

/// Evaluates `batch` blocks at a time; the last batch may be smaller.
///
/// # Errors
/// A block cannot be read, no label counts, or the loss is not finite.
pub fn evaluate<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    data: &Dataset,
    batch: usize,
) -> Result<Evaluation, Error> {
    let style = ProgressStyle::with_template("evaluating {pos}/{len} blocks {bar:24}  ETA {eta}")
        .expect("the template is constant");
    let bar = ProgressBar::new(data.len() as u64).with_style(style.progress_chars("━╸ "));
    let (mut sum, mut tokens) = (0.0, 0);
    for first in (0..data.len()).step_by(batch) {
        let blocks = first..data.len().min(first + batch);
        let samples = blocks.map(|i| data.sample(i)).collect::<Result<Vec<_>, _>>()?;
        let batch = Batch::new(&samples);
        let loss = batch.loss(&mut Tape::inference(backend), model, None, Checkpointing::None);
        sum += f64::from(backend.values(&loss)[0]);
        tokens += batch.valid() as u64;
        bar.inc(batch.size as u64);
    }
    bar.finish_and_clear();
    if tokens == 0 {
        return Err(Error::new("the dataset has no label that counts")
            .with_hint("blocks of one token, or labels that are all -100, cannot be evaluated"));
    }
    let loss = sum / tokens as f64;
    if !loss.is_finite() {
        return Err(Error::new(format!("the loss is {loss}")).with_hint("try --dtype float32"));
    }
    Ok(Evaluation { loss, tokens })
}
