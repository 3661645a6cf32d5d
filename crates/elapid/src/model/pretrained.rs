//! Hugging Face model folders: `config.json` and `model.safetensors`, in and out.
//!
//! Reading maps the files and checks every name, shape and element type before the first value goes out. Writing
//! streams one tensor at a time into files beside the final ones and renames them when all are on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use elapid_tensor::{NormGroup, Slot};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use super::layout::Layout;
pub use super::weights::FileDType;
use super::weights::{EMBEDDING, EMBEDDING_ALIAS, PIECE, Weights, check_finite, open_safetensors};
use crate::Error;
use crate::config::ModelConfig;
use crate::disk;
use crate::error::say;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// What `torch.save` makes of a model.
pub(crate) const PICKLE: &str = "pytorch_model.bin";
/// Most bytes of tensors in one file, unless a single one has more: transformers' `max_shard_size`.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

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
    let weights = open(dir)?.fit(dir, CONFIG, layout)?;
    for (name, slot, info) in layout.iter() {
        let tensor = &weights.0[&name];
        let mut values = vec![0.0; info.elements()];
        tensor.read(0, &mut values)?;
        check_finite(&name, &info.shape, 0, &values).map_err(|error| error.at(tensor.path().display()))?;
        sink(&slot, &info.cuts(layout.share).slice(&values));
    }
    Ok(())
}

/// A weight file as it lies on disk.
#[derive(Clone, Debug)]
pub struct WeightFile {
    /// Its path.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Parameters in it.
    pub tensors: usize,
    /// Their element types.
    pub dtypes: BTreeSet<String>,
}

/// Whether the folder holds weights, of whatever kind.
///
/// # Errors
/// It cannot be read.
pub fn has_weights(dir: &Path) -> Result<bool, Error> {
    let entries = fs::read_dir(dir).map_err(|cause| Error::io("read", dir, &cause))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let index = index_name(WEIGHTS);
    Ok(names.into_iter().any(|name| [".safetensors", &index, ".bin"].iter().any(|end| name.ends_with(end))))
}

/// The weight files of the model folder `dir`, whose tensors fit `layout` by names, shapes and element types; no value
/// is read but those of a tied head.
///
/// # Errors
/// As [`load_weights`], as far as that goes.
pub fn inspect(dir: &Path, layout: &Layout) -> Result<Vec<WeightFile>, Error> {
    let weights = open(dir)?.fit(dir, CONFIG, layout)?;
    let mut files = BTreeMap::<&Path, WeightFile>::new();
    for tensor in weights.0.values() {
        let path = tensor.path();
        let bytes = fs::metadata(path).map_err(|cause| Error::io("read", path, &cause))?.len();
        let new = WeightFile { path: path.to_owned(), bytes, tensors: 0, dtypes: BTreeSet::new() };
        let file = files.entry(path).or_insert(new);
        file.tensors += 1;
        file.dtypes.insert(tensor.dtype().to_safetensors().to_string());
    }
    Ok(files.into_values().collect())
}

/// The tensors of a model folder, by Hugging Face names, not yet looked at.
fn open(dir: &Path) -> Result<Weights, Error> {
    let files = weight_files(dir, WEIGHTS)?.ok_or_else(|| {
        let hint = if dir.join(PICKLE).exists() {
            "pytorch_model.bin is a pickle; make a safe file of it with elapid convert --from hf --to hf"
        } else {
            "a model folder holds config.json and model.safetensors"
        };
        Error::new(format!("there is no {WEIGHTS} in {}", dir.display())).with_hint(hint)
    })?;
    let mut found = open_safetensors(&files)?;
    rename_embedding(&mut found);
    Ok(found.into())
}

/// Gives the embedding the name that transformers gives it.
pub(crate) fn rename_embedding<T>(found: &mut BTreeMap<String, T>) {
    if !found.contains_key(EMBEDDING)
        && let Some(embedding) = found.remove(EMBEDDING_ALIAS)
    {
        found.insert(EMBEDDING.into(), embedding);
    }
}

/// The weight files of a folder: `single`, or else those that `<single>.index.json` names, as in transformers. None
/// where there is neither.
pub(crate) fn weight_files(dir: &Path, single: &str) -> Result<Option<Vec<PathBuf>>, Error> {
    let (file, index) = (dir.join(single), dir.join(index_name(single)));
    if file.exists() {
        return Ok(Some(vec![file]));
    }
    if !index.exists() {
        return Ok(None);
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
    Ok(Some(names.into_iter().map(|name| dir.join(name)).collect()))
}

fn index_name(single: &str) -> String {
    format!("{single}.index.json")
}

/// A name without a folder in it: an index does not lead out of its own folder.
fn is_file_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|last| last == name)
}

/// Writes a model folder that transformers reads: `config.json`, `generation_config.json` and `model.safetensors`, or,
/// for tensors of more than `max_shard` bytes (as a rule [`MAX_SHARD_SIZE`]), `model-00001-of-0000n.safetensors` and
/// so on with `model.safetensors.index.json`. All weights are written in `dtype`; a tied head is not written.
/// `source(name, first, count)` gives fp32 values of a stretch of a parameter, which are asked for in alphabetical order of
/// names and from first to last; a few MiB are in memory at a time. Files of these names are replaced, and only by whole
/// ones; weight files of another division are removed afterwards.
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
    let tensors = layout.iter().map(|(name, _, info)| (name, info.shape.clone())).collect();
    save_tensors(dir, config, tensors, dtype, max_shard, &mut |name, first, count| {
        Ok(source(name, first, count))
    })
}

/// Gives the fp32 values of a stretch of a tensor: (name, first element, number of elements).
pub(crate) type Values<'a> = dyn FnMut(&str, usize, usize) -> Result<Vec<f32>, Error> + 'a;

/// As [`save`], of `tensors` of these names and extents.
pub(crate) fn save_tensors(
    dir: &Path,
    config: &ModelConfig,
    tensors: BTreeMap<String, Vec<usize>>,
    dtype: FileDType,
    max_shard: u64,
    source: &mut Values<'_>,
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
        Aside::text(dir, CONFIG, &config.to_json())?,
        Aside::text(dir, "generation_config.json", &format!("{generation:#}\n"))?,
    ];
    let parameters: usize = tensors.values().map(|shape| elements(shape)).sum();
    let shards = shards(tensors, dtype, max_shard);
    let mut names = BTreeSet::new();
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => WEIGHTS.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        files.push(Aside::write(dir, &name, |out| write_tensors(out, shard, dtype, source))?);
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.as_str(), name.clone())));
        names.insert(name);
    }
    if shards.len() > 1 {
        let index = json!({
            "metadata": { "total_parameters": parameters, "total_size": parameters * dtype.size() },
            "weight_map": weight_map,
        });
        files.push(Aside::text(dir, &index_name(WEIGHTS), &format!("{index:#}\n"))?);
        names.insert(index_name(WEIGHTS));
    }
    for file in files {
        file.commit()?;
    }
    remove_other_weights(dir, &names)?;
    // A rename is on disk when its folder is.
    disk::sync_names(dir)
}

/// The tensors of each weight file, in alphabetical order: a file is begun where the next tensor would make the one
/// before larger than `max_shard` bytes.
fn shards(
    tensors: BTreeMap<String, Vec<usize>>,
    dtype: FileDType,
    max_shard: u64,
) -> Vec<Vec<(String, Vec<usize>)>> {
    let (mut shards, mut size) = (vec![Vec::new()], 0);
    for (name, shape) in tensors {
        let bytes = elements(&shape) as u64 * dtype.size() as u64;
        if size + bytes > max_shard && size > 0 {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("never empty").push((name, shape));
    }
    shards
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Removes weight files of an earlier save that was divided otherwise: a reader could take them for these.
fn remove_other_weights(dir: &Path, keep: &BTreeSet<String>) -> Result<(), Error> {
    let entries = fs::read_dir(dir).map_err(|cause| Error::io("read", dir, &cause))?;
    for entry in entries {
        let entry = entry.map_err(|cause| Error::io("read", dir, &cause))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !keep.contains(name) && (name == WEIGHTS || name == index_name(WEIGHTS) || is_shard(name)) {
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

pub(crate) type Out = BufWriter<File>;
pub(crate) type Written = Result<(), WriteError>;

/// What stops a file from being written.
pub(crate) enum WriteError {
    Io(std::io::Error),
    Value(Error),
}

impl From<std::io::Error> for WriteError {
    fn from(cause: std::io::Error) -> Self {
        Self::Io(cause)
    }
}

/// A finished file under a preliminary name; dropped without [`Aside::commit`], it is removed.
pub(crate) struct Aside {
    partial: PathBuf,
    path: PathBuf,
}

impl Aside {
    pub(crate) fn text(dir: &Path, name: &str, text: &str) -> Result<Self, Error> {
        Self::write(dir, name, |out| Ok(out.write_all(text.as_bytes())?))
    }

    pub(crate) fn write(
        dir: &Path,
        name: &str,
        content: impl FnOnce(&mut Out) -> Written,
    ) -> Result<Self, Error> {
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

    pub(crate) fn commit(self) -> Result<(), Error> {
        disk::place(&self.partial, &self.path)
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
pub(crate) fn write_tensors(
    out: &mut Out,
    tensors: &[(String, Vec<usize>)],
    dtype: FileDType,
    source: &mut Values<'_>,
) -> Written {
    let mut end = 0;
    let entries = tensors.iter().map(|(name, shape)| {
        let start = end;
        end += elements(shape) * dtype.size();
        let info =
            TensorInfo { dtype: dtype.to_safetensors(), shape: shape.clone(), data_offsets: (start, end) };
        (name.clone(), info)
    });
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(format), entries.collect())
        .map_err(|cause| cause.to_string())
        .and_then(|metadata| serde_json::to_string(&metadata).map_err(|cause| cause.to_string()))
        .map_err(|cause| {
            WriteError::Value(Error::new(format!("cannot make a safetensors header: {cause}")))
        })?;
    let blanks = header.len().next_multiple_of(8) - header.len();
    out.write_all(&((header.len() + blanks) as u64).to_le_bytes())?;
    write!(out, "{header}{:blanks$}", "")?;
    for (name, shape) in tensors {
        write_values(out, name, shape, dtype, source)?;
    }
    Ok(())
}

/// The values of one tensor, a stretch at a time.
pub(crate) fn write_values(
    out: &mut impl Write,
    name: &str,
    shape: &[usize],
    dtype: FileDType,
    source: &mut Values<'_>,
) -> Written {
    let len = elements(shape);
    for first in (0..len).step_by(PIECE) {
        let values = source(name, first, PIECE.min(len - first)).map_err(WriteError::Value)?;
        let bytes = dtype.encode(&values);
        // Looked at after rounding: a finite value may lie beyond what fp16 holds.
        check_finite(name, shape, first, &dtype.decode(&bytes)).map_err(|error| {
            let fits = !values.iter().all(|value| value.is_finite());
            let hint = format!("a weight does not fit {}; save as float32 or bfloat16", dtype.name());
            WriteError::Value(if fits { error } else { error.with_hint(hint) })
        })?;
        out.write_all(&bytes)?;
    }
    Ok(())
}
