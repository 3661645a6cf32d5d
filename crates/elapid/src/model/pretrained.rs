//! Hugging Face model folders: `config.json` and `model.safetensors`, in and out.
//!
//! Reading maps the files and checks every name, shape and element type before the first value goes out. Writing
//! streams one tensor at a time into files beside the final ones and renames them when all are on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use elapid_tensor::{NormGroup, Slot};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, TensorInfo, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::{Value, json};

use super::layout::{Layout, ParamInfo};
use crate::Error;
use crate::config::ModelConfig;
use crate::error::say;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Most bytes of tensors in one file, unless a single one has more: transformers' `max_shard_size`.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;
/// Elements in memory at a time while a tensor is written.
const PIECE: usize = 1 << 20;
const EMBEDDING: &str = "backbone.embeddings.weight";
/// What state-spaces calls [`EMBEDDING`]; transformers reads it too.
const EMBEDDING_ALIAS: &str = "backbone.embedding.weight";
const HEAD: &str = "lm_head.weight";

/// Element type of weights on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileDType {
    /// `float32`.
    F32,
    /// `bfloat16`.
    Bf16,
    /// `float16`.
    F16,
}

impl FileDType {
    /// The name in a `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn from_safetensors(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    fn to_safetensors(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Little-endian bytes to values.
    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let (quads, pairs) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<2>().0);
        match self {
            Self::F32 => quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect(),
            Self::Bf16 => pairs.iter().map(|pair| bf16::from_le_bytes(*pair).to_f32()).collect(),
            Self::F16 => pairs.iter().map(|pair| f16::from_le_bytes(*pair).to_f32()).collect(),
        }
    }

    /// Values to little-endian bytes, rounded to nearest even.
    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        }
    }
}

/// Reads the weights of the model folder `dir` into `sink`, one tensor at a time, row-major, as fp32: of each tensor the
/// part that `layout` says is this rank's.
///
/// The folder holds `model.safetensors` or, where that is absent, the pieces that `model.safetensors.index.json`
/// names. Nothing reaches `sink` before all names, shapes and element types are found right.
///
/// # Errors
/// No or damaged files; tensors missing, unexpected, of another shape or of an element type other than fp32, bf16 and
/// fp16; a `lm_head.weight` that differs from the embedding it is tied to; a value that is not finite.
pub fn load_weights(dir: &Path, layout: &Layout, mut sink: impl FnMut(&Slot, &[f32])) -> Result<(), Error> {
    let files = weight_files(dir)?;
    let maps = files.iter().map(|path| map(path)).collect::<Result<Vec<_>, _>>()?;
    let mut found = BTreeMap::new();
    for (path, map) in files.iter().zip(&maps) {
        let tensors = SafeTensors::deserialize(map).map_err(|cause| damaged(path, &cause))?;
        for (name, view) in tensors.tensors() {
            if let Some(Found { path: other, .. }) = found.insert(name.clone(), Found { path, view }) {
                return Err(Error::new(format!(
                    "{name} is in {} and in {}",
                    other.display(),
                    path.display()
                ))
                .with_hint("remove files that do not belong to this model"));
            }
        }
    }
    if !found.contains_key(EMBEDDING)
        && let Some(embedding) = found.remove(EMBEDDING_ALIAS)
    {
        found.insert(EMBEDDING.into(), embedding);
    }
    let tied_head = if layout.shared().head.is_none() { found.remove(HEAD) } else { None };

    check_names(dir, layout, &found)?;
    for (name, _, info) in layout.iter() {
        found[&name].check(&name, &info.shape)?;
    }
    if let Some(head) = tied_head {
        head.check(HEAD, found[EMBEDDING].view.shape())?;
        if head.values(HEAD)? != found[EMBEDDING].values(EMBEDDING)? {
            return Err(Error::new(format!(
                "{HEAD} in {} differs from {EMBEDDING}, to which config.json ties it",
                head.path.display()
            ))
            .with_hint(
                "set \"tie_word_embeddings\": false in config.json to keep both, or remove lm_head.weight",
            ));
        }
    }
    for (name, slot, info) in layout.iter() {
        sink(&slot, &info.cuts(layout.share).slice(&found[&name].values(&name)?));
    }
    Ok(())
}

/// A tensor in a file.
struct Found<'a> {
    path: &'a Path,
    view: TensorView<'a>,
}

impl Found<'_> {
    /// Shape and element type are as they must be.
    fn check(&self, name: &str, shape: &[usize]) -> Result<FileDType, Error> {
        if self.view.shape() != shape {
            return Err(Error::new(format!(
                "{name} is {:?} in {}, but config.json makes it {shape:?}",
                self.view.shape(),
                self.path.display()
            ))
            .with_hint("config.json and weights belong to different models; copy both from the same place"));
        }
        FileDType::from_safetensors(self.view.dtype()).ok_or_else(|| {
            Error::new(format!("{name} in {} has element type {}", self.path.display(), self.view.dtype()))
                .with_hint("supported are F32, BF16 and F16; save the model in one of them")
        })
    }

    /// The values, all finite.
    fn values(&self, name: &str) -> Result<Vec<f32>, Error> {
        let values = self.check(name, self.view.shape())?.decode(self.view.data());
        check_finite(name, self.view.shape(), 0, &values).map_err(|error| error.at(self.path.display()))?;
        Ok(values)
    }
}

/// `values` are those from element `first` of the tensor on.
fn check_finite(name: &str, shape: &[usize], first: usize, values: &[f32]) -> Result<(), Error> {
    let Some(at) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
    let value = values[at];
    let mut at = first + at;
    let mut index = vec![0; shape.len()];
    for (axis, extent) in shape.iter().enumerate().rev() {
        index[axis] = at % extent;
        at /= extent;
    }
    Err(Error::new(format!("{name}{index:?} is {value}"))
        .with_hint("the model diverged before it was saved, or the values do not fit the element type; use an earlier checkpoint"))
}

/// Every parameter is there and nothing else.
fn check_names(dir: &Path, layout: &Layout, found: &BTreeMap<String, Found<'_>>) -> Result<(), Error> {
    let expected: BTreeSet<String> = layout.iter().map(|(name, _, _)| name).collect();
    let missing: Vec<&str> =
        expected.iter().filter(|name| !found.contains_key(*name)).map(String::as_str).collect();
    let unexpected: Vec<&str> =
        found.keys().filter(|name| !expected.contains(*name)).map(String::as_str).collect();
    if missing.is_empty() && unexpected.is_empty() {
        return Ok(());
    }
    let mut message = format!("the weights in {} do not fit config.json:", dir.display());
    for (what, names) in [("missing", &missing), ("unexpected", &unexpected)] {
        if !names.is_empty() {
            message += &format!(" {} {what} ({})", names.len(), names.join(", "));
        }
    }
    let headless =
        || missing.iter().all(|name| *name == HEAD || found.contains_key(&name["backbone.".len()..]));
    let hint = if missing == [HEAD] {
        "the head seems to be the embedding: set \"tie_word_embeddings\": true in config.json"
    } else if !missing.is_empty() && headless() {
        "the names lack \"backbone.\": save the model from Mamba2ForCausalLM, not from Mamba2Model"
    } else {
        "compare num_hidden_layers, use_bias, use_conv_bias and tie_word_embeddings in config.json with the weights"
    };
    Err(Error::new(message).with_hint(hint))
}

/// The safetensors files of the folder; `model.safetensors` wins over an index, as in transformers.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let (single, index) = (dir.join(WEIGHTS), dir.join(INDEX));
    if single.exists() {
        return Ok(vec![single]);
    }
    if !index.exists() {
        let hint = if dir.join("pytorch_model.bin").exists() {
            "pytorch_model.bin is a pickle, which runs code when it is read; save the model as safetensors"
        } else {
            "a model folder holds config.json and model.safetensors"
        };
        return Err(Error::new(format!("there is no {WEIGHTS} in {}", dir.display())).with_hint(hint));
    }
    let text = fs::read_to_string(&index).map_err(|cause| Error::io("read", &index, &cause))?;
    let value: Value = serde_json::from_str(&text).map_err(|cause| {
        Error::new(format!("{} is not JSON: {cause}", index.display())).with_hint("copy the file again")
    })?;
    let entries = value.get("weight_map").and_then(Value::as_object).map(|map| map.values());
    let names: Option<BTreeSet<&str>> =
        entries.and_then(|names| names.map(|name| name.as_str().filter(|name| is_file_name(name))).collect());
    let names = names.filter(|names| !names.is_empty()).ok_or_else(|| {
        Error::new(format!("{} has no weight_map from tensors to files of this folder", index.display()))
            .with_hint("copy the file again")
    })?;
    let absent: Vec<&str> = names.iter().copied().filter(|name| !dir.join(name).exists()).collect();
    if !absent.is_empty() {
        return Err(Error::new(format!(
            "{} names files that are missing: {}",
            index.display(),
            absent.join(", ")
        ))
        .with_hint("copy these files as well"));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// A name without a folder in it: an index does not lead out of its own folder.
fn is_file_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|last| last == name)
}

fn map(path: &Path) -> Result<Mmap, Error> {
    let file = File::open(path).map_err(|cause| Error::io("open", path, &cause))?;
    // SAFETY: the map is read-only and dropped when loading ends. Elapid itself replaces model files by renaming, which
    // leaves a mapped file as it was; a foreign program that shrinks it meanwhile ends this process, as with any map.
    unsafe { Mmap::map(&file) }.map_err(|cause| Error::io("map", path, &cause))
}

fn damaged(path: &Path, cause: &SafeTensorError) -> Error {
    let length = fs::metadata(path).map_or(0, |data| data.len());
    Error::new(format!("{} ({length} bytes) is not a whole safetensors file: {cause}", path.display()))
        .with_hint("the file is cut off or damaged; copy it again")
}

/// Writes a model folder that transformers reads: `config.json`, `generation_config.json` and `model.safetensors`, or,
/// for tensors of more than `max_shard` bytes (as a rule [`MAX_SHARD_SIZE`]), `model-00001-of-0000n.safetensors` and
/// so on with `model.safetensors.index.json`. All weights are written in `dtype`; a tied head is not written.
/// `source(name, first, count)` gives fp32 values of a stretch of a parameter, which are asked for in alphabetical order of
/// names and from first to last; a few MiB are in memory at a time. Files of these names are replaced, and only by whole ones; weight files of another division are removed afterwards.
///
/// Warns on stderr where transformers would compute something else ([`export_warning`]).
///
/// # Errors
/// The folder cannot be written; a value that is not finite or does not fit `dtype`.
pub fn save(
    dir: &Path,
    config: &ModelConfig,
    layout: &Layout,
    dtype: FileDType,
    max_shard: u64,
    mut source: impl FnMut(&str, usize, usize) -> Vec<f32>,
) -> Result<(), Error> {
    if let Some(warning) = export_warning(config) {
        say(format_args!("warning: {warning}"));
    }
    fs::create_dir_all(dir).map_err(|cause| Error::io("create", dir, &cause))?;
    // transformers (5.23) applies `rescale_prenorm_residual` to weights that it has just read, so a trained out_proj
    // would come out divided by √layers. The field speaks of initial values only, and these are past.
    let config =
        ModelConfig { dtype: Some(dtype.name().into()), rescale_prenorm_residual: false, ..config.clone() };
    let generation = json!({
        "_from_model_config": true,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_cache": config.use_cache,
    });
    let mut files = vec![
        Aside::write(dir, "config.json", |out| put(out, config.to_json().as_bytes()))?,
        Aside::write(dir, "generation_config.json", |out| put(out, format!("{generation:#}\n").as_bytes()))?,
    ];
    let shards = shards(layout, dtype, max_shard);
    let mut names = BTreeSet::new();
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => WEIGHTS.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        files.push(Aside::write(dir, &name, |out| write_tensors(out, shard, dtype, &mut source))?);
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.as_str(), name.clone())));
        names.insert(name);
    }
    if shards.len() > 1 {
        let parameters = layout.parameter_count();
        let size = parameters * dtype.size();
        let index = json!({
            "metadata": { "total_parameters": parameters, "total_size": size },
            "weight_map": weight_map,
        });
        files.push(Aside::write(dir, INDEX, |out| put(out, format!("{index:#}\n").as_bytes()))?);
        names.insert(INDEX.to_owned());
    }
    for file in files {
        file.commit()?;
    }
    remove_other_weights(dir, &names)?;
    // A rename is on disk when its folder is. Windows cannot open folders and needs no such call.
    #[cfg(unix)]
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(|cause| Error::io("write", dir, &cause))?;
    Ok(())
}

/// The tensors of each weight file, in alphabetical order: a file is begun where the next tensor would make the one
/// before larger than `max_shard` bytes.
fn shards(layout: &Layout, dtype: FileDType, max_shard: u64) -> Vec<Vec<(String, &ParamInfo)>> {
    let tensors: BTreeMap<String, &ParamInfo> = layout.iter().map(|(name, _, info)| (name, info)).collect();
    let (mut shards, mut size) = (vec![Vec::new()], 0);
    for (name, info) in tensors {
        let bytes = info.elements() as u64 * dtype.size() as u64;
        if size + bytes > max_shard && size > 0 {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("never empty").push((name, info));
    }
    shards
}

/// Removes weight files of an earlier save that was divided otherwise: a reader could take them for these.
fn remove_other_weights(dir: &Path, keep: &BTreeSet<String>) -> Result<(), Error> {
    let entries = fs::read_dir(dir).map_err(|cause| Error::io("read", dir, &cause))?;
    for entry in entries {
        let entry = entry.map_err(|cause| Error::io("read", dir, &cause))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !keep.contains(name) && (name == WEIGHTS || name == INDEX || is_shard(name)) {
            fs::remove_file(entry.path()).map_err(|cause| Error::io("remove", &entry.path(), &cause))?;
        }
    }
    Ok(())
}

/// Whether that is `model-00001-of-00002.safetensors` or the like.
fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.and_then(|rest| rest.split_once("-of-")).is_some_and(|(i, n)| is_number(i) && is_number(n))
}

/// What must be said to whoever exports this model to transformers.
pub fn export_warning(config: &ModelConfig) -> Option<String> {
    (config.norm_group == NormGroup::Across && config.n_groups > 1).then(|| {
        format!(
            "this model takes the mean of its gated norm across all {} groups, but transformers takes one mean per \
             group: IT WILL COMPUTE SOMETHING ELSE with these weights. Elapid reads \"norm_group\": \"across\" from \
             config.json and computes the right thing.",
            config.n_groups
        )
    })
}

type Out = BufWriter<File>;
type Written = Result<(), WriteError>;

/// What stops a file from being written.
enum WriteError {
    Io(std::io::Error),
    Value(Error),
}

fn put(out: &mut Out, bytes: &[u8]) -> Written {
    out.write_all(bytes).map_err(WriteError::Io)
}

/// A finished file under a preliminary name; dropped without [`Aside::commit`], it is removed.
struct Aside {
    partial: PathBuf,
    path: PathBuf,
}

impl Aside {
    fn write(dir: &Path, name: &str, content: impl FnOnce(&mut Out) -> Written) -> Result<Self, Error> {
        let aside = Self { partial: dir.join(format!(".{name}.partial")), path: dir.join(name) };
        let io = |cause| Error::io("write", &aside.path, &cause);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&aside.partial).map_err(io)?);
        content(&mut out).map_err(|error| match error {
            WriteError::Io(cause) => io(cause),
            WriteError::Value(error) => error.at(aside.path.display()),
        })?;
        let file = out.into_inner().map_err(|error| io(error.into_error()))?;
        file.sync_all().map_err(io)?;
        Ok(aside)
    }

    fn commit(self) -> Result<(), Error> {
        fs::rename(&self.partial, &self.path).map_err(|cause| Error::io("write", &self.path, &cause))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After a commit there is nothing under this name; after a failure there is nobody to tell.
        let _ = fs::remove_file(&self.partial);
    }
}

/// A safetensors file with the tensors in the order given, byte for byte as the Python library writes it: header length
/// as u64, JSON header padded with blanks to a multiple of 8, data. Format: the safetensors README.
fn write_tensors(
    out: &mut Out,
    tensors: &[(String, &ParamInfo)],
    dtype: FileDType,
    source: &mut impl FnMut(&str, usize, usize) -> Vec<f32>,
) -> Written {
    let mut end = 0;
    let entries = tensors.iter().map(|(name, info)| {
        let start = end;
        end += info.elements() * dtype.size();
        let entry = TensorInfo {
            dtype: dtype.to_safetensors(),
            shape: info.shape.clone(),
            data_offsets: (start, end),
        };
        (name.clone(), entry)
    });
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(format), entries.collect())
        .map_err(|cause| cause.to_string())
        .and_then(|metadata| serde_json::to_string(&metadata).map_err(|cause| cause.to_string()))
        .map_err(|cause| {
            WriteError::Value(Error::new(format!("cannot make a safetensors header: {cause}")))
        })?;
    let blanks = header.len().next_multiple_of(8) - header.len();
    put(out, &((header.len() + blanks) as u64).to_le_bytes())?;
    put(out, header.as_bytes())?;
    put(out, &b"        "[..blanks])?;
    for (name, info) in tensors {
        for first in (0..info.elements()).step_by(PIECE) {
            let values = source(name, first, PIECE.min(info.elements() - first));
            let bytes = dtype.encode(&values);
            // Looked at after rounding: a finite value may lie beyond what fp16 holds.
            check_finite(name, &info.shape, first, &dtype.decode(&bytes)).map_err(|error| {
                let fits = !values.iter().all(|value| value.is_finite());
                let hint = format!("a weight does not fit {}; save as float32 or bfloat16", dtype.name());
                WriteError::Value(if fits { error } else { error.with_hint(hint) })
            })?;
            put(out, &bytes)?;
        }
    }
    Ok(())
}
