//! A tiny training run, as a program.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use elapid::data::{Card, DatasetWriter};
use serde_json::Value;

pub(crate) const VOCAB: u32 = 64;

/// Writes a dataset of random blocks of 16 tokens, with `documents` that begin inside and between blocks.
pub(crate) fn dataset(dir: &Path, seed: u32, blocks: u64, documents: bool) {
    let mut writer = DatasetWriter::create(dir, 16, documents).unwrap();
    let mut x = seed;
    let mut document = 0;
    for _ in 0..blocks {
        let ids: Vec<u32> = (0..16)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 16) % VOCAB
            })
            .collect();
        let begins = |(place, id): (usize, &u32)| *id < 5 || place == 0 && id.is_multiple_of(2);
        let of_tokens: Vec<i32> = (ids.iter().enumerate())
            .map(|token| {
                document += i32::from(begins(token));
                document
            })
            .collect();
        writer.push(&ids, documents.then_some(&of_tokens)).unwrap();
    }
    let card = Card {
        tokenizer: "none".into(),
        vocab_size: VOCAB as usize,
        eos_id: None,
        seq_len: 16,
        append_eos: false,
        document_ids: documents,
        documents: 1,
        tokens: blocks * 16,
        dropped_tokens: 0,
        bytes: blocks * 16,
        source: "random".into(),
        ..Card::default()
    };
    writer.finish(&card).unwrap();
}

/// A folder with `data`, `other` (another dataset of the same extents) and `model.json`.
pub(crate) fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    dataset(&dir.path().join("data"), 1, 37, false);
    dataset(&dir.path().join("other"), 2, 37, false);
    let config = serde_json::json!({
        "model_type": "mamba2", "num_heads": 4, "head_dim": 16, "hidden_size": 32, "expand": 2, "state_size": 8,
        "n_groups": 2, "num_hidden_layers": 2, "vocab_size": VOCAB, "chunk_size": 8, "tie_word_embeddings": true,
    });
    fs::write(dir.path().join("model.json"), config.to_string()).unwrap();
    dir
}

/// The words of a command line.
pub(crate) fn words(flags: &str) -> Vec<String> {
    let fixed = "train --model model.json --data-dir data --lr 1e-2 --warmup-steps 1 --threads 1";
    fixed.split(' ').chain(flags.split(' ')).map(str::to_owned).collect()
}

pub(crate) fn command(dir: &Path, flags: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
    command.current_dir(dir).args(words(flags)).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn run(dir: &Path, flags: &str) -> Output {
    command(dir, flags).output().unwrap()
}

/// Runs to the end; gives stderr.
pub(crate) fn succeed(dir: &Path, flags: &str) -> String {
    let output = run(dir, flags);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{flags}: {stderr}");
    stderr
}

/// Runs into an error; gives stderr.
pub(crate) fn fail(dir: &Path, flags: &str) -> String {
    let output = run(dir, flags);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{flags}: {stderr}");
    assert!(stderr.contains("error: ") && stderr.contains("hint: "), "{stderr}");
    stderr
}

pub(crate) fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Waits until `condition` holds; false where that takes longer than 20 s.
pub(crate) fn wait_for(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > Duration::from_secs(20) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// What of `metrics.jsonl` does not depend on the speed of the machine.
pub(crate) fn metrics(run: &Path) -> Vec<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let [step, loss, norm, lr, tokens, eval] =
                ["step", "loss", "grad_norm", "lr", "tokens", "eval_loss"]
                    .map(|name| record[name].to_string());
            format!("{step} {loss} {norm} {lr} {tokens} {eval}")
        })
        .collect()
}

pub(crate) fn model(run: &Path) -> Vec<u8> {
    fs::read(run.join("hf/model.safetensors")).unwrap()
}

/// Checkpoints, oldest first.
pub(crate) fn checkpoints(run: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut found: Vec<_> =
        paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("step-")).collect();
    found.sort();
    found
}

/// Names in the checkpoint folder that begin as unfinished and retired ones do.
pub(crate) fn leftovers(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(".step-")).collect()
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
}
