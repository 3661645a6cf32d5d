//! The folder of one run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::Error;

/// The folder of one run, locked while it lives.
pub(super) struct RunFolder {
    dir: PathBuf,
    /// Held, not read: the lock ends with the file.
    _lock: File,
}

impl RunFolder {
    pub(super) fn create(dir: &Path) -> Result<Self, Error> {
        let metrics = dir.join("metrics.jsonl");
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
        let path = Self::lock(dir);
        let lock = File::create(&path).map_err(|e| Error::io("create", &path, &e))?;
        if lock.try_lock().is_err() {
            return Err(Error::new(format!("another process is training into {}", dir.display()))
                .with_hint("wait for it, or give another --output-dir"));
        }
        if metrics.exists() {
            return Err(Error::new(format!("{} already holds a run", dir.display()))
                .with_hint("give another --output-dir, or move that folder away"));
        }
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// The file of the lock.
    fn lock(dir: &Path) -> PathBuf {
        dir.join(".lock")
    }

    pub(super) fn open(&self, name: &str) -> Result<File, Error> {
        let path = self.dir.join(name);
        File::create(&path).map_err(|e| Error::io("create", &path, &e))
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|e| Error::io("write", &path, &e))
    }
}

impl Drop for RunFolder {
    /// A run that failed before it left anything leaves no folder either; one that holds something stays.
    fn drop(&mut self) {
        let only_the_lock = |mut entries: fs::ReadDir| {
            entries.all(|entry| entry.is_ok_and(|entry| entry.path() == Self::lock(&self.dir)))
        };
        if fs::read_dir(&self.dir).is_ok_and(only_the_lock) {
            let _ = fs::remove_file(Self::lock(&self.dir)).and_then(|()| fs::remove_dir(&self.dir));
        }
    }
}
