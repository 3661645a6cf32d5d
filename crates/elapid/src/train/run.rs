//! The loop of `elapid train`: data, steps, metrics, export.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Checkpointing, DType};
use serde_json::json;

use super::progress::{Figures, Progress};
use super::{Batch, Trainer};
use crate::Error;
use crate::config::run::{ActivationCheckpointing, Dtype, Run};
use crate::data::{Dataset, Sampler, Tokenizer};
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

/// A CPU backend with `threads` workers (None: one a core).
///
/// # Errors
/// When the threads cannot be started.
pub fn cpu(threads: Option<usize>) -> Result<CpuBackend, Error> {
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
    let args = &run.args;
    let data = open_data(run)?;
    let folder = RunFolder::create(&run.output_dir)?;
    let backend = cpu(args.threads)?;
    let model = match &args.init_from {
        None => Mamba2ForCausalLM::new(
            &backend,
            &with_token_ids(run, &data),
            args.dtype.compute(),
            args.init.into(),
            args.seed,
        ),
        Some(dir) => {
            let mut model = Mamba2ForCausalLM::empty(&backend, &run.config, args.dtype.compute());
            model.load(&backend, dir)?;
            model
        }
    };
    let peak = backend.measure_peak();
    print_start(run, &data, &model, &backend, peak);
    folder.write("run.toml", &toml::to_string(args).map_err(|e| Error::new(format!("run.toml: {e}")))?)?;

    let checkpointing = match args.activation_checkpointing {
        ActivationCheckpointing::None => Checkpointing::None,
        ActivationCheckpointing::Block => Checkpointing::Block,
    };
    let flops = model.config().flops_per_token();
    let flops = (flops.forward + flops.backward) as f64;
    let mut trainer = Trainer::new(&backend, model, checkpointing);
    let sampler = Sampler {
        len: data.len(),
        batch: args.batch,
        dp: 1,
        rank: 0,
        accum: args.grad_accum_usteps,
        shuffle: args.shuffle.then_some(args.seed),
    };
    let mut metrics = folder.open("metrics.jsonl")?;
    let progress = Progress::new(args.max_steps, args.logging_interval);
    let mut outcome = Outcome {
        first_loss: f64::NAN,
        last_loss: f64::NAN,
        tokens: 0,
        seconds: 0.0,
        model_dir: run.output_dir.join("hf"),
    };

    for step in 1..=args.max_steps {
        let start = Instant::now();
        let (mut valid, mut tokens) = (0, 0);
        for micro in 0..args.grad_accum_usteps {
            let indices = sampler.indices(step - 1, micro);
            let samples = indices.iter().map(|&i| data.sample(i)).collect::<Result<Vec<_>, _>>()?;
            let batch = Batch::new(samples.iter().map(|s| (&s.input_ids[..], &s.labels[..])));
            trainer.micro_step(&batch);
            valid += batch.valid();
            tokens += batch.tokens();
        }
        if valid == 0 {
            return Err(Error::new(format!("step {step}: the batch has no label that counts"))
                .with_hint("blocks of one token, or labels that are all -100, teach nothing"));
        }
        let lr = run.schedule.rate(step);
        let hyper = AdamW {
            lr: lr as f32,
            beta1: args.beta1,
            beta2: args.beta2,
            eps: args.eps,
            weight_decay: args.weight_decay,
            step,
        };
        let report = trainer.update(&hyper, args.max_grad_norm, valid);
        if !report.finite {
            progress.finish();
            return Err(Error::new(format!(
                "step {step}: loss {} with gradient norm {} is not finite; the update was not applied",
                report.loss, report.grad_norm
            ))
            .with_hint("try a lower --lr, more --warmup-steps or --dtype float32"));
        }
        let seconds = start.elapsed().as_secs_f64();
        outcome.tokens += tokens as u64;
        outcome.seconds += seconds;
        outcome.last_loss = report.loss;
        if step == 1 {
            outcome.first_loss = report.loss;
        }
        let tokens_per_s = tokens as f64 / seconds;
        let mfu = tokens_per_s * flops / peak;
        let line = json!({
            "step": step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": lr,
            "tokens": outcome.tokens,
            "tokens_per_s": tokens_per_s,
            "step_time_s": seconds,
            "mfu": mfu,
        });
        // One write a line: whoever reads along sees whole lines.
        metrics
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|e| Error::io("write", &run.output_dir.join("metrics.jsonl"), &e))?;
        progress.step(&Figures {
            step,
            loss: report.loss,
            lr,
            grad_norm: report.grad_norm,
            tokens_per_s,
            mfu,
        });
    }
    progress.finish();

    trainer.model().save_pretrained(&backend, &outcome.model_dir, FileDType::F32)?;
    if let Some(tokenizer) = data.tokenizer() {
        Tokenizer::load(&tokenizer.display().to_string())?.save(&outcome.model_dir)?;
    }
    Ok(outcome)
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

/// The configuration with the special tokens of the dataset's tokenizer, where that is known.
fn with_token_ids(run: &Run, data: &Dataset) -> crate::config::ModelConfig {
    let mut config = run.config.clone();
    if let Some(card) = data.card() {
        let id = card.eos_id;
        config.eos_token_id = id.map(crate::config::TokenIds::One);
        config.bos_token_id = id;
        config.pad_token_id = id;
    }
    config
}

fn print_start(
    run: &Run,
    data: &Dataset,
    model: &Mamba2ForCausalLM<CpuBackend>,
    backend: &CpuBackend,
    peak: f64,
) {
    let args = &run.args;
    let config = model.config();
    let row = |name: &str, value: String| say(format_args!("  {name:<12} {value}"));
    let source = args.model.clone().or(args.init_from.as_ref().map(|d| d.display().to_string()));
    say(format_args!("training {}", source.unwrap_or_default()));
    row(
        "model",
        format!(
            "{} parameters: {} layers, D {}, H {}, P {}, G {}, N {}, V {}",
            model.layout().parameter_count(),
            config.num_hidden_layers,
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            config.n_groups,
            config.state_size,
            config.vocab_size
        ),
    );
    let per_step = args.batch * args.grad_accum_usteps;
    row(
        "data",
        format!(
            "{}: {} blocks of {} tokens, {:.2} epochs",
            args.data_dir.display(),
            data.len(),
            data.seq_len(),
            (args.max_steps as usize * per_step) as f64 / data.len() as f64
        ),
    );
    row(
        "step",
        format!(
            "{} tokens = {} sequences × {} micro-steps × {}; {} steps",
            per_step * data.seq_len(),
            args.batch,
            args.grad_accum_usteps,
            data.seq_len(),
            args.max_steps
        ),
    );
    row(
        "AdamW",
        format!(
            "lr {:.2e} → {:.2e}, warm-up {}, betas {} {}, eps {:e}, weight decay {}, clip {}",
            run.schedule.lr,
            match run.schedule.shape {
                super::schedule::Shape::Constant => run.schedule.lr,
                super::schedule::Shape::Cosine => run.schedule.min_lr,
            },
            args.warmup_steps,
            args.beta1,
            args.beta2,
            args.eps,
            args.weight_decay,
            args.max_grad_norm
        ),
    );
    row(
        "device",
        format!(
            "CPU, {} threads, {:?}, {:.0} GFLOP/s in fp32 products; compute in {:?}",
            backend.threads(),
            backend.isa(),
            peak / 1e9,
            args.dtype
        ),
    );
    row("run folder", run.output_dir.display().to_string());
    for line in model.layout().to_string().lines() {
        say(format_args!("  {line}"));
    }
}

/// The folder of one run, locked while it lives.
struct RunFolder {
    dir: PathBuf,
    /// Held, not read: the lock ends with the file.
    _lock: File,
}

impl RunFolder {
    fn create(dir: &Path) -> Result<Self, Error> {
        let metrics = dir.join("metrics.jsonl");
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
        let path = dir.join(".lock");
        let lock = File::create(&path).map_err(|e| Error::io("create", &path, &e))?;
        if lock.try_lock().is_err() {
            return Err(Error::new(format!("another process is training into {}", dir.display()))
                .with_hint("wait for it, or give another --output-dir"));
        }
        if metrics.exists() {
            return Err(Error::new(format!("{} already holds a run", dir.display()))
                .with_hint("give another --output-dir, or move that folder away"));
        }
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    fn open(&self, name: &str) -> Result<File, Error> {
        let path = self.dir.join(name);
        File::create(&path).map_err(|e| Error::io("create", &path, &e))
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|e| Error::io("write", &path, &e))
    }
}
