//! A run between its first step and its last.

use std::time::Instant;

use elapid_cpu::CpuBackend;
use elapid_tensor::{AdamW, State};
use serde_json::{Value, json};

use super::device::DeviceTrainer;
use super::diagnose::{Recorded, diagnose};
use super::evaluate::HeldOut;
use super::folder::{Log, RunFolder};
use super::memory;
use super::nonfinite::{self, NonFinite};
use super::norms::Norms;
use super::progress::{Figures, Progress};
use super::stop::{self, Graceful};
use super::{Batch, Outcome, StepReport, Trainer, resume};
use crate::Error;
use crate::checkpoint::{Checkpoint, Progress as Position, Saver, State as Held, Store, write_files};
use crate::config::run::{Run, TrainArgs};
use crate::data::{Dataset, Order, Sampler, Tokenizer};
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::model::pretrained::FileDType;
use crate::parallel::Rank;

/// Whether copies are made to be written while the run goes on.
pub(super) fn saves_beside_training(args: &TrainArgs) -> bool {
    args.checkpoint_freq > 0 && !args.no_async_save
}

/// A signal that any rank has caught, and whether all ranks say `done`.
fn agreed(rank: &Rank, caught: Option<i32>, done: bool) -> (Option<i32>, bool) {
    let all = rank.gather_numbers(caught.unwrap_or(0) as u64 | u64::from(done) << 32);
    let signal = all.iter().map(|word| *word as i32).find(|&signal| signal > 0);
    (signal, all.iter().all(|word| word >> 32 == 1))
}

/// What one rank trains with.
pub(super) struct Session<'a> {
    run: &'a Run,
    rank: &'a Rank,
    data: &'a Dataset,
    held_out: Option<&'a HeldOut<'a>>,
    /// On the first rank, which writes metrics and the end.
    folder: Option<&'a RunFolder>,
    backend: &'a CpuBackend,
    /// With a device: what it was when somebody last looked, see [`Session::fetch`].
    trainer: Trainer<'a, CpuBackend>,
    device: Option<DeviceTrainer>,
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
    /// FLOP/s of this machine; NaN: not known.
    peak: f64,
    /// FLOPs a token, forward and backward.
    flops: f64,
    pub(super) outcome: Outcome,
}

impl<'a> Session<'a> {
    /// A session at step 1, or after the step of the checkpoint `from`.
    pub(super) fn new(
        run: &'a Run,
        rank: &'a Rank,
        data: &'a Dataset,
        held_out: Option<&'a HeldOut<'a>>,
        folder: Option<&'a RunFolder>,
        backend: &'a CpuBackend,
        model: Mamba2ForCausalLM<CpuBackend>,
        mut device: Option<DeviceTrainer>,
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
        if let Some(device) = &mut device {
            device.upload(backend, &trainer)?;
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
            device,
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

    /// Trains to the end and exports.
    pub(super) fn train(
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
            self.fetch()?;
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
        self.fetch()?;
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

    /// Brings what the device holds into the trainer.
    fn fetch(&mut self) -> Result<(), Error> {
        self.device.as_mut().map_or(Ok(()), |device| device.download(self.backend, &mut self.trainer))
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
            match &mut self.device {
                Some(device) => device.micro_step(&batch)?,
                None if micro + 1 < args.grad_accum_usteps => self.trainer.micro_step(&batch),
                None => self.trainer.last_micro_step(&batch),
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
            self.device.as_mut().map_or(Ok(()), |device| device.download_gradients(&mut self.trainer))?;
            norms.before_update(self.rank, self.backend, &mut self.trainer, valid);
        }
        let report = match &mut self.device {
            Some(device) => device.update(&hyper, valid)?,
            None => self.trainer.update(&hyper, args.max_grad_norm, valid),
        };
        if !report.finite {
            self.progress.finish();
            return self.not_finite(step, before, report).map(Some);
        }
        if self.norms.is_some() {
            self.fetch()?;
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
        let evaluation = match (self.held_out, &mut self.device) {
            (Some(held_out), Some(device)) => {
                held_out.after_by(step, self.rank, |batch| device.loss(batch))?
            }
            (Some(held_out), None) => held_out.after(step, self.rank, self.backend, self.trainer.model())?,
            (None, _) => None,
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
        if self.device.is_some() && before.is_some() {
            return Ok(Error::new(what).with_hint(format!(
                "{hint}; to find the value, go on from the last checkpoint with --device cpu: the states before the step are \
                 not kept on a device"
            )));
        }
        let micro_steps = 0..self.run.args.grad_accum_usteps;
        let recorded = Recorded {
            batches: micro_steps.clone().map(|micro| self.batch(step, micro)).collect::<Result<_, _>>()?,
            samples: micro_steps.map(|micro| self.sampler.indices(step - 1, micro)).collect(),
        };
        self.fetch()?;
        self.trainer.refresh();
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
