//! Where text comes from: files, folders and globs of many formats, and datasets that Python saved.

mod files;
mod packed;
mod parquet;
mod splits;
mod tables;
mod text;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::Error;
pub use files::{Documents, Source, SourceOptions};
pub(super) use splits::{README, Wanted};

/// Text of a document, or a part of one where documents are long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The text.
    pub text: String,
    /// The document ends with it.
    pub last: bool,
    /// Bytes of input that were read for it, files passed over on the way included.
    pub input_bytes: u64,
    /// The file that it is from, by its number in the source.
    pub file: usize,
}

/// What a file holds, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// One document.
    Text,
    /// JSON objects, one a line.
    Lines,
    /// JSON objects, in an array or one after the other.
    Json,
    /// A table with a line of names; fields end at this byte.
    Csv(u8),
    /// Apache Parquet.
    Parquet,
    /// Arrow, as a stream or as a file.
    Arrow,
}

/// What a file is compressed with, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Format {
    /// Format and compression that a file's name stands for. What is no table is text.
    pub(crate) fn of(path: &Path) -> (Self, Compression) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let (name, compression) = if let Some(name) = name.strip_suffix(".gz") {
            (name, Compression::Gzip)
        } else if let Some(name) = name.strip_suffix(".zst") {
            (name, Compression::Zstd)
        } else {
            (&name[..], Compression::None)
        };
        let format = match name.rsplit_once('.').map_or("", |(_, extension)| extension) {
            "jsonl" | "ndjson" => Self::Lines,
            "json" => Self::Json,
            "csv" => Self::Csv(b','),
            "tsv" => Self::Csv(b'\t'),
            "parquet" => Self::Parquet,
            "arrow" => Self::Arrow,
            _ => Self::Text,
        };
        (format, compression)
    }
}

/// The documents of one file, from first to last.
trait Rows: Send {
    /// The next text, and whether its document ends with it.
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error>;

    /// Bytes of the file that have been read.
    fn position(&self) -> u64;
}

/// Counts the bytes that are read through it.
struct Counted<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// A file, decompressed, and the count of the bytes read of it as it lies on disk.
fn open(path: &Path, compression: Compression) -> Result<(Box<dyn Read + Send>, Arc<AtomicU64>), Error> {
    let file = File::open(path).map_err(|cause| Error::io("read", path, &cause))?;
    let count = Arc::new(AtomicU64::new(0));
    let file = Counted { inner: file, count: count.clone() };
    Ok((packed::decompress(file, compression), count))
}

/// That a file cannot be read on; what is compressed may be cut off.
fn unreadable(path: &Path, compression: Compression, cause: &std::io::Error) -> Error {
    if compression == Compression::None {
        return Error::io("read", path, cause);
    }
    Error::new(format!("cannot decompress {}: {cause}", path.display()))
        .with_hint("the file is damaged or incomplete; copy or download it again")
}

/// That a table lacks the column that was asked for.
fn no_column(place: impl std::fmt::Display, what: &str, column: &str, names: &[impl AsRef<str>]) -> Error {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Error::new(format!("{place}: there is no {what} {column:?}"))
        .with_hint(format!("choose one with --text-column; there are: {there}"))
}

/// Where a file is read whole and in order: `(path, column)`.
struct Place {
    path: PathBuf,
    compression: Compression,
    column: String,
}
