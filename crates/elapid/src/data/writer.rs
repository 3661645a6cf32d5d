//! Writing packed datasets: aside, fsynced, and put into place by one rename.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int32Array, ListArray, RecordBatch};
use arrow_buffer::OffsetBuffer;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use serde_json::{Value, json};

use super::dataset::{CARD, Card, STATE};
use crate::Error;

const DATA: &str = "data-00000-of-00001.arrow";
const INFO: &str = "dataset_info.json";

/// Rows of one record batch, as in Python's `datasets`.
const BATCH_ROWS: usize = 1000;

/// A dataset being written.
pub struct DatasetWriter {
    /// Where it will be.
    dir: PathBuf,
    /// Where it is until then; None once it is in place.
    aside: Option<PathBuf>,
    seq_len: usize,
    out: Option<StreamWriter<BufWriter<File>>>,
    schema: Arc<Schema>,
    pending: Vec<i32>,
    /// Documents of the pending tokens, where there is a column for them.
    documents: Option<Vec<i32>>,
    blocks: u64,
    /// FNV-1a over the tokens: the fingerprint that `datasets` caches by.
    hash: u64,
}

impl DatasetWriter {
    /// Starts writing beside `dir`, with a column `document_ids` where `documents` says so.
    ///
    /// # Errors
    /// `dir` holds something already, or its parent cannot be written.
    pub fn create(dir: &Path, seq_len: usize, documents: bool) -> Result<Self, Error> {
        if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) || dir.is_file() {
            return Err(Error::new(format!("{} exists already", dir.display()))
                .with_hint("give another --save-path, or move that folder away"));
        }
        let name = dir.file_name().ok_or_else(|| {
            Error::new(format!("{} names no folder", dir.display()))
                .with_hint("give --save-path a folder name")
        })?;
        let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(|cause| Error::io("create", parent, &cause))?;
        let aside = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
        // Left by a process of the same number that was killed.
        let _ = fs::remove_dir_all(&aside);
        fs::create_dir(&aside).map_err(|cause| Error::io("create", &aside, &cause))?;

        let column = |name| Field::new_list(name, Field::new("item", DataType::Int32, true), true);
        let metadata = json!({ "info": { "features": features(documents) } }).to_string();
        let schema = Schema::new(columns(documents).map(column).collect::<Vec<_>>())
            .with_metadata(HashMap::from([("huggingface".to_owned(), metadata)]));
        let path = aside.join(DATA);
        let file = File::create(&path).map_err(|cause| Error::io("create", &path, &cause))?;
        let mut writer = Self {
            dir: dir.to_owned(),
            aside: Some(aside),
            seq_len,
            out: None,
            schema: Arc::new(schema),
            pending: Vec::new(),
            documents: documents.then(Vec::new),
            blocks: 0,
            hash: 0xcbf2_9ce4_8422_2325,
        };
        let out = StreamWriter::try_new(BufWriter::new(file), &writer.schema);
        writer.out = Some(out.map_err(|cause| writer.failed(&cause))?);
        Ok(writer)
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
        assert_eq!(ids.len(), self.seq_len);
        if let Some(column) = &mut self.documents {
            let documents = documents.expect("a dataset with documents is told them");
            assert_eq!(documents.len(), self.seq_len);
            for &id in documents {
                self.hash = (self.hash ^ id as u64).wrapping_mul(0x0100_0000_01b3);
            }
            column.extend_from_slice(documents);
        }
        for &id in ids {
            self.hash = (self.hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3);
            self.pending.push(id as i32);
        }
        self.blocks += 1;
        if self.pending.len() == BATCH_ROWS * self.seq_len { self.flush() } else { Ok(()) }
    }

    /// Blocks so far.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The folder as it is while being written: what is put there becomes part of the dataset.
    pub fn folder(&self) -> &Path {
        self.aside.as_deref().unwrap_or(&self.dir)
    }

    /// Completes the dataset and puts it into place.
    ///
    /// # Errors
    /// The disk is full or gone, or somebody else has put something into the place.
    pub fn finish(mut self, card: &Card) -> Result<(), Error> {
        self.flush()?;
        let out = self.out.take().expect("open until here");
        let file = out
            .into_inner()
            .map_err(|cause| self.failed(&cause))?
            .into_inner()
            .map_err(|cause| Error::io("write", &self.dir, cause.error()))?;
        file.sync_all().map_err(|cause| Error::io("write", &self.dir, &cause))?;
        let features = features(self.documents.is_some());
        let info =
            json!({ "citation": "", "description": "", "features": features, "homepage": "", "license": "" });
        let state = json!({
            "_data_files": [{ "filename": DATA }],
            "_fingerprint": format!("{:016x}", self.hash),
            "_format_columns": Value::Null,
            "_format_kwargs": {},
            "_format_type": Value::Null,
            "_output_all_columns": false,
            "_split": Value::Null,
        });
        self.write_json(INFO, &info)?;
        self.write_json(STATE, &state)?;
        self.write_json(CARD, &serde_json::to_value(card).expect("a card is plain data"))?;
        let aside = self.aside.take().expect("in place only here");
        if let Err(cause) = fs::rename(&aside, &self.dir) {
            self.aside = Some(aside);
            return Err(Error::io("put the dataset into", &self.dir, &cause));
        }
        Ok(())
    }

    fn write_json(&self, name: &str, value: &Value) -> Result<(), Error> {
        let path = self.folder().join(name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            writeln!(file, "{value:#}")?;
            file.sync_all()
        };
        write().map_err(|cause| Error::io("write", &path, &cause))
    }

    fn flush(&mut self) -> Result<(), Error> {
        let rows = self.pending.len() / self.seq_len;
        if rows == 0 {
            return Ok(());
        }
        let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(self.seq_len, rows));
        let item = Arc::new(Field::new("item", DataType::Int32, true));
        let column = |values: &mut Vec<i32>| -> ArrayRef {
            let values = Arc::new(Int32Array::from(std::mem::take(values)));
            Arc::new(ListArray::new(item.clone(), offsets.clone(), values, None))
        };
        let ids = column(&mut self.pending);
        let mut columns = vec![ids.clone(), ids];
        columns.extend(self.documents.as_mut().map(column));
        let batch = RecordBatch::try_new(self.schema.clone(), columns);
        let written = batch.and_then(|batch| self.out.as_mut().expect("open until finish").write(&batch));
        written.map_err(|cause| self.failed(&cause))
    }

    fn failed(&self, cause: &ArrowError) -> Error {
        Error::new(format!("cannot write {}: {cause}", self.folder().join(DATA).display()))
            .with_hint("is the disk full?")
    }
}

impl Drop for DatasetWriter {
    /// An unfinished dataset leaves nothing behind.
    fn drop(&mut self) {
        if let Some(aside) = &self.aside {
            let _ = fs::remove_dir_all(aside);
        }
    }
}

fn columns(documents: bool) -> impl Iterator<Item = &'static str> {
    ["input_ids", "labels"].into_iter().chain(documents.then_some("document_ids"))
}

fn features(documents: bool) -> Value {
    let column = json!({ "feature": { "dtype": "int32", "_type": "Value" }, "_type": "List" });
    columns(documents).map(|name| (name.to_owned(), column.clone())).collect::<serde_json::Map<_, _>>().into()
}
