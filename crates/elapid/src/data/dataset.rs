//! Packed datasets: the folder that Hugging Face `datasets` writes with `save_to_disk`.
//!
//! Arrow stream files, listed in `state.json`, with the columns `input_ids` and, optionally, `labels` and
//! `document_ids`; reading maps them into memory. Beside them Elapid keeps `dataset_card.json` and the tokenizer.

use std::cell::Cell;
use std::fs::{self, File};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Once};

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
    UInt64Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::DataType;
use elapid_tensor::IGNORE_LABEL;
use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

pub(super) const STATE: &str = "state.json";
pub(super) const CARD: &str = "dataset_card.json";
pub(super) const DICT: &str = "dataset_dict.json";
pub(super) const TOKENIZER: &str = "tokenizer";

/// Ends every Arrow stream: a continuation mark and the length 0 (Arrow's columnar format, "IPC Streaming Format").
pub(super) const END_OF_STREAM: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// Facts about a dataset, in `dataset_card.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// What `--tokenizer` said.
    pub tokenizer: String,
    /// SHA-256 of its `tokenizer.json`.
    #[serde(default)]
    pub tokenizer_sha256: Option<String>,
    /// Ids are below this.
    pub vocab_size: usize,
    /// End of text.
    pub eos_id: Option<u32>,
    /// L.
    pub seq_len: usize,
    /// Whether every document ends with `eos_id`.
    pub append_eos: bool,
    /// Whether there is a column `document_ids`.
    #[serde(default)]
    pub document_ids: bool,
    /// Documents read.
    pub documents: u64,
    /// Tokens in blocks.
    pub tokens: u64,
    /// Tokens after the last whole block.
    pub dropped_tokens: u64,
    /// UTF-8 bytes of the documents.
    pub bytes: u64,
    /// What `--dataset` said.
    pub source: String,
    /// What `--text-column` said.
    #[serde(default)]
    pub text_column: Option<String>,
    /// What `--split` said.
    #[serde(default)]
    pub source_split: Option<String>,
    /// Which split this is.
    #[serde(default)]
    pub split: Option<String>,
    /// What `--val-fraction` said.
    #[serde(default)]
    pub val_fraction: Option<f64>,
    /// What `--shuffle-seed` said.
    #[serde(default)]
    pub shuffle_seed: Option<u64>,
    /// Whether only the first documents were read.
    #[serde(default)]
    pub dryrun: bool,
}

impl Card {
    /// Tokens that a byte of the text became: (tokens in blocks + dropped ones) / bytes. All of the text counts, since
    /// `bytes` does; ends of text are tokens without bytes, so what a model spends on them is charged to the text.
    pub fn tokens_per_byte(&self) -> Option<f64> {
        (self.bytes > 0).then(|| (self.tokens + self.dropped_tokens) as f64 / self.bytes as f64)
    }
}

/// One block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// `[L]`.
    pub input_ids: Vec<i32>,
    /// `[L]`, as stored: the label of a position is its own token, shifting is up to whoever trains.
    pub labels: Vec<i32>,
    /// `[L]`, at least 0: where two neighbours differ, a document begins. None: the dataset does not say.
    pub documents: Option<Vec<i32>>,
}

impl Sample {
    /// Tokens that are their own labels, one document.
    pub fn new(ids: &[u32]) -> Self {
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        Self { labels: ids.clone(), input_ids: ids, documents: None }
    }
}

/// One record batch.
struct Rows {
    /// Place of its first row in the dataset.
    first: usize,
    count: usize,
    ids: ArrayRef,
    labels: Option<ArrayRef>,
    documents: Option<ArrayRef>,
}

/// A dataset, mapped into memory.
pub struct Dataset {
    dir: PathBuf,
    batches: Vec<Rows>,
    len: usize,
    seq_len: usize,
    card: Option<Card>,
    fingerprint: Option<String>,
    vocab_size: Option<usize>,
}

impl Dataset {
    /// Opens a dataset folder; of a `DatasetDict` its `train` split.
    ///
    /// # Errors
    /// No such folder, files missing or damaged, other columns, no rows, or rows of different lengths.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let dict = dir.join(DICT).exists();
        let dir = if dict { dir.join("train") } else { dir.to_owned() };
        let path = dir.join(STATE);
        if !path.exists() {
            let what = if dir.is_dir() { "holds no state.json" } else { "does not exist" };
            return Err(Error::new(format!("{} {what}", dir.display()))
                .with_hint("a dataset is a folder that `elapid tokenize` or Python's `save_to_disk` wrote"));
        }
        let state: Value = serde_json::from_str(&read(&path)?).map_err(|cause| {
            Error::new(format!("{}: {cause}", path.display())).with_hint("write the dataset again")
        })?;
        let files = state["_data_files"].as_array().map(Vec::as_slice).unwrap_or_default();
        let mut data = Self {
            card: read_card(&dir)?,
            fingerprint: state["_fingerprint"].as_str().map(str::to_owned),
            batches: Vec::new(),
            len: 0,
            seq_len: 0,
            vocab_size: None,
            dir: dir.clone(),
        };
        for file in files {
            let name = file["filename"].as_str().ok_or_else(|| {
                Error::new(format!("{}: a data file has no filename", path.display()))
                    .with_hint("write the dataset again")
            })?;
            data.read_file(&dir.join(name))?;
        }
        if let Some(card) = &data.card
            && card.tokens != (data.len * data.seq_len) as u64
        {
            return Err(Error::new(format!(
                "{} holds {} rows of {} tokens, but {CARD} says {} tokens",
                dir.display(),
                data.len,
                data.seq_len,
                card.tokens
            ))
            .with_hint("a file is cut off or from elsewhere; copy or write the dataset again"));
        }
        if data.len == 0 {
            return Err(Error::new(format!("{} holds no rows", dir.display()))
                .with_hint("tokenize more text, or with a shorter --seq-len"));
        }
        Ok(data)
    }

    fn read_file(&mut self, path: &Path) -> Result<(), Error> {
        let damaged = |what: String| {
            Error::new(format!("{}: {what}", path.display()))
                .with_hint("the file is damaged or incomplete; copy or write the dataset again")
        };
        let file = File::open(path).map_err(|cause| Error::io("open", path, &cause))?;
        // SAFETY: the mapping is only read. Another process that cuts the file off while it is mapped would end this
        // one with SIGBUS, as with every mapped file; datasets are written aside and renamed for that reason.
        let map = unsafe { Mmap::map(&file) }.map_err(|cause| Error::io("map", path, &cause))?;
        let map = Arc::new(map);
        let start = NonNull::new(map.as_ptr().cast_mut()).expect("a mapping is never at 0");
        // SAFETY: the pointer and length are those of the mapping, which the buffer keeps alive.
        let mut bytes = unsafe { Buffer::from_custom_allocation(start, map.len(), map.clone()) };
        let mut decoder = StreamDecoder::new();
        if !map.ends_with(END_OF_STREAM) {
            return Err(damaged("the end of the stream is missing".into()));
        }
        while !bytes.is_empty() {
            let batch = quietly(|| decoder.decode(&mut bytes))
                .map_err(|()| damaged("sizes and places in it contradict each other".into()))?;
            match batch.map_err(|cause| damaged(cause.to_string()))? {
                Some(batch) => self.add(path, &batch)?,
                None => break,
            }
        }
        decoder.finish().map_err(|cause| damaged(cause.to_string()))
    }

    fn add(&mut self, path: &Path, batch: &RecordBatch) -> Result<(), Error> {
        let column = |name: &str| batch.column_by_name(name).cloned();
        let names: Vec<_> = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
        let ids = column("input_ids").ok_or_else(|| {
            Error::new(format!("{} has the columns {names:?}, but no `input_ids`", path.display())).with_hint(
                "a packed dataset has the columns input_ids and, optionally, labels and document_ids",
            )
        })?;
        let (labels, documents) = (column("labels"), column("document_ids"));
        if self.batches.first().is_some_and(|b| b.documents.is_some() != documents.is_some()) {
            return Err(Error::new(format!(
                "{} has the columns {names:?}; of document_ids the files before it say otherwise",
                path.display()
            ))
            .with_hint("all files of a dataset have the same columns; write the dataset again"));
        }
        for column in [Some(&ids), labels.as_ref(), documents.as_ref()].into_iter().flatten() {
            check_type(column.data_type()).map_err(|e| e.at(path.display()))?;
            for row in 0..batch.num_rows() {
                let items = list_row(column, row);
                if items.null_count() > 0 {
                    let row = self.len + row;
                    return Err(Error::new(format!("{}: row {row} holds a null", path.display()))
                        .with_hint("every item is a token id, or in labels -100 where it does not count"));
                }
                let length = items.len();
                if self.len + row == 0 && self.seq_len == 0 {
                    self.seq_len = length;
                }
                if length != self.seq_len || length == 0 {
                    let row = self.len + row;
                    return Err(Error::new(format!(
                        "{}: row {row} has {length} tokens, row 0 has {}",
                        path.display(),
                        self.seq_len
                    ))
                    .with_hint("all rows must be blocks of one length; `elapid tokenize` packs them so"));
                }
            }
        }
        if batch.num_rows() > 0 {
            self.batches.push(Rows { first: self.len, count: batch.num_rows(), ids, labels, documents });
            self.len += batch.num_rows();
        }
        Ok(())
    }

    /// Number of blocks; never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// L.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// What is known of the dataset, where Elapid wrote it.
    pub fn card(&self) -> Option<&Card> {
        self.card.as_ref()
    }

    /// What changes with its content, where whoever wrote it said so.
    pub fn fingerprint(&self) -> Option<&str> {
        self.fingerprint.as_deref()
    }

    /// The folder of its tokenizer, where it has one.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        Some(self.dir.join(TOKENIZER)).filter(|dir| dir.is_dir())
    }

    /// Checks that all tokens and labels are below `vocab_size`: at once where the dataset does not say so itself,
    /// and in any case as samples are read.
    ///
    /// # Errors
    /// Names the row, the position and the id.
    pub fn check_vocab(&mut self, vocab_size: usize) -> Result<(), Error> {
        self.vocab_size = Some(vocab_size);
        if self.card.as_ref().is_some_and(|card| card.vocab_size <= vocab_size) {
            return Ok(());
        }
        (0..self.len).into_par_iter().try_for_each(|row| self.sample(row).map(|_| ()))
    }

    /// The record batch of block `index`, and its row there.
    fn place(&self, index: usize) -> (&Rows, usize) {
        assert!(index < self.len, "row {index} of {}", self.len);
        let batch = &self.batches[self.batches.partition_point(|b| b.first + b.count <= index)];
        (batch, index - batch.first)
    }

    /// Block `index`.
    ///
    /// # Errors
    /// A token outside of the vocabulary that [`Self::check_vocab`] was told; a document id below 0.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn sample(&self, index: usize) -> Result<Sample, Error> {
        let (batch, row) = self.place(index);
        let limit = self.vocab_size.map_or(i64::from(i32::MAX), |v| v as i64);
        let bad = |what: &str, position: usize, id: i64| {
            Error::new(format!(
                "{}: row {index} has {what} {id} at position {position}, but the vocabulary has {limit} tokens",
                self.dir.display()
            ))
            .with_hint("give the model a larger --vocab-size, or tokenize with the model's own tokenizer")
        };
        let input_ids = values(&list_row(&batch.ids, row), |id| (0..limit).contains(&id))
            .map_err(|(position, id)| bad("token", position, id))?;
        let counts = |id: i64| (0..limit).contains(&id) || id == i64::from(IGNORE_LABEL);
        let labels = match &batch.labels {
            None => input_ids.clone(),
            Some(labels) => {
                values(&list_row(labels, row), counts).map_err(|(position, id)| bad("label", position, id))?
            }
        };
        Ok(Sample { input_ids, labels, documents: self.documents(index)? })
    }

    /// The documents of block `index`, where the dataset knows them.
    fn documents(&self, index: usize) -> Result<Option<Vec<i32>>, Error> {
        let (batch, row) = self.place(index);
        let read = |column| {
            values(&list_row(column, row), |id| (0..=i64::from(i32::MAX)).contains(&id)).map_err(
                |(position, id)| {
                    Error::new(format!(
                        "{}: row {index} has document id {id} at position {position}",
                        self.dir.display()
                    ))
                    .with_hint("document ids are 0 or more and below 2^31")
                },
            )
        };
        batch.documents.as_ref().map(read).transpose()
    }

    /// Does block `index` go on in the document that ended the block before it? Where the dataset knows no
    /// documents, all of it is one.
    ///
    /// # Errors
    /// A document id below 0.
    ///
    /// # Panics
    /// As [`Self::sample`].
    pub fn continues(&self, index: usize) -> Result<bool, Error> {
        if index == 0 {
            return Ok(false);
        }
        let (before, here) = (self.documents(index - 1)?, self.documents(index)?);
        Ok(before.as_ref().and_then(|ids| ids.last()) == here.as_ref().and_then(|ids| ids.first()))
    }

    /// Whether the blocks know their documents.
    pub fn knows_documents(&self) -> bool {
        self.batches.first().is_some_and(|batch| batch.documents.is_some())
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `decode`, with () for a panic in it, of which nothing is printed. `arrow-ipc` (60.1) takes the places of buffers
/// from the file without a check and panics where they lie outside of it.
pub(super) fn quietly<T>(decode: impl FnOnce() -> T) -> Result<T, ()> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    // What `decode` had in hand is given up with it: the caller ends with an error.
    let result = panic::catch_unwind(AssertUnwindSafe(decode));
    QUIET.set(false);
    result.map_err(|_| ())
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))
}

fn read_card(dir: &Path) -> Result<Option<Card>, Error> {
    let path = dir.join(CARD);
    if !path.exists() {
        return Ok(None);
    }
    serde_json::from_str(&read(&path)?).map(Some).map_err(|cause| {
        Error::new(format!("{}: {cause}", path.display()))
            .with_hint("without that file the dataset is read all the same")
    })
}

/// The list types of Arrow with integers in them; nulls never.
fn check_type(data_type: &DataType) -> Result<(), Error> {
    let item = match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            item.data_type()
        }
        other => other,
    };
    if item == data_type || !item.is_integer() {
        return Err(Error::new(format!("a column of {data_type} where lists of integers are needed"))
            .with_hint("columns input_ids, labels and document_ids hold lists of integers"));
    }
    Ok(())
}

/// The items of one row; an empty list for a null.
fn list_row(column: &ArrayRef, row: usize) -> ArrayRef {
    match column.data_type() {
        DataType::List(_) => column.as_list::<i32>().value(row),
        DataType::LargeList(_) => column.as_list::<i64>().value(row),
        _ => column.as_fixed_size_list().value(row),
    }
}

/// The items as i32; (position, value) of the first that `good` refuses.
fn values(items: &ArrayRef, good: impl Fn(i64) -> bool) -> Result<Vec<i32>, (usize, i64)> {
    fn convert<T: ArrowPrimitiveType>(
        items: &ArrayRef,
        good: impl Fn(i64) -> bool,
    ) -> Result<Vec<i32>, (usize, i64)>
    where
        T::Native: TryInto<i64>,
    {
        let items = items.as_primitive::<T>().values().iter().enumerate();
        items
            .map(|(position, &item)| {
                let id = item.try_into().unwrap_or(i64::MAX);
                if good(id) { Ok(id as i32) } else { Err((position, id)) }
            })
            .collect()
    }
    match items.data_type() {
        DataType::Int8 => convert::<Int8Type>(items, good),
        DataType::Int16 => convert::<Int16Type>(items, good),
        DataType::Int32 => convert::<Int32Type>(items, good),
        DataType::Int64 => convert::<Int64Type>(items, good),
        DataType::UInt8 => convert::<UInt8Type>(items, good),
        DataType::UInt16 => convert::<UInt16Type>(items, good),
        DataType::UInt32 => convert::<UInt32Type>(items, good),
        _ => convert::<UInt64Type>(items, good),
    }
}
