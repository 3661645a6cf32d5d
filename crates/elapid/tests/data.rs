//! Datasets that Python's `datasets` wrote (`tools/golden.py`), whole and damaged.
#![allow(missing_docs)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use elapid::data::Dataset;
use serde_json::Value;
use tempfile::TempDir;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/datasets")
}

fn expected() -> serde_json::Map<String, Value> {
    serde_json::from_str(&fs::read_to_string(golden().join("expected.json")).unwrap()).unwrap()
}

#[test]
fn every_arrow_type_that_datasets_writes_reads_the_same() {
    let cases = expected();
    for (name, case) in &cases {
        if name == "ragged" {
            continue;
        }
        let data = Dataset::open(&golden().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let rows: Vec<Vec<i32>> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        let labels = match case.get("labels") {
            Some(labels) => serde_json::from_value(labels.clone()).unwrap(),
            None => rows.clone(),
        };
        assert_eq!((data.len(), data.seq_len()), (rows.len(), rows[0].len()), "{name}");
        for (i, (ids, labels)) in rows.iter().zip(&labels).enumerate() {
            let sample = data.sample(i).unwrap();
            assert_eq!((&sample.input_ids, &sample.labels), (ids, labels), "{name} row {i}");
        }
    }
    assert!(cases.len() >= 10);
}

#[test]
fn of_splits_the_training_one_is_read() {
    let open = |name: &str| Dataset::open(&golden().join(name)).unwrap();
    let (whole, train) = (open("splits"), open("splits/train"));
    assert_eq!(whole.len(), train.len());
    assert!((0..train.len()).all(|row| whole.sample(row).unwrap() == train.sample(row).unwrap()));
    assert_ne!(open("splits/test").len(), whole.len());
}

#[test]
fn rows_of_different_lengths_are_refused() {
    let error = Dataset::open(&golden().join("ragged")).err().unwrap();
    assert!(error.to_string().contains("data-00000-of-00001.arrow: row "), "{error}");
    assert!(error.hint().is_some());
}

/// Opens the dataset and reads every row. Any answer will do but a panic; true where it was Ok.
fn survives(dir: &Path, what: &str) -> bool {
    let read = || {
        let mut data = Dataset::open(dir)?;
        data.check_vocab(1000)?;
        (0..data.len()).try_for_each(|row| data.sample(row).map(|_| ()))
    };
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            assert!(error.hint().is_some(), "{what}: {error}");
            false
        }
        Err(_) => panic!("{what}: a panic"),
    }
}

/// One copy of each single-file dataset: (name, folder, shard, its bytes).
fn copies(room: &TempDir) -> Vec<(String, PathBuf, PathBuf, Vec<u8>)> {
    let names = expected().into_iter().map(|(name, _)| name).filter(|name| name != "ragged");
    let copies = names.filter_map(|name| {
        let shard = golden().join(&name).join("data-00000-of-00001.arrow");
        let bytes = fs::read(&shard).ok()?;
        let dir = room.path().join(&name);
        fs::create_dir_all(&dir).unwrap();
        fs::copy(golden().join(&name).join("state.json"), dir.join("state.json")).unwrap();
        let shard = dir.join("data-00000-of-00001.arrow");
        Some((name, dir, shard, bytes))
    });
    copies.collect()
}

#[test]
fn truncated_shards_are_refused() {
    let room = TempDir::new().unwrap();
    let copies = copies(&room);
    assert!(copies.len() >= 7);
    for (name, dir, shard, bytes) in copies {
        for length in (0..bytes.len()).step_by(61).chain(bytes.len() - 16..bytes.len()) {
            fs::write(&shard, &bytes[..length]).unwrap();
            assert!(!survives(&dir, &format!("{name} cut to {length}")), "{name} cut to {length} was read");
        }
    }
}

#[test]
fn flipped_bytes_are_refused_or_read_as_other_data() {
    let room = TempDir::new().unwrap();
    let (mut good, mut bad) = (0, 0);
    for (name, dir, shard, bytes) in copies(&room) {
        for at in (0..bytes.len()).step_by(5) {
            for mask in [0xff, 0x01] {
                let mut damaged = bytes.clone();
                damaged[at] ^= mask;
                fs::write(&shard, &damaged).unwrap();
                *if survives(&dir, &format!("{name}: byte {at} ^ {mask:#x}")) {
                    &mut good
                } else {
                    &mut bad
                } += 1;
            }
        }
    }
    assert!(good > 0 && bad > 0);
}

#[test]
fn damaged_state_files_are_refused() {
    let room = TempDir::new().unwrap();
    let (_, dir, shard, bytes) = copies(&room).remove(0);
    fs::write(shard, bytes).unwrap();
    assert!(survives(&dir, "whole"));
    let state = fs::read_to_string(dir.join("state.json")).unwrap();
    let missing = state.replace("data-00000", "data-00007");
    for text in [
        "",
        "{",
        "[]",
        "{}",
        "null",
        r#"{"_data_files": []}"#,
        r#"{"_data_files": [{}]}"#,
        r#"{"_data_files": 3}"#,
        &missing,
    ] {
        fs::write(dir.join("state.json"), text).unwrap();
        assert!(!survives(&dir, text), "{text}");
    }
}
