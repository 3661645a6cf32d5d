//! Evaluation while a model trains.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn elapid(dir: &Path, args: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_elapid")).current_dir(dir).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn dataset(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join("text"), text).unwrap();
    let flags =
        ["--dataset", "text", "--tokenizer", "bytes", "--seq-len", "16", "--append-eos", "--save-path", name];
    let (ok, _, err) = elapid(dir, &[&["tokenize"], &flags[..]].concat());
    assert!(ok, "{err}");
}

/// The lines of `metrics.jsonl` of a run with these flags.
fn train(dir: &Path, name: &str, flags: &[&str]) -> Vec<Value> {
    #[rustfmt::skip]
    let common = [
        "train", "--model", "tiny", "--max-steps", "5", "--batch", "3", "--shuffle", "--lr", "1e-2", "--output-dir", name,
    ];
    let (ok, _, err) = elapid(dir, &[&common, flags].concat());
    assert!(ok, "{err}");
    let lines = std::fs::read_to_string(dir.join(name).join("metrics.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn evaluate(dir: &Path, model: &str, flags: &[&str]) -> Value {
    let (ok, out, err) =
        elapid(dir, &[&["eval", "--json", "--batch", "3", "--model", model], flags].concat());
    assert!(ok, "{err}");
    serde_json::from_str(&out).unwrap()
}

fn field(lines: &[Value], name: &str) -> Vec<Option<f64>> {
    lines.iter().map(|line| line.get(name).map(|value| value.as_f64().unwrap())).collect()
}

#[test]
fn evaluation_leaves_training_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text = "Rings and snakes, and the rest of it.\n";
    // 31·16 + 8 tokens: 31 blocks and some tokens that fill none.
    dataset(dir, "all", &text.repeat(14)[..503]);
    dataset(dir, "other", &"Something else. ".repeat(10));

    let part = ["--data-dir", "all", "--eval-fraction", "0.2", "--eval-freq", "2"];
    let held_out = train(dir, "held_out", &part);
    let last = train(dir, "last", &part[..4]);
    assert_eq!(field(&held_out, "loss"), field(&last, "loss"));
    let evaluated =
        |lines: &[Value]| field(lines, "eval_loss").iter().map(Option::is_some).collect::<Vec<_>>();
    assert_eq!(evaluated(&held_out), [false, true, false, true, true]);
    assert_eq!(evaluated(&last), [false, false, false, false, true]);

    let plain = train(dir, "plain", &["--data-dir", "all"]);
    let beside = train(dir, "beside", &["--data-dir", "all", "--eval-data-dir", "other", "--eval-freq", "1"]);
    assert_eq!(field(&plain, "loss"), field(&beside, "loss"));
    assert_eq!(field(&plain, "grad_norm"), field(&beside, "grad_norm"));
    assert_eq!(evaluated(&plain), [false; 5]);
    assert_eq!(evaluated(&beside), [true; 5]);

    // What the run reports is what `eval` finds in the model that it leaves.
    for (run, lines, flags) in [
        ("held_out/hf", &held_out, &["--data-dir", "all", "--eval-fraction", "0.2"][..]),
        ("beside/hf", &beside, &["--data-dir", "other"]),
    ] {
        let again = evaluate(dir, run, flags);
        let last = lines.last().unwrap();
        assert_eq!(last["eval_loss"], again["loss"]);
        assert_eq!(last["eval_perplexity"], again["perplexity"]);
        assert_eq!(last["eval_bits_per_byte"], again["bits_per_byte"]);
    }
    // 6 of 31 blocks, 15 labels each. 503 bytes are 504 tokens.
    let result = evaluate(dir, "plain/hf", &["--data-dir", "all", "--eval-fraction", "0.2"]);
    assert_eq!(result["tokens"], 6 * 15);
    let bits = result["loss"].as_f64().unwrap() / std::f64::consts::LN_2 * 504.0 / 503.0;
    assert!((result["bits_per_byte"].as_f64().unwrap() - bits).abs() < 1e-12, "{result}");

    // A dataset that does not know its bytes.
    std::fs::remove_file(dir.join("other/dataset_card.json")).unwrap();
    assert_eq!(evaluate(dir, "plain/hf", &["--data-dir", "other"])["bits_per_byte"], Value::Null);
    let silent = train(dir, "silent", &["--data-dir", "all", "--eval-data-dir", "other"]);
    assert_eq!(field(&silent, "eval_bits_per_byte"), [None; 5]);
    assert!(field(&silent, "eval_loss")[4].is_some());
}

#[test]
fn held_out_blocks_are_never_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Two texts that differ in their last block only: the held-out one.
    for (name, end) in [("a", "x"), ("b", "y")] {
        dataset(dir, name, &format!("{}{}", "abcdefghijklmnop".repeat(4), end.repeat(15)));
    }
    let runs = ["a", "b"].map(|name| {
        let run = format!("run_{name}");
        train(dir, &run, &["--data-dir", name, "--eval-fraction", "0.01"])
    });
    assert_eq!(field(&runs[0], "loss"), field(&runs[1], "loss"));
    assert_ne!(field(&runs[0], "eval_loss"), field(&runs[1], "eval_loss"));
}

#[test]
fn contradictions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    dataset(dir, "data", "abcdefghijklmno");
    for (flags, expected) in [
        (&["--eval-fraction", "1"][..], "--eval-fraction is 1"),
        (&["--eval-fraction", "0.5"], "data: --eval-fraction 0.5 of 1 blocks leaves none"),
        (&["--eval-freq", "5"], "nothing to evaluate on"),
        (&["--eval-fraction", "0.5", "--eval-data-dir", "data"], "are both given"),
        (&["--eval-data-dir", "missing"], "missing does not exist"),
        (&["--eval-data-dir", "data", "--eval-freq", "0"], "--eval-freq is 0"),
        (&["--decay-steps", "1"], "--lr-schedule is not wsd"),
        (&["--lr-schedule", "wsd", "--decay-steps", "6"], "more than the 5 steps"),
    ] {
        let common =
            ["train", "--model", "tiny", "--data-dir", "data", "--max-steps", "5", "--output-dir", "run"];
        let (ok, _, err) = elapid(dir, &[&common, flags].concat());
        assert!(!ok && err.contains(expected) && err.contains("hint: "), "{flags:?}: {err}");
        assert!(!dir.join("run").exists(), "{flags:?}");
    }
}
