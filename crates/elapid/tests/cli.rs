//! What the commands promise to whoever calls them.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::slice::from_ref;

use common::{Room, TRAIN, one_object, stderr, write_dataset};
use serde_json::{Value, json};

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn t24_tokenize_json_counts_every_token() {
    let room = Room::new();
    let line =
        "tokenize --dataset text.txt --tokenizer bytes --seq_len 32 --save_path data --append_eos --json";
    let object = room.json(line);
    let count = |name: &str| object[name].as_u64().unwrap();
    assert_eq!(count("bytes"), room.read("text.txt").len() as u64);
    assert_eq!(count("documents"), 1);
    assert_eq!(count("tokens") + count("dropped_tokens"), count("bytes") + 1);
    assert_eq!(count("blocks") * 32, count("tokens"));
    assert_eq!(room.names("."), ["data", "text.txt", "tiny.json"]);
}

#[test]
fn train_leaves_metrics_settings_and_a_model() {
    let room = Room::with_model();
    let metrics = room.metrics("run");
    let fields = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "mfu"];
    for (i, line) in metrics.iter().enumerate() {
        assert_eq!(keys(line), BTreeSet::from(fields));
        assert_eq!(line["step"], i + 1);
        assert_eq!(line["tokens"], 32 * (i + 1));
        assert!(fields.iter().all(|field| line[field].as_f64().is_some_and(f64::is_finite)), "{line}");
    }
    assert_eq!(metrics.len(), 3);
    assert_eq!(
        room.names("run/hf"),
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert!(room.read("run/run.toml").contains("max-steps = 3"));
    // A random model of V tokens has a loss near ln V.
    assert!((room.losses("run")[0] - 257f64.ln()).abs() < 0.2);
}

#[test]
fn the_same_seed_gives_the_same_bits_with_any_number_of_threads() {
    let room = Room::with_data();
    for (run, flags) in [("a", "--threads 1"), ("b", "--threads 2"), ("c", "--threads 1"), ("d", "--seed 1")]
    {
        room.ok(&format!("{TRAIN} --shuffle --batch 2 {flags} --output-dir {run}"));
    }
    let bits = |run| room.losses(run).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert_eq!(bits("a"), bits("b"));
    assert_eq!(bits("a"), bits("c"));
    assert_ne!(bits("a"), bits("d"));
    assert_eq!(
        fs::read(room.path("a/hf/model.safetensors")).unwrap(),
        fs::read(room.path("b/hf/model.safetensors")).unwrap()
    );
}

#[test]
fn t19_micro_steps_equal_one_batch() {
    let room = Room::with_data();
    room.ok(&format!("{TRAIN} --batch 2 --output-dir one"));
    room.ok(&format!("{TRAIN} --batch 1 --grad_accum_usteps 2 --output-dir two"));
    for (one, two) in room.metrics("one").iter().zip(room.metrics("two")) {
        for field in ["loss", "grad_norm"] {
            let (one, two) = (one[field].as_f64().unwrap(), two[field].as_f64().unwrap());
            assert!((one / two - 1.0).abs() < 1e-5, "{field}: {one} {two}");
        }
        assert_eq!(one["tokens"], two["tokens"]);
    }
}

#[test]
fn checkpointing_changes_no_loss_and_bf16_little() {
    let room = Room::with_data();
    room.ok(&format!("{TRAIN} --output-dir plain"));
    room.ok(&format!("{TRAIN} --activation-checkpointing block --output-dir block"));
    room.ok(&format!("{TRAIN} --dtype bfloat16 --output-dir bf16"));
    assert_eq!(room.losses("plain"), room.losses("block"));
    for (a, b) in room.losses("plain").iter().zip(room.losses("bf16")) {
        assert!((a - b).abs() < 2e-2 && *a != b, "{a} {b}");
    }
}

#[test]
fn old_command_lines_work() {
    let room = Room::with_data();
    let output = room.run(
        "train --model tiny.json --data_dir data --max_steps=9 --max_steps=2 --grad_accum_usteps=2 --backend xla \
         --debug --output_dir run",
    );
    assert!(output.status.success(), "{}", stderr(&output));
    for flag in ["--backend", "--debug"] {
        assert!(stderr(&output).contains(&format!("warning: {flag}")), "{}", stderr(&output));
    }
    assert_eq!(room.metrics("run")[1]["tokens"], 2 * 2 * 32);
    assert_eq!(room.losses("run").len(), 2);
}

#[test]
fn init_from_goes_on_where_the_model_was() {
    let room = Room::with_model();
    fs::create_dir(room.path("first")).unwrap();
    // The first block alone, without a tokenizer: the model brings its own.
    let block: Vec<_> = room.read("text.txt").bytes().take(32).map(|byte| Some(i32::from(byte))).collect();
    write_dataset(&room.path("first"), from_ref(&block), from_ref(&block));
    let loss = room.json("eval --model run/hf --data-dir first --json")["loss"].as_f64().unwrap();
    room.ok("train --init-from run/hf --data-dir first --max-steps 1 --output-dir on");
    assert!((room.losses("on")[0] - loss).abs() < 1e-5, "{} {loss}", room.losses("on")[0]);
    assert_ne!(loss, room.losses("run")[0]);
    assert_eq!(room.read("on/hf/tokenizer.json"), room.read("run/hf/tokenizer.json"));
}

#[test]
fn shuffling_reads_every_block_once_an_epoch() {
    let room = Room::new();
    // Each block is one token, repeated: with a rate of next to nothing its loss tells which it was.
    let rows: Vec<Vec<_>> = (0..6).map(|id| vec![Some(id * 40); 32]).collect();
    write_dataset(&room.path("data"), &rows, &rows);
    let line = "train --model tiny.json --data-dir data --lr 1e-30 --weight-decay 0";
    room.ok(&format!("{line} --max-steps 6 --output-dir plain"));
    room.ok(&format!("{line} --max-steps 12 --shuffle --output-dir mixed"));
    let sorted = |losses: &[f64]| {
        let mut losses = losses.to_vec();
        losses.sort_by(f64::total_cmp);
        losses
    };
    let (plain, mixed) = (room.losses("plain"), room.losses("mixed"));
    assert_ne!(plain, mixed[..6]);
    assert_ne!(mixed[..6], mixed[6..]);
    assert_eq!(sorted(&plain), sorted(&mixed[..6]));
    assert_eq!(sorted(&plain), sorted(&mixed[6..]));
}

#[test]
fn labels_of_minus_100_do_not_count() {
    let room = Room::with_model();
    let ids: Vec<_> = (0..16).map(|i| Some(i * 3)).collect();
    let mut labels = ids.clone();
    labels[8..].fill(Some(-100));
    write_dataset(&room.path("whole"), &[ids[..8].to_vec()], &[ids[..8].to_vec()]);
    write_dataset(&room.path("masked"), from_ref(&ids), &[labels]);
    let eval = |data: &str| room.json(&format!("eval --model run/hf --data-dir {data} --json"));
    let (whole, masked) = (eval("whole"), eval("masked"));
    assert_eq!(masked["tokens"], 7);
    assert_eq!(whole["tokens"], 7);
    let (whole, masked) = (whole["loss"].as_f64().unwrap(), masked["loss"].as_f64().unwrap());
    assert!((whole - masked).abs() < 1e-5, "{whole} {masked}");
    room.ok("train --init-from run/hf --data-dir masked --max-steps 1 --output-dir on");
    assert!((room.losses("on")[0] - whole).abs() < 1e-5);

    write_dataset(&room.path("mute"), &[ids], &[vec![Some(-100); 16]]);
    room.refuses("eval --model run/hf --data-dir mute --json", &["no label that counts"]);
    let output = room.run("train --init-from run/hf --data-dir mute --max-steps 1 --output-dir mute-run");
    assert!(common::failed_in_order(&output).contains("step 1: the batch has no label"));
}

#[test]
fn eval_json_is_one_object_whatever_the_batch() {
    let room = Room::with_model();
    let one = room.json("eval --model run/hf --data-dir data --json");
    assert_eq!(keys(&one), BTreeSet::from(["bits_per_byte", "loss", "perplexity", "tokens"]));
    let loss = one["loss"].as_f64().unwrap();
    assert!((one["perplexity"].as_f64().unwrap() / loss.exp() - 1.0).abs() < 1e-12);
    let blocks = one["tokens"].as_u64().unwrap() / 31;
    assert_eq!(one["tokens"], blocks * 31);
    // The last batch is a smaller one.
    let five = room.json("eval --model run/hf --data-dir data --batch 5 --json");
    assert!((five["loss"].as_f64().unwrap() - loss).abs() < 1e-5);
    assert_eq!(five["tokens"], one["tokens"]);
    let bf16 = room.json("eval --model run/hf --data-dir data --dtype bfloat16 --json");
    assert!((bf16["loss"].as_f64().unwrap() - loss).abs() < 2e-2);
}

#[test]
fn generate_json_and_text_say_the_same() {
    let room = Room::with_model();
    let line = "generate --model run/hf --prompt Line --max-new-tokens 24";
    for flags in ["--temperature 0", "--seed 3", "--seed 4", "--seed 5 --temperature 5 --top-p 1"] {
        let object = room.json(&format!("{line} {flags} --json"));
        assert_eq!(keys(&object), BTreeSet::from(["prompt_ids", "ids", "text"]));
        assert_eq!(object["prompt_ids"], json!([76, 105, 110, 101]));
        let text = room.ok(&format!("{line} {flags}"));
        assert_eq!(text, format!("Line{}\n", object["text"].as_str().unwrap()), "{flags}");
    }
    let draw = |seed| room.json(&format!("{line} --seed {seed} --json"))["ids"].clone();
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
}

#[test]
fn greedy_decoding_equals_repeated_prompts() {
    let room = Room::with_model();
    let next = |prompt: &[u64], count: usize| -> Vec<u64> {
        let ids: Vec<_> = prompt.iter().map(u64::to_string).collect();
        let object = room.json(&format!(
            "generate --model run/hf --prompt-ids {} --max-new-tokens {count} --temperature 0 --ignore-eos --json",
            ids.join(",")
        ));
        object["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    };
    // Longer than the chunk of 16, so that the prompt goes through the chunked scan and the state.
    let mut ids: Vec<u64> = (60..80).collect();
    let all = next(&ids, 6);
    for id in all {
        assert_eq!(next(&ids, 1), [id]);
        ids.push(id);
    }
}

#[test]
fn generation_ends_at_the_end_of_text_unless_told_otherwise() {
    let room = Room::with_model();
    let line = "generate --model run/hf --prompt a --max-new-tokens 8 --temperature 0 --json";
    let all = room.json(&format!("{line} --ignore-eos"))["ids"].as_array().unwrap().clone();
    assert_eq!(all.len(), 8);
    // The second token that comes is declared the end.
    let mut config: Value = serde_json::from_str(&room.read("run/hf/config.json")).unwrap();
    config["eos_token_id"] = json!([all[1], 256]);
    room.write("run/hf/config.json", &config.to_string());
    let end = all.iter().position(|id| *id == all[1]).unwrap();
    assert_eq!(room.json(line)["ids"], json!(all[..=end]));
    assert_eq!(room.json(&format!("{line} --ignore-eos"))["ids"], json!(all));
}

#[test]
fn ids_can_be_continued_without_a_tokenizer() {
    let room = Room::with_model();
    fs::remove_file(room.path("run/hf/tokenizer.json")).unwrap();
    let line = "generate --model run/hf --prompt-ids 1,2 --max-new-tokens 3 --temperature 0 --ignore-eos";
    let object = room.json(&format!("{line} --json"));
    assert_eq!(object["text"], Value::Null);
    let ids: Vec<_> = object["ids"].as_array().unwrap().iter().map(|id| format!(" {id}")).collect();
    assert_eq!(room.ok(line).trim_end(), format!("1 2{}", ids.concat()));
    room.refuses("generate --model run/hf --prompt a", &["run/hf", "tokenizer.json"]);
}

#[test]
fn quickstart_goes_all_the_way_on_text_of_ones_own() {
    let room = Room::new();
    room.write("mine.txt", &"All is well that ends well. ".repeat(200));
    let said = room.ok("quickstart --text mine.txt --max-steps 2 --output-dir q");
    for part in ["1. tokens", "2. training", "evaluation: loss", "3. a sample", "Next:"] {
        assert!(said.contains(part), "no {part}:\n{said}");
    }
    assert_eq!(room.losses("q/train").len(), 2);
    // The commands that it ends with work.
    room.json("eval --model q/train/hf --data-dir q/data --json");
    room.json("generate --model q/train/hf --prompt All --max-new-tokens 2 --json");
}

#[test]
fn golden_bpe_tokenizer_travels_from_text_to_sample() {
    let room = Room::new();
    let bpe = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokenizers/bpe");
    let object = room
        .json(&format!("tokenize --dataset text.txt --tokenizer {bpe} --seq-len 16 --save-path data --json"));
    let vocab = object["vocab_size"].as_u64().unwrap();
    room.ok(&format!("{TRAIN} --vocab-size {vocab} --output-dir run"));
    let answer = one_object(&room.ok("generate --model run/hf --prompt Line --max-new-tokens 4 --json"));
    assert!(answer["text"].is_string());
    assert_eq!(
        fs::read(room.path("run/hf/tokenizer.json")).unwrap(),
        fs::read(format!("{bpe}/tokenizer.json")).unwrap()
    );
}

/// A reader that goes away after the first bytes: `| head -1`, and `2>&1 | head -1`.
#[cfg(unix)]
#[test]
fn readers_may_leave_early() {
    let room = Room::with_model();
    let args =
        ["generate", "--model", "run/hf", "--prompt", "Line", "--max-new-tokens", "400", "--ignore-eos"];
    let mut child = room.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));

    let line = format!("{TRAIN} --output-dir on");
    let args: Vec<_> = line.split_whitespace().collect();
    let mut child = room.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(room.losses("on").len(), 3);
    assert!(room.path("on/hf/model.safetensors").exists());
}
