//! Mean token loss of a model over a dataset.

use elapid_tensor::{Backend, Checkpointing, IGNORE_LABEL, Tape};
use indicatif::{ProgressBar, ProgressStyle};

use super::Batch;
use crate::Error;
use crate::data::{Dataset, Order, Sampler};
use crate::model::Mamba2ForCausalLM;

/// What an evaluation came to.
#[derive(Clone, Copy, Debug)]
pub struct Evaluation {
    /// Sum of token losses / number of labels, over the whole dataset.
    pub loss: f64,
    /// Number of labels.
    pub tokens: u64,
}

/// Evaluates `batch` blocks at a time, in the order of the dataset. With `carry_state` each row of the batch reads a
/// stretch of its own, see [`Order::Stretches`], and goes on in the state of the block before.
///
/// # Errors
/// A block cannot be read, no label counts, or the loss is not finite.
pub fn evaluate<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    data: &Dataset,
    batch: usize,
    carry_state: bool,
) -> Result<Evaluation, Error> {
    let style = ProgressStyle::with_template("evaluating {pos}/{len} blocks {bar:24}  ETA {eta}")
        .expect("the template is constant");
    let bar = ProgressBar::new(data.len() as u64).with_style(style.progress_chars("━╸ "));
    let batch = batch.min(data.len());
    let order = if carry_state { Order::Stretches } else { Order::Dataset };
    let sampler = Sampler { len: data.len(), batch, dp: 1, rank: 0, accum: 1, order };
    let mut states = carry_state.then(Vec::new);
    let (mut sum, mut tokens) = (0.0, 0);
    for step in 0..data.len().div_ceil(batch) {
        let mut places = sampler.places(step as u64, 0);
        if !carry_state {
            places.retain(|place| place.epoch == 0);
        }
        let mut batch = Batch::read(data, &places)?;
        // Where states are carried a row that is through its stretch stays in the batch, but does not count.
        for (place, labels) in places.iter().zip(batch.labels.chunks_exact_mut(batch.length)) {
            if place.epoch > 0 {
                labels.fill(IGNORE_LABEL);
            }
        }
        let loss = batch.loss(&mut Tape::inference(backend), model, states.as_mut(), Checkpointing::None);
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
