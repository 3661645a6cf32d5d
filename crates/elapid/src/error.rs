//! Errors for people: what is wrong, with the value and the file, and what to do about it.

use std::cell::Cell;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// What went wrong (`Display`) and what to do ([`Error::hint`]). The command line prints them as `error: …` and
/// `hint: …`.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    message: String,
    hint: Option<String>,
    signal: Option<i32>,
}

impl Error {
    /// An error without a hint. `message` names the offending value and the file it stands in.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, signal: None }
    }

    /// The operating system refused something: `cannot {action} {path}: {cause}`, with the usual remedy.
    pub fn io(action: &str, path: &Path, cause: &std::io::Error) -> Self {
        Self::new(format!("cannot {action} {}: {cause}", path.display())).with_hint(match cause.kind() {
            ErrorKind::NotFound => "check the spelling of the path",
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                "check who may read and write there, or choose another path"
            }
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "free some space on that disk, or choose a path on another"
            }
            ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                "a file stands where a folder is needed; choose another path"
            }
            ErrorKind::IsADirectory => "a folder stands where a file is needed; choose another path",
            _ => "check the path and the disk that it lies on",
        })
    }

    /// Says what to do.
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Says that it was no fault, but a signal that asked to stop.
    pub fn by_signal(self, signal: i32) -> Self {
        Self { signal: Some(signal), ..self }
    }

    /// The signal that asked to stop; the process ends with 128 + its number, as a shell reports it.
    pub fn signal(&self) -> Option<i32> {
        self.signal
    }

    /// Puts the place of the fault in front of the message.
    pub fn at(self, place: impl std::fmt::Display) -> Self {
        Self { message: format!("{place}: {}", self.message), ..self }
    }

    /// What to do, where that is known.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread says nothing: of several ranks one speaks.
pub(crate) fn quiet() -> bool {
    QUIET.get()
}

/// From now on this thread says nothing, or speaks again.
pub(crate) fn set_quiet(quiet: bool) {
    QUIET.set(quiet);
}

/// Writes a line to stderr, unless this thread is [`quiet`]. Unlike `eprintln!` it does not panic where nobody reads any more (`elapid train 2>&1 |
/// head`): a run does not end for that.
pub(crate) fn say(line: impl std::fmt::Display) {
    if !quiet() {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// The candidate most like `name`, where one is like it at all.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase().replace('_', "-");
    let likeness = |candidate: &str| strsim::jaro_winkler(&name, &candidate.to_lowercase());
    candidates
        .into_iter()
        .map(|candidate| (candidate, likeness(candidate)))
        .filter(|(_, score)| *score > 0.75)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(candidate, _)| candidate)
}
