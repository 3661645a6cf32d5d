//! Which files a source is made of, and the walk through them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::parquet::Parquet;
use super::tables::{Arrow, Csv};
use super::text::{Json, Lines, Text};
use super::{Compression, Format, Part, Place, README, Rows, Wanted};
use crate::Error;
use crate::data::dataset::{DICT, STATE};
use crate::data::hub;

/// How a source is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// Column, or field of a JSON object, that holds the text.
    pub text_column: String,
    /// Which split of a dataset that has several; None: `train`, of a folder of files all of them.
    pub split: Option<String>,
    /// Which configuration of a dataset on the Hub, or of a folder laid out like one, that has several.
    pub config: Option<String>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { text_column: "text".into(), split: None, config: None }
    }
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Input {
    path: PathBuf,
    format: Format,
    compression: Compression,
    bytes: u64,
    /// When it was last written, in nanoseconds since 1970.
    modified: u128,
    /// Came from a folder: passed over where it is not text.
    choosy: bool,
}

/// Files in the order in which they are read.
#[derive(Clone, Debug)]
pub struct Source {
    files: Vec<Input>,
    text_column: String,
}

impl Source {
    /// The documents of `path`: a file, a folder, a glob, or a dataset folder that Python's `save_to_disk` wrote.
    ///
    /// What a file holds its name says: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`, each but the last two
    /// also as `.gz` or `.zst`; any other file is one document of text. Of a folder, these are all files below it,
    /// sorted by path, without hidden ones, folders named `target`, symbolic links and files that are not UTF-8 text;
    /// where there are Parquet or Arrow files among them, only those; where a split or a configuration is asked for, those
    /// that are its by the head of README.md or by their names, as on the Hub. What does not exist and could be a name is looked
    /// for on the Hugging Face Hub and downloaded.
    ///
    /// # Errors
    /// `path` or a folder below it cannot be read, or there is no file; it has no such split or configuration; those of a
    /// download.
    pub fn open(path: &Path, options: &SourceOptions) -> Result<Self, Error> {
        let spec = path.to_string_lossy();
        let hint =
            "--dataset is a file, a folder or a glob of text, .jsonl, .json, .csv, .parquet or .arrow files";
        let alone = |what: &str| match (&options.config, &options.split) {
            (Some(config), _) => Err(Error::new(format!(
                "{spec} is {what}: it has no configuration {config:?}"
            ))
            .with_hint(
                "leave --dataset-config out: it is for datasets of the Hub, and folders laid out like one",
            )),
            // As in Python, all of it is the split `train`.
            (None, Some(split)) if split != "train" => {
                Err(Error::new(format!("{spec} is {what}: it has no split {split:?}"))
                    .with_hint("leave --split out, or give the files of that split alone"))
            }
            (None, _) => Ok(()),
        };
        let wanted = Wanted { config: options.config.as_deref(), split: options.split.as_deref() };
        let files = if path.is_dir() && (path.join(STATE).exists() || path.join(DICT).exists()) {
            saved(path, wanted)?
        } else if path.is_dir() {
            let files = walk(path, &options.text_column)?;
            if wanted.config.is_some() || wanted.split.is_some() {
                chosen(path, files, wanted)?
            } else {
                files
            }
        } else if !path.exists() && spec.contains(['*', '?', '[']) {
            alone("a glob")?;
            globbed(&spec)?
        } else if !path.exists() && hub::is_name(&spec) {
            let files = hub::dataset(&spec, options.config.as_deref(), options.split.as_deref())?;
            return Self::of_files(&files, options);
        } else {
            let file =
                Input::new(path, false).map_err(|cause| Error::io("read", path, &cause).with_hint(hint))?;
            alone("a single file")?;
            vec![file]
        };
        Self::of_inputs(files, options).ok_or_else(|| {
            Error::new(format!("{spec} holds no file to read")).with_hint(
                "hidden files and folders, folders named `target` and symbolic links are passed over",
            )
        })
    }

    /// Files in this order, each of them wanted.
    fn of_files(paths: &[PathBuf], options: &SourceOptions) -> Result<Self, Error> {
        let input = |path: &PathBuf| Input::new(path, false).map_err(|cause| Error::io("read", path, &cause));
        let files = paths.iter().map(input).collect::<Result<_, _>>()?;
        Self::of_inputs(files, options).ok_or_else(|| Error::new("there is no file to read"))
    }

    fn of_inputs(files: Vec<Input>, options: &SourceOptions) -> Option<Self> {
        (!files.is_empty()).then(|| Self { files, text_column: options.text_column.clone() })
    }

    /// Number of files.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Size of all files, those that will be passed over included.
    pub fn input_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// What changes where a file is changed, added or taken away.
    pub fn identity(&self) -> Value {
        serde_json::to_value(&self.files).expect("plain data")
    }

    /// Puts the files into another order.
    pub(crate) fn reorder(&mut self, order: impl Fn(usize) -> usize) {
        self.files = (0..self.files.len()).map(|i| self.files[order(i)].clone()).collect();
    }

    /// The documents from file number `first` on, in order.
    pub fn documents(&self, first: usize) -> Documents<'_> {
        let before = self.files[..first.min(self.files.len())].iter().map(|file| file.bytes).sum();
        Documents { source: self, next: first, rows: None, ended: false, skipped: 0, given: before, before }
    }
}

impl Input {
    fn new(path: &Path, choosy: bool) -> std::io::Result<Self> {
        let metadata = fs::metadata(path)?;
        let (format, compression) = Format::of(path);
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Ok(Self { path: path.to_owned(), format, compression, bytes: metadata.len(), modified, choosy })
    }

    fn place(&self, text_column: &str) -> Place {
        Place { path: self.path.clone(), compression: self.compression, column: text_column.to_owned() }
    }

    /// Its documents; None where it is passed over.
    fn open(&self, text_column: &str) -> Result<Option<Box<dyn Rows>>, Error> {
        let place = self.place(text_column);
        Ok(Some(match self.format {
            Format::Text => return Ok(Text::open(place, self.choosy)?.map(|rows| Box::new(rows) as _)),
            Format::Lines => Box::new(Lines::open(place)?),
            Format::Json => Box::new(Json::open(place)?),
            Format::Csv(delimiter) => Box::new(Csv::open(place, delimiter)?),
            Format::Parquet if self.compression == Compression::None => {
                Box::new(Parquet::open(&self.path, text_column)?)
            }
            Format::Parquet => {
                return Err(Error::new(format!("{} is compressed as a whole", self.path.display()))
                    .with_hint("a Parquet file is compressed inside; unpack it first"));
            }
            Format::Arrow => Box::new(Arrow::open(place)?),
        }))
    }
}

/// The documents of a source. Holds one at a time, or a part of a long one.
pub struct Documents<'a> {
    source: &'a Source,
    next: usize,
    rows: Option<Box<dyn Rows>>,
    ended: bool,
    skipped: u64,
    /// Bytes of input that the parts so far were read from; and those of the files before this one.
    given: u64,
    before: u64,
}

impl Documents<'_> {
    /// Files passed over so far because they are not UTF-8 text.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn advance(&mut self) -> Result<Option<Part>, Error> {
        loop {
            if let Some(rows) = &mut self.rows {
                if let Some((text, last)) = rows.advance()? {
                    let read = self.before + rows.position();
                    let input_bytes = read.saturating_sub(self.given);
                    self.given += input_bytes;
                    return Ok(Some(Part { text, last, input_bytes, file: self.next - 1 }));
                }
                self.rows = None;
                self.before += self.source.files[self.next - 1].bytes;
            }
            let Some(file) = self.source.files.get(self.next) else { return Ok(None) };
            self.next += 1;
            self.rows = file.open(&self.source.text_column)?;
            if self.rows.is_none() {
                self.skipped += 1;
                self.before += file.bytes;
            }
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Part, Error>;

    /// An error is the last item.
    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.advance().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

/// The files below `root` in the order of their paths.
fn walk(root: &Path, text_column: &str) -> Result<Vec<Input>, Error> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_owned()]);
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
                files.push(Input::new(&entry.path(), true).map_err(failed)?);
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let binary = |file: &Input| matches!(file.format, Format::Parquet | Format::Arrow);
    if files.iter().any(binary) {
        files.retain(binary);
    }
    for file in files.iter_mut().filter(|file| file.format == Format::Json) {
        if !Json::is_table(file.place(text_column)) {
            file.format = Format::Text;
        }
    }
    Ok(files)
}

/// Those of the files below `root` that belong to a split and a configuration.
fn chosen(root: &Path, files: Vec<Input>, wanted: Wanted) -> Result<Vec<Input>, Error> {
    let relative = |file: &Input| {
        let parts = file.path.strip_prefix(root).unwrap_or(&file.path).components();
        parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
    };
    // It says which is which, or there is none.
    let readme = fs::read_to_string(root.join(README)).unwrap_or_default();
    let paths: Vec<String> = files.iter().map(relative).collect();
    let chosen = wanted.among(&paths, &readme).map_err(|error| error.at(root.display()))?;
    Ok(files.into_iter().filter(|file| chosen.contains(&relative(file))).collect())
}

fn globbed(pattern: &str) -> Result<Vec<Input>, Error> {
    let paths = glob::glob(pattern).map_err(|cause| {
        Error::new(format!("{pattern:?} is no glob: {cause}"))
            .with_hint("such as 'data/**/*.jsonl.gz', in quotes")
    })?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|cause| Error::io("read", cause.path(), cause.error()))?;
        if path.is_file() {
            files.push(Input::new(&path, false).map_err(|cause| Error::io("read", &path, &cause))?);
        }
    }
    if files.is_empty() {
        return Err(Error::new(format!("no file matches {pattern:?}"))
            .with_hint("`**` stands for folders, `*` and `?` for parts of a name"));
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// The files of a dataset folder that Python saved; of a `DatasetDict`, those of one split.
fn saved(dir: &Path, wanted: Wanted) -> Result<Vec<Input>, Error> {
    let json = |path: &Path| -> Result<Value, Error> {
        let text = fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))?;
        serde_json::from_str(&text).map_err(|cause| {
            Error::new(format!("{}: {cause}", path.display())).with_hint("write the dataset again")
        })
    };
    let lacks =
        |what: String, hint: String| Error::new(format!("{} has no {what}", dir.display())).with_hint(hint);
    if let Some(config) = wanted.config {
        let hint = "leave --dataset-config out: what `save_to_disk` wrote is one configuration";
        return Err(lacks(format!("configuration {config:?}"), hint.into()));
    }
    let mut folder = dir.to_owned();
    if dir.join(DICT).exists() {
        let splits = json(&dir.join(DICT))?;
        let splits: Vec<&str> =
            splits["splits"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let split = wanted.split.unwrap_or("train");
        if !splits.contains(&split) {
            let hint = format!("choose one with --split; there are: {}", splits.join(", "));
            return Err(lacks(format!("split {split:?}"), hint));
        }
        folder.push(split);
    }
    let path = folder.join(STATE);
    let state = json(&path)?;
    // A single split may know its name.
    let name = state["_split"].as_str().unwrap_or("train");
    if let Some(split) = wanted.split.filter(|split| folder == dir && *split != name) {
        return Err(lacks(format!("split {split:?}"), format!("leave --split out; it is the split {name}")));
    }
    let dir = folder;
    let names = state["_data_files"].as_array().into_iter().flatten().map(|file| file["filename"].as_str());
    names
        .map(|name| {
            let file = dir.join(name.ok_or_else(|| {
                Error::new(format!("{}: a data file has no filename", path.display()))
                    .with_hint("write the dataset again")
            })?);
            Input::new(&file, false).map_err(|cause| Error::io("read", &file, &cause))
        })
        .collect()
}

#[cfg(test)]
mod tests;
