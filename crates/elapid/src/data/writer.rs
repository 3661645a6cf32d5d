//! Writing packed datasets: Arrow shards and what `datasets` wants beside them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int32Array, Int64Array, ListArray, RecordBatch, UInt16Array};
use arrow_buffer::OffsetBuffer;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::aside::{Aside, write_json};
use super::dataset::{CARD, Card, STATE};
use crate::Error;
use crate::disk;

const INFO: &str = "dataset_info.json";

/// Rows of one record batch, as in Python's `datasets`, and its most tokens.
const BATCH_ROWS: usize = 1000;
const BATCH_TOKENS: usize = 4 << 20;

/// Size of a shard unless another is asked for, as in Python's `datasets`.
pub const MAX_SHARD_SIZE: u64 = 500_000_000;

/// What token ids are written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum IdType {
    /// The smallest of the others that holds the vocabulary.
    #[default]
    Smallest,
    /// Up to 65,536 tokens.
    Uint16,
    /// What Python's `datasets` makes of a column called `input_ids`.
    Int32,
    /// What torch takes as an index and as a label.
    Int64,
}

impl IdType {
    /// The type for ids below `vocab_size`.
    ///
    /// # Errors
    /// They do not fit.
    pub(super) fn resolve(self, vocab_size: usize) -> Result<Self, Error> {
        match self {
            Self::Smallest if vocab_size <= 1 << 16 => Ok(Self::Uint16),
            Self::Smallest => Ok(Self::Int32),
            Self::Uint16 if vocab_size > 1 << 16 => Err(Error::new(format!(
                "--id-type uint16 holds 65536 tokens, but the tokenizer has {vocab_size}"
            ))
            .with_hint("leave --id-type out")),
            other => Ok(other),
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::Uint16 => 2,
            Self::Smallest | Self::Int32 => 4,
            Self::Int64 => 8,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Uint16 => "uint16",
            Self::Smallest | Self::Int32 => "int32",
            Self::Int64 => "int64",
        }
    }

    fn arrow(self) -> DataType {
        match self {
            Self::Uint16 => DataType::UInt16,
            Self::Smallest | Self::Int32 => DataType::Int32,
            Self::Int64 => DataType::Int64,
        }
    }

    fn array(self, ids: Vec<u32>) -> ArrayRef {
        match self {
            Self::Uint16 => Arc::new(UInt16Array::from_iter_values(ids.into_iter().map(|id| id as u16))),
            Self::Smallest | Self::Int32 => {
                Arc::new(Int32Array::from_iter_values(ids.into_iter().map(|id| id as i32)))
            }
            Self::Int64 => Arc::new(Int64Array::from_iter_values(ids.into_iter().map(i64::from))),
        }
    }
}

/// What the rows of a dataset are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rows {
    /// L.
    pub(super) seq_len: usize,
    /// Type of `input_ids` and `labels`.
    pub(super) ids: IdType,
    /// Whether there is a column `document_ids`.
    pub(super) documents: bool,
    /// Rows of a shard.
    pub(super) shard: u64,
}

impl Rows {
    /// With shards of at most `max_shard_size` bytes, but a row at least.
    pub(super) fn new(seq_len: usize, ids: IdType, documents: bool, max_shard_size: u64) -> Self {
        let row = seq_len as u64 * (2 * ids.bytes() + if documents { 4 } else { 0 });
        Self { seq_len, ids, documents, shard: (max_shard_size / row).max(1) }
    }

    fn columns(&self) -> impl Iterator<Item = (&'static str, IdType)> {
        let documents = self.documents.then_some(("document_ids", IdType::Int32));
        [("input_ids", self.ids), ("labels", self.ids)].into_iter().chain(documents)
    }

    fn features(&self) -> Value {
        let column = |(name, ids): (&str, IdType)| {
            let column = json!({ "feature": { "dtype": ids.name(), "_type": "Value" }, "_type": "List" });
            (name.to_owned(), column)
        };
        self.columns().map(column).collect::<serde_json::Map<_, _>>().into()
    }

    fn schema(&self) -> Schema {
        let column =
            |(name, ids): (_, IdType)| Field::new_list(name, Field::new("item", ids.arrow(), true), true);
        let metadata = json!({ "info": { "features": self.features() } }).to_string();
        Schema::new(self.columns().map(column).collect::<Vec<_>>())
            .with_metadata(HashMap::from([("huggingface".to_owned(), metadata)]))
    }
}

/// Shards that are on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shards {
    /// Bytes of each.
    bytes: Vec<u64>,
    /// Their rows.
    pub(super) rows: u64,
    /// FNV-1a over the tokens: the fingerprint that `datasets` caches by.
    hash: u64,
}

impl Shards {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.bytes.len()
    }
}

impl Default for Shards {
    fn default() -> Self {
        Self { bytes: Vec::new(), rows: 0, hash: 0xcbf2_9ce4_8422_2325 }
    }
}

/// One split being written, shard by shard.
pub(super) struct ShardWriter {
    dir: PathBuf,
    rows: Rows,
    schema: Arc<Schema>,
    out: Option<StreamWriter<BufWriter<File>>>,
    ids: Vec<u32>,
    /// Documents of `ids`, where there is a column for them.
    documents: Vec<i32>,
    /// Rows in the shard at hand.
    filled: u64,
    shards: Shards,
}

impl ShardWriter {
    /// Goes on after `shards` in `dir`, which is made where it is missing.
    ///
    /// # Errors
    /// A shard is missing or has another size; `dir` cannot be written.
    pub(super) fn open(dir: &Path, rows: Rows, shards: Shards) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(|cause| Error::io("create", dir, &cause))?;
        let schema = Arc::new(rows.schema());
        let writer = Self {
            dir: dir.to_owned(),
            rows,
            schema,
            out: None,
            ids: Vec::new(),
            documents: Vec::new(),
            filled: 0,
            shards,
        };
        for (i, &bytes) in writer.shards.bytes.iter().enumerate() {
            let path = writer.path(i);
            let length =
                fs::metadata(&path).or_else(|_| fs::metadata(writer.final_path(i))).map(|meta| meta.len());
            if length.as_ref().ok() != Some(&bytes) {
                return Err(Error::new(format!("{} is not as it was written", path.display()))
                    .with_hint("remove the hidden folder that it lies in, and begin anew"));
            }
        }
        Ok(writer)
    }

    fn path(&self, shard: usize) -> PathBuf {
        self.dir.join(format!("data-{shard:05}.arrow"))
    }

    /// Its name says how many there are, so it gets it at the end.
    fn final_path(&self, shard: usize) -> PathBuf {
        self.dir.join(format!("data-{shard:05}-of-{:05}.arrow", self.shards.count()))
    }

    /// Adds one block of L ids; its labels are the ids. `documents` `[L]` is looked at where there is a column for it.
    /// True where a shard is on disk with it.
    ///
    /// # Errors
    /// The disk is full or gone.
    pub(super) fn push(&mut self, ids: &[u32], documents: &[i32]) -> Result<bool, Error> {
        if self.out.is_none() {
            let path = self.path(self.shards.count());
            let file = File::create(&path).map_err(|cause| Error::io("create", &path, &cause))?;
            let out = StreamWriter::try_new(BufWriter::with_capacity(1 << 18, file), &self.schema);
            self.out = Some(out.map_err(|cause| self.failed(&cause))?);
        }
        let add = |hash: u64, id: u64| (hash ^ id).wrapping_mul(0x0100_0000_01b3);
        if self.rows.documents {
            self.shards.hash = documents.iter().fold(self.shards.hash, |hash, &id| add(hash, id as u64));
            self.documents.extend_from_slice(documents);
        }
        self.shards.hash = ids.iter().fold(self.shards.hash, |hash, &id| add(hash, id.into()));
        self.ids.extend_from_slice(ids);
        self.filled += 1;
        self.shards.rows += 1;
        let rows = (BATCH_TOKENS / self.rows.seq_len).clamp(1, BATCH_ROWS);
        if self.ids.len() >= rows * self.rows.seq_len {
            self.flush()?;
        }
        if self.filled == self.rows.shard {
            self.end_shard()?;
            return Ok(true);
        }
        Ok(false)
    }

    /// What is on disk, where a shard has just ended.
    pub(super) fn shards(&self) -> &Shards {
        &self.shards
    }

    fn flush(&mut self) -> Result<(), Error> {
        let rows = self.ids.len() / self.rows.seq_len;
        if rows == 0 {
            return Ok(());
        }
        let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(self.rows.seq_len, rows));
        let column = |values: ArrayRef| -> ArrayRef {
            let item = Arc::new(Field::new("item", values.data_type().clone(), true));
            Arc::new(ListArray::new(item, offsets.clone(), values, None))
        };
        let ids = column(self.rows.ids.array(std::mem::take(&mut self.ids)));
        let mut columns = vec![ids.clone(), ids];
        if self.rows.documents {
            columns.push(column(Arc::new(Int32Array::from(std::mem::take(&mut self.documents)))));
        }
        let batch = RecordBatch::try_new(self.schema.clone(), columns);
        let written =
            batch.and_then(|batch| self.out.as_mut().expect("open since the first row").write(&batch));
        written.map_err(|cause| self.failed(&cause))
    }

    fn end_shard(&mut self) -> Result<(), Error> {
        self.flush()?;
        let Some(out) = self.out.take() else { return Ok(()) };
        let path = self.path(self.shards.count());
        let file = out.into_inner().map_err(|cause| self.failed(&cause))?;
        let file = file.into_inner().map_err(|cause| Error::io("write", &path, cause.error()))?;
        file.sync_all().map_err(|cause| Error::io("write", &path, &cause))?;
        let bytes = file.metadata().map_err(|cause| Error::io("write", &path, &cause))?.len();
        self.shards.bytes.push(bytes);
        self.filled = 0;
        disk::sync_names(&self.dir)
    }

    /// Ends the last shard. It is on disk with this; the split is not complete before [`Self::complete`].
    pub(super) fn end(&mut self) -> Result<&Shards, Error> {
        self.end_shard()?;
        Ok(&self.shards)
    }

    /// Gives the shards their names and writes what describes them. May be done again where it was interrupted.
    pub(super) fn complete(&self, split: &str, card: &Card) -> Result<(), Error> {
        let names: Vec<_> = (0..self.shards.count())
            .map(|shard| {
                let (old, new) = (self.path(shard), self.final_path(shard));
                if old.exists() {
                    fs::rename(&old, &new).map_err(|cause| Error::io("write", &new, &cause))?;
                }
                Ok(json!({ "filename": new.file_name().unwrap_or_default().to_string_lossy() }))
            })
            .collect::<Result<_, Error>>()?;
        let bytes: u64 = self.shards.bytes.iter().sum();
        let info = json!({
            "citation": "",
            "dataset_size": bytes,
            "description": "",
            "features": self.rows.features(),
            "homepage": "",
            "license": "",
            "splits": { split: { "name": split, "num_bytes": bytes, "num_examples": self.shards.rows } },
        });
        let state = json!({
            "_data_files": Value::Array(names),
            "_fingerprint": format!("{:016x}", self.shards.hash),
            "_format_columns": Value::Null,
            "_format_kwargs": {},
            "_format_type": Value::Null,
            "_output_all_columns": false,
            "_split": split,
        });
        write_json(&self.dir.join(INFO), &info)?;
        write_json(&self.dir.join(CARD), card)?;
        write_json(&self.dir.join(STATE), &state)?;
        disk::sync_names(&self.dir)
    }

    fn failed(&self, cause: &ArrowError) -> Error {
        let path = self.path(self.shards.count());
        match cause {
            ArrowError::IoError(_, cause) => Error::io("write", &path, cause),
            _ => {
                Error::new(format!("cannot write {}: {cause}", path.display())).with_hint("is the disk full?")
            }
        }
    }
}

/// A dataset being written: one split, which is put into place when it is complete. Given up before, it leaves nothing
/// behind.
pub struct DatasetWriter {
    aside: Aside,
    out: ShardWriter,
}

impl DatasetWriter {
    /// Starts writing beside `dir`, ids as int32, with a column `document_ids` where `documents` says so.
    ///
    /// # Errors
    /// `dir` holds something already, or its parent cannot be written.
    pub fn create(dir: &Path, seq_len: usize, documents: bool) -> Result<Self, Error> {
        let (aside, _) = Aside::open::<()>(dir, None)?;
        let rows = Rows::new(seq_len, IdType::Int32, documents, MAX_SHARD_SIZE);
        let out = ShardWriter::open(&aside.folder(), rows, Shards::default())?;
        Ok(Self { aside, out })
    }

    /// Adds one block of `seq_len` ids; its labels are the ids. `documents` `[seq_len]` is for the column
    /// `document_ids` and not looked at where there is none.
    ///
    /// # Errors
    /// The disk is full or gone.
    ///
    /// # Panics
    /// On a block of another length, or without the documents that the column wants.
    pub fn push(&mut self, ids: &[u32], documents: Option<&[i32]>) -> Result<(), Error> {
        let rows = &self.out.rows;
        assert_eq!(ids.len(), rows.seq_len);
        let documents = documents.unwrap_or_default();
        assert!(!rows.documents || documents.len() == rows.seq_len, "a dataset with documents is told them");
        self.out.push(ids, documents).map(|_| ())
    }

    /// Blocks so far.
    pub fn blocks(&self) -> u64 {
        self.out.shards.rows
    }

    /// Completes the dataset and puts it into place.
    ///
    /// # Errors
    /// The disk is full or gone, or somebody else has put something into the place.
    pub fn finish(mut self, card: &Card) -> Result<(), Error> {
        self.out.end()?;
        self.out.complete("train", card)?;
        self.aside.place()
    }
}
