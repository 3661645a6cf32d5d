//! Plain text, and JSON objects: one a line, in an array, or one after the other.

use std::io::{BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::{Compression, Place, Rows, no_column, open, unreadable};
use crate::Error;

/// Bytes of a text file that are handed out at a time.
pub(super) const CHUNK: usize = 4 << 20;

/// Bytes of a file that are looked at before it is read whole: enough to tell pictures and programs from text.
pub(super) const HEAD: usize = 8192;

/// A BOM, which JSON does not allow and editors write.
const BOM: &[u8] = "\u{feff}".as_bytes();

/// A file that is one document.
pub(super) struct Text {
    place: Place,
    file: Box<dyn Read + Send>,
    count: Arc<AtomicU64>,
    /// Read, but not handed out: an incomplete character, or what was looked at.
    ahead: Vec<u8>,
    /// Bytes handed out.
    done: u64,
    ended: bool,
}

impl Text {
    /// With `choosy`, None where the file is not UTF-8 or has a NUL near its start.
    pub(super) fn open(place: Place, choosy: bool) -> Result<Option<Self>, Error> {
        if choosy && !is_text(&place.path, place.compression)? {
            return Ok(None);
        }
        let (file, count) = open(&place.path, place.compression)?;
        Ok(Some(Self { place, file, count, ahead: Vec::new(), done: 0, ended: false }))
    }
}

impl Rows for Text {
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error> {
        if self.ended {
            return Ok(None);
        }
        let mut bytes = std::mem::take(&mut self.ahead);
        let wanted = (CHUNK - bytes.len()) as u64;
        (&mut self.file)
            .take(wanted)
            .read_to_end(&mut bytes)
            .map_err(|cause| unreadable(&self.place.path, self.place.compression, &cause))?;
        self.ended = bytes.len() < CHUNK;
        let whole = match std::str::from_utf8(&bytes) {
            Ok(_) => bytes.len(),
            Err(cause) if cause.error_len().is_none() && !self.ended => cause.valid_up_to(),
            Err(cause) => {
                let at = self.done + cause.valid_up_to() as u64;
                return Err(Error::new(format!(
                    "{} is not UTF-8 text: byte {at}",
                    self.place.path.display()
                ))
                .with_hint("convert it to UTF-8, or unpack it where it is compressed"));
            }
        };
        self.ahead = bytes.split_off(whole);
        self.done += whole as u64;
        let text = String::from_utf8(bytes).expect("checked above");
        Ok(Some((text, self.ended)))
    }

    fn position(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Is a file UTF-8 without a NUL near its start? The rest of one with a NUL is left unread.
fn is_text(path: &Path, compression: Compression) -> Result<bool, Error> {
    let (mut file, _) = open(path, compression)?;
    let mut bytes = Vec::new();
    let mut first = true;
    loop {
        let wanted = if first { HEAD } else { CHUNK };
        let before = bytes.len();
        (&mut file)
            .take(wanted as u64)
            .read_to_end(&mut bytes)
            .map_err(|cause| unreadable(path, compression, &cause))?;
        if first && bytes.contains(&0) {
            return Ok(false);
        }
        let ended = bytes.len() - before < wanted;
        match std::str::from_utf8(&bytes) {
            Ok(_) => bytes.clear(),
            Err(cause) if cause.error_len().is_none() && !ended => drop(bytes.drain(..cause.valid_up_to())),
            Err(_) => return Ok(false),
        }
        if ended {
            return Ok(true);
        }
        first = false;
    }
}

/// A file of one JSON object a line.
pub(super) struct Lines {
    place: Place,
    reader: BufReader<Box<dyn Read + Send>>,
    count: Arc<AtomicU64>,
    line: Vec<u8>,
    number: u64,
}

impl Lines {
    pub(super) fn open(place: Place) -> Result<Self, Error> {
        let (file, count) = open(&place.path, place.compression)?;
        Ok(Self {
            place,
            reader: BufReader::with_capacity(1 << 18, file),
            count,
            line: Vec::new(),
            number: 0,
        })
    }
}

impl Rows for Lines {
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error> {
        let Place { path, compression, column } = &self.place;
        loop {
            self.line.clear();
            let n = self
                .reader
                .read_until(b'\n', &mut self.line)
                .map_err(|cause| unreadable(path, *compression, &cause))?;
            if n == 0 {
                return Ok(None);
            }
            self.number += 1;
            let line = if self.number == 1 { without_bom(&self.line) } else { &self.line };
            if !line.trim_ascii().is_empty() {
                let place = format_args!("{}:{}", path.display(), self.number);
                let hint = "a .jsonl file holds one JSON object a line, in UTF-8";
                return Ok(Some((text_of(line, column, place, hint)?, true)));
            }
        }
    }

    fn position(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BOM).unwrap_or(bytes)
}

/// The string in the field `column` of a JSON object.
fn text_of(object: &[u8], column: &str, place: impl std::fmt::Display, hint: &str) -> Result<String, Error> {
    let fault = |what: String| Error::new(format!("{place}: {what}"));
    if let Err(cause) = std::str::from_utf8(object) {
        return Err(
            fault(format!("not UTF-8: byte {}", cause.valid_up_to())).with_hint("convert the file to UTF-8")
        );
    }
    let mut json = serde_json::Deserializer::from_slice(object);
    let found = Field(column).deserialize(&mut json).and_then(|found| json.end().map(|()| found));
    match found.map_err(|cause| fault(format!("not a JSON object: {cause}")).with_hint(hint))? {
        Some(Value::String(text)) => Ok(text),
        Some(value) => Err(fault(format!("the field {column:?} is not a string: {value:.60}"))
            .with_hint("choose the field that holds the text with --text-column")),
        None => {
            let object: Value = serde_json::from_slice(object).unwrap_or_default();
            let names: Vec<&String> =
                object.as_object().into_iter().flat_map(|object| object.keys()).collect();
            Err(no_column(place, "field", column, &names))
        }
    }
}

/// One field of an object; the others are passed over unread. Of a repeated name the last counts.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(wanted) = map.next_key_seed(Is(self.0, PhantomData))? {
            if wanted {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Whether a key is this one.
struct Is<'a>(&'a str, PhantomData<bool>);

impl<'de> DeserializeSeed<'de> for Is<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Is<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<bool, E> {
        Ok(name == self.0)
    }
}

/// A file of JSON objects, in an array or one after the other.
pub(super) struct Json {
    place: Place,
    reader: BufReader<Box<dyn Read + Send>>,
    count: Arc<AtomicU64>,
    value: Vec<u8>,
    /// Objects so far.
    number: u64,
    /// Inside of an array; None: nothing has been read.
    array: Option<bool>,
    ended: bool,
}

impl Json {
    pub(super) fn open(place: Place) -> Result<Self, Error> {
        let (file, count) = open(&place.path, place.compression)?;
        let reader = BufReader::with_capacity(1 << 18, file);
        Ok(Self { place, reader, count, value: Vec::new(), number: 0, array: None, ended: false })
    }

    /// Is it a table, or the settings of a program? A single object without the column is none, and neither is what is
    /// no JSON or an array of anything but objects.
    pub(super) fn is_table(place: Place) -> bool {
        let column = place.column.clone();
        let Ok(mut json) = Self::open(place) else { return true };
        let Ok(Some(())) = json.next_value() else { return false };
        let Ok(Value::Object(object)) = serde_json::from_slice(&json.value) else { return false };
        object.contains_key(&column) || json.array == Some(true) || matches!(json.next_value(), Ok(Some(())))
    }

    fn fault(&self, what: &str) -> Error {
        Error::new(format!("{}, object {}: {what}", self.place.path.display(), self.number + 1))
            .with_hint("a .json file holds JSON objects, in an array or one after the other")
    }

    /// The next byte that is no blank, left unread.
    fn peek(&mut self) -> Result<Option<u8>, Error> {
        loop {
            let buffer = self
                .reader
                .fill_buf()
                .map_err(|cause| unreadable(&self.place.path, self.place.compression, &cause))?;
            let blanks = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let (next, all) = (buffer.get(blanks).copied(), buffer.is_empty());
            self.reader.consume(blanks);
            if next.is_some() || all {
                return Ok(next);
            }
        }
    }

    /// Reads the next object, or what stands in its place, into `value`.
    fn next_value(&mut self) -> Result<Option<()>, Error> {
        if self.ended {
            return Ok(None);
        }
        if self.array.is_none() {
            if let Ok(buffer) = self.reader.fill_buf()
                && buffer.starts_with(BOM)
            {
                self.reader.consume(BOM.len());
            }
            self.array = Some(self.peek()? == Some(b'['));
            if self.array == Some(true) {
                self.reader.consume(1);
            }
        }
        if self.array == Some(true) {
            let next = self.peek()?;
            match (next, self.number) {
                (Some(b']'), _) => {
                    self.reader.consume(1);
                    self.ended = true;
                    return match self.peek()? {
                        None => Ok(None),
                        Some(_) => Err(self.fault("something follows the end of the array")),
                    };
                }
                (Some(b','), 1..) => self.reader.consume(1),
                (Some(_), 0) => {}
                (Some(_), _) => return Err(self.fault("there is no comma before it")),
                (None, _) => return Err(self.fault("the end of the array is missing")),
            }
        }
        let Some(first) = self.peek()? else {
            self.ended = true;
            return if self.array == Some(true) { Err(self.fault("it is missing")) } else { Ok(None) };
        };
        if first != b'{' {
            return Err(self.fault("it is no object"));
        }
        self.scan()?;
        Ok(Some(()))
    }

    /// Reads up to the brace that ends the object.
    fn scan(&mut self) -> Result<(), Error> {
        self.value.clear();
        let (mut depth, mut string, mut escaped) = (0usize, false, false);
        loop {
            let buffer = self
                .reader
                .fill_buf()
                .map_err(|cause| unreadable(&self.place.path, self.place.compression, &cause))?;
            if buffer.is_empty() {
                return Err(self.fault("it has no end"));
            }
            let end = buffer.iter().position(|&byte| {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if string => escaped = true,
                    b'"' => string = !string,
                    b'{' | b'[' if !string => depth += 1,
                    b'}' | b']' if !string => depth -= 1,
                    _ => {}
                }
                depth == 0
            });
            let n = end.map_or(buffer.len(), |at| at + 1);
            self.value.extend_from_slice(&buffer[..n]);
            self.reader.consume(n);
            if end.is_some() {
                return Ok(());
            }
        }
    }
}

impl Rows for Json {
    fn advance(&mut self) -> Result<Option<(String, bool)>, Error> {
        let Some(()) = self.next_value()? else { return Ok(None) };
        self.number += 1;
        let Place { path, column, .. } = &self.place;
        let place = format!("{}, object {}", path.display(), self.number);
        let hint = "a .json file holds JSON objects, in an array or one after the other";
        Ok(Some((text_of(&self.value, column, place, hint)?, true)))
    }

    fn position(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
