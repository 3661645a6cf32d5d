//! What the fuzz targets share: the readers work on files.

use std::fs;
use std::path::Path;

/// Gives `reader` a folder that holds these files.
///
/// # Panics
/// They cannot be written.
pub fn with_files(files: &[(&str, &[u8])], reader: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().expect("a place for files");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).expect("room for files");
    }
    reader(dir.path());
}
