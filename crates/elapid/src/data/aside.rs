//! A folder that appears whole or not at all: written in a hidden folder beside its place and put there by one rename.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Error;
use crate::disk;
use crate::vacant::vacant;

const LOCK: &str = "lock";
const PLAN: &str = "plan.json";
const PROGRESS: &str = "progress.json";
/// What becomes the folder.
const FOLDER: &str = "dataset";

/// A folder being written: `.NAME.partial`, which holds a lock, what is to be written, how far it has come, and the
/// folder itself.
pub(super) struct Aside {
    dir: PathBuf,
    path: PathBuf,
    /// It holds work that is worth going on with.
    keep: bool,
    placed: bool,
    _lock: File,
}

impl Aside {
    /// Begins the folder `dir`. Where one of the same `plan` was begun and holds work, gives its progress too; other
    /// remains without work in them are replaced.
    ///
    /// # Errors
    /// `dir` holds something already, its parent cannot be written, another process is at it, or it was begun with
    /// another plan.
    pub(super) fn open<P: DeserializeOwned>(
        dir: &Path,
        plan: Option<&Value>,
    ) -> Result<(Self, Option<P>), Error> {
        let (parent, name) = vacant(dir, "--save-path")?;
        let path = parent.join(format!(".{name}.partial"));
        fs::create_dir_all(&path).map_err(|cause| Error::io("create", &path, &cause))?;
        let lock = path.join(LOCK);
        let file = File::create(&lock).map_err(|cause| Error::io("create", &lock, &cause))?;
        file.try_lock().map_err(|_| {
            Error::new(format!("{} is being written by another process", dir.display()))
                .with_hint("wait for it, or give another --save-path")
        })?;
        let mut aside = Self { dir: dir.to_owned(), path, keep: true, placed: false, _lock: file };
        // Without its folder it was put into place, and only its remains were not removed.
        let begun: Option<(Value, P)> =
            aside.read(PLAN).zip(aside.read(PROGRESS)).filter(|_| aside.folder().is_dir());
        if let (Some((old, progress)), Some(plan)) = (begun, plan) {
            if old == *plan {
                return Ok((aside, Some(progress)));
            }
            let (old, new) = (old.as_object(), plan.as_object());
            let changed = new
                .into_iter()
                .flatten()
                .filter(|(key, value)| old.and_then(|old| old.get(*key)) != Some(value));
            let changed: Vec<_> = changed.map(|(key, _)| key.replace('_', "-")).collect();
            return Err(Error::new(format!(
                "{} was begun with other settings or another source ({})",
                aside.path.display(),
                changed.join(", ")
            ))
            .with_hint("give the same ones to go on, or remove that folder to begin anew"));
        }
        aside.keep = false;
        let failed = |path: &Path, cause: &std::io::Error| Error::io("create", path, cause);
        // What was begun there came to nothing.
        for name in [PROGRESS, PLAN] {
            let _ = fs::remove_file(aside.path.join(name));
        }
        let folder = aside.folder();
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).map_err(|cause| failed(&folder, &cause))?;
        if let Some(plan) = plan {
            write_json(&aside.path.join(PLAN), plan)?;
        }
        Ok((aside, None))
    }

    /// The hidden folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder as it is while being written: what is put there becomes part of it.
    pub(super) fn folder(&self) -> PathBuf {
        self.path.join(FOLDER)
    }

    /// Notes how far it has come; what is on disk by now is kept from here on, even if this process is killed.
    pub(super) fn note(&mut self, progress: &impl Serialize) -> Result<(), Error> {
        let (path, new) = (self.path.join(PROGRESS), self.path.join("progress.new"));
        write_json(&new, progress)?;
        disk::place(&new, &path)?;
        self.keep = true;
        Ok(())
    }

    /// Puts the folder into its place.
    ///
    /// # Errors
    /// Somebody else has put something there.
    pub(super) fn place(mut self) -> Result<(), Error> {
        disk::place(&self.folder(), &self.dir)?;
        self.placed = true;
        Ok(())
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.path.join(name)).ok()?).ok()
    }
}

impl Drop for Aside {
    /// Work that is worth going on with stays; nothing else does.
    fn drop(&mut self) {
        if self.placed || !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Writes a file and brings it to disk.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).expect("plain data");
    disk::write(path, (text + "\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn open(dir: &Path, plan: &Value) -> Result<(Aside, Option<u32>), Error> {
        Aside::open(&dir.join("data"), Some(plan))
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            dir.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (aside, progress) = open(dir.path(), &json!({})).unwrap();
        assert_eq!(progress, None);
        fs::write(aside.folder().join("a"), "x").unwrap();
        assert_eq!(names(dir.path()), [".data.partial"]);
        drop(aside);
        assert!(names(dir.path()).is_empty());

        let (aside, _) = open(dir.path(), &json!({})).unwrap();
        fs::write(aside.folder().join("a"), "x").unwrap();
        aside.place().unwrap();
        assert_eq!(
            (names(dir.path()), names(&dir.path().join("data"))),
            (vec!["data".into()], vec!["a".into()])
        );
        assert!(open(dir.path(), &json!({})).err().unwrap().to_string().contains("data exists already"));
    }

    #[test]
    fn noted_work_is_found_again_by_the_same_plan_alone() {
        let dir = tempfile::tempdir().unwrap();
        let plan = json!({ "seq_len": 4, "source": "a" });
        let (mut aside, _) = open(dir.path(), &plan).unwrap();
        fs::write(aside.folder().join("a"), "x").unwrap();
        aside.note(&7).unwrap();
        let busy = open(dir.path(), &plan).err().unwrap();
        assert!(busy.to_string().contains("another process"), "{busy}");
        drop(aside);

        let other = open(dir.path(), &json!({ "seq_len": 8, "source": "a" })).err().unwrap();
        assert!(other.to_string().contains("(seq-len)") && other.hint().is_some(), "{other}");
        let (aside, progress) = open(dir.path(), &plan).unwrap();
        assert_eq!(progress, Some(7));
        assert_eq!(fs::read(aside.folder().join("a")).unwrap(), b"x");
        // Killed just after it was put into place, which was then taken away.
        fs::remove_dir_all(aside.folder()).unwrap();
        drop(aside);
        assert_eq!(open(dir.path(), &plan).unwrap().1, None);
    }
}
