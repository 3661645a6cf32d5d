//! The folder of a run's checkpoints: one is written aside and put into place by one rename.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use elapid_tensor::Backend;

use super::piece::write;
use super::write::write_files;
use super::{Progress, State};
use crate::Error;
use crate::disk;
use crate::parallel::Rank;

/// Names the newest checkpoint, for whoever asks no [`Store`].
pub(crate) const LATEST: &str = "latest";

/// Everything that is not, or no longer, in place begins with this.
const ASIDE: &str = ".step-";

/// The checkpoints of a run, in a folder that is locked while this lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    tag: Option<String>,
    /// How many to keep; None: all.
    keep: Option<usize>,
    /// Held, not read. None: the first rank holds it.
    _lock: Option<Lock>,
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

    /// Whether a process works in the folder.
    pub(crate) fn is_held(dir: &Path) -> bool {
        File::open(Self::path(dir)).is_ok_and(|file| file.try_lock_shared().is_err())
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
pub(crate) fn list(dir: &Path) -> Result<Vec<(u64, String)>, Error> {
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

/// A folder that vanishes unless it is put into place.
#[derive(Debug)]
pub(super) struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // Once it is in place there is nothing under this name; after a failure there is nobody to tell.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Puts the folder `name` into `dir`: written aside by `content`, brought to disk, renamed. One of that name is
/// replaced. All ranks call this together; the first one holds a [`Lock`] of `dir`.
pub(crate) fn put(
    rank: &Rank,
    dir: &Path,
    name: &str,
    content: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let _made = begin(rank, dir, name)?;
    content(&aside(dir, name))?;
    rank.from_first(|| commit(dir, name))?;
    Ok(dir.join(name))
}

/// Where the folder `name` of `dir` is written.
pub(super) fn aside(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!(".{name}.partial"))
}

/// Makes the folder that [`aside`] names, which vanishes with the first rank's answer. All ranks call this together.
pub(super) fn begin(rank: &Rank, dir: &Path, name: &str) -> Result<Option<Aside>, Error> {
    let (aside, mut made) = (aside(dir, name), None);
    rank.from_first(|| {
        if aside.exists() {
            // A process was killed here.
            fs::remove_dir_all(&aside).map_err(|cause| Error::io("remove", &aside, &cause))?;
        }
        fs::create_dir(&aside).map_err(|cause| Error::io("create", &aside, &cause))?;
        made = Some(Aside(aside));
        Ok(())
    })?;
    Ok(made)
}

/// Puts what was written aside into its place.
pub(super) fn commit(dir: &Path, name: &str) -> Result<(), Error> {
    let _old = retire(dir, name)?;
    disk::place(&aside(dir, name), &dir.join(name))
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

/// What to say of a save that failed.
pub(super) fn earlier_ones_stay(error: Error) -> Error {
    let what = error.hint().map_or(String::new(), |hint| format!("{hint}; "));
    error.with_hint(format!("{what}checkpoints written before are whole, --resume auto goes on from them"))
}

impl Store {
    /// Locks the folder, which is made where it is missing, and removes what killed processes left unfinished there.
    ///
    /// # Errors
    /// The folder cannot be made or written, or another process has it.
    pub fn open(dir: &Path, tag: Option<String>, keep: Option<usize>) -> Result<Self, Error> {
        let lock = Lock::new(dir, "--checkpoint-dir")?;
        let store = Self { _lock: Some(lock), ..Self::of_first_rank(dir, tag, keep)? };
        for entry in fs::read_dir(dir).map_err(|cause| Error::io("read", dir, &cause))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(ASIDE) {
                fs::remove_dir_all(entry.path()).map_err(|e| Error::io("remove", &entry.path(), &e))?;
            }
        }
        Ok(store)
    }

    /// The store that the first rank has opened, as the other ranks know it.
    ///
    /// # Errors
    /// None; as [`Self::open`].
    pub fn of_first_rank(dir: &Path, tag: Option<String>, keep: Option<usize>) -> Result<Self, Error> {
        Ok(Self { dir: dir.to_owned(), tag, keep, _lock: None })
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

    /// Writes a checkpoint of `state`: aside, every file on disk, then one rename. All ranks call this together; each
    /// writes the blocks that it holds, a stretch at a time in memory, into the same folder. A checkpoint of the same name
    /// is replaced. Afterwards the oldest ones go, where only so many are kept.
    ///
    /// # Errors
    /// The disk is full, or gone. What was there before is still there.
    pub fn save<B: Backend>(
        &self,
        rank: &Rank,
        backend: &B,
        state: &State<'_, B>,
        progress: Progress,
    ) -> Result<PathBuf, Error> {
        let (name, step) = (self.name(progress.step), progress.step);
        let save = || {
            let _made = begin(rank, &self.dir, &name)?;
            write_files(&aside(&self.dir, &name), rank, backend, state, progress)?;
            rank.from_first(|| self.commit(step))
        };
        save().map_err(earlier_ones_stay)?;
        Ok(self.dir.join(name))
    }

    /// The name of a checkpoint after `step`.
    pub(super) fn name(&self, step: u64) -> String {
        let tag = self.tag.as_ref().map_or(String::new(), |tag| format!("-{tag}"));
        format!("step-{step:08}{tag}")
    }

    /// Puts the checkpoint of `step`, whose files are all aside and on disk, into its place.
    pub(super) fn commit(&self, step: u64) -> Result<(), Error> {
        let name = self.name(step);
        commit(&self.dir, &name).and_then(|()| self.point_to(&name)).and_then(|()| self.prune(step))
    }

    /// Makes `latest` name that checkpoint.
    fn point_to(&self, name: &str) -> Result<(), Error> {
        let pointer = self.dir.join(format!(".{LATEST}.partial"));
        write(&pointer, |out| writeln!(out, "{name}"))?;
        disk::place(&pointer, &self.dir.join(LATEST))
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
