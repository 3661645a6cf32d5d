//! The predicted peak of resident memory beside that of a real run, in a process of its own.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;

use elapid::config::ModelConfig;

fn elapid(dir: &Path, args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_elapid")).current_dir(dir).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// MiB of `12.3 MiB`.
fn mebibytes(text: &str) -> f64 {
    text.strip_suffix(" MiB").unwrap_or_else(|| panic!("{text:?} is no size")).parse().unwrap()
}

#[test]
fn predicted_memory_is_that_of_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("text"), "A line of text.\n".repeat(1000)).unwrap();
    elapid(
        dir,
        &["tokenize", "--dataset", "text", "--tokenizer", "bytes", "--seq-len", "512", "--save-path", "data"],
    );
    // 10 million parameters, of which the vocabulary is half, as in small models.
    let config = ModelConfig {
        hidden_size: 256,
        num_heads: 8,
        head_dim: 64,
        state_size: 64,
        num_hidden_layers: 8,
        vocab_size: 20_000,
        ..ModelConfig::preset("tiny").unwrap()
    };
    std::fs::write(dir.join("config.json"), config.to_json()).unwrap();
    for (dtype, checkpointing, mesh) in [
        ("float32", "none", ""),
        ("float32", "none", "--checkpoint-freq 1"),
        ("float32", "block", ""),
        ("bfloat16", "none", ""),
        ("bfloat16", "block", ""),
        ("float32", "none", "--tp 2"),
        ("bfloat16", "none", "--tp 2 --sequence-parallel-enabled"),
        ("bfloat16", "block", "--tp 2"),
        ("bfloat16", "none", "--dp 2 --use-zero-1"),
        ("bfloat16", "none", "--dp 2 --use-zero-1 --checkpoint-freq 1"),
    ] {
        let run = format!("{dtype}-{checkpointing}{}", mesh.replace(' ', ""));
        #[rustfmt::skip]
        let mut args = vec![
            "train", "--model", "config.json", "--data-dir", "data", "--batch", "2", "--max-steps", "2", "--threads", "2",
            "--dtype", dtype, "--activation-checkpointing", checkpointing, "--output-dir", &run,
        ];
        args.extend(mesh.split_whitespace());
        let out = elapid(dir, &args);
        let line = out.lines().find_map(|line| line.strip_prefix("peak memory ")).expect("a line on memory");
        let (measured, predicted) = line.split_once(" (predicted ").unwrap();
        let ratio = mebibytes(predicted.trim_end_matches(')')) / mebibytes(measured);
        println!("{run}: {line}, ratio {ratio:.3}");
        assert!((ratio - 1.0).abs() < 0.15, "{run}: {line}");
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_it_leaves_anything() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("text"), "A line of text.\n".repeat(100)).unwrap();
    elapid(
        dir,
        &["tokenize", "--dataset", "text", "--tokenizer", "bytes", "--seq-len", "64", "--save-path", "data"],
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
    let flags = ["train", "--model", "tiny", "--data-dir", "data", "--max-steps", "1", "--output-dir", "run"];
    let output = command.current_dir(dir).args(flags).args(["--batch", "1000000000"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(stderr.contains("error: the run needs about") && stderr.contains("hint: "), "{stderr}");
    assert!(!dir.join("run").exists());
}
