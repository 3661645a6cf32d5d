//! The folder of a run's checkpoints: one is written aside and put into place by one rename.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use elapid_tensor::Backend;

use super::piece::{write, write_tensors};
use super::{CONFIG, FileInfo, LogicalTensor, MANIFEST, Manifest, PREFIXES, Piece, Progress};
use crate::Error;
use crate::config::ModelConfig;
use crate::model::Layout;

/// Names the newest checkpoint, for whoever asks no [`Store`].
const LATEST: &str = "latest";

/// Everything that is not, or no longer, in place begins with this.
const ASIDE: &str = ".step-";

/// The checkpoints of a run, in a folder that is locked while this lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    tag: Option<String>,
    /// How many to keep; None: all.
    keep: Option<usize>,
    /// Held, not read.
    _lock: Lock,
}

/// A folder that no other process works in, until this is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    dir: PathBuf,
    /// Held, not read.
    _file: File,
}

impl Lock {
    /// Locks the folder, which is made where it is missing. `flag` names another one.
    pub(crate) fn new(dir: &Path, flag: &str) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(|cause| Error::io("create", dir, &cause))?;
        let path = Self::path(dir);
        let file = File::create(&path).map_err(|cause| Error::io("create", &path, &cause))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _file: file }),
            Err(_) => Err(Error::new(format!("another process is training into {}", dir.display()))
                .with_hint(format!("wait for it, or give another {flag}"))),
        }
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join(".lock")
    }
}

impl Drop for Lock {
    /// Where nothing was left in the folder, no folder is left either.
    fn drop(&mut self) {
        let path = Self::path(&self.dir);
        let only_the_lock =
            |mut entries: fs::ReadDir| entries.all(|entry| entry.is_ok_and(|entry| entry.path() == path));
        if fs::read_dir(&self.dir).is_ok_and(only_the_lock) {
            let _ = fs::remove_file(&path).and_then(|()| fs::remove_dir(&self.dir));
        }
    }
}

/// Steps and names of the checkpoints in a folder, oldest first; none where there is no such folder.
pub(super) fn list(dir: &Path) -> Result<Vec<(u64, String)>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|cause| Error::io("read", dir, &cause))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(|cause| Error::io("read", dir, &cause))?.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-"));
        let step = step.and_then(|rest| rest.split('-').next()).and_then(|digits| digits.parse().ok());
        found.extend(step.map(|step| (step, name.to_string_lossy().into_owned())));
    }
    found.sort();
    Ok(found)
}

/// The checkpoint that `latest` names.
pub(super) fn latest(dir: &Path) -> Result<Option<PathBuf>, Error> {
    let path = dir.join(LATEST);
    match fs::read_to_string(&path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        name => {
            name.map(|name| Some(dir.join(name.trim()))).map_err(|cause| Error::io("read", &path, &cause))
        }
    }
}

/// Waits until the entries of a folder are on disk. Windows cannot open folders and needs no such call.
fn sync(dir: &Path) -> Result<(), Error> {
    #[cfg(unix)]
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(|cause| Error::io("write", dir, &cause))?;
    Ok(())
}

/// A folder that vanishes unless it is put into place.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // Once it is in place there is nothing under this name; after a failure there is nobody to tell.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Puts the folder `name` into `dir`: written aside by `content`, brought to disk, renamed. One of that name is
/// replaced. Whoever calls holds a [`Lock`] of `dir`.
pub(crate) fn put(
    dir: &Path,
    name: &str,
    content: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let (place, aside) = (dir.join(name), Aside(dir.join(format!(".{name}.partial"))));
    if aside.0.exists() {
        // A process was killed here.
        fs::remove_dir_all(&aside.0).map_err(|cause| Error::io("remove", &aside.0, &cause))?;
    }
    fs::create_dir(&aside.0).map_err(|cause| Error::io("create", &aside.0, &cause))?;
    content(&aside.0)?;
    sync(&aside.0)?;
    let _old = retire(dir, name)?;
    fs::rename(&aside.0, &place).map_err(|cause| Error::io("write", &place, &cause))?;
    sync(dir)?;
    Ok(place)
}

/// Takes a folder out of sight; its files go when the answer is dropped. A kill in between leaves no half one.
fn retire(dir: &Path, name: &str) -> Result<Option<Aside>, Error> {
    let (place, retired) = (dir.join(name), dir.join(format!(".{name}.retired")));
    match fs::rename(&place, &retired) {
        Ok(()) => Ok(Some(Aside(retired))),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io("remove", &place, &cause)),
    }
}

impl Store {
    /// Locks the folder, which is made where it is missing, and removes what killed processes left unfinished there.
    ///
    /// # Errors
    /// The folder cannot be made or written, or another process has it.
    pub fn open(dir: &Path, tag: Option<String>, keep: Option<usize>) -> Result<Self, Error> {
        let store = Self { _lock: Lock::new(dir, "--checkpoint-dir")?, dir: dir.to_owned(), tag, keep };
        for entry in fs::read_dir(dir).map_err(|cause| Error::io("read", dir, &cause))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(ASIDE) {
                fs::remove_dir_all(entry.path()).map_err(|e| Error::io("remove", &entry.path(), &e))?;
            }
        }
        Ok(store)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Step and name of the newest checkpoint, whole or not.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn last(&self) -> Result<Option<(u64, String)>, Error> {
        Ok(list(&self.dir)?.pop())
    }

    /// Writes a checkpoint of `state` (masters and moments) and of the tensors `carried`: aside, every file on disk, then one rename. One tensor at a time is in memory. A
    /// checkpoint of the same name is replaced. Afterwards the oldest ones go, where only so many are kept.
    ///
    /// # Errors
    /// The disk is full, or gone. What was there before is still there.
    pub fn save<B: Backend>(
        &self,
        backend: &B,
        config: &ModelConfig,
        layout: &Layout,
        state: [&B::Buffer; 3],
        carried: &[(String, B::Tensor)],
        progress: Progress,
    ) -> Result<PathBuf, Error> {
        let step = progress.step;
        let tag = self.tag.as_ref().map_or(String::new(), |tag| format!("-{tag}"));
        let name = format!("step-{step:08}{tag}");
        let content = |aside: &Path| write_files(aside, backend, config, layout, state, carried, progress);
        let place = put(&self.dir, &name, content)
            .and_then(|place| {
                self.point_to(&name)?;
                Ok(place)
            })
            .map_err(|error| {
                let what = error.hint().map_or(String::new(), |hint| format!("{hint}; "));
                error.with_hint(format!(
                    "{what}checkpoints written before are whole, --resume auto goes on from them"
                ))
            })?;
        self.prune(step)?;
        Ok(place)
    }

    /// Makes `latest` name that checkpoint.
    fn point_to(&self, name: &str) -> Result<(), Error> {
        let pointer = self.dir.join(format!(".{LATEST}.partial"));
        write(&pointer, |out| writeln!(out, "{name}"))?;
        fs::rename(&pointer, self.dir.join(LATEST)).map_err(|cause| Error::io("write", &pointer, &cause))?;
        sync(&self.dir)
    }

    /// Removes the oldest until so many are left, counting back from the one just written: what claims a later step was
    /// found damaged when the run was resumed, and does not count.
    fn prune(&self, newest: u64) -> Result<(), Error> {
        let Some(keep) = self.keep else { return Ok(()) };
        let names = list(&self.dir)?.into_iter().filter(|(step, _)| *step <= newest).collect::<Vec<_>>();
        for (_, name) in &names[..names.len().saturating_sub(keep.max(1))] {
            retire(&self.dir, name)?;
        }
        Ok(())
    }
}

/// Writes the files of a checkpoint into `dir`.
pub(crate) fn write_files<B: Backend>(
    dir: &Path,
    backend: &B,
    config: &ModelConfig,
    layout: &Layout,
    state: [&B::Buffer; 3],
    carried: &[(String, B::Tensor)],
    progress: Progress,
) -> Result<(), Error> {
    const PIECE: &str = "rank-00000.safetensors";
    let slots: Vec<_> = PREFIXES
        .iter()
        .zip(state)
        .flat_map(|(prefix, buffer)| {
            layout.iter().map(move |(name, slot, _)| (format!("{prefix}.{name}"), buffer, slot))
        })
        .collect();
    let parameters = slots.iter().map(|(name, _, slot)| (name.clone(), slot.shape.clone()));
    let entries: Vec<_> =
        parameters.chain(carried.iter().map(|(name, t)| (name.clone(), backend.shape(t)))).collect();
    let values = |place: usize| match slots.get(place) {
        Some((_, buffer, slot)) => backend.values(&backend.view(buffer, slot)),
        None => backend.values(&carried[place - slots.len()].1),
    };
    let json = config.to_json();
    let files: BTreeMap<String, FileInfo> = [
        (CONFIG.to_owned(), write(&dir.join(CONFIG), |out| out.write_all(json.as_bytes()))?),
        (PIECE.to_owned(), write_tensors(&dir.join(PIECE), &entries, values)?),
    ]
    .into();
    // One rank holds every tensor whole.
    let tensors = entries.into_iter().map(|(name, shape)| {
        let offset = vec![0; shape.len()];
        let piece = Piece { file: PIECE.into(), name: name.clone(), offset, shape: shape.clone() };
        (name, LogicalTensor { shape, dtype: "F32".into(), pieces: vec![piece] })
    });
    let manifest = Manifest::new(progress, files, tensors.collect());
    write(&dir.join(MANIFEST), |out| out.write_all(manifest.to_json().as_bytes()))?;
    Ok(())
}
