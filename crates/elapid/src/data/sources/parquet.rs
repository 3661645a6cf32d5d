//! Columns of text in Parquet files.
//!
//! Pages compressed with Zstandard are decompressed here: the crate `parquet` would need a C library for them. It is told
//! that the column is not compressed and hands its pages out as they are.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, Type};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::serialized_reader::SerializedPageReader;

use super::packed::decompress;
use super::{Rows, no_column};
use crate::Error;
use crate::data::dataset::quietly;

/// Rows that are decoded at a time.
const ROWS: usize = 256;

/// The texts of one column.
pub(super) struct Parquet {
    path: PathBuf,
    file: Arc<File>,
    reader: SerializedFileReader<File>,
    /// Place of the column.
    column: usize,
    /// The next row group.
    group: usize,
    open: Option<ColumnReaderImpl<ByteArrayType>>,
    texts: std::vec::IntoIter<Option<ByteArray>>,
    /// Rows handed out, and how many there are.
    done: u64,
    rows: u64,
    bytes: u64,
}

impl Parquet {
    pub(super) fn open(path: &Path, column: &str) -> Result<Self, Error> {
        let file = File::open(path).map_err(|cause| Error::io("read", path, &cause))?;
        let bytes = file.metadata().map_err(|cause| Error::io("read", path, &cause))?.len();
        let copy = file.try_clone().map_err(|cause| Error::io("read", path, &cause))?;
        let reader = guarded(path, || SerializedFileReader::new(copy))?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
        let place = names
            .iter()
            .position(|name| name == column)
            .ok_or_else(|| no_column(path.display(), "column", column, &names))?;
        let leaf = schema.column(place);
        if leaf.physical_type() != Type::BYTE_ARRAY || leaf.max_rep_level() > 0 {
            let what = if leaf.max_rep_level() > 0 { "lists" } else { "no text" };
            return Err(Error::new(format!("{}: the column {column:?} holds {what}", path.display()))
                .with_hint(format!(
                    "choose one of text with --text-column; there are: {}",
                    names.join(", ")
                )));
        }
        let rows = reader.metadata().file_metadata().num_rows().max(0) as u64;
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(file),
            reader,
            column: place,
            group: 0,
            open: None,
            texts: Vec::new().into_iter(),
            done: 0,
            rows,
            bytes,
        })
    }

    /// The column in the next row group.
    fn next_group(&mut self) -> Result<bool, Error> {
        if self.group == self.reader.num_row_groups() {
            return Ok(false);
        }
        let (group, column, file) = (self.group, self.column, self.file.clone());
        let metadata = self.reader.metadata();
        let open = guarded(&self.path, || {
            let group = metadata.row_group(group);
            let chunk = group.column(column);
            let zstd = matches!(chunk.compression(), Compression::ZSTD(_));
            let raw = chunk.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build()?;
            let chunk = if zstd { &raw } else { chunk };
            let pages = SerializedPageReader::new(file, chunk, group.num_rows() as usize, None)?;
            let pages: Box<dyn PageReader> = if zstd { Box::new(ZstdPages(pages)) } else { Box::new(pages) };
            match get_column_reader(group.schema_descr().column(column), pages) {
                ColumnReader::ByteArrayColumnReader(reader) => Ok(reader),
                _ => Err(ParquetError::General("the type of the column changes".into())),
            }
        })?;
        self.open = Some(open);
        self.group += 1;
        Ok(true)
    }
}

impl Rows for Parquet {
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error> {
        loop {
            if let Some(text) = self.texts.next() {
                let row = self.done;
                self.done += 1;
                let fault = |what: &str, hint: &str| {
                    Err(Error::new(format!("{}: the text of row {row} is {what}", self.path.display()))
                        .with_hint(hint))
                };
                return match text.map(|bytes| String::from_utf8(bytes.data().to_vec())) {
                    Some(Ok(text)) => Ok(Some((text, true))),
                    Some(Err(_)) => {
                        fault("not UTF-8", "convert it to UTF-8, or choose another --text-column")
                    }
                    None => fault("null", "leave such rows out, or choose another --text-column"),
                };
            }
            let Some(reader) = &mut self.open else {
                if !self.next_group()? {
                    if self.done < self.rows {
                        return Err(Error::new(format!(
                            "{} holds {} rows, but says {}",
                            self.path.display(),
                            self.done,
                            self.rows
                        ))
                        .with_hint("the file is damaged or incomplete; copy or download it again"));
                    }
                    return Ok(None);
                }
                continue;
            };
            let (mut values, mut levels) = (Vec::with_capacity(ROWS), Vec::with_capacity(ROWS));
            let read =
                guarded(&self.path, || reader.read_records(ROWS, Some(&mut levels), None, &mut values));
            if read?.0 == 0 {
                self.open = None;
                continue;
            }
            let schema = self.reader.metadata().file_metadata().schema_descr_ptr();
            let full = schema.column(self.column).max_def_level();
            let mut values = values.into_iter();
            let texts: Vec<_> = if full == 0 {
                values.map(Some).collect()
            } else {
                levels.iter().map(|&level| if level == full { values.next() } else { None }).collect()
            };
            self.texts = texts.into_iter();
        }
    }

    fn position(&self) -> u64 {
        (self.bytes as u128 * self.done as u128 / u128::from(self.rows.max(1))) as u64
    }
}

/// What the crate says of a damaged file, and its panics, as our error.
fn guarded<T>(path: &Path, read: impl FnOnce() -> ParquetResult<T>) -> Result<T, Error> {
    let fault = |what: &str| {
        Error::new(format!("{} is not a whole Parquet file: {what}", path.display()))
            .with_hint("the file is damaged or incomplete; copy or download it again")
    };
    match quietly(read) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(cause)) => Err(fault(&cause.to_string())),
        Err(()) => Err(fault("sizes and places in it contradict each other")),
    }
}

/// Pages that the reader inside takes for uncompressed ones.
struct ZstdPages(SerializedPageReader<File>);

impl ZstdPages {
    /// The page with `buf` decompressed from `start` on.
    fn unpack(mut page: Page) -> ParquetResult<Page> {
        let (buf, start) = match &mut page {
            Page::DataPage { buf, .. } | Page::DictionaryPage { buf, .. } => (buf, 0),
            Page::DataPageV2 { is_compressed: false, .. } => return Ok(page),
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, .. } => {
                (buf, *def_levels_byte_len as usize + *rep_levels_byte_len as usize)
            }
        };
        if start > buf.len() {
            return Err(ParquetError::General("a page is shorter than its levels".into()));
        }
        let mut unpacked = buf[..start].to_vec();
        let packed = std::io::Cursor::new(buf.slice(start..));
        decompress(packed, super::Compression::Zstd).read_to_end(&mut unpacked)?;
        *buf = unpacked.into();
        Ok(page)
    }
}

impl Iterator for ZstdPages {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for ZstdPages {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        self.0.get_next_page()?.map(Self::unpack).transpose()
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        self.0.peek_next_page()
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.0.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> ParquetResult<bool> {
        self.0.at_record_boundary()
    }
}
