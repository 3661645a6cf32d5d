//! Bringing files and folders to disk, so that a rename commits what is whole whatever happens to the machine.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::Error;

/// Writes a file and brings it to disk. Its name is not there for certain before [`sync_folder`].
pub(crate) fn write_synced(path: &Path, content: &[u8]) -> Result<(), Error> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|cause| Error::io("write", path, &cause))
}

/// Brings the names in a folder to disk: files that were made, renamed or removed there.
pub(crate) fn sync_folder(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(|cause| Error::io("write", dir, &cause))
}

/// [`sync_folder`] of a folder and of all folders below it.
pub(crate) fn sync_folders(dir: &Path) -> Result<(), Error> {
    let failed = |cause: std::io::Error| Error::io("read", dir, &cause);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    sync_folder(dir)
}
