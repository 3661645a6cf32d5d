//! The place of a folder that is yet to be written.

use std::borrow::Cow;
use std::path::Path;

use crate::Error;

/// Parent and name of the folder `dir`, which must not exist or be empty. `flag` has named it.
///
/// # Errors
/// It holds something, is a file, or has no name.
pub(crate) fn vacant<'a>(dir: &'a Path, flag: &str) -> Result<(&'a Path, Cow<'a, str>), Error> {
    if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) || dir.is_file() {
        return Err(Error::new(format!("{} exists already", dir.display()))
            .with_hint(format!("give another {flag}, or move that folder away")));
    }
    let name = dir.file_name().ok_or_else(|| {
        Error::new(format!("{} names no folder", dir.display()))
            .with_hint(format!("give {flag} a folder name"))
    })?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")), name.to_string_lossy()))
}
