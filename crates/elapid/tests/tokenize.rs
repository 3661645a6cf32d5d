//! `elapid tokenize` as a program.

use std::path::Path;
use std::process::{Command, Output};

fn tokenize(dir: &Path, flags: &[&str]) -> Output {
    let flags = ["tokenize", "--dataset", "corpus.jsonl", "--tokenizer", "bytes"].iter().chain(flags);
    Command::new(env!("CARGO_BIN_EXE_elapid")).current_dir(dir).args(flags).output().unwrap()
}

#[test]
fn json_is_one_object_on_stdout() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("corpus.jsonl"), "{\"body\": \"abcdé\"}\n{\"body\": \"gh\"}\n").unwrap();
    let flags = [
        "--text_column",
        "body",
        "--seq_len=4",
        "--save_path=data",
        "--append-eos",
        "--num-proc=2",
        "--json",
    ];
    let output = tokenize(dir.path(), &flags);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = serde_json::json!({
        "documents": 2, "tokens": 8, "blocks": 2, "bytes": 8, "dropped_tokens": 2, "seq_len": 4, "vocab_size": 257,
        "save_path": "data",
    });
    assert_eq!(object, expected);
    assert!(dir.path().join("data/tokenizer/tokenizer.json").exists());
}

#[test]
fn a_bad_line_is_an_error_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("corpus.jsonl"), "{\"body\": \"abcd\"}\n").unwrap();
    let output = tokenize(dir.path(), &["--seq-len=2", "--save-path=data"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]));
    assert!(stderr.contains("error: corpus.jsonl:1: there is no field \"text\"\nhint: "), "{stderr}");
    assert!(!dir.path().join("data").exists());
}
