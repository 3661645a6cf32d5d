//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder of pieces (safetensors), a `config.json` and a `manifest.json`. The manifest speaks of
//! *logical* tensors under their Hugging Face names: `model.<name>` is the fp32 master, `m.<name>` and `v.<name>` are
//! AdamW's moments. It says for each of them which blocks lie in which file, so that any mesh can read what any other
//! has written. [`Store`] is the folder in which the checkpoints of a run lie side by side.

mod held;
mod manifest;
mod piece;
mod store;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use elapid_tensor::Slot;

pub use held::State;
pub(crate) use held::{carried_cuts_of, carried_name};
pub use manifest::{Data, FileInfo, LogicalTensor, Manifest, Piece, Progress};
pub(crate) use piece::{verify, write};
pub use store::Store;
pub(crate) use store::{LATEST, Lock, list, put, write_files};

use crate::Error;
use crate::config::ModelConfig;
use crate::error::say;
use crate::model::Layout;
use piece::PieceFile;

/// What a parameter's name begins with in a checkpoint: its master and AdamW's first and second moment.
pub const PREFIXES: [&str; 3] = ["model", "m", "v"];

pub(crate) const MANIFEST: &str = "manifest.json";
const CONFIG: &str = "config.json";

/// Extents and values, row-major.
pub type HostTensor = (Vec<usize>, Vec<f32>);

/// A checkpoint on disk, found whole.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    pieces: HashMap<String, PieceFile>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` and reads all of its files once to check their sizes and checksums.
    ///
    /// # Errors
    /// What is missing, cut off, or not as it was written.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let manifest = Manifest::read(&dir.join(MANIFEST))?;
        for (name, info) in &manifest.files {
            piece::verify(&dir.join(name), info)?;
        }
        let files = manifest.tensors.values().flat_map(|tensor| &tensor.pieces).map(|piece| &piece.file);
        let mut pieces = HashMap::new();
        for name in files {
            if !pieces.contains_key(name) {
                pieces.insert(name.clone(), PieceFile::open(&dir.join(name))?);
            }
        }
        Ok(Self { dir: dir.to_owned(), manifest, pieces })
    }

    /// Opens what `path` names: a checkpoint, or a folder of checkpoints, of which `latest` names the newest.
    ///
    /// # Errors
    /// Neither, or as [`Self::open`].
    pub fn find(path: &Path) -> Result<Self, Error> {
        if path.join(MANIFEST).exists() {
            return Self::open(path);
        }
        match store::latest(path)? {
            Some(dir) => Self::open(&dir),
            None => Err(Error::new(format!("there is no checkpoint in {}", path.display()))
                .with_hint("a checkpoint is a folder step-… that holds manifest.json")),
        }
    }

    /// The newest whole checkpoint of the folder `dir`, of those that were given `--tag tag` where one is asked for.
    /// A damaged one is reported on stderr and passed over.
    ///
    /// # Errors
    /// The folder cannot be read, or holds checkpoints of which none is whole.
    pub fn newest(dir: &Path, tag: Option<&str>) -> Result<Option<Self>, Error> {
        let mut names = store::list(dir)?;
        names.retain(|(_, name)| tag.is_none_or(|tag| name.ends_with(&format!("-{tag}"))));
        for (_, name) in names.iter().rev() {
            match Self::open(&dir.join(name)) {
                Ok(found) => return Ok(Some(found)),
                Err(error) => {
                    say(format_args!("warning: passing over {}: {error}", dir.join(name).display()))
                }
            }
        }
        if names.is_empty() {
            return Ok(None);
        }
        Err(Error::new(format!("all {} checkpoints in {} are damaged", names.len(), dir.display()))
            .with_hint("move that folder away to start anew"))
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The model's configuration.
    ///
    /// # Errors
    /// As [`ModelConfig::load`].
    pub fn config(&self) -> Result<ModelConfig, Error> {
        ModelConfig::load(&self.dir.join(CONFIG))
    }

    /// Reads one of the three states of every parameter into `sink`, one tensor at a time: the part that the rank of
    /// `layout` holds, row-major. `prefix` is one of [`PREFIXES`].
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; a file that cannot be read.
    pub fn read(
        &self,
        prefix: &str,
        layout: &Layout,
        mut sink: impl FnMut(&Slot, &[f32]),
    ) -> Result<(), Error> {
        for (name, slot, info) in layout.iter() {
            let name = format!("{prefix}.{name}");
            let fault = |what: String| {
                Error::new(format!("{name} {what} in {}", self.dir.display())).with_hint(
                    "the checkpoint belongs to another model; give the --model that it was made with",
                )
            };
            let (shape, values) = self.tensor(&name)?.ok_or_else(|| fault("is missing".into()))?;
            if shape != info.shape {
                return Err(fault(format!("is {shape:?} instead of {:?}", info.shape)));
            }
            sink(&slot, &info.cuts(layout.share).slice(&values));
        }
        Ok(())
    }

    /// Shape and values of one logical tensor, row-major; None where there is none of that name.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Option<HostTensor>, Error> {
        let Some(tensor) = self.manifest.tensors.get(name) else { return Ok(None) };
        let mut values = vec![0.0; tensor.shape.iter().product()];
        for piece in &tensor.pieces {
            self.pieces[&piece.file].read(piece, &tensor.shape, &mut values)?;
        }
        Ok(Some((tensor.shape.clone(), values)))
    }
}
