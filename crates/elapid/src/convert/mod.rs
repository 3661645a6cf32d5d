//! Models of other programs, in and out.
//!
//! Every format is opened as a configuration and tensors under their Hugging Face names, checked against the layout table,
//! and written a stretch at a time. What a file says and Elapid does not implement is refused by name.

mod diff;
mod join;
mod open;
mod torch;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

pub use diff::{Comparison, TensorComparison, compare};
pub use open::Dimensions;

use crate::Error;
use crate::checkpoint::{Checkpoint, write_weights};
use crate::config::{ModelConfig, TokenIds};
use crate::data::Tokenizer;
use crate::disk;
use crate::error::say;
use crate::model::pretrained::{
    Aside, CONFIG, FileDType, MAX_SHARD_SIZE, PICKLE, save_tensors, write_tensors,
};
use crate::model::weights::{Stored, Weights};
use crate::model::{Layout, Role, Shard};
use crate::vacant::vacant;
use open::{CONSOLIDATED, PARAMS};

/// A way to lay a model out on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// state-spaces/mamba: `config.json`, `pytorch_model.bin` or `model.safetensors`
    #[value(name = "mamba_ssm", alias = "mamba-ssm")]
    MambaSsm,
    /// Mamba-Codestral: `params.json`, `consolidated.safetensors`
    Codestral,
    /// transformers: `config.json`, `model.safetensors` or its pieces, or `pytorch_model.bin`
    Hf,
    /// Tensor-parallel ranks of neuronx-distributed: `dp_rank_00_tp_rank_NN_pp_rank_00.pt`
    NeuronTp,
    /// Elapid's checkpoints
    Elapid,
}

impl Format {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::MambaSsm => "mamba_ssm",
            Self::Codestral => "codestral",
            Self::Hf => "hf",
            Self::NeuronTp => "neuron-tp",
            Self::Elapid => "elapid",
        }
    }
}

/// One conversion.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// Format of the input.
    pub from: Format,
    /// Format of the output.
    pub to: Format,
    /// The folder to read.
    pub input: PathBuf,
    /// The folder to write; it must not hold anything yet.
    pub output: PathBuf,
    /// Element type to write; None: the input's, of several the one that holds them all.
    pub dtype: Option<FileDType>,
    /// Folder or file of the tokenizer; None: the input's.
    pub tokenizer: Option<PathBuf>,
    /// Write in_proj in three parts.
    pub split_proj: bool,
    /// What the input's files do not say.
    pub dimensions: Dimensions,
}

/// Converts a model. The output appears when all of it is on disk.
///
/// # Errors
/// An input that is missing, damaged, or of a kind that either side does not implement; an output that cannot be written,
/// exists, or cannot say what the model is.
pub fn convert(conversion: &Conversion) -> Result<(), Error> {
    let Conversion { from, to, input, output, .. } = conversion;
    match to {
        Format::NeuronTp => {
            return Err(Error::new("--to neuron-tp is not implemented: files of ranks are read only")
                .with_hint("convert to hf; elapid trains on any number of ranks from that"));
        }
        Format::Elapid if conversion.dtype.is_some_and(|dtype| dtype != FileDType::F32) => {
            return Err(Error::new("-p does not go with --to elapid: the masters in a checkpoint are fp32")
                .with_hint("leave -p out"));
        }
        _ => {}
    }
    if conversion.split_proj && *to != Format::Hf {
        return Err(Error::new(format!("--split-proj does not go with --to {}", to.name()))
            .with_hint("only Hugging Face folders are written with split projections"));
    }
    let model = open::open(*from, input, &conversion.dimensions)?;
    let mut config = model.config;
    let layout = Layout::new(&config);
    let weights = model.weights.fit(input, &model.described, &layout)?;
    let dtype = conversion.dtype.or(weights.0.values().map(|tensor| tensor.dtype()).reduce(FileDType::or));
    let dtype = dtype.unwrap_or(FileDType::F32);
    let tokenizer = find_tokenizer(conversion)?;
    if let Tokens::Json(tokenizer) = &tokenizer {
        if tokenizer.vocab_size() > config.vocab_size {
            let (tokens, rows) = (tokenizer.vocab_size(), config.vocab_size);
            return Err(Error::new(format!("the tokenizer has {tokens} tokens, but the model {rows}"))
                .with_hint("give the tokenizer that the model was trained with"));
        }
        // state-spaces' files do not name their special tokens.
        if *from == Format::MambaSsm
            && let Some(id) = tokenizer.eos_id()
        {
            (config.bos_token_id, config.pad_token_id) = (Some(id), Some(id));
            config.eos_token_id = Some(TokenIds::One(id));
        }
    }

    let folder = Folder::create(output)?;
    match to {
        Format::Hf => write_hf(&folder.aside, &config, &layout, &weights, dtype, conversion.split_proj)?,
        Format::MambaSsm => write_mamba_ssm(&folder.aside, &config, &weights, dtype)?,
        Format::Elapid => {
            let parameters = shapes(&weights).into_iter().collect();
            let source = |name: &str, first, count| values(&*weights.0[name], first, count);
            write_weights(&folder.aside, &config, tokenizer.contents()?, parameters, source)?;
            return folder.commit();
        }
        _ => write_codestral(&folder.aside, &config, &weights, dtype)?,
    }
    tokenizer.save(&folder.aside)?;
    folder.commit()
}

fn shapes(weights: &Weights) -> BTreeMap<String, Vec<usize>> {
    weights.0.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect()
}

fn values(tensor: &dyn Stored, first: usize, count: usize) -> Result<Vec<f32>, Error> {
    let mut values = vec![0.0; count];
    tensor.read(first, &mut values)?;
    Ok(values)
}

fn write_hf(
    dir: &Path,
    config: &ModelConfig,
    layout: &Layout,
    weights: &Weights,
    dtype: FileDType,
    split_proj: bool,
) -> Result<(), Error> {
    let mut tensors = shapes(weights);
    // Parts of split tensors: (the whole, its element with which the part begins).
    let mut parts = BTreeMap::new();
    let column = |info: &crate::model::ParamInfo| match &info.shard {
        Shard::Column(segments) if split_proj => Some(segments.clone()),
        _ => None,
    };
    for (name, _, info) in layout.iter() {
        let in_proj = info.role == Role::InProj || name.ends_with("in_proj.bias");
        let Some(segments) = column(info).filter(|_| in_proj) else { continue };
        let width = info.elements() / info.shape[0];
        let mut first = 0;
        for (part, segments) in join::split(&name, &segments) {
            let mut shape = info.shape.clone();
            shape[0] = segments.iter().map(|segment| segment.len()).sum();
            parts.insert(part.clone(), (name.clone(), first));
            first += shape[0] * width;
            tensors.insert(part, shape);
        }
        tensors.remove(&name);
    }
    if split_proj {
        say("note: transformers itself does not read split projections; programs that have them do");
    }
    save_tensors(dir, config, tensors, dtype, MAX_SHARD_SIZE, &mut |name, first, count| {
        let (whole, start) = parts.get(name).map_or((name, 0), |(whole, start)| (whole.as_str(), *start));
        values(&*weights.0[whole], start + first, count)
    })
}

fn write_mamba_ssm(
    dir: &Path,
    config: &ModelConfig,
    weights: &Weights,
    dtype: FileDType,
) -> Result<(), Error> {
    let old = |name: &str| name.replace("backbone.embeddings.", "backbone.embedding.");
    let tensors = shapes(weights).into_iter().map(|(name, shape)| (old(&name), shape)).collect();
    // The library looks for both names of a tied table.
    let tied = [("lm_head.weight", "backbone.embedding.weight")];
    let aliases = if config.tie_word_embeddings { &tied[..] } else { &[] };
    Aside::text(dir, CONFIG, &config.to_state_spaces()?)?.commit()?;
    let source = &mut |name: &str, first, count| {
        let name = name.replace("backbone.embedding.", "backbone.embeddings.");
        values(&*weights.0[&name], first, count)
    };
    Aside::write(dir, PICKLE, |out| torch::write(out, &tensors, aliases, dtype, source))?.commit()
}

fn write_codestral(
    dir: &Path,
    config: &ModelConfig,
    weights: &Weights,
    dtype: FileDType,
) -> Result<(), Error> {
    let name = |name: &str| format!("model.{}", name.replace("backbone.embeddings.", "backbone.embedding."));
    let tensors: Vec<_> = shapes(weights).into_iter().map(|(ours, shape)| (name(&ours), shape)).collect();
    let ours: BTreeMap<String, &str> = weights.0.keys().map(|ours| (name(ours), ours.as_str())).collect();
    Aside::text(dir, PARAMS, &config.to_codestral()?)?.commit()?;
    let source = &mut |name: &str, first, count| values(&*weights.0[ours[name]], first, count);
    Aside::write(dir, CONSOLIDATED, |out| write_tensors(out, &tensors, dtype, source))?.commit()
}

/// The tokenizer that goes with the model.
enum Tokens {
    None,
    Json(Box<Tokenizer>),
    /// Files that are copied as they are.
    Files(Vec<PathBuf>),
}

fn find_tokenizer(conversion: &Conversion) -> Result<Tokens, Error> {
    let place = match (&conversion.tokenizer, conversion.from) {
        (Some(given), _) => given,
        (None, Format::Elapid) => &Checkpoint::locate(&conversion.input)?,
        (None, _) => &conversion.input,
    };
    if !place.exists() {
        // A name on the Hub, or an error.
        return Ok(Tokens::Json(Box::new(Tokenizer::load(&place.display().to_string())?)));
    }
    let json = place.is_dir() && place.join("tokenizer.json").exists()
        || place.extension().is_some_and(|extension| extension == "json");
    if json {
        return Ok(Tokens::Json(Box::new(Tokenizer::load(&place.display().to_string())?)));
    }
    // SentencePiece: tokenizer.model, tokenizer.model.v3.
    let is_model = |path: &Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tokenizer.model"))
    };
    let files: Vec<PathBuf> = if place.is_dir() {
        let entries = fs::read_dir(place).map_err(|cause| Error::io("read", place, &cause))?;
        entries.flatten().map(|entry| entry.path()).filter(|path| is_model(path)).collect()
    } else if is_model(place) {
        vec![place.clone()]
    } else {
        Vec::new()
    };
    match (files.is_empty(), &conversion.tokenizer) {
        (false, _) => {
            say("note: the tokenizer is copied as it is; elapid generate needs a tokenizer.json for text");
            Ok(Tokens::Files(files))
        }
        (true, Some(place)) => Err(Error::new(format!("{} is no tokenizer", place.display()))
            .with_hint("-t is a folder with a tokenizer.json or tokenizer.model, or one of these files")),
        (true, None) => {
            say(format_args!(
                "warning: {} holds no tokenizer, so the converted model has none; give one with -t",
                place.display()
            ));
            Ok(Tokens::None)
        }
    }
}

impl Tokens {
    /// Names and contents of its files.
    fn contents(&self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let of = |file: &PathBuf| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            fs::read(file).map(|content| (name, content)).map_err(|cause| Error::io("read", file, &cause))
        };
        match self {
            Self::None => Ok(Vec::new()),
            Self::Json(tokenizer) => Ok(tokenizer
                .files()
                .iter()
                .map(|(name, content)| ((*name).into(), content.clone()))
                .collect()),
            Self::Files(files) => files.iter().map(of).collect(),
        }
    }

    fn save(&self, dir: &Path) -> Result<(), Error> {
        match self {
            Self::None => Ok(()),
            Self::Json(tokenizer) => tokenizer.save(dir),
            Self::Files(files) => files.iter().try_for_each(|file| {
                let place = dir.join(file.file_name().unwrap_or_default());
                let copy = || fs::copy(file, &place).and_then(|_| File::open(&place)?.sync_all());
                copy().map_err(|cause| Error::io("copy", file, &cause))
            }),
        }
    }
}

/// A folder that is written under a hidden name and vanishes unless it is put into place.
struct Folder {
    dir: PathBuf,
    aside: PathBuf,
}

impl Folder {
    fn create(dir: &Path) -> Result<Self, Error> {
        let (parent, name) = vacant(dir, "--output")?;
        fs::create_dir_all(parent).map_err(|cause| Error::io("create", parent, &cause))?;
        let aside = parent.join(format!(".{name}.partial-{}", std::process::id()));
        // Left by a process of the same number that was killed.
        let _ = fs::remove_dir_all(&aside);
        fs::create_dir(&aside).map_err(|cause| Error::io("create", &aside, &cause))?;
        Ok(Self { dir: dir.to_owned(), aside })
    }

    fn commit(self) -> Result<(), Error> {
        disk::place(&self.aside, &self.dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Once it is in place there is nothing under this name; after a failure there is nobody to tell.
        let _ = fs::remove_dir_all(&self.aside);
    }
}
