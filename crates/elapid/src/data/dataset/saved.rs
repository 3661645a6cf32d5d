//! The folder that Hugging Face `datasets` writes with `save_to_disk`.
//!
//! Arrow stream files, listed in `state.json`, with the columns `input_ids` and, optionally, `labels`, `document_ids`,
//! `loss_mask` and `attention_mask`; reading maps them into memory. Beside them Elapid keeps `dataset_card.json` and the
//! tokenizer.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

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
use serde_json::Value;

use super::card::{read, read_card};
use super::{Card, PAD_DOCUMENT, Sample, advise, bad_id, quietly};
use crate::Error;

pub(crate) const STATE: &str = "state.json";
pub(in crate::data) const CARD: &str = "dataset_card.json";
pub(crate) const DICT: &str = "dataset_dict.json";
pub(in crate::data) const TOKENIZER: &str = "tokenizer";

/// Ends every Arrow stream: a continuation mark and the length 0 (Arrow's columnar format, "IPC Streaming Format").
pub(in crate::data) const END_OF_STREAM: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// One record batch.
struct Rows {
    /// Place of its first row in the dataset.
    first: usize,
    count: usize,
    /// Those of [`COLUMNS`] that there are.
    columns: [Option<ArrayRef>; COLUMNS.len()],
    map: Arc<Mmap>,
}

/// The columns that are read, in this order; the first must be there.
const COLUMNS: [&str; 5] = ["input_ids", "labels", "document_ids", "loss_mask", "attention_mask"];
const IDS: usize = 0;
const LABELS: usize = 1;
const DOCUMENTS: usize = 2;
const LOSS_MASK: usize = 3;
const ATTENTION_MASK: usize = 4;

/// A dataset folder, mapped into memory.
pub(super) struct Saved {
    dir: PathBuf,
    batches: Vec<Rows>,
    pub(super) len: usize,
    pub(super) seq_len: usize,
    pub(super) card: Option<Card>,
    pub(super) fingerprint: Option<String>,
}

impl Saved {
    /// Opens a dataset folder; of a `DatasetDict` its `train` split.
    ///
    /// # Errors
    /// No such folder, files missing or damaged, other columns, no rows, or rows of different lengths.
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
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
                Some(batch) => self.add(path, &batch, &map)?,
                None => break,
            }
        }
        decoder.finish().map_err(|cause| damaged(cause.to_string()))
    }

    fn add(&mut self, path: &Path, batch: &RecordBatch, map: &Arc<Mmap>) -> Result<(), Error> {
        let names: Vec<_> = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
        let columns = COLUMNS.map(|name| batch.column_by_name(name).cloned());
        if columns[IDS].is_none() {
            return Err(Error::new(format!(
                "{} has the columns {names:?}, but no `input_ids`",
                path.display()
            ))
            .with_hint(
                "a packed dataset has the columns input_ids and, optionally, labels and document_ids",
            ));
        }
        let there = |columns: &[Option<ArrayRef>; COLUMNS.len()]| columns.each_ref().map(Option::is_some);
        if self.batches.first().is_some_and(|batch| there(&batch.columns) != there(&columns)) {
            return Err(Error::new(format!(
                "{} has the columns {names:?}, unlike the files before it",
                path.display()
            ))
            .with_hint("all files of a dataset have the same columns; write the dataset again"));
        }
        for column in columns.iter().flatten() {
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
            self.batches.push(Rows { first: self.len, count: batch.num_rows(), columns, map: map.clone() });
            self.len += batch.num_rows();
        }
        Ok(())
    }

    /// The columns that Elapid reads.
    pub(super) fn columns(&self) -> Vec<&'static str> {
        let there = COLUMNS.iter().zip(&self.batches[0].columns).filter(|(_, column)| column.is_some());
        there.map(|(name, _)| *name).collect()
    }

    /// The folder of its tokenizer, where it has one.
    pub(super) fn tokenizer(&self) -> Option<PathBuf> {
        Some(self.dir.join(TOKENIZER)).filter(|dir| dir.is_dir())
    }

    /// Whether the blocks know their documents.
    pub(super) fn knows_documents(&self) -> bool {
        self.batches.first().is_some_and(|batch| batch.columns[DOCUMENTS].is_some())
    }

    /// The record batch of block `index`, and its row there.
    fn place(&self, index: usize) -> (&Rows, usize) {
        assert!(index < self.len, "row {index} of {}", self.len);
        let batch = &self.batches[self.batches.partition_point(|b| b.first + b.count <= index)];
        (batch, index - batch.first)
    }

    /// Block `index` of a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// A token outside of the vocabulary; a document id below 0.
    pub(super) fn sample(&self, index: usize, vocab_size: Option<usize>) -> Result<Sample, Error> {
        let (batch, row) = self.place(index);
        let limit = vocab_size.map_or(i64::from(i32::MAX), |v| v as i64);
        let bad = |what: &str, position: usize, id: i64| bad_id(&self.dir, index, what, position, id, limit);
        let column = |column: usize| batch.columns[column].as_ref().map(|column| list_row(column, row));
        let ids = column(IDS).expect("checked when it was opened");
        let input_ids = values(&ids, |id| (0..limit).contains(&id))
            .map_err(|(position, id)| bad("token", position, id))?;
        let counts = |id: i64| (0..limit).contains(&id) || id == i64::from(IGNORE_LABEL);
        let mut labels = match column(LABELS) {
            None => input_ids.clone(),
            Some(labels) => values(&labels, counts).map_err(|(position, id)| bad("label", position, id))?,
        };
        let mut documents = self.documents(index)?;
        let mask = |place: usize| -> Result<Vec<i32>, Error> {
            let mask = column(place).map(|mask| values(&mask, |_| true)).transpose();
            Ok(mask.map_err(|(position, value)| bad(COLUMNS[place], position, value))?.unwrap_or_default())
        };
        for (label, _) in labels.iter_mut().zip(mask(LOSS_MASK)?).filter(|(_, counts)| *counts == 0) {
            *label = IGNORE_LABEL;
        }
        let attended = mask(ATTENTION_MASK)?;
        for (i, _) in attended.iter().enumerate().filter(|(_, attended)| **attended == 0) {
            labels[i] = IGNORE_LABEL;
            documents.get_or_insert_with(|| vec![0; labels.len()])[i] = PAD_DOCUMENT;
        }
        Ok(Sample { input_ids, labels, documents })
    }

    /// The documents of block `index`, where the dataset knows them.
    pub(super) fn documents(&self, index: usize) -> Result<Option<Vec<i32>>, Error> {
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
        batch.columns[DOCUMENTS].as_ref().map(read).transpose()
    }

    /// Asks the system to read a block into memory, and does not wait.
    pub(super) fn prefetch(&self, index: usize) {
        let (batch, row) = self.place(index);
        for column in batch.columns.iter().flatten() {
            let items = list_row(column, row).to_data();
            let Some(buffer) = items.buffers().first() else { continue };
            advise(&batch.map, buffer.as_ptr() as usize, buffer.len());
        }
    }
}

/// The list types of Arrow with integers in them; nulls never.
fn check_type(data_type: &DataType) -> Result<(), Error> {
    let item = match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            item.data_type()
        }
        other => other,
    };
    if item == data_type || !(item.is_integer() || *item == DataType::Boolean) {
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
        DataType::Boolean => {
            let items = items.as_boolean().values().iter().map(i32::from).enumerate();
            items.map(|(i, item)| if good(item.into()) { Ok(item) } else { Err((i, item.into())) }).collect()
        }
        _ => convert::<UInt64Type>(items, good),
    }
}
