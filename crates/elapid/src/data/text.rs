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

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, content: impl AsRef<[u8]>) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn read(path: &Path) -> Result<Vec<Document>, Error> {
        documents(path, "text")?.collect()
    }

    fn texts(path: &Path) -> Vec<String> {
        read(path).unwrap().into_iter().map(|d| d.text).collect()
    }

    /// The error at the end of the documents of a file `name`, and the number of documents before it.
    fn error(name: &str, content: impl AsRef<[u8]>) -> (usize, Error) {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join(name), content);
        let all: Vec<_> = documents(&dir.path().join(name), "text").unwrap().collect();
        let n = all.len() - 1;
        (n, all.into_iter().next_back().unwrap().unwrap_err())
    }

    #[test]
    fn a_text_file_is_one_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write(&path, "one\r\ntwo\n\0é");
        assert_eq!(read(&path).unwrap(), [Document { text: "one\r\ntwo\n\0é".into(), input_bytes: 12 }]);
    }

    #[test]
    fn a_line_of_json_is_one_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.JSONL");
        write(&path, "{\"text\": \"one\\ntwo\", \"n\": 1}\r\n\n  \n{\"text\": \"\"}\n{\"text\":\"é\"}");
        assert_eq!(texts(&path), ["one\ntwo", "", "é"]);
        let read: u64 = read(&path).unwrap().iter().map(|d| d.input_bytes).sum();
        assert_eq!(read, fs::metadata(&path).unwrap().len());
        assert_eq!(documents(&path, "text").unwrap().input_bytes(), read);

        write(&path, r#"{"body": "other"}"#);
        let other: Vec<_> = documents(&path, "body").unwrap().map(|d| d.unwrap().text).collect();
        assert_eq!(other, ["other"]);
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write(&at("b/z.md"), "3");
        write(&at("a.txt"), "1");
        write(&at("b.py"), "4");
        write(&at("b/c/lines.jsonl"), "{\"text\":\"2a\"}\n{\"text\":\"2b\"}\n");
        write(&at("z"), "5");
        assert_eq!(texts(dir.path()), ["1", "2a", "2b", "3", "4", "5"]);
    }

    #[test]
    fn a_folder_is_read_without_what_is_no_text_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write(&at("text"), "yes");
        write(&at("sub/targets/x"), "yes");
        write(&at(".hidden"), "no");
        write(&at(".git/config"), "no");
        write(&at("sub/target/debug.txt"), "no");
        write(&at("picture.png"), [0x89, b'P', b'N', b'G', 0, 0]);
        write(&at("latin1.txt"), [b'a', 0xe9, b'b']);
        let mut late = vec![b'a'; HEAD + 1];
        late.push(0xff);
        write(&at("late.txt"), late);
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(at("text"), at("link")).unwrap();
            std::os::unix::fs::symlink(dir.path(), at("sub/loop")).unwrap();
        }
        let mut documents = documents(dir.path(), "text").unwrap();
        let read: Vec<_> = documents.by_ref().map(|d| d.unwrap()).collect();
        assert_eq!(read.iter().map(|d| &d.text[..]).collect::<Vec<_>>(), ["yes", "yes"]);
        assert_eq!(documents.skipped(), 3);
        // The progress of the input counts what was passed over.
        assert_eq!(read.iter().map(|d| d.input_bytes).sum::<u64>(), documents.input_bytes());
    }

    #[test]
    fn one_document_is_held_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a.jsonl"), "{\"text\":\"1\"}\nbroken\n");
        write(&dir.path().join("b.txt"), "never read");
        let mut documents = documents(dir.path(), "text").unwrap();
        assert_eq!(documents.next().unwrap().unwrap().text, "1");
        assert!(documents.next().unwrap().is_err());
        assert!(documents.next().is_none());
    }

    #[test]
    fn a_bad_line_is_named() {
        let (before, broken) = error("a.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \n");
        assert_eq!(before, 1);
        assert!(broken.to_string().contains("a.jsonl:3: not a JSON object"), "{broken}");

        let (_, array) = error("a.jsonl", "[\"text\"]");
        assert!(array.to_string().contains("a.jsonl:1: not a JSON object"), "{array}");

        let (_, missing) = error("a.jsonl", r#"{"title": "", "body": ""}"#);
        assert!(missing.to_string().contains(r#"a.jsonl:1: there is no field "text""#), "{missing}");
        assert!(missing.hint().unwrap().contains("title, body"), "{missing:?}");

        let (_, number) = error("a.jsonl", r#"{"text": 5}"#);
        assert!(number.to_string().contains(r#"a.jsonl:1: the field "text" is not a string: 5"#), "{number}");

        let (_, bytes) = error("a.jsonl", b"{\"text\": \"\xff\"}");
        assert!(bytes.to_string().contains("a.jsonl:1"), "{bytes}");
    }

    #[test]
    fn a_named_file_must_be_text() {
        let (before, error) = error("a.txt", b"abc\xff");
        assert_eq!(before, 0);
        assert!(error.to_string().contains("a.txt is not UTF-8 text"), "{error}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn a_path_must_hold_something() {
        let dir = tempfile::tempdir().unwrap();
        let missing = documents(&dir.path().join("none"), "text").unwrap_err();
        assert!(missing.to_string().contains("none") && missing.hint().is_some(), "{missing}");
        write(&dir.path().join(".hidden"), "no");
        let empty = documents(dir.path(), "text").unwrap_err();
        assert!(empty.to_string().contains("holds no file to read"), "{empty}");
    }
}
