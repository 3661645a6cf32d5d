//! Putting what was written aside into its place, so that no power cut takes it away again.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::Error;

/// Waits until the entries of a folder are on disk. Windows cannot open folders and needs no such call.
fn sync(dir: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    fs::File::open(dir)?.sync_all()?;
    Ok(())
}

/// Waits until the names of files in a folder are on disk.
///
/// # Errors
/// The disk does not take them.
pub(crate) fn sync_names(dir: &Path) -> Result<(), Error> {
    sync(dir).map_err(|cause| Error::io("write", dir, &cause))
}

/// Writes a file and waits until it is on disk.
///
/// # Errors
/// The disk does not take it.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = fs::File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|cause| Error::io("write", path, &cause))
}

/// Renames the file or folder `aside` to `place`, after its own entries are on disk, and returns when this is, too. The files
/// are on disk already.
///
/// # Errors
/// Something else is there, or the disk does not take it.
pub(crate) fn place(aside: &Path, place: &Path) -> Result<(), Error> {
    let put = || {
        if aside.is_dir() {
            sync(aside)?;
        }
        fs::rename(aside, place)?;
        sync(place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    };
    put().map_err(|cause| Error::io("write", place, &cause))
}
