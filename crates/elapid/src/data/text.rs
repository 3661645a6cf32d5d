//! Documents from text files, JSON lines, and folders of both.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::Error;

/// Bytes of a file that are looked at before it is read whole: enough to tell pictures and programs from text.
const HEAD: usize = 8192;

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text.
    pub text: String,
    /// Bytes of input that were read for it, files skipped on the way included.
    pub input_bytes: u64,
}

/// Documents in the order of their files, and of the lines in a file. Holds one at a time.
#[derive(Debug)]
pub struct Documents {
    files: std::vec::IntoIter<PathBuf>,
    lines: Option<Lines>,
    text_column: String,
    /// Files came from a folder: what is not text is passed over.
    skip: bool,
    skipped: u64,
    skipped_bytes: u64,
    input_bytes: u64,
}

/// The documents of `path`.
///
/// A file is one document; a `.jsonl` file holds one a line, in the field `text_column`. Of a folder, these are all
/// files below it, sorted by path, without hidden ones, folders named `target`, symbolic links and files that are not
/// UTF-8 text.
///
/// # Errors
/// When `path` or a folder below it cannot be read, or a folder holds no file. The iterator yields an error, and then
/// ends, at a file that cannot be read, a named file that is not UTF-8, and a line of a `.jsonl` file that is not a
/// JSON object with that field as a string.
pub fn documents(path: &Path, text_column: &str) -> Result<Documents, Error> {
    let meta = fs::metadata(path).map_err(|cause| {
        Error::io("read", path, &cause)
            .with_hint("--dataset is a text file, a .jsonl file, or a folder of them")
    })?;
    let (files, input_bytes) = if meta.is_dir() { walk(path)? } else { (vec![path.to_owned()], meta.len()) };
    if files.is_empty() {
        return Err(Error::new(format!("{} holds no file to read", path.display())).with_hint(
            "hidden files and folders, folders named `target` and symbolic links are passed over",
        ));
    }
    Ok(Documents {
        files: files.into_iter(),
        lines: None,
        text_column: text_column.to_owned(),
        skip: meta.is_dir(),
        skipped: 0,
        skipped_bytes: 0,
        input_bytes,
    })
}

impl Documents {
    /// Size of all files, skipped ones included.
    pub fn input_bytes(&self) -> u64 {
        self.input_bytes
    }

    /// Files passed over so far because they are not UTF-8 text.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn advance(&mut self) -> Result<Option<Document>, Error> {
        loop {
            if let Some(lines) = &mut self.lines {
                if let Some(document) = lines.advance(&self.text_column)? {
                    return Ok(Some(document));
                }
                self.lines = None;
            }
            let Some(path) = self.files.next() else { return Ok(None) };
            let file = File::open(&path).map_err(|e| Error::io("read", &path, &e))?;
            if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl")) {
                self.lines = Some(Lines { path, reader: BufReader::new(file), line: Vec::new(), number: 0 });
                continue;
            }
            let (text, size) = read_text(file, self.skip).map_err(|e| Error::io("read", &path, &e))?;
            match text {
                Some(text) => {
                    let input_bytes = size + std::mem::take(&mut self.skipped_bytes);
                    return Ok(Some(Document { text, input_bytes }));
                }
                None if self.skip => {
                    self.skipped += 1;
                    self.skipped_bytes += size;
                }
                None => {
                    return Err(Error::new(format!("{} is not UTF-8 text", path.display()))
                        .with_hint("convert it to UTF-8, or unpack it where it is compressed"));
                }
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.lines = None;
            self.files = Vec::new().into_iter();
        }
        next.transpose()
    }
}

/// The text of a file, None where it is not UTF-8, and its size in bytes. With `skip`, a NUL near the start is not
/// text either, and the rest of such a file is left unread.
fn read_text(mut file: File, skip: bool) -> std::io::Result<(Option<String>, u64)> {
    let size = file.metadata()?.len();
    let mut bytes = Vec::with_capacity(size as usize);
    if skip {
        (&mut file).take(HEAD as u64).read_to_end(&mut bytes)?;
        if bytes.contains(&0) {
            return Ok((None, size));
        }
    }
    file.read_to_end(&mut bytes)?;
    Ok((String::from_utf8(bytes).ok(), size))
}

/// A `.jsonl` file.
#[derive(Debug)]
struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: Vec<u8>,
    number: u64,
}

impl Lines {
    /// The document of the next line that is not blank.
    fn advance(&mut self, text_column: &str) -> Result<Option<Document>, Error> {
        let mut input_bytes = 0;
        loop {
            self.line.clear();
            let n = self
                .reader
                .read_until(b'\n', &mut self.line)
                .map_err(|e| Error::io("read", &self.path, &e))?;
            if n == 0 {
                return Ok(None);
            }
            self.number += 1;
            input_bytes += n as u64;
            if !self.line.trim_ascii().is_empty() {
                let text = text_of(&self.line, text_column)
                    .map_err(|e| e.at(format_args!("{}:{}", self.path.display(), self.number)))?;
                return Ok(Some(Document { text, input_bytes }));
            }
        }
    }
}

/// The string in the field `text_column` of a JSON object.
fn text_of(line: &[u8], text_column: &str) -> Result<String, Error> {
    let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(|cause| {
        Error::new(format!("not a JSON object: {cause}"))
            .with_hint("a .jsonl file holds one JSON object a line, in UTF-8")
    })?;
    match object.remove(text_column) {
        Some(Value::String(text)) => Ok(text),
        Some(value) => Err(Error::new(format!("the field {text_column:?} is not a string: {value:.60}"))
            .with_hint("choose the field that holds the text with --text-column")),
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            Err(Error::new(format!("there is no field {text_column:?}"))
                .with_hint(format!("choose one with --text-column; the line has: {}", names.join(", "))))
        }
    }
}

/// The files below `root` in the order of their paths, and their size in bytes.
fn walk(root: &Path) -> Result<(Vec<PathBuf>, u64), Error> {
    let (mut files, mut bytes, mut folders) = (Vec::new(), 0, vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        let failed = |cause: std::io::Error| Error::io("read", &folder, &cause);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            // Neither follows a symbolic link.
            let meta = match entry.metadata() {
                Err(cause) if cause.kind() == ErrorKind::NotFound => continue,
                meta => meta.map_err(failed)?,
            };
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            } else if meta.is_dir() && name != "target" {
                folders.push(entry.path());
            } else if meta.is_file() {
                bytes += meta.len();
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok((files, bytes))
}
