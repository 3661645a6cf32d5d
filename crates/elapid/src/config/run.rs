//! A training run: from what was typed ([`TrainArgs`]) to what is meant ([`Run`]).

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use elapid_tensor::NormGroup;
use serde::{Deserialize, Serialize};

use super::ModelConfig;
pub use super::device::{Device, DeviceArgs, LayerLoop, Target};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::error::say;
use crate::model::init::Init;
use crate::model::shard::check_ranks;
use crate::parallel::{self, Mesh};
use crate::train::schedule::{Schedule, Shape};

/// Compute dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// fp32 throughout.
    Float32,
    /// bf16 activations and products, fp32 masters and states.
    Bfloat16,
}

/// Initial values of a new model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum InitScheme {
    /// As state-spaces/mamba.
    StateSpaces,
    /// As Hugging Face transformers.
    Transformers,
}

impl From<InitScheme> for Init {
    fn from(scheme: InitScheme) -> Self {
        match scheme {
            InitScheme::StateSpaces => Self::StateSpaces,
            InitScheme::Transformers => Self::Transformers,
        }
    }
}

/// What layers keep for their adjoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpointing {
    /// What each op saves: fastest.
    None,
    /// The input of each block, which then runs twice: least memory.
    Block,
}

/// Which checkpoint a run goes on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub enum Resume {
    /// The newest whole one of its own; none: step 1.
    Auto,
    /// This one.
    Path(PathBuf),
}

impl From<String> for Resume {
    fn from(text: String) -> Self {
        if text == "auto" { Self::Auto } else { Self::Path(text.into()) }
    }
}

impl From<Resume> for String {
    fn from(resume: Resume) -> Self {
        match resume {
            Resume::Auto => "auto".into(),
            Resume::Path(path) => path.display().to_string(),
        }
    }
}

/// Flags of `elapid train`.
#[derive(Clone, Debug, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct TrainArgs {
    /// Preset name, or a config.json, or a folder that holds one
    #[arg(long, value_name = "PRESET|PATH", required_unless_present = "init_from")]
    pub model: Option<String>,
    /// Rows of the embedding table, in place of the model's own
    #[arg(long, value_name = "V")]
    pub vocab_size: Option<usize>,
    /// Groups of B and C, in place of the model's own
    #[arg(long, value_name = "G")]
    pub n_groups: Option<usize>,
    /// Gated norm over the whole inner width instead of per group
    #[arg(long)]
    pub rmsnorm_across_groups: bool,
    /// Start from the weights of a Hugging Face folder, or of a checkpoint and nothing else of it
    #[arg(long, value_name = "DIR")]
    pub init_from: Option<PathBuf>,
    /// Initial values of a new model
    #[arg(long, value_enum, default_value = "state-spaces")]
    pub init: InitScheme,
    /// Dataset folder, as `elapid tokenize` or Python's `save_to_disk` wrote it, or Megatron's NAME.bin with NAME.idx;
    /// several as a,b or, mixed by weights, as a:0.7,b:0.3
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Hold the last F of the blocks out of training, at least one, and evaluate on them
    #[arg(long, value_name = "F")]
    pub eval_fraction: Option<f64>,
    /// Evaluate on another dataset
    #[arg(long, value_name = "DIR")]
    pub eval_data_dir: Option<PathBuf>,
    /// Steps between evaluations; one follows the last step in any case
    #[arg(long, value_name = "N")]
    pub eval_freq: Option<u64>,
    /// Tokens a block: must agree with the dataset, and cuts Megatron's files, which do not say
    #[arg(long, value_name = "L")]
    pub seq_len: Option<usize>,
    /// Read samples in a seeded random order, new in every epoch
    #[arg(long)]
    pub shuffle: bool,
    /// Carry the state from block to block: each batch row reads on in its own stretch of the dataset
    #[arg(long)]
    pub carry_state: bool,
    /// Seed of initial values and shuffling
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,
    /// Compute dtype
    #[arg(long, value_enum, default_value = "float32")]
    pub dtype: Dtype,
    /// Sequences in a micro-step of a rank
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Micro-steps in an optimizer step
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub grad_accum_usteps: usize,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    pub max_steps: u64,
    /// Peak learning rate
    #[arg(long, default_value_t = 3e-4)]
    pub lr: f64,
    /// Learning rate at the last step, where the schedule decays [default: a tenth of --lr]
    #[arg(long)]
    pub min_lr: Option<f64>,
    /// Steps of linear warm-up
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup_steps: u64,
    /// Learning rate after warm-up
    #[arg(long, value_enum, default_value = "cosine")]
    pub lr_schedule: Shape,
    /// Last steps of the run over which wsd decays [default: a tenth of --max-steps]
    #[arg(long, value_name = "N")]
    pub decay_steps: Option<u64>,
    /// Decay of AdamW's first moment
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f32,
    /// Decay of AdamW's second moment
    #[arg(long, default_value_t = 0.95)]
    pub beta2: f32,
    /// AdamW's epsilon
    #[arg(long, default_value_t = 1e-8)]
    pub eps: f32,
    /// Decoupled weight decay of matrices; vectors are never decayed
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f32,
    /// Clip gradients to this global norm; 0 does not clip
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f32,
    /// Ranks that share the model's tensors
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub tp: usize,
    /// Ranks that share the samples of a step [default: as many as were started, by --tp]
    #[arg(long, value_name = "N")]
    pub dp: Option<usize>,
    /// Cut masters, moments and the update over the data-parallel ranks
    #[arg(long = "use-zero-1")]
    pub use_zero_1: bool,
    /// Cut what lies between the blocks over the tensor-parallel ranks, along the sequence
    #[arg(long)]
    pub sequence_parallel_enabled: bool,
    /// How long a rank waits for the others
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub comm_timeout: u64,
    /// What layers keep for the backward pass
    #[arg(long, value_enum, default_value = "none")]
    pub activation_checkpointing: ActivationCheckpointing,
    /// Folder of checkpoints [default: OUTPUT_DIR/checkpoints]
    #[arg(long, value_name = "DIR")]
    pub checkpoint_dir: Option<PathBuf>,
    /// Optimizer steps between checkpoints; 0: only where Ctrl-C, SIGTERM or --save-last-step asks for one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub checkpoint_freq: u64,
    /// Ends the names of this run's checkpoints: step-00000042-TAG
    #[arg(long)]
    pub tag: Option<String>,
    /// Checkpoints to keep, the newest; -1 keeps all
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub num_kept_checkpoint: i64,
    /// Write a checkpoint after the last step
    #[arg(long)]
    pub save_last_step: bool,
    /// Wait in each save until it is on disk: takes no memory for a copy of masters and moments
    #[arg(long)]
    pub no_async_save: bool,
    /// Go on from the newest checkpoint of this run, or from the one given
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<Resume>,
    /// Start from the weights of a checkpoint, and from nothing else of it
    #[arg(long, conflicts_with = "init_from")]
    pub checkpoint_load: bool,
    /// Folder of that checkpoint, or of several [default: .]
    #[arg(long, value_name = "DIR")]
    pub checkpoint_load_dir: Option<PathBuf>,
    /// Which of several: a folder's name, or the newest saved with that --tag
    #[arg(long, value_name = "TAG")]
    pub checkpoint_load_tag: Option<String>,
    /// Start even where the predicted memory is more than the machine has free
    #[arg(long)]
    pub ignore_memory_limit: bool,
    /// Steps between log lines where there is no terminal
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub logging_interval: u64,
    /// Write the norm of every gradient, update and parameter to norms.jsonl, step by step
    #[arg(long)]
    pub log_norms: bool,
    /// Run folder [default: runs/MODEL, or the first free runs/MODEL-N]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: Device,
    /// How that is found.
    #[command(flatten)]
    #[serde(flatten)]
    pub on: DeviceArgs,
    /// Of --device neuron: compile the modules of the run into the cache, and do nothing else
    #[arg(long)]
    pub compile_only: bool,
    /// How modules for a device write layers
    #[arg(long, value_enum, default_value = "call")]
    pub layer_loop: LayerLoop,
    /// Cut the micro-step of a device into modules of so many groups of layers, forward and backward [default: as few as
    /// keep to the instructions of a module]
    #[arg(long, value_name = "N")]
    pub layer_groups: Option<usize>,
    /// Modules for a device write what is updated beside what was there instead of in its place
    #[arg(long)]
    pub not_in_place: bool,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Accepted for old command lines; means nothing here
    #[arg(long, hide = true, num_args = 0..=1)]
    #[serde(skip)]
    pub backend: Option<Option<String>>,
    /// Accepted for old command lines; means nothing here
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub debug: bool,
}

/// Below this, counts of samples and tokens cannot overflow.
const MAX_SAMPLES: u64 = 1 << 44;

/// A validated training run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The flags, with what was left open filled in; saved as `run.toml` beside the results.
    pub args: TrainArgs,
    /// The model's configuration.
    pub config: ModelConfig,
    /// Run folder.
    pub output_dir: PathBuf,
    /// Folder of checkpoints.
    pub checkpoint_dir: PathBuf,
    /// How many checkpoints to keep; None: all.
    pub keep: Option<usize>,
    /// The learning rate by step.
    pub schedule: Schedule,
    /// The ranks.
    pub mesh: Mesh,
}

impl Run {
    /// The flags as TOML, which `--config` takes.
    ///
    /// # Errors
    /// A value that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, Error> {
        toml::to_string(&self.args).map_err(|cause| {
            Error::new(format!("the settings cannot be written as TOML: {cause}"))
                .with_hint("numbers must be below 2^63, and paths UTF-8")
        })
    }
}

impl TrainArgs {
    /// Checks the values and resolves the model and the run folder. Reads the model's configuration, writes nothing.
    ///
    /// # Errors
    /// A value that cannot be meant, with its flag.
    pub fn resolve(self) -> Result<Run, Error> {
        // Of a folder of checkpoints it is one that is meant.
        let init_from = self.init_from.map(|dir| Checkpoint::locate(&dir).unwrap_or(dir));
        let this = Self { init_from, ..self };
        this.resolved()
    }

    fn resolved(self) -> Result<Run, Error> {
        for (flag, given) in [("--backend", self.backend.is_some()), ("--debug", self.debug)] {
            if given {
                say(format_args!("warning: {flag} means nothing here and is passed over"));
            }
        }
        let (model, config) = resolve_model(
            self.model.as_deref(),
            self.init_from.as_deref(),
            self.vocab_size,
            self.n_groups,
            self.rmsnorm_across_groups,
        )?;

        if self.carry_state && self.shuffle {
            return Err(Error::new("--carry-state and --shuffle exclude each other").with_hint(
                "a state is carried into the next block of the dataset; leave one of the two out",
            ));
        }
        at_least_one("--batch", self.batch as u64)?;
        at_least_one("--grad-accum-usteps", self.grad_accum_usteps as u64)?;
        at_least_one("--max-steps", self.max_steps)?;
        at_least_one("--logging-interval", self.logging_interval)?;
        check_threads("--threads", self.threads.unwrap_or(1))?;
        at_least_one("--comm-timeout", self.comm_timeout)?;
        let mesh = Mesh::new(self.tp, self.dp, parallel::world_size()?)?;
        check_ranks(&config, self.tp)?;
        self.check_device()?;
        let samples = [self.batch as u64, self.grad_accum_usteps as u64, mesh.dp as u64]
            .into_iter()
            .try_fold(self.max_steps, |product, factor| product.checked_mul(factor));
        if samples.is_none_or(|samples| samples > MAX_SAMPLES) {
            return Err(Error::new(format!(
                "--max-steps {} × --grad-accum-usteps {} × --batch {} × --dp {} are too many samples",
                self.max_steps, self.grad_accum_usteps, self.batch, mesh.dp
            ))
            .with_hint(format!("no run reads more than {MAX_SAMPLES}; look for a digit too many")));
        }
        let min_lr = self.min_lr.unwrap_or(self.lr / 10.0);
        let (beta1, beta2, eps) = (f64::from(self.beta1), f64::from(self.beta2), f64::from(self.eps));
        let (decay, clip) = (f64::from(self.weight_decay), f64::from(self.max_grad_norm));
        let below_one = "it must be 0 or more, and less than 1";
        let not_negative = "it must be a finite number, 0 or more";
        check("--lr", self.lr, self.lr > 0.0 && self.lr.is_finite(), "it must be a finite number above 0")?;
        check("--min-lr", min_lr, (0.0..=self.lr).contains(&min_lr), "it must lie between 0 and --lr")?;
        check("--beta1", beta1, (0.0..1.0).contains(&beta1), below_one)?;
        check("--beta2", beta2, (0.0..1.0).contains(&beta2), below_one)?;
        // With 0, a parameter that has had no gradient yet would move by 0 / 0.
        check("--eps", eps, eps > 0.0 && eps.is_finite(), "it must be a finite number above 0")?;
        check("--weight-decay", decay, decay >= 0.0 && decay.is_finite(), not_negative)?;
        check("--max-grad-norm", clip, clip >= 0.0 && clip.is_finite(), not_negative)?;
        if let Some(fraction) = self.eval_fraction {
            let inside = fraction > 0.0 && fraction < 1.0;
            check("--eval-fraction", fraction, inside, "it must lie between 0 and 1, such as 0.05")?;
        }
        match (&self.eval_data_dir, self.eval_fraction, self.eval_freq) {
            (Some(_), Some(_), _) => {
                return Err(Error::new("--eval-data-dir and --eval-fraction are both given")
                    .with_hint("evaluate on another dataset, or on the last part of this one"));
            }
            (None, None, Some(freq)) => {
                return Err(Error::new(format!(
                    "--eval-freq is {freq}, but there is nothing to evaluate on"
                ))
                .with_hint("give --eval-fraction F or --eval-data-dir DIR"));
            }
            (_, _, freq) => at_least_one("--eval-freq", freq.unwrap_or(1))?,
        }
        if self.warmup_steps > self.max_steps {
            let (warmup, max) = (self.warmup_steps, self.max_steps);
            return Err(Error::new(format!("--warmup-steps {warmup} is more than --max-steps {max}"))
                .with_hint(
                    "the learning rate would never reach its peak; warm up over 1 to 10 % of the steps",
                ));
        }
        let decay_steps = self.decay_steps.unwrap_or(self.max_steps.div_ceil(10));
        let after_warmup = self.max_steps - self.warmup_steps;
        if self.decay_steps.is_some() && self.lr_schedule != Shape::Wsd {
            return Err(Error::new("--decay-steps is given, but --lr-schedule is not wsd")
                .with_hint("cosine and linear decay from the end of the warm-up to the last step"));
        }
        if self.decay_steps.is_some_and(|steps| steps > after_warmup) {
            return Err(Error::new(format!(
                "--decay-steps {decay_steps} is more than the {after_warmup} steps after the warm-up"
            ))
            .with_hint("warm up and decay over fewer steps, or train for more"));
        }
        let name = Path::new(&model).file_stem().map_or("model".into(), |stem| stem.to_string_lossy());
        let output_dir = match (&self.output_dir, &self.resume) {
            (Some(dir), _) => dir.clone(),
            (None, None) => free_folder(Path::new("runs"), &name),
            (None, Some(Resume::Auto)) => Path::new("runs").join(&*name),
            (None, Some(Resume::Path(path))) => {
                return Err(Error::new(format!("--resume {} without --output-dir", path.display()))
                    .with_hint("give the run folder to go on in"));
            }
        };
        let checkpoint_dir = self.checkpoint_dir.clone().unwrap_or_else(|| output_dir.join("checkpoints"));
        let keep = match self.num_kept_checkpoint {
            -1 => None,
            n if n > 0 => Some(n as usize),
            n => {
                return Err(Error::new(format!("--num-kept-checkpoint is {n}"))
                    .with_hint("give 1 or more, or -1 to keep all"));
            }
        };
        let in_a_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if let Some(tag) = self.tag.as_ref().filter(|tag| tag.is_empty() || !tag.chars().all(in_a_name)) {
            return Err(Error::new(format!("--tag is {tag:?}"))
                .with_hint("it becomes part of a folder's name: letters, digits, '.', '_' and '-'"));
        }
        if !self.checkpoint_load && (self.checkpoint_load_dir.is_some() || self.checkpoint_load_tag.is_some())
        {
            say(format_args!(
                "warning: --checkpoint-load-dir and -tag mean nothing without --checkpoint-load"
            ));
        }

        let schedule = Schedule {
            shape: self.lr_schedule,
            lr: self.lr,
            min_lr,
            warmup_steps: self.warmup_steps,
            decay_steps: decay_steps.min(after_warmup),
            max_steps: self.max_steps,
        };
        let args = Self { min_lr: Some(min_lr), output_dir: Some(output_dir.clone()), ..self };
        Ok(Run { args, config, output_dir, checkpoint_dir, keep, schedule, mesh })
    }
}

impl TrainArgs {
    /// Whether the device can do what is asked for.
    fn check_device(&self) -> Result<(), Error> {
        self.on.check(self.device)?;
        if self.compile_only && self.device != Device::Neuron {
            return Err(Error::new("--compile-only without --device neuron")
                .with_hint("no other device's modules are compiled beforehand"));
        }
        if self.device == Device::Cpu {
            return Ok(());
        }
        match parallel::place()?.filter(|_| self.device == Device::Pjrt) {
            None => Ok(()),
            Some(place) => Err(Error::new(format!(
                "a launcher has started {} processes with --device pjrt",
                place.ranks
            ))
            .with_hint("all ranks are threads of one process: call elapid itself, with --tp and --dp")),
        }
    }
}

/// The model that the flags of that name mean, valid: where it comes from, and its configuration.
///
/// # Errors
/// There is no such model, or the flags do not fit it.
pub(crate) fn resolve_model(
    model: Option<&str>,
    init_from: Option<&Path>,
    vocab_size: Option<usize>,
    n_groups: Option<usize>,
    rmsnorm_across_groups: bool,
) -> Result<(String, ModelConfig), Error> {
    let (name, mut config) = match (model, init_from) {
        (Some(name), _) => (name.to_owned(), ModelConfig::find(name)?),
        (None, Some(dir)) => (dir.display().to_string(), ModelConfig::load(dir)?),
        (None, None) => return Err(Error::new("neither --model nor --init-from is given")),
    };
    if let Some(vocab_size) = vocab_size {
        config.vocab_size = vocab_size;
    }
    if let Some(n_groups) = n_groups {
        config.n_groups = n_groups;
    }
    if rmsnorm_across_groups {
        config.norm_group = NormGroup::Across;
    }
    config.validate()?;
    Ok((name, config))
}

/// `parent/name`, or the first free `parent/name-N` from 2 on.
pub fn free_folder(parent: &Path, name: &str) -> PathBuf {
    let numbered = (2..).map(|n| parent.join(format!("{name}-{n}")));
    std::iter::once(parent.join(name)).chain(numbered).find(|dir| !dir.exists()).expect("numbers do not end")
}

/// Refuses 0.
///
/// # Errors
/// `value` is 0.
pub(crate) fn at_least_one(flag: &str, value: u64) -> Result<(), Error> {
    if value == 0 { Err(Error::new(format!("{flag} is 0")).with_hint("give 1 or more")) } else { Ok(()) }
}

/// A number of threads that a machine can have use for.
///
/// # Errors
/// 0, or more than 1024.
pub(crate) fn check_threads(flag: &str, threads: usize) -> Result<(), Error> {
    at_least_one(flag, threads as u64)?;
    if threads > 1024 {
        return Err(Error::new(format!("{flag} is {threads}"))
            .with_hint("more threads than cores only wait for each other; 1024 at most"));
    }
    Ok(())
}

/// Refuses a value that is not `good`.
///
/// # Errors
/// It is not.
pub(crate) fn check(flag: &str, value: f64, good: bool, hint: &str) -> Result<(), Error> {
    if good { Ok(()) } else { Err(Error::new(format!("{flag} is {value}")).with_hint(hint)) }
}
