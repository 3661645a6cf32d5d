//! Going on where a run stopped: which checkpoint, whether it fits, and what it puts back.

use std::path::{Path, PathBuf};
use std::time::Instant;

use elapid_tensor::{Backend, DType, Group, State};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::folder::RunFolder;
use super::{Outcome, Trainer};
use crate::Error;
use crate::checkpoint::{
    Checkpoint, Data, MANIFEST, Manifest, PREFIXES, Store, carried_cuts_of, carried_name,
};
use crate::config::ModelConfig;
use crate::config::run::{Resume, Run, TrainArgs};
use crate::data::{Dataset, Order, Sampler};
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::model::shard::Cuts;
use crate::parallel::Rank;

/// Where a run begins.
pub(super) enum Start {
    /// At step 1.
    Fresh,
    /// After the step of a checkpoint.
    From(Box<Checkpoint>),
    /// Nowhere: it came to its end before.
    Finished(Outcome),
}

/// What the first rank finds, as it tells the others.
#[derive(Serialize, Deserialize)]
enum Found {
    Fresh,
    /// A checkpoint, that of this folder.
    At(PathBuf),
    /// The newest whole checkpoint, where there is one.
    Newest,
    Finished,
}

/// What `--resume` says, with what the folders hold. All ranks call this together; the first one, which has the run
/// `folder`, looks.
pub(super) fn start(
    run: &Run,
    rank: &Rank,
    folder: Option<&RunFolder>,
    store: &Store,
) -> Result<Start, Error> {
    let mut own = None;
    let found = rank.from_first(|| {
        let (found, outcome) = look(run, folder.expect("the first rank has the folder"), store)?;
        own = outcome;
        Ok(found)
    })?;
    let begin = Instant::now();
    let start = match found {
        Found::Fresh => Start::Fresh,
        Found::Finished => Start::Finished(own.unwrap_or_else(|| Outcome::new(run.output_dir.join("hf")))),
        Found::At(dir) => Start::From(Box::new(Checkpoint::open_on(rank, &dir)?)),
        Found::Newest => match Checkpoint::newest(rank, store.dir(), None)? {
            Some(checkpoint) => Start::From(Box::new(checkpoint)),
            None => {
                say(format_args!("no checkpoint in {}: starting at step 1", store.dir().display()));
                Start::Fresh
            }
        },
    };
    if let Start::From(checkpoint) = &start {
        say(format_args!("{} checked in {:.2} s", checkpoint.dir().display(), begin.elapsed().as_secs_f64()));
    }
    Ok(start)
}

fn look(run: &Run, folder: &RunFolder, store: &Store) -> Result<(Found, Option<Outcome>), Error> {
    match &run.args.resume {
        None => {
            folder.refuse_a_run()?;
            match store.last()? {
                None => Ok((Found::Fresh, None)),
                Some((_, name)) => Err(Error::new(format!("{} already holds {name}", store.dir().display()))
                    .with_hint("go on from it with --resume auto, or give another --checkpoint-dir")),
            }
        }
        Some(Resume::Auto) => match folder.finished(run.args.max_steps)? {
            Some(outcome) => Ok((Found::Finished, Some(outcome))),
            None => Ok((Found::Newest, None)),
        },
        Some(Resume::Path(path)) => {
            let dir = Checkpoint::locate(path)?;
            let step = Manifest::read(&dir.join(MANIFEST))?.progress.step;
            match store.last()? {
                Some((later, name)) if later > step => Err(Error::new(format!(
                    "{} is at step {step}, but {} holds {name}",
                    dir.display(),
                    store.dir().display()
                ))
                .with_hint(
                    "move later checkpoints away to train these steps again, or give another --checkpoint-dir",
                )),
                _ => Ok((Found::At(dir), None)),
            }
        }
    }
}

/// Replaces the parameters by those of the checkpoint that `--checkpoint-load-dir` and `-tag` name.
pub(super) fn load_weights<B: Backend>(
    args: &TrainArgs,
    rank: &Rank,
    backend: &B,
    model: &mut Mamba2ForCausalLM<B>,
) -> Result<(), Error> {
    let dir = args.checkpoint_load_dir.as_deref().unwrap_or(Path::new("."));
    let checkpoint = match &args.checkpoint_load_tag {
        None => Checkpoint::open_on(rank, &rank.from_first(|| Checkpoint::locate(dir))?)?,
        Some(tag) if dir.join(tag).is_dir() => Checkpoint::open_on(rank, &dir.join(tag))?,
        Some(tag) => Checkpoint::newest(rank, dir, Some(tag))?.ok_or_else(|| {
            Error::new(format!("there is no checkpoint {tag} in {}", dir.display())).with_hint(
                "give --checkpoint-load-tag the name of a step-… folder, or the --tag that it was saved with",
            )
        })?,
    };
    read_weights(&checkpoint, backend, model)
}

/// Replaces the parameters by those of `checkpoint`.
pub(super) fn read_weights<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &B,
    model: &mut Mamba2ForCausalLM<B>,
) -> Result<(), Error> {
    let layout = model.layout().clone();
    let [weights, ..] = PREFIXES;
    let masters = model.masters_mut();
    checkpoint.read(weights, &layout, (1, 0), |slot, values| backend.write_slot(masters, slot, values))?;
    model.refresh(backend);
    Ok(())
}

/// What tells this dataset from others.
pub(super) fn identity(data: &Dataset, sampler: &Sampler) -> Data {
    Data {
        blocks: sampler.len,
        seq_len: data.seq_len(),
        fingerprint: data.fingerprint().map(str::to_owned),
        tokenizer: data.card().map(|card| card.tokenizer.clone()),
    }
}

/// Checks that the checkpoint is of this model and of samples that the run can go on with, and says what has changed. Gives
/// [`Sampler::from`]: where it goes on, or the beginning of another dataset.
pub(super) fn check(
    checkpoint: &Checkpoint,
    run: &Run,
    config: &ModelConfig,
    data: &Dataset,
    sampler: &Sampler,
) -> Result<(u64, u64), Error> {
    let old = &checkpoint.manifest().progress;
    let fault = |what: String, hint: &str| {
        Err(Error::new(format!("cannot go on from {}: {what}", checkpoint.dir().display())).with_hint(hint))
    };
    let model = differences(&fields(&checkpoint.config()?), &fields(config));
    if !model.is_empty() {
        return fault(
            format!("the model has changed ({})", model.join(", ")),
            "give the same model, or start a new run with --checkpoint-load, which takes the weights alone",
        );
    }
    if !old.is_of_a_run() {
        say(format_args!("beginning with the weights of {}", checkpoint.dir().display()));
        return Ok((0, 0));
    }
    let json = |data: &Data| match serde_json::to_value(data) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let dataset = differences(&json(&old.data), &json(&identity(data, sampler))).join(", ");
    let stretches = [old.order, sampler.order].contains(&Order::Stretches);
    if old.order != sampler.order && (dataset.is_empty() || stretches) {
        let say = |order: Order| match order {
            Order::Dataset => "that of the dataset".into(),
            Order::Shuffled(seed) => format!("random with seed {seed}"),
            Order::Stretches => "by stretches".to_owned(),
        };
        return fault(
            format!("the order of samples was {}, now it is {}", say(old.order), say(sampler.order)),
            "give --shuffle, --seed and --carry-state as before",
        );
    }
    let setting = |name: &str| old.settings[name].as_u64().unwrap_or(1);
    let before = setting("batch") * setting("grad-accum-usteps") * checkpoint.manifest().mesh.dp as u64;
    let per_step = sampler.read_before(1);
    if stretches && !dataset.is_empty() {
        return fault(
            format!("the dataset has changed ({dataset}), and states are carried through it"),
            "give the dataset that the run was started with; for another one start a new run with --checkpoint-load",
        );
    }
    if stretches && before != per_step {
        return fault(
            format!(
                "a step read {before} samples, but --batch {} with --grad-accum-usteps {} and --dp {} makes {per_step}",
                sampler.batch, sampler.accum, sampler.dp
            ),
            "with --carry-state the split may change, but not the product --batch × --grad-accum-usteps × --dp",
        );
    }
    if old.step > run.args.max_steps {
        return fault(
            format!("it is at step {}, past --max-steps {}", old.step, run.args.max_steps),
            "give a larger --max-steps, or an earlier checkpoint",
        );
    }
    say(format_args!("going on after step {} of {}", old.step, checkpoint.dir().display()));
    let changed = differences(&numeric(&old.settings), &numeric(&settings(&run.args)));
    if !changed.is_empty() {
        say(format_args!("  changed since: {}", changed.join(", ")));
    }
    if before != per_step {
        say(format_args!("  a step reads {per_step} samples from here on, {before} before"));
    }
    if dataset.is_empty() {
        return Ok((old.step, old.samples));
    }
    say(format_args!("  another dataset, read from its beginning ({dataset})"));
    Ok((old.step, 0))
}

/// The flags that have a part in the numbers: not where things go, nor how often.
fn numeric(settings: &Value) -> Map<String, Value> {
    const OTHERS: [&str; 12] = [
        "comm-timeout",
        "output-dir",
        "checkpoint-dir",
        "checkpoint-freq",
        "tag",
        "num-kept-checkpoint",
        "save-last-step",
        "no-async-save",
        "resume",
        "logging-interval",
        "log-norms",
        "data-dir",
    ];
    let mut flags = settings.as_object().cloned().unwrap_or_default();
    flags.retain(|flag, _| !OTHERS.contains(&flag.as_str()));
    flags
}

/// The flags, as a checkpoint keeps them.
pub(super) fn settings(args: &TrainArgs) -> Value {
    serde_json::to_value(args).expect("flags are plain data")
}

/// The fields of a configuration that decide what the model computes.
fn fields(config: &ModelConfig) -> Map<String, Value> {
    let neutral = ModelConfig::default();
    let config = ModelConfig {
        pad_token_id: None,
        bos_token_id: None,
        eos_token_id: None,
        initializer_range: neutral.initializer_range,
        rescale_prenorm_residual: neutral.rescale_prenorm_residual,
        time_step_min: neutral.time_step_min,
        time_step_max: neutral.time_step_max,
        time_step_floor: neutral.time_step_floor,
        use_cache: neutral.use_cache,
        dtype: None,
        transformers_version: None,
        extra: Map::new(),
        ..config.clone()
    };
    match serde_json::from_str(&config.to_json()) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// [`differences`] between two objects.
pub(super) fn differences_of(old: &Value, new: &Value) -> Vec<String> {
    match (old.as_object(), new.as_object()) {
        (Some(old), Some(new)) => differences(old, new),
        _ => Vec::new(),
    }
}

/// `name old → new` for all fields that differ.
fn differences(old: &Map<String, Value>, new: &Map<String, Value>) -> Vec<String> {
    let names = old.keys().chain(new.keys().filter(|name| !old.contains_key(*name)));
    names
        .map(|name| (name, old.get(name).unwrap_or(&Value::Null), new.get(name).unwrap_or(&Value::Null)))
        .filter(|(_, old, new)| old != new)
        .map(|(name, old, new)| format!("{name} {old} → {new}"))
        .collect()
}

/// Puts carried states back, of `rows` sequences on each rank. Before the first step there are none.
pub(super) fn restore_carried<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &B,
    trainer: &mut Trainer<'_, B>,
    rows: usize,
) -> Result<(), Error> {
    if trainer.states().is_none() || checkpoint.manifest().progress.step == 0 {
        return Ok(());
    }
    let (ranks, rank) = (backend.group_size(Group::Dp), backend.group_rank(Group::Dp));
    let model = trainer.model();
    let [conv, ssm] = carried_cuts_of(model.layout(), &model.config().spec(), rows);
    let tensor = |part: &str, layer: usize, cuts: &Cuts| {
        let name = carried_name(part, layer);
        let fault = |what: String| {
            Error::new(format!("{name} {what} in {}", checkpoint.dir().display())).with_hint(
                "with --carry-state give --batch as before, or start a new run with --checkpoint-load",
            )
        };
        let held = checkpoint.sequences(&name).ok_or_else(|| fault("is missing".into()))?;
        if held != ranks * rows {
            return Err(fault(format!("holds {held} sequences instead of {}", ranks * rows)));
        }
        let values = checkpoint.read_carried(&name, cuts, rank * rows)?;
        Ok(backend.tensor(&values, &cuts.shape(), DType::F32))
    };
    let layers = model.layout().flat.layers;
    let states = (0..layers)
        .map(|layer| Ok(State { conv: tensor("conv", layer, &conv)?, ssm: tensor("ssm", layer, &ssm)? }));
    let states = states.collect::<Result<_, Error>>()?;
    trainer.set_states(states);
    Ok(())
}

/// Puts masters, moments and carried states back; `rows` is B.
pub(super) fn restore<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &B,
    trainer: &mut Trainer<'_, B>,
    rows: usize,
) -> Result<(), Error> {
    let start = Instant::now();
    restore_carried(checkpoint, backend, trainer, rows)?;
    let moments = checkpoint.manifest().progress.is_of_a_run();
    trainer.replace_state(|which, layout, part, write| match which {
        1.. if !moments => Ok(()),
        _ => checkpoint.read(PREFIXES[which], layout, part, write),
    })?;
    say(format_args!("  read in {:.2} s", start.elapsed().as_secs_f64()));
    Ok(())
}
