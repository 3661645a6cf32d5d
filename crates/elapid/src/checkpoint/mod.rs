//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder of pieces (safetensors), a `config.json` and a `manifest.json`. The manifest speaks of
//! *logical* tensors under their Hugging Face names: `model.<name>` is the fp32 master, `m.<name>` and `v.<name>` are
//! AdamW's moments. It says for each of them which blocks lie in which file, so that any mesh can read what any other
//! has written. [`Store`] is the folder in which the checkpoints of a run lie side by side.

mod held;
mod manifest;
mod piece;
mod rectangle;
mod saver;
mod store;
mod write;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use elapid_tensor::Slot;

pub use held::State;
pub(crate) use held::{carried_cuts_of, carried_name};
pub use manifest::{Data, FileInfo, LogicalTensor, Manifest, Piece, Progress};
pub(crate) use piece::write;
pub use saver::Saver;
pub use store::Store;
pub(crate) use store::{LATEST, Lock, list, put};
pub(crate) use write::{write_files, write_weights};

use crate::Error;
use crate::config::ModelConfig;
use crate::error::say;
use crate::model::Layout;
use crate::model::shard::Cuts;
use crate::parallel::Rank;
use piece::PieceFile;
use rectangle::{Rectangle, meet, rectangles, runs};

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
    bytes_read: AtomicU64,
}

/// The outcome of what every rank has done: where one has failed, all have, with its error.
fn agree<T>(rank: &Rank, outcome: Result<T, Error>) -> Result<T, Error> {
    if rank.mesh().size() == 1 {
        return outcome;
    }
    let words = |error: &Error| (error.to_string(), error.hint().map(str::to_owned));
    let all = rank.gather(outcome.as_ref().err().map(words));
    match all.into_iter().flatten().next() {
        None => outcome,
        Some((message, hint)) => {
            let error = Error::new(message);
            Err(hint.into_iter().fold(error, Error::with_hint))
        }
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` and reads all of its files once to check their sizes and checksums.
    ///
    /// # Errors
    /// What is missing, cut off, or not as it was written.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_on(&Rank::single(None), dir)
    }

    /// [`Self::open`] for all ranks together, each of which checks its share of the files.
    ///
    /// # Errors
    /// As [`Self::open`], on every rank.
    pub fn open_on(rank: &Rank, dir: &Path) -> Result<Self, Error> {
        let open = || {
            let manifest = Manifest::read(&dir.join(MANIFEST))?;
            for name in manifest.files.keys().skip(rank.number()).step_by(rank.mesh().size()) {
                manifest.verify(dir, name)?;
            }
            Self::unverified(dir, manifest)
        };
        agree(rank, open())
    }

    fn unverified(dir: &Path, manifest: Manifest) -> Result<Self, Error> {
        let files = manifest.tensors.values().flat_map(|tensor| &tensor.pieces).map(|piece| &piece.file);
        let mut pieces = HashMap::new();
        for name in files {
            if !pieces.contains_key(name) {
                pieces.insert(name.clone(), PieceFile::open(&dir.join(name))?);
            }
        }
        Ok(Self { dir: dir.to_owned(), manifest, pieces, bytes_read: 0.into() })
    }

    /// The folder of the checkpoint that `path` names: its own, or one of checkpoints, of which `latest` names the newest.
    ///
    /// # Errors
    /// Neither.
    pub fn locate(path: &Path) -> Result<PathBuf, Error> {
        if path.join(MANIFEST).exists() {
            return Ok(path.to_owned());
        }
        store::latest(path)?.ok_or_else(|| {
            Error::new(format!("there is no checkpoint in {}", path.display()))
                .with_hint("a checkpoint is a folder step-… that holds manifest.json")
        })
    }

    /// Opens what `path` names.
    ///
    /// # Errors
    /// As [`Self::locate`] and [`Self::open`].
    pub fn find(path: &Path) -> Result<Self, Error> {
        Self::open(&Self::locate(path)?)
    }

    /// The newest whole checkpoint of the folder `dir`, of those that were given `--tag tag` where one is asked for.
    /// A damaged one is reported on stderr and passed over. All ranks call this together.
    ///
    /// # Errors
    /// The folder cannot be read, or holds checkpoints of which none is whole.
    pub fn newest(rank: &Rank, dir: &Path, tag: Option<&str>) -> Result<Option<Self>, Error> {
        let mut names = rank.from_first(|| store::list(dir))?;
        names.retain(|(_, name)| tag.is_none_or(|tag| name.ends_with(&format!("-{tag}"))));
        for (_, name) in names.iter().rev() {
            match Self::open_on(rank, &dir.join(name)) {
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

    /// Bytes of tensors that were read so far, those of the check aside.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Reads one of the three states of every parameter into `sink`, one tensor at a time: what the rank of `layout` holds
    /// in part number `part` of `parts` of its rows, and where that is in the part. Nothing else is read. `prefix` is one of
    /// [`PREFIXES`].
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; a file that cannot be read.
    pub fn read(
        &self,
        prefix: &str,
        layout: &Layout,
        (parts, part): (usize, usize),
        mut sink: impl FnMut(&Slot, &[f32]),
    ) -> Result<(), Error> {
        for (name, slot, info) in layout.iter() {
            let name = format!("{prefix}.{name}");
            let fault = |what: String| {
                Error::new(format!("{name} {what} in {}", self.dir.display())).with_hint(
                    "the checkpoint belongs to another model; give the --model that it was made with",
                )
            };
            let tensor = self.manifest.tensors.get(&name).ok_or_else(|| fault("is missing".into()))?;
            if tensor.shape != info.shape {
                return Err(fault(format!("is {:?} instead of {:?}", tensor.shape, info.shape)));
            }
            let (range, offset) = layout.within_part(&slot, parts, part);
            if !range.is_empty() {
                let slot = Slot { row: slot.row, offset, shape: vec![range.len()] };
                sink(&slot, &self.cut(tensor, &info.cuts(layout.share), 0, range)?);
            }
        }
        Ok(())
    }

    /// How many sequences have carried states of this name; None: there are no such states.
    pub(crate) fn sequences(&self, name: &str) -> Option<usize> {
        self.manifest.tensors.get(name).and_then(|tensor| tensor.shape.first().copied())
    }

    /// What `cuts` takes of carried states, for the sequences from `first` on.
    ///
    /// # Errors
    /// They have other extents, or cannot be read.
    pub(crate) fn read_carried(&self, name: &str, cuts: &Cuts, first: usize) -> Result<Vec<f32>, Error> {
        let tensor = &self.manifest.tensors[name];
        if tensor.shape[1..] != cuts.logical()[1..] {
            let what = format!("{name} is {:?} in {}", tensor.shape, self.dir.display());
            return Err(Error::new(what).with_hint("the checkpoint belongs to another model"));
        }
        self.cut(tensor, cuts, first, 0..cuts.shape().iter().product())
    }

    /// Elements `range` of what `cuts` takes of a tensor, or of those of its sequences that begin at `first`.
    fn cut(
        &self,
        tensor: &LogicalTensor,
        cuts: &Cuts,
        first: usize,
        range: Range<usize>,
    ) -> Result<Vec<f32>, Error> {
        let local_shape = cuts.shape();
        let mut values = vec![0.0; range.len()];
        for rectangle in rectangles(&local_shape, range.clone()) {
            for block in cuts.blocks() {
                let Some((local, extents)) = meet(&rectangle, &(block.local.clone(), block.shape)) else {
                    continue;
                };
                let shifts = local.iter().zip(&block.local).zip(&block.logical);
                let mut logical: Vec<_> = shifts.map(|((at, local), logical)| at - local + logical).collect();
                logical.iter_mut().take(1).for_each(|at| *at += first);
                self.copy(tensor, &(logical, extents), &local_shape, &local, range.start, &mut values)?;
            }
        }
        Ok(values)
    }

    /// Copies the block `wanted` of a tensor to the place `local` in one of extents `shape`, of which `values` holds the
    /// elements from `first` on.
    fn copy(
        &self,
        tensor: &LogicalTensor,
        wanted: &Rectangle,
        shape: &[usize],
        local: &[usize],
        first: usize,
        values: &mut [f32],
    ) -> Result<(), Error> {
        for piece in &tensor.pieces {
            let Some((at, extents)) = meet(wanted, &(piece.offset.clone(), piece.shape.clone())) else {
                continue;
            };
            let in_piece = at.iter().zip(&piece.offset).map(|(at, offset)| at - offset).collect();
            let here = at.iter().zip(&wanted.0).zip(local).map(|((at, from), local)| at - from + local);
            let from = runs(&piece.shape, &(in_piece, extents.clone()));
            let mut to = runs(shape, &(here.collect(), extents));
            to.iter_mut().for_each(|run| *run = run.start - first..run.end - first);
            let bytes = 4 * from.iter().map(ExactSizeIterator::len).sum::<usize>() as u64;
            self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
            self.pieces[&piece.file].read(piece, from, to, values)?;
        }
        Ok(())
    }

    /// Shape and values of one logical tensor, row-major; None where there is none of that name.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Option<HostTensor>, Error> {
        let Some(tensor) = self.manifest.tensors.get(name) else { return Ok(None) };
        let (origin, shape) = (vec![0; tensor.shape.len()], &tensor.shape);
        let mut values = vec![0.0; shape.iter().product()];
        self.copy(tensor, &(origin.clone(), shape.clone()), shape, &origin, 0, &mut values)?;
        Ok(Some((shape.clone(), values)))
    }
}
