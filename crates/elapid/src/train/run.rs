//! `elapid train`: set up, step, export.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Checkpointing, DType, State};
use serde_json::{Value, json};

use super::diagnose::{Recorded, diagnose};
use super::evaluate::HeldOut;
use super::folder::{Log, RunFolder};
use super::memory::{self, Demand, Memory};
use super::nonfinite::{self, NonFinite};
use super::norms::Norms;
use super::plan::waste;
use super::progress::{Figures, Progress};
use super::resume::{self, Start};
use super::stop::{self, Graceful};
use super::{Batch, Evaluation, StepReport, Trainer, start};
use crate::Error;
use crate::checkpoint::{
    Checkpoint, MANIFEST, Progress as Position, Saver, State as Held, Store, write_files,
};
use crate::config::ModelConfig;
use crate::config::TokenIds;
use crate::config::run::{ActivationCheckpointing, Dtype, Run, TrainArgs, check_threads};
use crate::data::{Dataset, Order, Sampler, Tokenizer};
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::model::pretrained::FileDType;
use crate::parallel::{Launch, Rank, launch};

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

/// Whether copies are made to be written while the run goes on.
fn saves_beside_training(args: &TrainArgs) -> bool {
    args.checkpoint_freq > 0 && !args.no_async_save
}

/// A signal that any rank has caught, and whether all ranks say `done`.
fn agreed(rank: &Rank, caught: Option<i32>, done: bool) -> (Option<i32>, bool) {
    let all = rank.gather_numbers(caught.unwrap_or(0) as u64 | u64::from(done) << 32);
    let signal = all.iter().map(|word| *word as i32).find(|&signal| signal > 0);
    (signal, all.iter().all(|word| word >> 32 == 1))
}

/// FLOP/s of this rank. One that has the machine for itself measures once in a process for each number of threads; those
/// that share it measure side by side.
fn peak(rank: &Rank, backend: &CpuBackend) -> f64 {
    if rank.ranks_here() > 1 {
        return backend.measure_peak();
    }
    static MEASURED: Mutex<BTreeMap<usize, f64>> = Mutex::new(BTreeMap::new());
    let mut measured = MEASURED.lock().expect("measuring does not panic");
    *measured.entry(backend.threads()).or_insert_with(|| backend.measure_peak())
}

/// Trains as `run` says, from step 1 or from a checkpoint, and leaves `metrics.jsonl`, `run.toml` and the model in `hf/` in
/// the run folder.
///
/// # Errors
/// Anything that stops it, before the first step where that can be known then; a loss or gradient that is not finite,
/// before it reaches the parameters; a signal, after a checkpoint ([`Error::signal`]).
pub fn train(run: &Run) -> Result<Outcome, Error> {
    let (args, mesh) = (&run.args, run.mesh);
    let start = Launch { mesh, threads: args.threads, timeout: Duration::from_secs(args.comm_timeout) };
    Ok(launch(&start, |rank| train_on(run, rank))?.swap_remove(0))
}

/// What one rank does of it.
fn train_on(run: &Run, rank: &Rank) -> Result<Outcome, Error> {
    // Where ranks are processes each has resolved its folders by itself; those of the first one count.
    let dirs = rank.from_first(|| Ok((run.output_dir.clone(), run.checkpoint_dir.clone())))?;
    let args = TrainArgs { output_dir: Some(dirs.0.clone()), ..run.args.clone() };
    let run = &Run { args, output_dir: dirs.0, checkpoint_dir: dirs.1, ..run.clone() };
    let settings = run.to_toml()?;
    let data = open_data(run)?;
    let tokenizer = open_tokenizer(run, &data)?;
    let held_out = HeldOut::open(run, &data)?;
    let blocks = held_out.as_ref().map_or(data.len(), HeldOut::training_blocks);
    let rows = run.args.batch * run.mesh.dp;
    if run.args.carry_state && blocks < rows {
        return Err(Error::new(format!(
            "--carry-state needs a block for each of the {rows} rows of a batch, but there are {blocks} to train on"
        ))
        .with_hint("give a smaller --batch, or more data"));
    }
    let backend = rank.cpu()?;
    let shapes = held_out.as_ref().map_or_else(Vec::new, HeldOut::shapes);
    let demand = Demand {
        config: &run.config,
        batch: run.args.batch,
        length: data.seq_len(),
        dtype: run.args.dtype.compute(),
        checkpointing: run.args.activation_checkpointing.into(),
        threads: backend.threads(),
        mesh: run.mesh,
        ranks_here: rank.ranks_here(),
        zero1: run.args.use_zero_1,
        sequence_parallel: run.args.sequence_parallel_enabled,
        evaluation: &shapes,
        log_norms: run.args.log_norms,
        saves: saves_beside_training(&run.args),
    };
    let memory = Memory::predict(&demand);
    let warning = rank.from_first(|| memory.check(run.args.ignore_memory_limit))?;
    for warning in waste(&demand).into_iter().chain(warning) {
        say(format_args!("warning: {warning}"));
    }
    // The first rank keeps the folders; the others are told what it finds there.
    let folder = rank.is_first().then(|| RunFolder::lock(&run.output_dir)).transpose()?;
    let open = if rank.is_first() { Store::open } else { Store::of_first_rank };
    let store = open(&run.checkpoint_dir, run.args.tag.clone(), run.keep)?;
    let from = match resume::start(run, rank, folder.as_ref(), &store)? {
        Start::Fresh => None,
        Start::From(checkpoint) => Some(*checkpoint),
        Start::Finished(outcome) => {
            say(format_args!("the run in {} is finished; nothing is left to do", run.output_dir.display()));
            return Ok(outcome);
        }
    };
    let mut model = build_model(run, rank, &data, &backend, from.is_some())?
        .with_sequence_parallel(run.args.sequence_parallel_enabled);
    if run.args.use_zero_1 {
        model = model.with_zero1(&backend);
    }
    let peak = rank.gather_numbers(peak(rank, &backend) as u64).into_iter().sum::<u64>() as f64;
    start::print(run, &data, held_out.as_ref(), &model, &backend, peak, &memory);
    let folder = folder.as_ref();
    folder.map_or(Ok(()), |folder| folder.write("run.toml", &settings))?;
    let held_out = held_out.as_ref();
    // Before the metrics are there: who sees them may count on a signal being heard.
    let signals = Graceful::new()?;
    let mut session =
        Session::new(run, rank, &data, held_out, folder, &backend, model, tokenizer, from.as_ref(), peak)?;
    session.outcome.predicted_memory = memory.total();
    std::thread::scope(|scope| session.train(&signals, &store, Saver::new(scope, &store, rank, &backend)))
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
    rank: &Rank,
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
        if dir.join(MANIFEST).exists() {
            resume::read_weights(&Checkpoint::open_on(rank, dir)?, backend, &mut model)?;
        } else {
            model.load(backend, dir)?;
        }
    } else {
        resume::load_weights(args, rank, backend, &mut model)?;
    }
    Ok(model)
}

/// A run between its first step and its last.
struct Session<'a> {
    run: &'a Run,
    rank: &'a Rank,
    data: &'a Dataset,
    held_out: Option<&'a HeldOut<'a>>,
    /// On the first rank, which writes metrics and the end.
    folder: Option<&'a RunFolder>,
    backend: &'a CpuBackend,
    trainer: Trainer<'a, CpuBackend>,
    sampler: Sampler,
    /// What is exported with the model.
    tokenizer: Option<Tokenizer>,
    metrics: Option<Log>,
    norms: Option<Norms<CpuBackend>>,
    /// What `metrics.jsonl` says of the last step.
    last_line: Value,
    /// Seconds that the run waited for a checkpoint after the last step.
    save_s: Option<f64>,
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
        rank: &'a Rank,
        data: &'a Dataset,
        held_out: Option<&'a HeldOut<'a>>,
        folder: Option<&'a RunFolder>,
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
        let mut sampler = Sampler {
            len: held_out.map_or(data.samples(), HeldOut::training_samples),
            batch: args.batch,
            dp: run.mesh.dp,
            rank: rank.dp_rank(),
            accum: args.grad_accum_usteps,
            order,
            from: (0, 0),
        };
        let mut done = 0;
        let mut outcome = Outcome::new(run.output_dir.join("hf"));
        if let Some(checkpoint) = from {
            sampler.from = resume::check(checkpoint, run, trainer.model().config(), data, &sampler)?;
            resume::restore(checkpoint, backend, &mut trainer, args.batch)?;
            let position = &checkpoint.manifest().progress;
            done = position.step;
            outcome.first_loss = position.first_loss;
            outcome.last_loss = position.last_loss;
            outcome.tokens = position.tokens;
            outcome.seconds = position.seconds;
        }
        let log = folder.map_or(Ok(None), |folder| folder.open_norms(done, args.log_norms))?;
        let norms = args.log_norms.then(|| Norms::new(backend, &trainer, log));
        Ok(Self {
            run,
            rank,
            data,
            held_out,
            folder,
            backend,
            trainer,
            sampler,
            tokenizer,
            metrics: folder.map(|folder| folder.open_metrics(done)).transpose()?,
            norms,
            save_s: None,
            last_line: from.map_or(Value::Null, |checkpoint| checkpoint.manifest().progress.metrics.clone()),
            progress: Progress::new(done + 1, args.max_steps, args.logging_interval),
            done,
            peak,
            flops: (flops.forward + flops.backward) as f64,
            outcome,
        })
    }

    fn train(
        mut self,
        signals: &Graceful,
        store: &Store,
        mut saver: Saver<'_, '_, CpuBackend>,
    ) -> Result<Outcome, Error> {
        let args = &self.run.args;
        if saves_beside_training(args) {
            saver.reserve(&self.state(self.trainer.states()));
        }
        for step in self.done + 1..=args.max_steps {
            if let Some(error) = self.step(step)? {
                // All ranks end here, with a step that cannot be made; what is being saved is whole.
                if let Err(other) = saver.finish() {
                    say(format_args!("warning: {other}"));
                }
                return Err(error);
            }
            let (signal, written) = agreed(self.rank, signals.caught(), saver.is_written());
            saver.advance(written)?;
            let due = args.checkpoint_freq > 0 && step.is_multiple_of(args.checkpoint_freq);
            let last = step == args.max_steps;
            if !(due || signal.is_some() || args.save_last_step && last) {
                continue;
            }
            let start = Instant::now();
            self.sync()?;
            let (state, position) = (self.state(self.trainer.states()), self.position(step));
            if signal.is_none() && !last && !args.no_async_save {
                saver.start(&state, position)?;
                self.save_s = Some(start.elapsed().as_secs_f64());
                continue;
            }
            saver.finish()?;
            let place = store.save(self.rank, self.backend, &state, position)?;
            self.save_s = Some(start.elapsed().as_secs_f64());
            // One that comes while a checkpoint is written is heard as well.
            if let Some(signal) = signal.or(agreed(self.rank, signals.caught(), false).0) {
                self.progress.finish();
                return Err(stop::after(step, signal, &place));
            }
        }
        saver.finish()?;
        self.progress.finish();
        let model = self.trainer.into_model().without_zero1(self.backend);
        // The ranks that hold the same tensors have nothing to add.
        if self.rank.dp_rank() == 0 {
            model.save_pretrained(self.backend, &self.outcome.model_dir, FileDType::F32)?;
        }
        if let Some(folder) = self.folder {
            self.tokenizer.map_or(Ok(()), |tokenizer| tokenizer.save(&self.outcome.model_dir))?;
            folder.finish(args.max_steps, &self.outcome)?;
        }
        if let Some(signal) = agreed(self.rank, signals.caught(), false).0 {
            return Err(stop::after_export(signal, &self.outcome.model_dir));
        }
        self.outcome.peak_memory = memory::peak_resident();
        Ok(self.outcome)
    }

    /// Brings the lines of all steps to disk, before a checkpoint of them is there.
    fn sync(&self) -> Result<(), Error> {
        let mut logs = self.metrics.iter().chain(self.norms.as_ref().and_then(Norms::log));
        logs.try_for_each(Log::sync)
    }

    /// What a checkpoint holds, with these carried states.
    fn state<'s>(&'s self, carried: Option<&'s [State<elapid_cpu::Tensor>]>) -> Held<'s, CpuBackend> {
        Held {
            model: self.trainer.model(),
            buffers: self.trainer.state(),
            carried,
            tokenizer: self.tokenizer.as_ref(),
        }
    }

    /// How far the run is after `step`.
    fn position(&self, step: u64) -> Position {
        Position {
            step,
            samples: self.sampler.read_before(step),
            tokens: self.outcome.tokens,
            seconds: self.outcome.seconds,
            first_loss: self.outcome.first_loss,
            last_loss: self.outcome.last_loss,
            order: self.sampler.order,
            data: resume::identity(self.data, &self.sampler),
            metrics: self.last_line.clone(),
            settings: resume::settings(&self.run.args),
        }
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

    /// Makes a step. Where all ranks find that it cannot be made, that is the answer.
    ///
    /// # Errors
    /// Those of this rank.
    fn step(&mut self, step: u64) -> Result<Option<Error>, Error> {
        let start = Instant::now();
        let args = &self.run.args;
        let before = self.trainer.states().map(<[_]>::to_vec);
        let (mut valid, mut tokens) = (0, 0);
        for micro in 0..args.grad_accum_usteps {
            let batch = self.batch(step, micro)?;
            if micro + 1 < args.grad_accum_usteps {
                self.trainer.micro_step(&batch);
            } else {
                self.trainer.last_micro_step(&batch);
            }
            valid += batch.valid();
            tokens += batch.tokens();
        }
        let valid = self.rank.sum_over_samples(valid as u64) as usize;
        let tokens = tokens * self.run.mesh.dp;
        if valid == 0 {
            let error = Error::new(format!("step {step}: the batch has no label that counts"));
            return Ok(Some(
                error.with_hint("blocks of one token, or labels that are all -100, teach nothing"),
            ));
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
        if let Some(norms) = &mut self.norms {
            norms.before_update(self.rank, self.backend, &mut self.trainer, valid);
        }
        let report = self.trainer.update(&hyper, args.max_grad_norm, valid);
        if !report.finite {
            self.progress.finish();
            return self.not_finite(step, before, report).map(Some);
        }
        if let Some(norms) = &mut self.norms {
            norms.after_update(step, self.rank, self.backend, &self.trainer)?;
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
            Some(held_out) => held_out.after(step, self.rank, self.backend, self.trainer.model())?,
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
        })?;
        Ok(None)
    }

    /// Runs the step that came to `report` again to find out why, from the states `before` it, and leaves all that
    /// it takes to repeat it in the run folder.
    ///
    /// # Errors
    /// The batches cannot be read again.
    fn not_finite(
        &mut self,
        step: u64,
        before: Option<Vec<State<elapid_cpu::Tensor>>>,
        report: StepReport,
    ) -> Result<Error, Error> {
        let what = format!(
            "step {step}: loss {:?} with gradient norm {:?} is not finite; the update was not applied",
            report.loss, report.grad_norm
        );
        let hint = "try a lower --lr, more --warmup-steps or --dtype float32";
        if self.run.mesh.size() > 1 {
            return Ok(Error::new(what).with_hint(format!(
                "{hint}; to find the value, go on from the last checkpoint on a single rank, with --batch {}",
                self.run.args.batch * self.run.mesh.dp
            )));
        }
        let micro_steps = 0..self.run.args.grad_accum_usteps;
        let recorded = Recorded {
            batches: micro_steps.clone().map(|micro| self.batch(step, micro)).collect::<Result<_, _>>()?,
            samples: micro_steps.map(|micro| self.sampler.indices(step - 1, micro)).collect(),
        };
        let diagnosis = diagnose(self.backend, &mut self.trainer, &recorded, before.clone());
        let error =
            Error::new(format!("{what}; {diagnosis}; it read {}", nonfinite::list(&recorded.samples)));
        let dir = &self.run.output_dir;
        let place = NonFinite::write(dir, step, &self.run.args, &recorded, &diagnosis, |dir| {
            let state = self.state(before.as_deref());
            write_files(dir, self.rank, self.backend, &state, self.position(step - 1))
        });
        let repeat = match place {
            Ok(place) => format!("`elapid replay {}` repeats the step", place.display()),
            Err(cause) => format!("the step cannot be kept to be repeated: {cause}"),
        };
        Ok(error.with_hint(format!("{hint}; {repeat}")))
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
        if let Some(seconds) = self.save_s.take() {
            line["save_s"] = seconds.into();
        }
        if let Some(metrics) = &mut self.metrics {
            metrics.push(&line)?;
        }
        self.last_line = line;
        self.progress.step(&figures);
        Ok(())
    }
}
