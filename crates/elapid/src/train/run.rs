//! `elapid train`: set up, step, export.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Checkpointing, DType};
use serde_json::json;

use super::folder::RunFolder;
use super::progress::{Figures, Progress};
use super::{Batch, Trainer, start};
use crate::Error;
use crate::config::ModelConfig;
use crate::config::TokenIds;
use crate::config::run::{ActivationCheckpointing, Dtype, Run, check_threads};
use crate::data::{Dataset, Sampler, Tokenizer};
use crate::memory;
use crate::model::Mamba2ForCausalLM;
use crate::model::layout::Layout;
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

/// Trains as `run` says and leaves `metrics.jsonl`, `run.toml` and the model in `hf/` in the run folder.
///
/// # Errors
/// Anything that stops it, before the first step where that can be known then; a loss or gradient that is not finite,
/// before it reaches the parameters.
pub fn train(run: &Run) -> Result<Outcome, Error> {
    let data = open_data(run)?;
    check_memory(run, &data)?;
    let tokenizer = load_tokenizer(run, &data)?;
    let folder = RunFolder::create(&run.output_dir)?;
    let backend = cpu(run.args.threads)?;
    let model = build_model(run, &data, &backend)?;
    let peak = backend.measure_peak();
    start::print(run, &data, &model, &backend, peak);
    let settings = toml::to_string(&run.args).map_err(|cause| Error::new(format!("run.toml: {cause}")))?;
    folder.write("run.toml", &settings)?;
    Session::new(run, &data, tokenizer, &folder, &backend, model, peak)?.train()
}

/// Opens the dataset and checks it against the model.
fn open_data(run: &Run) -> Result<Dataset, Error> {
    let dir = &run.args.data_dir;
    let mut data = Dataset::open(dir)?;
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
    Ok(data)
}

/// What will be exported with the model. Loaded before the first step, so that a damaged one is not found after the last.
fn load_tokenizer(run: &Run, data: &Dataset) -> Result<Option<Tokenizer>, Error> {
    let init_from = run.args.init_from.clone().filter(|dir| dir.join("tokenizer.json").exists());
    let dir = data.tokenizer().or(init_from);
    dir.map(|dir| Tokenizer::load(&dir.display().to_string())).transpose()
}

/// A lower bound of what training takes: masters, gradients and both moments in fp32, the bf16 copy, and of each layer
/// the residual stream and, unless it runs twice, the output of in_proj.
fn check_memory(run: &Run, data: &Dataset) -> Result<(), Error> {
    let (args, config) = (&run.args, &run.config);
    let (parameter, activation) = if args.dtype == Dtype::Bfloat16 { (18.0, 2.0) } else { (16.0, 4.0) };
    let kept = match args.activation_checkpointing {
        ActivationCheckpointing::None => config.hidden_size + config.spec().projection(),
        ActivationCheckpointing::Block => config.hidden_size,
    };
    let tokens = args.batch as f64 * data.seq_len() as f64;
    let parameters = Layout::new(config).parameter_count() as f64 * parameter;
    let activations = tokens * config.num_hidden_layers as f64 * kept as f64 * activation;
    memory::check(
        parameters,
        "the parameters, gradients and moments",
        "choose a smaller --model or --vocab-size",
    )?;
    memory::check(
        parameters + activations,
        "parameters and activations",
        "choose a smaller --batch with more --grad-accum-usteps, or --activation-checkpointing block",
    )
}

fn build_model(
    run: &Run,
    data: &Dataset,
    backend: &CpuBackend,
) -> Result<Mamba2ForCausalLM<CpuBackend>, Error> {
    let (args, dtype) = (&run.args, run.args.dtype.compute());
    if let Some(dir) = &args.init_from {
        let mut model = Mamba2ForCausalLM::empty(backend, &run.config, dtype);
        model.load(backend, dir)?;
        return Ok(model);
    }
    // A new model takes the special tokens of its data, where those are known and fit its vocabulary.
    let fits = |id: &u32| (*id as usize) < run.config.vocab_size;
    let config = match data.card().map(|card| card.eos_id.filter(fits)) {
        None => run.config.clone(),
        Some(id) => ModelConfig {
            eos_token_id: id.map(TokenIds::One),
            bos_token_id: id,
            pad_token_id: id,
            ..run.config.clone()
        },
    };
    Ok(Mamba2ForCausalLM::new(backend, &config, dtype, args.init.into(), args.seed))
}

/// A run between its first step and its last.
struct Session<'a> {
    run: &'a Run,
    data: &'a Dataset,
    backend: &'a CpuBackend,
    trainer: Trainer<'a, CpuBackend>,
    sampler: Sampler,
    /// What is exported with the model.
    tokenizer: Option<Tokenizer>,
    metrics: File,
    progress: Progress,
    /// FLOP/s of this machine.
    peak: f64,
    /// FLOPs a token, forward and backward.
    flops: f64,
    outcome: Outcome,
}

impl<'a> Session<'a> {
    fn new(
        run: &'a Run,
        data: &'a Dataset,
        tokenizer: Option<Tokenizer>,
        folder: &RunFolder,
        backend: &'a CpuBackend,
        model: Mamba2ForCausalLM<CpuBackend>,
        peak: f64,
    ) -> Result<Self, Error> {
        let args = &run.args;
        let flops = model.config().flops_per_token();
        let sampler = Sampler {
            len: data.len(),
            batch: args.batch,
            dp: 1,
            rank: 0,
            accum: args.grad_accum_usteps,
            shuffle: args.shuffle.then_some(args.seed),
        };
        let outcome = Outcome {
            first_loss: f64::NAN,
            last_loss: f64::NAN,
            tokens: 0,
            seconds: 0.0,
            model_dir: run.output_dir.join("hf"),
        };
        Ok(Self {
            run,
            data,
            backend,
            trainer: Trainer::new(backend, model, args.activation_checkpointing.into()),
            sampler,
            tokenizer,
            metrics: folder.open("metrics.jsonl")?,
            progress: Progress::new(args.max_steps, args.logging_interval),
            peak,
            flops: (flops.forward + flops.backward) as f64,
            outcome,
        })
    }

    fn train(mut self) -> Result<Outcome, Error> {
        for step in 1..=self.run.args.max_steps {
            self.step(step)?;
        }
        self.progress.finish();
        self.export()?;
        Ok(self.outcome)
    }

    /// The batch of one micro-step.
    fn batch(&self, step: u64, micro: usize) -> Result<Batch, Error> {
        let indices = self.sampler.indices(step - 1, micro);
        let samples = indices.iter().map(|&i| self.data.sample(i)).collect::<Result<Vec<_>, _>>()?;
        Ok(Batch::new(samples.iter().map(|s| (&s.input_ids[..], &s.labels[..]))))
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
        self.log(Figures {
            step,
            loss: report.loss,
            lr,
            grad_norm: report.grad_norm,
            tokens: self.outcome.tokens,
            tokens_per_s,
            step_time_s: seconds,
            mfu: tokens_per_s * self.flops / self.peak,
        })
    }

    fn log(&mut self, figures: Figures) -> Result<(), Error> {
        let Figures { step, loss, lr, grad_norm, tokens, tokens_per_s, step_time_s, mfu } = figures;
        let line = json!({
            "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens,
            "tokens_per_s": tokens_per_s, "step_time_s": step_time_s, "mfu": mfu,
        });
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
