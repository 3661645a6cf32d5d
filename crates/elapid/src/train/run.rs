//! `elapid train`: set up, step, export.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Checkpointing, DType};
use serde_json::json;

use super::evaluate::HeldOut;
use super::folder::RunFolder;
use super::memory::{self, Demand, Memory};
use super::progress::{Figures, Progress};
use super::resume::{self, Start};
use super::stop::{self, Graceful};
use super::{Batch, Evaluation, Trainer, start};
use crate::Error;
use crate::checkpoint::{Checkpoint, Progress as Position, Store};
use crate::config::ModelConfig;
use crate::config::TokenIds;
use crate::config::run::{ActivationCheckpointing, Dtype, Run, check_threads};
use crate::data::{Dataset, Order, Sampler, Tokenizer};
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::model::pretrained::FileDType;

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

impl Dtype {
    /// The dtype of activations.
    pub fn compute(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::Bfloat16 => DType::Bf16,
        }
    }
}

impl From<ActivationCheckpointing> for Checkpointing {
    fn from(choice: ActivationCheckpointing) -> Self {
        match choice {
            ActivationCheckpointing::None => Self::None,
            ActivationCheckpointing::Block => Self::Block,
        }
    }
}

/// A CPU backend with `threads` workers (None: one a core).
///
/// # Errors
/// 0 threads, more than any machine has use for, or they cannot be started.
pub fn cpu(threads: Option<usize>) -> Result<CpuBackend, Error> {
    check_threads("--threads", threads.unwrap_or(1))?;
    CpuBackend::new(&CpuOptions { threads, ..CpuOptions::default() }).map_err(|cause| {
        Error::new(cause.to_string()).with_hint("give fewer --threads, or free some on this machine")
    })
}

/// Trains as `run` says, from step 1 or from a checkpoint, and leaves `metrics.jsonl`, `run.toml` and the model in `hf/` in
/// the run folder.
///
/// # Errors
/// Anything that stops it, before the first step where that can be known then; a loss or gradient that is not finite,
/// before it reaches the parameters; a signal, after a checkpoint ([`Error::signal`]).
pub fn train(run: &Run) -> Result<Outcome, Error> {
    let data = open_data(run)?;
    let tokenizer = open_tokenizer(run, &data)?;
    let held_out = HeldOut::open(run, &data)?;
    let blocks = held_out.as_ref().map_or(data.len(), HeldOut::training_blocks);
    if run.args.carry_state && blocks < run.args.batch {
        return Err(Error::new(format!(
            "--carry-state needs a block for each of the {} rows of a batch, but there are {blocks} to train on",
            run.args.batch
        ))
        .with_hint("give a smaller --batch, or more data"));
    }
    let backend = cpu(run.args.threads)?;
    let memory = Memory::predict(&Demand {
        config: &run.config,
        batch: run.args.batch,
        length: data.seq_len(),
        dtype: run.args.dtype.compute(),
        checkpointing: run.args.activation_checkpointing.into(),
        threads: backend.threads(),
        evaluation: &held_out.as_ref().map_or_else(Vec::new, HeldOut::shapes),
    });
    if let Some(warning) = memory.check(run.args.ignore_memory_limit)? {
        say(format_args!("warning: {warning}"));
    }
    let folder = RunFolder::lock(&run.output_dir)?;
    let store = Store::open(&run.checkpoint_dir, run.args.tag.clone(), run.keep)?;
    let from = match resume::start(run, &folder, &store)? {
        Start::Fresh => None,
        Start::From(checkpoint) => Some(*checkpoint),
        Start::Finished(outcome) => {
            say(format_args!("the run in {} is finished; nothing is left to do", run.output_dir.display()));
            return Ok(outcome);
        }
    };
    let model = build_model(run, &data, &backend, from.is_some())?;
    let peak = backend.measure_peak();
    start::print(run, &data, held_out.as_ref(), &model, &backend, peak, &memory);
    let settings = toml::to_string(&run.args).map_err(|cause| Error::new(format!("run.toml: {cause}")))?;
    folder.write("run.toml", &settings)?;
    let held_out = held_out.as_ref();
    let mut session =
        Session::new(run, &data, held_out, &folder, &store, &backend, model, tokenizer, from.as_ref(), peak)?;
    session.outcome.predicted_memory = memory.total();
    session.train()
}

/// Opens the dataset and checks it against the model.
fn open_data(run: &Run) -> Result<Dataset, Error> {
    let dir = &run.args.data_dir;
    let mut data = Dataset::open_blocks(dir, run.args.seq_len)?;
    if let Some(seq_len) = run.args.seq_len
        && seq_len != data.seq_len()
    {
        return Err(Error::new(format!(
            "--seq-len is {seq_len}, but the blocks of {} are {} tokens long",
            dir.display(),
            data.seq_len()
        ))
        .with_hint("leave --seq-len out, or tokenize again with that length"));
    }
    data.check_vocab(run.config.vocab_size)?;
    if data.is_mixture() && (run.args.carry_state || run.args.eval_fraction.is_some()) {
        let flag = if run.args.carry_state { "--carry-state" } else { "--eval-fraction" };
        return Err(Error::new(format!("{flag} with weights in --data-dir {}", dir.display())).with_hint(
            "blocks of a mixture do not follow each other; leave one out, or evaluate on --eval-data-dir",
        ));
    }
    if run.args.shuffle {
        data.shuffle_parts(run.args.seed);
    }
    Ok(data)
}

/// The tokenizer that is exported with the model: the dataset's, or that of the weights to start from. Loaded before the
/// run folder is made: a damaged one is not to be found after the last step.
fn open_tokenizer(run: &Run, data: &Dataset) -> Result<Option<Tokenizer>, Error> {
    let init_from = run.args.init_from.clone().filter(|dir| dir.join("tokenizer.json").exists());
    let Some(dir) = data.tokenizer().or(init_from) else { return Ok(None) };
    let tokenizer = Tokenizer::load(&dir.display().to_string())?;
    let (size, vocab) = (tokenizer.vocab_size(), run.config.vocab_size);
    if size > vocab {
        return Err(Error::new(format!(
            "the tokenizer in {} has {size} tokens, but the model's vocabulary has {vocab}",
            dir.display()
        ))
        .with_hint("give the model a larger --vocab-size, or tokenize with the model's own tokenizer"));
    }
    Ok(Some(tokenizer))
}

/// The model of a new run, or a model of zeros of the same configuration for a run that goes on.
fn build_model(
    run: &Run,
    data: &Dataset,
    backend: &CpuBackend,
    goes_on: bool,
) -> Result<Mamba2ForCausalLM<CpuBackend>, Error> {
    let (args, dtype) = (&run.args, run.args.dtype.compute());
    // A new model takes the special tokens of its data, where those are known and fit its vocabulary.
    let fits = |id: &u32| (*id as usize) < run.config.vocab_size;
    let config = match data.card().map(|card| card.eos_id.filter(fits)) {
        Some(id) if args.init_from.is_none() => ModelConfig {
            eos_token_id: id.map(TokenIds::One),
            bos_token_id: id,
            pad_token_id: id,
            ..run.config.clone()
        },
        _ => run.config.clone(),
    };
    if !goes_on && args.init_from.is_none() && !args.checkpoint_load {
        return Ok(Mamba2ForCausalLM::new(backend, &config, dtype, args.init.into(), args.seed));
    }
    let mut model = Mamba2ForCausalLM::empty(backend, &config, dtype);
    if goes_on {
        return Ok(model);
    }
    if let Some(dir) = &args.init_from {
        model.load(backend, dir)?;
    } else {
        resume::load_weights(args, backend, &mut model)?;
    }
    Ok(model)
}

/// A run between its first step and its last.
struct Session<'a> {
    run: &'a Run,
    data: &'a Dataset,
    held_out: Option<&'a HeldOut<'a>>,
    folder: &'a RunFolder,
    store: &'a Store,
    backend: &'a CpuBackend,
    trainer: Trainer<'a, CpuBackend>,
    sampler: Sampler,
    /// What is exported with the model.
    tokenizer: Option<Tokenizer>,
    metrics: File,
    progress: Progress,
    /// Steps that were done before.
    done: u64,
    /// FLOP/s of this machine.
    peak: f64,
    /// FLOPs a token, forward and backward.
    flops: f64,
    outcome: Outcome,
}

impl<'a> Session<'a> {
    /// A session at step 1, or after the step of the checkpoint `from`.
    fn new(
        run: &'a Run,
        data: &'a Dataset,
        held_out: Option<&'a HeldOut<'a>>,
        folder: &'a RunFolder,
        store: &'a Store,
        backend: &'a CpuBackend,
        model: Mamba2ForCausalLM<CpuBackend>,
        tokenizer: Option<Tokenizer>,
        from: Option<&Checkpoint>,
        peak: f64,
    ) -> Result<Self, Error> {
        let args = &run.args;
        let flops = model.config().flops_per_token();
        let order = match (args.carry_state, args.shuffle) {
            (true, _) => Order::Stretches,
            (false, true) if !data.is_mixture() => Order::Shuffled(args.seed),
            _ => Order::Dataset,
        };
        let mut trainer = Trainer::new(backend, model, args.activation_checkpointing.into());
        if args.carry_state {
            trainer = trainer.with_carried_states();
        }
        let sampler = Sampler {
            len: held_out.map_or(data.samples(), HeldOut::training_samples),
            batch: args.batch,
            dp: 1,
            rank: 0,
            accum: args.grad_accum_usteps,
            order,
        };
        let mut done = 0;
        let mut outcome = Outcome::new(run.output_dir.join("hf"));
        if let Some(checkpoint) = from {
            resume::check(checkpoint, run, trainer.model().config(), data, &sampler)?;
            resume::restore(checkpoint, backend, &mut trainer, args.batch)?;
            let position = &checkpoint.manifest().progress;
            done = position.step;
            outcome.first_loss = position.first_loss;
            outcome.last_loss = position.last_loss;
            outcome.tokens = position.tokens;
            outcome.seconds = position.seconds;
        }
        Ok(Self {
            run,
            data,
            held_out,
            folder,
            store,
            backend,
            trainer,
            sampler,
            tokenizer,
            metrics: folder.open_metrics(done)?,
            progress: Progress::new(done + 1, args.max_steps, args.logging_interval),
            done,
            peak,
            flops: (flops.forward + flops.backward) as f64,
            outcome,
        })
    }

    fn train(mut self) -> Result<Outcome, Error> {
        let args = &self.run.args;
        let signals = Graceful::new()?;
        for step in self.done + 1..=args.max_steps {
            self.step(step)?;
            let signal = signals.caught();
            let due = args.checkpoint_freq > 0 && step.is_multiple_of(args.checkpoint_freq);
            if due || signal.is_some() || args.save_last_step && step == args.max_steps {
                let place = self.save(step)?;
                // One that comes while a checkpoint is written is heard as well.
                if let Some(signal) = signal.or(signals.caught()) {
                    self.progress.finish();
                    return Err(stop::after(step, signal, &place));
                }
            }
        }
        self.progress.finish();
        self.export()?;
        self.folder.finish(args.max_steps, &self.outcome)?;
        self.outcome.peak_memory = memory::peak_resident();
        Ok(self.outcome)
    }

    /// Writes a checkpoint; the lines of its steps reach the disk before it does.
    fn save(&mut self, step: u64) -> Result<PathBuf, Error> {
        let metrics = self.run.output_dir.join("metrics.jsonl");
        self.metrics.sync_all().map_err(|cause| Error::io("write", &metrics, &cause))?;
        let position = Position {
            step,
            samples: step * resume::samples_per_step(&self.sampler),
            tokens: self.outcome.tokens,
            seconds: self.outcome.seconds,
            first_loss: self.outcome.first_loss,
            last_loss: self.outcome.last_loss,
            order: self.sampler.order,
            data: resume::identity(self.data, &self.sampler),
            settings: resume::settings(&self.run.args),
        };
        let model = self.trainer.model();
        let (state, carried) = (self.trainer.state(), resume::carried(&self.trainer));
        self.store.save(self.backend, model.config(), model.layout(), state, &carried, position)
    }

    /// The batch of one micro-step; the system is asked to read the next one.
    fn batch(&self, step: u64, micro: usize) -> Result<Batch, Error> {
        let batch = Batch::read(self.data, &self.sampler.places(step - 1, micro))?;
        let last = micro + 1 == self.sampler.accum;
        let next =
            if last { self.sampler.indices(step, 0) } else { self.sampler.indices(step - 1, micro + 1) };
        self.data.prefetch(next);
        Ok(batch)
    }

    fn step(&mut self, step: u64) -> Result<(), Error> {
        let start = Instant::now();
        let args = &self.run.args;
        let (mut valid, mut tokens) = (0, 0);
        for micro in 0..args.grad_accum_usteps {
            let batch = self.batch(step, micro)?;
            self.trainer.micro_step(&batch);
            valid += batch.valid();
            tokens += batch.tokens();
        }
        if valid == 0 {
            return Err(Error::new(format!("step {step}: the batch has no label that counts"))
                .with_hint("blocks of one token, or labels that are all -100, teach nothing"));
        }
        let lr = self.run.schedule.rate(step);
        let hyper = AdamW {
            lr: lr as f32,
            beta1: args.beta1,
            beta2: args.beta2,
            eps: args.eps,
            weight_decay: args.weight_decay,
            step,
        };
        let report = self.trainer.update(&hyper, args.max_grad_norm, valid);
        if !report.finite {
            self.progress.finish();
            return Err(Error::new(format!(
                "step {step}: loss {} with gradient norm {} is not finite; the update was not applied",
                report.loss, report.grad_norm
            ))
            .with_hint("try a lower --lr, more --warmup-steps or --dtype float32"));
        }
        let seconds = start.elapsed().as_secs_f64();
        if step == 1 {
            self.outcome.first_loss = report.loss;
        }
        self.outcome.last_loss = report.loss;
        self.outcome.tokens += tokens as u64;
        self.outcome.seconds += seconds;
        let tokens_per_s = tokens as f64 / seconds;
        let evaluation = match self.held_out {
            Some(held_out) => held_out.after(step, self.backend, self.trainer.model())?,
            None => None,
        };
        self.outcome.evaluation = evaluation;
        self.log(Figures {
            step,
            loss: report.loss,
            lr,
            grad_norm: report.grad_norm,
            tokens: self.outcome.tokens,
            tokens_per_s,
            step_time_s: seconds,
            mfu: tokens_per_s * self.flops / self.peak,
            evaluation,
        })
    }

    fn log(&mut self, figures: Figures) -> Result<(), Error> {
        let Figures { step, loss, lr, grad_norm, tokens, tokens_per_s, step_time_s, mfu, evaluation } =
            figures;
        let mut line = json!({
            "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens,
            "tokens_per_s": tokens_per_s, "step_time_s": step_time_s, "mfu": mfu,
        });
        if let Some(evaluation) = evaluation {
            line["eval_loss"] = evaluation.loss.into();
            line["eval_perplexity"] = evaluation.perplexity().into();
            if let Some(bits) = evaluation.bits_per_byte {
                line["eval_bits_per_byte"] = bits.into();
            }
        }
        let path = self.run.output_dir.join("metrics.jsonl");
        // One write a line: whoever reads along sees whole lines.
        let line = format!("{line}\n");
        self.metrics.write_all(line.as_bytes()).map_err(|cause| Error::io("write", &path, &cause))?;
        self.progress.step(&figures);
        Ok(())
    }

    /// Leaves the model as a Hugging Face folder.
    fn export(&self) -> Result<(), Error> {
        let dir = &self.outcome.model_dir;
        self.trainer.model().save_pretrained(self.backend, dir, FileDType::F32)?;
        self.tokenizer.as_ref().map_or(Ok(()), |tokenizer| tokenizer.save(dir))
    }
}
