//! The real binary, in a folder of its own, on a model of a few thousand parameters.
#![allow(missing_docs, dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, ListArray, RecordBatch};
use arrow_ipc::writer::StreamWriter;
use serde_json::Value;
use tempfile::TempDir;

/// V = 257, as the `bytes` tokenizer has it.
pub(crate) const CONFIG: &str = r#"{"model_type": "mamba2", "num_heads": 4, "head_dim": 8, "hidden_size": 16,
    "state_size": 8, "num_hidden_layers": 2, "n_groups": 2, "vocab_size": 257, "chunk_size": 16,
    "tie_word_embeddings": true, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256}"#;

/// A folder with `tiny.json` and `text.txt` in it.
pub(crate) struct Room(pub(crate) TempDir);

impl Room {
    pub(crate) fn new() -> Self {
        let room = Self(TempDir::new().unwrap());
        room.write("tiny.json", CONFIG);
        let text: String = (0..40).map(|i| format!("Line {i} says that {} is no prime. ", i * 7)).collect();
        room.write("text.txt", &text);
        room
    }

    /// With the text tokenized in blocks of 32 into `data`.
    pub(crate) fn with_data() -> Self {
        let room = Self::new();
        room.ok("tokenize --dataset text.txt --tokenizer bytes --seq-len 32 --save-path data --append-eos");
        room
    }

    /// And with a model trained for three steps in `run`.
    pub(crate) fn with_model() -> Self {
        let room = Self::with_data();
        room.ok(&format!("{TRAIN} --output-dir run"));
        room
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        // Names that are no paths are not to be looked for elsewhere.
        command.args(args).current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1");
        command
    }

    /// The command line, split at blanks.
    pub(crate) fn run(&self, line: &str) -> Output {
        self.command(&line.split_whitespace().collect::<Vec<_>>()).output().unwrap()
    }

    /// stdout of a command that must succeed.
    pub(crate) fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}\n{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one JSON object that a command prints.
    pub(crate) fn json(&self, line: &str) -> Value {
        one_object(&self.ok(line))
    }

    /// stderr of a command that must fail in order: `error:` with all of `expected`, `hint:`, nothing on stdout.
    pub(crate) fn refuses(&self, line: &str, expected: &[&str]) -> String {
        let output = self.run(line);
        let said = failed_in_order(&output);
        for part in expected {
            assert!(said.contains(part), "{line}: no {part:?} in\n{said}");
        }
        assert!(output.stdout.is_empty(), "{line}");
        said
    }

    pub(crate) fn metrics(&self, run: &str) -> Vec<Value> {
        let lines = self.read(&format!("{run}/metrics.jsonl"));
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The losses of a run, as they stand in the file.
    pub(crate) fn losses(&self, run: &str) -> Vec<f64> {
        self.metrics(run).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    }

    /// Names in a folder, sorted.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Three steps on `data`.
pub(crate) const TRAIN: &str = "train --model tiny.json --data-dir data --max-steps 3";

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// stderr of a failure that is no panic and no signal.
pub(crate) fn failed_in_order(output: &Output) -> String {
    let said = stderr(output);
    assert!(matches!(output.status.code(), Some(1..=99)), "{:?}\n{said}", output.status);
    assert!(!said.contains("panicked"), "{said}");
    assert!(said.contains("error: ") && said.contains("hint: "), "{said}");
    said
}

pub(crate) fn one_object(stdout: &str) -> Value {
    let value: Value = serde_json::from_str(stdout).unwrap_or_else(|cause| panic!("{cause}: {stdout:?}"));
    assert!(value.is_object() && stdout.lines().count() == 1, "{stdout}");
    value
}

/// A dataset folder with these rows, as `datasets` lays it out; no card, no tokenizer.
pub(crate) fn write_dataset(dir: &Path, ids: &[Vec<Option<i32>>], labels: &[Vec<Option<i32>>]) {
    fs::create_dir_all(dir).unwrap();
    let column = |rows: &[Vec<Option<i32>>]| -> ArrayRef {
        let rows = rows.iter().map(|row| Some(row.iter().copied()));
        Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(rows))
    };
    let batch = RecordBatch::try_from_iter([("input_ids", column(ids)), ("labels", column(labels))]).unwrap();
    let file = fs::File::create(dir.join("data-00000-of-00001.arrow")).unwrap();
    let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    fs::write(dir.join("state.json"), r#"{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}"#)
        .unwrap();
}
