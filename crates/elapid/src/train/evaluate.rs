//! Mean token loss of a model over a dataset.

use std::f64::consts::LN_2;
use std::ops::Range;

use elapid_tensor::{Backend, Checkpointing, IGNORE_LABEL, Tape};
use indicatif::{ProgressBar, ProgressStyle};

use super::Batch;
use crate::Error;
use crate::config::run::Run;
use crate::data::{Dataset, Order, Sampler};
use crate::model::Mamba2ForCausalLM;
use crate::parallel::Rank;

/// What an evaluation came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of token losses / number of labels, over all blocks.
    pub loss: f64,
    /// Number of labels.
    pub tokens: u64,
    /// Bits that the model needs for a byte of the text: loss / ln 2 · tokens a byte, where the dataset says how many
    /// tokens its bytes became ([`crate::data::Card::tokens_per_byte`]).
    pub bits_per_byte: Option<f64>,
}

impl Evaluation {
    /// e^loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl std::fmt::Display for Evaluation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "loss {:.4}  perplexity {:.3}", self.loss, self.perplexity())?;
        match self.bits_per_byte {
            Some(bits) => write!(f, "  {bits:.3} bits per byte"),
            None => Ok(()),
        }
    }
}

/// Evaluates `blocks` of `data`, `batch` at a time; the last batch may be smaller. With `carry_state` each row of the
/// batch reads a stretch of its own, see [`Order::Stretches`], and goes on in the state of the block before. A bar on a
/// terminal shows how far it has come.
///
/// # Errors
/// A block cannot be read, no label counts, or the loss is not finite.
pub fn evaluate<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    data: &Dataset,
    blocks: Range<usize>,
    batch: usize,
    carry_state: bool,
) -> Result<Evaluation, Error> {
    evaluate_by(data, blocks, batch, carry_state, on_backend(backend, model, carry_state))
}

/// [`evaluate`], of the model whose sum of token losses in a batch `loss` gives.
///
/// # Errors
/// As [`evaluate`], and those of `loss`.
pub fn evaluate_by(
    data: &Dataset,
    blocks: Range<usize>,
    batch: usize,
    carry_state: bool,
    loss: impl FnMut(&Batch) -> Result<f64, Error>,
) -> Result<Evaluation, Error> {
    let style = ProgressStyle::with_template("evaluating {pos}/{len} blocks {bar:24}  ETA {eta}")
        .expect("the template is constant");
    let bar = ProgressBar::new(blocks.len() as u64).with_style(style.progress_chars("━╸ "));
    let alone = Rank::single(None);
    let result = quietly(&alone, data, blocks, batch, carry_state, loss, |done| bar.inc(done));
    bar.finish_and_clear();
    result
}

/// The sum of token losses of batch after batch, with the states carried between them where that is asked for.
fn on_backend<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    carry_state: bool,
) -> impl FnMut(&Batch) -> Result<f64, Error> {
    let mut states = carry_state.then(Vec::new);
    move |batch| {
        if batch.size == 0 {
            return Ok(0.0);
        }
        let loss = batch.loss(&mut Tape::inference(backend), model, states.as_mut(), Checkpointing::None);
        Ok(f64::from(backend.values(&loss)[0]))
    }
}

/// [`evaluate`] without a bar; `loss` gives the sum of a batch's token losses, and `progress` is told of blocks as they
/// are done. The ranks that share the samples share the batches, and all get what a rank alone would, to the bit: the
/// losses of batches are summed in the order of the batches. They ask for `loss` equally often, of an empty batch where
/// there are no more. Where states are carried each rank reads everything, since what a row reads would depend on their
/// number.
fn quietly(
    rank: &Rank,
    data: &Dataset,
    blocks: Range<usize>,
    batch: usize,
    carry_state: bool,
    mut loss: impl FnMut(&Batch) -> Result<f64, Error>,
    progress: impl Fn(u64),
) -> Result<Evaluation, Error> {
    let (len, batch) = (blocks.len(), batch.min(blocks.len()));
    let order = if carry_state { Order::Stretches } else { Order::Dataset };
    let sampler = Sampler { len, batch, dp: 1, rank: 0, accum: 1, order, from: (0, 0) };
    let batches = len.div_ceil(batch);
    let (first, ranks) = if carry_state { (0, 1) } else { (rank.dp_rank(), rank.mesh().dp) };
    let mut sums = vec![0.0; batches];
    let mut tokens = 0;
    for step in (first..batches.next_multiple_of(ranks)).step_by(ranks) {
        if step >= batches {
            loss(&Batch::default())?;
            continue;
        }
        let mut places = sampler.places(step as u64, 0);
        places.iter_mut().for_each(|place| place.index += blocks.start);
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
        sums[step] = loss(&batch)?;
        tokens += batch.valid() as u64;
        progress(places.iter().filter(|place| place.epoch == 0).count() as u64);
    }
    if ranks > 1 {
        rank.sum_all_over_samples(&mut sums);
        tokens = rank.sum_over_samples(tokens);
    }
    if tokens == 0 {
        return Err(Error::new("the dataset has no label that counts")
            .with_hint("blocks of one token, or labels that are all -100, cannot be evaluated"));
    }
    if let Some(at) = sums.iter().position(|sum| !sum.is_finite()) {
        let of = match (carry_state, blocks.start + at * batch) {
            (true, _) => format!("block {at} of a row"),
            (_, first) => format!("among blocks {first} to {}", blocks.end.min(first + batch) - 1),
        };
        let error = Error::new(format!("the loss is not finite: {} {of}", sums[at]));
        return Err(error.with_hint(
            "try --dtype float32; where a training step led to it, go on from an earlier checkpoint with a lower --lr",
        ));
    }
    let loss = sums.iter().sum::<f64>() / tokens as f64;
    let tokens_per_byte = data.card().and_then(|card| card.tokens_per_byte());
    let bits_per_byte = tokens_per_byte.map(|tokens| loss / LN_2 * tokens);
    Ok(Evaluation { loss, tokens, bits_per_byte })
}

/// The last `fraction` of `len` blocks, at least one.
///
/// # Errors
/// Nothing is left.
pub fn last_blocks(len: usize, fraction: f64) -> Result<Range<usize>, Error> {
    let held_out = ((len as f64 * fraction) as usize).max(1);
    if held_out >= len {
        return Err(Error::new(format!(
            "--eval-fraction {fraction} of {len} blocks leaves none to train on"
        ))
        .with_hint("hold out less, or give more data"));
    }
    Ok(len - held_out..len)
}

/// What a run evaluates on while it trains. Nothing here changes the run itself: evaluations read the model and leave
/// sampler, gradients and random numbers alone.
pub(super) struct HeldOut<'a> {
    /// Of --eval-data-dir; None: of the training data.
    own: Option<Dataset>,
    train: &'a Dataset,
    blocks: Range<usize>,
    batch: usize,
    carry_state: bool,
    /// Steps between evaluations; None: only after the last.
    freq: Option<u64>,
    last: u64,
}

impl<'a> HeldOut<'a> {
    /// What `run` asks for: the last blocks of `train`, or another dataset, or nothing.
    ///
    /// # Errors
    /// The other dataset cannot be read or has other tokens; nothing would be left to train on.
    pub(super) fn open(run: &Run, train: &'a Dataset) -> Result<Option<Self>, Error> {
        let args = &run.args;
        let (own, blocks) = match (&args.eval_data_dir, args.eval_fraction) {
            (Some(dir), _) => {
                let mut own = Dataset::open_blocks(dir, Some(train.seq_len()))?;
                if own.is_mixture() {
                    return Err(Error::new(format!("--eval-data-dir {} has weights", dir.display()))
                        .with_hint(
                            "an evaluation reads every block once: give the datasets without weights",
                        ));
                }
                own.check_vocab(run.config.vocab_size)?;
                let blocks = 0..own.len();
                (Some(own), blocks)
            }
            (None, Some(fraction)) => {
                (None, last_blocks(train.len(), fraction).map_err(|error| error.at(args.data_dir.display()))?)
            }
            (None, None) => return Ok(None),
        };
        let (batch, carry_state) = (args.batch, args.carry_state);
        let (freq, last) = (args.eval_freq, args.max_steps);
        Ok(Some(Self { own, train, blocks, batch, carry_state, freq, last }))
    }

    /// What is evaluated on.
    pub(super) fn data(&self) -> &Dataset {
        self.own.as_ref().unwrap_or(self.train)
    }

    /// Number of blocks held out.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Number of blocks of the training data that are left to train on.
    pub(super) fn training_blocks(&self) -> usize {
        if self.own.is_some() { self.train.len() } else { self.blocks.start }
    }

    /// Number of samples to train on: those blocks, or of a mixture more than any run reads.
    pub(super) fn training_samples(&self) -> usize {
        if self.own.is_some() { self.train.samples() } else { self.blocks.start }
    }

    /// B and L of its batches: whole ones, and the last where that is smaller.
    pub(super) fn shapes(&self) -> Vec<(usize, usize)> {
        let data = self.data();
        let sizes = [self.batch.min(self.len()), self.len() % self.batch];
        sizes.into_iter().filter(|&size| size > 0).map(|size| (size, data.seq_len())).collect()
    }

    /// The evaluation after `step`, where one is due.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub(super) fn after<B: Backend>(
        &self,
        step: u64,
        rank: &Rank,
        backend: &B,
        model: &Mamba2ForCausalLM<B>,
    ) -> Result<Option<Evaluation>, Error> {
        self.after_by(step, rank, on_backend(backend, model, self.carry_state))
    }

    /// [`Self::after`], of the model whose sum of token losses in a batch `loss` gives.
    ///
    /// # Errors
    /// As [`evaluate`], and those of `loss`.
    pub(super) fn after_by(
        &self,
        step: u64,
        rank: &Rank,
        loss: impl FnMut(&Batch) -> Result<f64, Error>,
    ) -> Result<Option<Evaluation>, Error> {
        if step != self.last && !self.freq.is_some_and(|freq| step.is_multiple_of(freq)) {
            return Ok(None);
        }
        quietly(rank, self.data(), self.blocks.clone(), self.batch, self.carry_state, loss, |_| ())
            .map(Some)
            .map_err(|error| error.at(format!("evaluation after step {step}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_blocks_are_held_out() {
        assert_eq!(last_blocks(10, 0.2).unwrap(), 8..10);
        assert_eq!(last_blocks(10, 0.01).unwrap(), 9..10);
        assert_eq!(last_blocks(10, 0.25).unwrap(), 8..10);
        assert!(last_blocks(1, 0.5).unwrap_err().to_string().contains("leaves none"));
    }
}
