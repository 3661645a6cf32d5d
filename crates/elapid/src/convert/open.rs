//! Opening models of every format: configuration, and tensors under their Hugging Face names.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use elapid_tensor::NormGroup;
use serde_json::Value;

use super::{Format, join, torch};
use crate::Error;
use crate::checkpoint::{Checkpoint, PREFIXES};
use crate::config::ModelConfig;
use crate::error::say;
use crate::model::Layout;
use crate::model::pretrained::{CONFIG, PICKLE, WEIGHTS, rename_embedding, weight_files};
use crate::model::weights::{FileDType, Stored, View, Weights, open_safetensors};

pub(super) const PARAMS: &str = "params.json";
pub(super) const CONSOLIDATED: &str = "consolidated.safetensors";

/// What the command line says about a model whose files do not say it.
#[derive(Clone, Debug, Default)]
pub struct Dimensions {
    /// A preset, a `config.json` or a folder that holds one.
    pub model: Option<String>,
    /// V.
    pub vocab_size: Option<usize>,
    /// G.
    pub n_groups: Option<usize>,
}

/// A model on disk.
pub(super) struct Model {
    pub(super) config: ModelConfig,
    /// Not yet fitted to the configuration.
    pub(super) weights: Weights,
    /// Where the configuration comes from, for messages.
    pub(super) described: String,
}

/// What lies in `path`.
///
/// # Errors
/// Nothing that is known.
pub(super) fn detect(path: &Path) -> Result<Format, Error> {
    let holds = |name: &str| path.join(name).exists();
    if holds("manifest.json") || holds("latest") {
        return Ok(Format::Elapid);
    }
    if holds(PARAMS) {
        return Ok(Format::Codestral);
    }
    if !rank_files(path)?.is_empty() {
        return Ok(Format::NeuronTp);
    }
    if holds(CONFIG) {
        let text = read(&path.join(CONFIG))?;
        let own = serde_json::from_str::<Value>(&text).is_ok_and(|json| json.get("model_type").is_none());
        return Ok(if own && text.contains("\"d_model\"") { Format::MambaSsm } else { Format::Hf });
    }
    Err(Error::new(format!("there is no model in {}", path.display())).with_hint(
        "a model folder holds a config.json, a params.json, dp_rank_….pt files or a manifest.json",
    ))
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))
}

/// Opens a model; its tensors are named, joined, and not looked at.
///
/// # Errors
/// Files that are missing, damaged, or hold what Elapid does not implement.
pub(super) fn open(format: Format, path: &Path, dimensions: &Dimensions) -> Result<Model, Error> {
    if format != Format::NeuronTp
        && let Some(flag) = [
            dimensions.model.as_ref().map(|_| "--model"),
            dimensions.vocab_size.map(|_| "--vocab-size"),
            dimensions.n_groups.map(|_| "--n-groups"),
        ]
        .into_iter()
        .flatten()
        .next()
    {
        return Err(Error::new(format!("{flag} does not go with a model of format {}", format.name()))
            .with_hint("its files say so themselves; the flag is for neuron-tp"));
    }
    let at = |name: &'static str| move |error: Error| error.at(path.join(name).display());
    match format {
        Format::Elapid => open_checkpoint(path),
        Format::NeuronTp => open_ranks(path, dimensions),
        Format::Hf => one_rank(ModelConfig::load(path)?, weights_of(path)?, CONFIG),
        Format::MambaSsm => {
            let config = ModelConfig::from_state_spaces(&read(&path.join(CONFIG))?).map_err(at(CONFIG))?;
            one_rank(config, weights_of(path)?, CONFIG)
        }
        Format::Codestral => {
            let config = ModelConfig::from_codestral(&read(&path.join(PARAMS))?).map_err(at(PARAMS))?;
            let views = open_safetensors(&[path.join(CONSOLIDATED)])?.into_iter();
            let bare = |name: String| name.strip_prefix("model.").map(str::to_owned).unwrap_or(name);
            one_rank(config, views.map(|(name, view)| (bare(name), view)).collect(), PARAMS)
        }
    }
}

fn one_rank(config: ModelConfig, mut views: BTreeMap<String, View>, described: &str) -> Result<Model, Error> {
    rename_embedding(&mut views);
    let weights = join::join(&Layout::new(&config), vec![views])?;
    Ok(Model { config, weights, described: described.to_owned() })
}

/// The tensors of `model.safetensors` or, where there is none, `pytorch_model.bin`, or of the files that their indices name.
fn weights_of(dir: &Path) -> Result<BTreeMap<String, View>, Error> {
    if let Some(files) = weight_files(dir, WEIGHTS)? {
        return open_safetensors(&files);
    }
    match weight_files(dir, PICKLE)? {
        Some(files) => torch::open(&files),
        None => Err(Error::new(format!("there is no {WEIGHTS} and no {PICKLE} in {}", dir.display()))
            .with_hint("a model folder holds a configuration and one of the two")),
    }
}

/// The tensors of one file, whatever it is called.
pub(super) fn open_file(path: &Path) -> Result<Weights, Error> {
    let files = [path.to_owned()];
    let safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
    let mut views = if safetensors { open_safetensors(&files)? } else { torch::open(&files)? };
    rename_embedding(&mut views);
    Ok(views.into())
}

/// The files `dp_rank_00_tp_rank_NN_pp_rank_00.pt` in `dir` or its folder `model`, by rank.
fn rank_files(dir: &Path) -> Result<BTreeMap<usize, PathBuf>, Error> {
    let mut found = BTreeMap::new();
    for dir in [dir.to_owned(), dir.join("model")] {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(rest) =
                name.strip_prefix("dp_rank_00_tp_rank_").and_then(|rest| rest.strip_suffix(".pt"))
            else {
                continue;
            };
            match rest.split_once("_pp_rank_") {
                Some((rank, "00")) if rank.len() <= 4 && rank.parse::<usize>().is_ok() => {
                    found.insert(rank.parse().unwrap_or(0), entry.path());
                }
                _ => {
                    return Err(Error::new(format!(
                        "{} is of a pipeline of several stages",
                        entry.path().display()
                    ))
                    .with_hint(
                        "only files of pp_rank_00 can be merged: tensor parallelism without a pipeline",
                    ));
                }
            }
        }
        if !found.is_empty() {
            break;
        }
    }
    Ok(found)
}

fn open_ranks(path: &Path, dimensions: &Dimensions) -> Result<Model, Error> {
    let files = rank_files(path)?;
    let tp = files.len();
    if tp == 0 {
        return Err(Error::new(format!(
            "there is no dp_rank_00_tp_rank_00_pp_rank_00.pt in {}",
            path.display()
        ))
        .with_hint("give the folder that holds the files of all ranks"));
    }
    if let Some(missing) = (0..tp).find(|rank| !files.contains_key(rank)) {
        return Err(Error::new(format!(
            "{} holds {tp} files, but none of tp_rank_{missing:02}",
            path.display()
        ))
        .with_hint("copy the files of all ranks into one folder"));
    }
    let beside = [path.to_owned(), path.join("model")].into_iter().find(|dir| dir.join(CONFIG).exists());
    let (mut config, described) = match (&dimensions.model, beside) {
        (Some(name), _) if Path::new(name).exists() => (ModelConfig::load(Path::new(name))?, name.clone()),
        // That system makes as many groups as it has ranks.
        (Some(name), _) => {
            (ModelConfig { n_groups: tp, ..ModelConfig::preset(name)? }, format!("--model {name}"))
        }
        (None, Some(dir)) => (ModelConfig::load(&dir)?, CONFIG.to_owned()),
        (None, None) => {
            return Err(Error::new(format!("{} does not say which model this is", path.display()))
                .with_hint(
                    "give --model (a preset such as Mamba7B, or a config.json), --vocab-size and --n-groups",
                ));
        }
    };
    config.vocab_size = dimensions.vocab_size.unwrap_or(config.vocab_size);
    config.n_groups = dimensions.n_groups.unwrap_or(config.n_groups);
    // T1: whatever the flag said, the norm was per group.
    if config.extra.shift_remove("rmsnorm_within_groups") == Some(Value::Bool(false)) {
        say(
            "note: the configuration asks for a norm across groups, but was trained with one per group; so it is converted",
        );
    }
    config.norm_group = NormGroup::PerGroup;
    config.validate()?;
    let mut ranks = Vec::new();
    for file in files.into_values() {
        let mut views = torch::open(&[file])?;
        rename_embedding(&mut views);
        ranks.push(views);
    }
    let weights = join::join(&Layout::new(&config), ranks)?;
    Ok(Model { config, weights, described })
}

fn open_checkpoint(path: &Path) -> Result<Model, Error> {
    let checkpoint = Checkpoint::find(path)?;
    let config = checkpoint.config()?;
    let [prefix, ..] = PREFIXES;
    let tensors = checkpoint.manifest().tensors.iter().filter_map(|(name, tensor)| {
        let bare = name.strip_prefix(prefix)?.strip_prefix('.')?;
        Some((bare.to_owned(), name.clone(), tensor.shape.clone()))
    });
    let tensors: Vec<_> = tensors.collect();
    let held = Rc::new(Held { checkpoint, last: RefCell::default() });
    let mut weights = Weights::default();
    for (bare, name, shape) in tensors {
        weights.0.insert(bare, Box::new(Logical { held: held.clone(), name, shape }));
    }
    Ok(Model { config, weights, described: CONFIG.to_owned() })
}

/// A checkpoint with the tensor that was last read from it: what is asked for next is as a rule its next stretch.
struct Held {
    checkpoint: Checkpoint,
    last: RefCell<(String, Vec<f32>)>,
}

/// A logical tensor of a checkpoint.
struct Logical {
    held: Rc<Held>,
    name: String,
    shape: Vec<usize>,
}

impl Stored for Logical {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> FileDType {
        FileDType::F32
    }

    fn path(&self) -> &Path {
        self.held.checkpoint.dir()
    }

    fn read(&self, first: usize, values: &mut [f32]) -> Result<(), Error> {
        let mut last = self.held.last.borrow_mut();
        if last.0 != self.name {
            let found = self.held.checkpoint.tensor(&self.name)?.map(|(_, values)| values);
            *last = (self.name.clone(), found.unwrap_or_default());
        }
        values.copy_from_slice(&last.1[first..first + values.len()]);
        Ok(())
    }
}
