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

/// Every file below a folder, by its path.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let (mut files, mut folders) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push((
                    path.strip_prefix(dir).unwrap().display().to_string(),
                    std::fs::read(&path).unwrap(),
                ));
            }
        }
    }
    files.sort();
    files
}

/// Twenty kills at random moments, and each time the same command: the bytes are those of a run that nobody disturbed.
#[test]
fn kill_9_at_any_moment_comes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..150_000).map(|i| format!("{{\"text\": \"{} is number {i}\"}}\n", i * i)).collect();
    std::fs::write(dir.path().join("corpus.jsonl"), text).unwrap();
    let flags =
        ["--seq-len=64", "--append-eos", "--val-fraction=0.3", "--max-shard-size=1MB", "--num-proc=2"];
    let start = std::time::Instant::now();
    let straight = tokenize(dir.path(), &[&flags[..], &["--save-path=straight"]].concat());
    assert!(straight.status.success());
    let time = start.elapsed();
    let expected = files(&dir.path().join("straight"));
    assert!(expected.len() > 15, "{}", expected.len());

    let data = dir.path().join("data");
    let whole = || {
        assert!(files(&data) == expected);
        std::fs::remove_dir_all(&data).unwrap();
    };
    let (mut kills, mut x, mut resumed) = (0, 1u32, 0);
    while kills < 20 {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let mut child = Command::new(env!("CARGO_BIN_EXE_elapid"))
            .current_dir(dir.path())
            .args(["tokenize", "--dataset", "corpus.jsonl", "--tokenizer", "bytes", "--save-path=data"])
            .args(flags)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(time.mul_f64(f64::from(x >> 16) / 65536.0));
        resumed += usize::from(dir.path().join(".data.partial/progress.json").exists());
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
        // Where it is there, it is whole.
        if data.exists() {
            whole();
        }
    }
    assert!(resumed > 5, "{resumed}");
    assert!(tokenize(dir.path(), &[&flags[..], &["--save-path=data"]].concat()).status.success());
    whole();
}
