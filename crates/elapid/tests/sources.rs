//! Text files and a tokenizer that Python's libraries wrote (`tools/golden_sources.py`), whole and damaged.
#![allow(missing_docs)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use elapid::Error;
use elapid::data::{Source, SourceOptions, Tokenizer};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn expected() -> Vec<String> {
    serde_json::from_slice(&fs::read(golden("sources/expected.json")).unwrap()).unwrap()
}

fn read(path: &Path, column: &str, split: Option<&str>) -> Result<Vec<String>, Error> {
    let options = SourceOptions { text_column: column.into(), split: split.map(str::to_owned), config: None };
    let source = Source::open(path, &options)?;
    source.documents(0).map(|part| part.map(|part| part.text)).collect()
}

#[test]
fn every_format_gives_the_same_texts() {
    let texts = expected();
    assert!(texts.len() > 10);
    let mut formats = 0;
    for entry in fs::read_dir(golden("sources")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let column = match &name[..] {
            "expected.json" | "nulls.parquet" => continue,
            "nested.parquet" => "meta.text",
            _ => "text",
        };
        let read = read(&path, column, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(read, texts, "{name}");
        formats += 1;
    }
    assert!(formats >= 20, "{formats}");
}

#[test]
fn a_split_is_chosen_by_name() {
    let splits = golden("sources/splits");
    assert_eq!(read(&splits, "text", Some("test")).unwrap(), expected()[2..4]);
    let error = read(&splits, "text", Some("dev")).unwrap_err();
    assert!(error.to_string().contains("no split \"dev\""), "{error}");
    assert!(error.hint().unwrap().contains("train, test"), "{error:?}");
    // A single dataset has none to choose from.
    let error = read(&golden("sources/saved"), "text", Some("test")).unwrap_err();
    assert!(error.to_string().contains("no split \"test\"") && error.hint().is_some(), "{error}");
}

#[test]
fn columns_that_do_not_serve_are_named_with_those_there_are() {
    for (file, column, expected, hint) in [
        ("zstd.parquet", "body", "no column \"body\"", "id, text, title"),
        ("zstd.parquet", "id", "\"id\" holds no text", "id, text, title"),
        ("nested.parquet", "text", "no column \"text\"", "meta.text"),
        ("stream.arrow", "body", "no column \"body\"", "id, text, title"),
        ("stream.arrow", "id", "\"id\" holds no text but Int64", "text"),
        ("saved", "body", "no column \"body\"", "id, text"),
        ("lines.jsonl.zst", "body", "lines.jsonl.zst:1: there is no field \"body\"", "id, text"),
        ("array.json", "id", "object 1: the field \"id\" is not a string: 0", "--text-column"),
        ("table.csv", "body", "no column \"body\"", "id, text"),
        ("nulls.parquet", "text", "the text of row 1 is null", "--text-column"),
    ] {
        let error = read(&golden("sources").join(file), column, None).unwrap_err();
        assert!(error.to_string().contains(expected), "{file}: {error}");
        assert!(error.hint().is_some_and(|text| text.contains(hint)), "{file}: {error:?}");
    }
}

/// Reads a damaged copy of a file. Any answer will do but a panic and an error without a hint.
fn survives(dir: &Path, name: &str, bytes: &[u8], what: &str) -> Option<Vec<String>> {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    match catch_unwind(AssertUnwindSafe(|| read(&path, "text", None))) {
        Ok(Ok(texts)) => Some(texts),
        Ok(Err(error)) => {
            assert!(error.hint().is_some(), "{name} {what}: {error}");
            None
        }
        Err(_) => panic!("{name} {what}: a panic"),
    }
}

#[test]
fn files_that_are_cut_off_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "zstd.parquet",
        "none.parquet",
        "groups.parquet",
        "stream.arrow",
        "feather.arrow",
        "lines.jsonl.zst",
        "lines.jsonl.gz",
    ] {
        let bytes = fs::read(golden("sources").join(name)).unwrap();
        for length in (1..bytes.len()).step_by(37).chain(bytes.len() - 8..bytes.len()) {
            let read = survives(dir.path(), name, &bytes[..length], &format!("cut to {length}"));
            // A stream of whole frames or members is whole.
            let half =
                read.as_ref().is_some_and(|read| name.starts_with("lines") && expected().starts_with(read));
            assert!(read.is_none() || half, "{name} cut to {length} was read");
        }
    }
}

#[test]
fn damaged_files_do_not_end_the_process() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "zstd.parquet",
        "plain.parquet",
        "pages_v2_snappy.parquet",
        "delta.parquet",
        "gzip.parquet",
        "stream.arrow",
        "lines.jsonl.zst",
    ] {
        let bytes = fs::read(golden("sources").join(name)).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            for mask in [0xff, 0x01] {
                let mut damaged = bytes.clone();
                damaged[at] ^= mask;
                survives(dir.path(), name, &damaged, &format!("byte {at} ^ {mask:#x}"));
            }
        }
    }
}

/// GPT-NeoX's pipeline: the ids that Python's `tokenizers` gives, of texts in many scripts and of very long lines.
#[test]
fn a_neox_tokenizer_gives_the_ids_of_the_python_library() {
    let expected: Value = serde_json::from_slice(&fs::read(golden("neox/expected.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::load(golden("neox").to_str().unwrap()).unwrap();
    assert_eq!(tokenizer.vocab_size() as u64, expected["vocab_size"].as_u64().unwrap());
    assert_eq!(tokenizer.eos_id(), Some(0));
    let samples = expected["samples"].as_array().unwrap();
    assert!(samples.len() > 15);
    for sample in samples {
        let text = sample["text"].as_str().unwrap();
        assert_eq!(serde_json::json!(tokenizer.encode(text).unwrap()), sample["ids"], "{text:?}");
    }
    for long in expected["long"].as_array().unwrap() {
        let pattern = long["pattern"].as_str().unwrap();
        let ids = tokenizer.encode(&pattern.repeat(long["times"].as_u64().unwrap() as usize)).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        assert_eq!(ids.len() as u64, long["tokens"].as_u64().unwrap(), "{pattern:?}");
        assert_eq!(u64::from(crc32fast::hash(&bytes)), long["crc32"].as_u64().unwrap(), "{pattern:?}");
    }
}
