//! Columns of text in CSV and Arrow files.

use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType};

use super::{Place, Rows, no_column, open, unreadable};
use crate::Error;
use crate::data::dataset::{END_OF_STREAM, quietly};

/// A table with a line of names.
pub(super) struct Csv {
    place: Place,
    reader: csv::Reader<Box<dyn Read + Send>>,
    record: csv::ByteRecord,
    column: usize,
    count: Arc<AtomicU64>,
}

impl Csv {
    pub(super) fn open(place: Place, delimiter: u8) -> Result<Self, Error> {
        let (file, count) = open(&place.path, place.compression)?;
        let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(file);
        let names = reader.byte_headers().map_err(|cause| fault(&place, cause))?;
        let names: Vec<String> =
            names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        let column = names
            .iter()
            .position(|name| *name == place.column)
            .ok_or_else(|| no_column(place.path.display(), "column", &place.column, &names))?;
        Ok(Self { place, reader, record: csv::ByteRecord::new(), column, count })
    }
}

fn fault(place: &Place, cause: csv::Error) -> Error {
    let line = cause.position().map_or(0, csv::Position::line);
    match cause.into_kind() {
        csv::ErrorKind::Io(cause) => unreadable(&place.path, place.compression, &cause),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => Error::new(format!(
            "{}:{line}: {len} fields, the first line has {expected_len}",
            place.path.display()
        ))
        .with_hint("fields with commas, quotes or line ends in them stand in double quotes"),
        other => Error::new(format!("{}:{line}: {other:?}", place.path.display()))
            .with_hint("a .csv file is a table in UTF-8 whose first line names its columns"),
    }
}

impl Rows for Csv {
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error> {
        if !self.reader.read_byte_record(&mut self.record).map_err(|cause| fault(&self.place, cause))? {
            return Ok(None);
        }
        let field = self.record.get(self.column).unwrap_or_default();
        String::from_utf8(field.to_vec()).map(|text| Some((text, true))).map_err(|_| {
            let line = self.record.position().map_or(0, csv::Position::line);
            Error::new(format!("{}:{line}: the text is not UTF-8", self.place.path.display()))
                .with_hint("convert the file to UTF-8")
        })
    }

    fn position(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Begins an Arrow file that can be read at random; a stream begins otherwise.
const ARROW_FILE: &[u8] = b"ARROW1";

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

/// An Arrow stream, as Python's `datasets` writes it, or an Arrow file (Feather).
pub(super) struct Arrow {
    path: PathBuf,
    batches: Batches,
    column: String,
    texts: Option<ArrayRef>,
    /// The next row of `texts`, and the number of its first one.
    row: usize,
    first: u64,
    count: Arc<AtomicU64>,
}

impl Arrow {
    pub(super) fn open(place: Place) -> Result<Self, Error> {
        let Place { path, compression, column } = place;
        let (mut file, count) = open(&path, compression)?;
        let mut head = Vec::new();
        (&mut file)
            .take(ARROW_FILE.len() as u64)
            .read_to_end(&mut head)
            .map_err(|cause| unreadable(&path, compression, &cause))?;
        if head != ARROW_FILE && compression == super::Compression::None {
            let whole = has_end(&path).map_err(|cause| Error::io("read", &path, &cause))?;
            guarded(&path, || whole.then_some(()).ok_or(ArrowError::IpcError("its end is missing".into())))?;
        }
        let batches = guarded(&path, || -> Result<Batches, ArrowError> {
            if head == ARROW_FILE {
                let whole = match compression {
                    // The table of contents stands at its end.
                    super::Compression::None => std::fs::File::open(&path)?,
                    _ => return Err(ArrowError::IpcError("a compressed Arrow file".into())),
                };
                Ok(Box::new(FileReader::try_new(BufReader::new(whole), None)?))
            } else {
                let stream = BufReader::with_capacity(1 << 18, Cursor::new(head).chain(file));
                Ok(Box::new(StreamReader::try_new(stream, None)?))
            }
        })?;
        Ok(Self { path, batches, column, texts: None, row: 0, first: 0, count })
    }

    fn take(&mut self, batch: &RecordBatch) -> Result<(), Error> {
        let schema = batch.schema();
        let names: Vec<&String> = schema.fields().iter().map(|field| field.name()).collect();
        let texts = batch
            .column_by_name(&self.column)
            .ok_or_else(|| no_column(self.path.display(), "column", &self.column, &names))?;
        if !matches!(texts.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
            return Err(Error::new(format!(
                "{}: the column {:?} holds no text but {}",
                self.path.display(),
                self.column,
                texts.data_type()
            ))
            .with_hint(format!("choose one of text with --text-column; there are: {names:?}")));
        }
        (self.texts, self.row) = (Some(texts.clone()), 0);
        Ok(())
    }
}

impl Rows for Arrow {
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error> {
        loop {
            if let Some(texts) = &self.texts {
                let row = self.row;
                if row < texts.len() {
                    self.row += 1;
                    if texts.is_null(row) {
                        let row = self.first + row as u64;
                        return Err(Error::new(format!(
                            "{}: the text of row {row} is null",
                            self.path.display()
                        ))
                        .with_hint("leave such rows out, or choose another --text-column"));
                    }
                    let text = match texts.data_type() {
                        DataType::Utf8 => texts.as_string::<i32>().value(row),
                        DataType::LargeUtf8 => texts.as_string::<i64>().value(row),
                        _ => texts.as_string_view().value(row),
                    };
                    return Ok(Some((text.to_owned(), true)));
                }
                self.first += texts.len() as u64;
                self.texts = None;
            }
            let batches = &mut self.batches;
            match guarded(&self.path, || batches.next().transpose())? {
                Some(batch) => self.take(&batch)?,
                None => return Ok(None),
            }
        }
    }

    fn position(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Does the mark stand at the end of a stream? Without the check one that is cut off between two batches would pass.
fn has_end(path: &Path) -> std::io::Result<bool> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let mut end = Vec::new();
    file.seek(SeekFrom::Start(length.saturating_sub(END_OF_STREAM.len() as u64)))?;
    file.read_to_end(&mut end)?;
    Ok(end == END_OF_STREAM)
}

/// What the crate says of a damaged file, and its panics, as our error.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, Error> {
    let fault = |what: &str| {
        Error::new(format!("{} is not a whole Arrow file: {what}", path.display()))
            .with_hint("the file is damaged or incomplete; copy or write it again")
    };
    match quietly(read) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(cause)) => Err(fault(&cause.to_string())),
        Err(()) => Err(fault("sizes and places in it contradict each other")),
    }
}
