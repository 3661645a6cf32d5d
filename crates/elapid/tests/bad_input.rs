//! Every mistake gets an error that names it and a hint, and leaves nothing half-written.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{Room, TRAIN, failed_in_order, stderr, write_dataset};
use serde_json::{Value, json};

/// Training that must be refused with `expected`, and leave no run folder.
fn no_training(room: &Room, flags: &str, expected: &[&str]) -> String {
    let before = room.names(".");
    let said = room.refuses(&format!("{TRAIN} --output-dir run-x {flags}"), expected);
    assert_eq!(room.names("."), before, "{flags}");
    said
}

fn change_config(room: &Room, dir: &str, field: &str, value: Value) {
    let path = format!("{dir}/config.json");
    let mut config: Value = serde_json::from_str(&room.read(&path)).unwrap();
    config[field] = value;
    room.write(&path, &config.to_string());
}

/// The three commands that read a model folder, on `run/hf`.
const READERS: [&str; 3] = [
    "eval --model run/hf --data-dir data",
    "generate --model run/hf --prompt a",
    "train --init-from run/hf --data-dir data --max-steps 1 --output-dir run-x",
];

fn every_reader_refuses(room: &Room, expected: &[&str]) {
    let before = room.names(".");
    for line in READERS {
        room.refuses(line, expected);
    }
    assert_eq!(room.names("."), before);
}

#[test]
fn datasets_that_are_not_there_are_named() {
    let room = Room::with_model();
    no_training(&room, "--data-dir nowhere", &["nowhere does not exist"]);
    no_training(&room, "--data-dir run", &["run holds no state.json"]);
    room.refuses("eval --model run/hf --data-dir nowhere", &["nowhere does not exist"]);
}

#[test]
fn token_ids_beyond_the_vocabulary_are_located() {
    let room = Room::with_model();
    let mut ids = vec![vec![Some(1); 8]; 3];
    ids[2][5] = Some(257);
    let good = vec![vec![Some(1); 8]; 3];
    write_dataset(&room.path("ids"), &ids, &good);
    write_dataset(&room.path("labels"), &good, &ids);
    ids[2][5] = Some(-1);
    write_dataset(&room.path("negative"), &ids, &good);
    no_training(&room, "--data-dir ids", &["ids: row 2 has token 257 at position 5", "257 tokens"]);
    no_training(&room, "--data-dir labels", &["labels: row 2 has label 257 at position 5"]);
    no_training(&room, "--data-dir negative", &["row 2 has token -1 at position 5"]);
    room.refuses("eval --model run/hf --data-dir ids", &["row 2 has token 257 at position 5"]);
    // A vocabulary that is too small for a dataset with a card.
    no_training(
        &room,
        "--vocab-size 100",
        &["tokenizer of data (bytes) has 257 tokens", "the model's vocabulary has 100"],
    );
}

#[test]
fn nulls_in_a_dataset_are_not_read_as_tokens() {
    let room = Room::with_data();
    let good = vec![vec![Some(1); 8]; 2];
    let mut holed = good.clone();
    holed[1][3] = None;
    write_dataset(&room.path("ids"), &holed, &good);
    write_dataset(&room.path("labels"), &good, &holed);
    no_training(&room, "--data-dir ids", &["data-00000-of-00001.arrow", "null"]);
    no_training(&room, "--data-dir labels", &["data-00000-of-00001.arrow", "null"]);
}

#[test]
fn blocks_of_another_length_than_said_are_refused() {
    let room = Room::with_data();
    no_training(&room, "--seq-len 64", &["--seq-len is 64", "data", "32 tokens long"]);
}

#[test]
fn t24_a_dataset_with_rows_missing_is_refused() {
    let room = Room::with_data();
    let card = room.read("data/dataset_card.json").replace("\"tokens\": ", "\"tokens\": 3");
    room.write("data/dataset_card.json", &card);
    no_training(&room, "", &["data holds 42 rows of 32 tokens", "dataset_card.json says 31344 tokens"]);
}

#[test]
fn models_that_are_not_there_are_named() {
    let room = Room::with_data();
    room.refuses("eval --model nowhere --data-dir data", &["nowhere"]);
    room.refuses("generate --model nowhere --prompt a", &["there is no model folder nowhere"]);
    room.refuses("train --init-from nowhere --data-dir data --max-steps 1", &["nowhere"]);
    fs::create_dir(room.path("empty")).unwrap();
    room.refuses("eval --model empty --data-dir data", &["empty/config.json"]);
}

#[test]
fn weights_that_are_missing_or_cut_off_are_named() {
    let room = Room::with_model();
    let path = room.path("run/hf/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        let size = format!("({length} bytes)");
        every_reader_refuses(&room, &["run/hf/model.safetensors", &size]);
    }
    fs::remove_file(&path).unwrap();
    every_reader_refuses(&room, &["there is no model.safetensors in run/hf"]);
}

#[test]
fn weights_of_another_shape_name_both() {
    let room = Room::with_model();
    change_config(&room, "run/hf", "state_size", json!(16));
    every_reader_refuses(&room, &["in_proj.weight is [", "[132, 16]", "run/hf/model.safetensors"]);
}

#[test]
fn weights_that_are_not_numbers_are_located() {
    let room = Room::with_model();
    let path = room.path("run/hf/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    every_reader_refuses(&room, &["run/hf/model.safetensors", "backbone.norm_f.weight[15] is NaN"]);
}

#[test]
fn configurations_that_cannot_be_built_are_refused() {
    let room = Room::with_model();
    for (field, value, expected) in [
        ("model_type", json!("llama"), "\"llama\""),
        ("architectures", json!(["LlamaForCausalLM"]), "LlamaForCausalLM"),
        ("num_heads", json!(5), "num_heads · head_dim = 5 · 8 = 40"),
        ("n_groups", json!(3), "n_groups = 3"),
        ("hidden_size", json!(0), "hidden_size is 0"),
        ("hidden_size", json!(-1), "hidden_size is -1"),
        ("state_size", json!(u64::MAX), "state_size is 18446744073709551615"),
        ("vocab_size", json!("many"), "vocab_size is \"many\""),
        ("layer_norm_epsilon", json!(0), "layer_norm_epsilon is 0"),
    ] {
        let whole = room.read("run/hf/config.json");
        change_config(&room, "run/hf", field, value);
        every_reader_refuses(&room, &["run/hf/config.json", expected]);
        room.write("run/hf/config.json", &whole);
    }
    let whole = room.read("run/hf/config.json");
    room.write("run/hf/config.json", &whole[..whole.len() / 2]);
    every_reader_refuses(&room, &["run/hf/config.json", "not JSON"]);
}

#[test]
fn unknown_presets_get_the_nearest_name() {
    let room = Room::with_data();
    let said = no_training(&room, "--model mamba2_130m", &["\"mamba2_130m\""]);
    assert!(said.contains("did you mean mamba2-130m?"), "{said}");
    no_training(&room, "--model Mamba2Hybrid8B", &["Mamba2Hybrid8B", "attention"]);
}

#[test]
fn values_that_cannot_be_meant_are_refused() {
    let room = Room::with_data();
    for (flags, expected) in [
        ("--lr nan", "--lr is NaN"),
        ("--lr 0", "--lr is 0"),
        ("--lr inf", "--lr is inf"),
        ("--min-lr 1", "--min-lr is 1"),
        ("--batch 0", "--batch is 0"),
        ("--grad-accum-usteps 0", "--grad-accum-usteps is 0"),
        ("--max-steps 0", "--max-steps is 0"),
        ("--warmup-steps 4", "--warmup-steps 4 is more than --max-steps 3"),
        ("--beta1 1", "--beta1 is 1"),
        ("--beta2 1", "--beta2 is 1"),
        ("--beta2 nan", "--beta2 is NaN"),
        ("--eps 0", "--eps is 0"),
        ("--weight-decay inf", "--weight-decay is inf"),
        ("--max-grad-norm nan", "--max-grad-norm is NaN"),
        ("--threads 0", "--threads is 0"),
        ("--threads 100000", "--threads is 100000"),
        ("--n-groups 3", "n_groups = 3"),
        ("--vocab-size 0", "vocab_size is 0"),
        ("--max-steps 18446744073709551615 --batch 3 --grad-accum-usteps 5", "are too many samples"),
    ] {
        no_training(&room, flags, &[expected]);
    }
    room.refuses("generate --model run --prompt a --temperature nan", &["--temperature is NaN"]);
    room.refuses("generate --model run --prompt a --top-p 0", &["--top-p is 0"]);
}

#[test]
fn what_no_memory_holds_is_refused_before_it_is_allocated() {
    let room = Room::with_model();
    no_training(&room, "--vocab-size 2000000000 --model mamba2-2.7b", &["the run needs about", "moments"]);
    no_training(&room, "--batch 99999999999", &["the run needs about", "activations"]);
    change_config(&room, "run/hf", "vocab_size", json!(i32::MAX));
    change_config(&room, "run/hf", "hidden_size", json!(16384));
    change_config(&room, "run/hf", "num_heads", json!(4096));
    every_reader_refuses(&room, &["need", "of memory"]);
}

#[test]
fn a_run_folder_is_used_once() {
    let room = Room::with_model();
    let before = room.read("run/metrics.jsonl");
    room.refuses(&format!("{TRAIN} --output-dir run"), &["run already holds a run"]);
    assert_eq!(room.read("run/metrics.jsonl"), before);
    // Without --output-dir each run gets its own.
    room.ok(TRAIN);
    room.ok(TRAIN);
    assert_eq!(room.names("runs"), ["tiny", "tiny-2"]);
}

#[test]
fn two_trainings_never_share_a_folder() {
    let room = Room::with_data();
    let line = format!("{TRAIN} --max-steps 1000000 --output-dir run");
    let args: Vec<_> = line.split_whitespace().collect();
    let mut first = room.command(&args).stderr(Stdio::null()).spawn().unwrap();
    while !room.path("run/metrics.jsonl").exists() {
        assert!(first.try_wait().unwrap().is_none(), "the first run ended");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let second = room.run(&format!("{TRAIN} --output-dir run"));
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(failed_in_order(&second).contains("another process is training into run"));
    assert!(room.path("run/metrics.jsonl").exists());
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let room = Room::with_data();
    no_training(&room, "--output-dir text.txt", &["text.txt"]);
    no_training(&room, "--output-dir text.txt/run", &["text.txt/run"]);
    let tokenize = "tokenize --dataset text.txt --tokenizer bytes --seq-len 32 --save-path";
    room.refuses(&format!("{tokenize} text.txt/data"), &["text.txt"]);
    room.refuses(&format!("{tokenize} data"), &["data exists already"]);
    if cfg!(target_os = "linux") {
        // Not even root creates a folder there.
        no_training(&room, "--output-dir /proc/elapid", &["/proc/elapid"]);
        room.refuses(&format!("{tokenize} /proc/elapid/data"), &["/proc/elapid"]);
    }
}

#[test]
fn a_run_that_diverges_stops_before_the_update() {
    let room = Room::with_data();
    let output = room.run(&format!("{TRAIN} --lr 1e30 --lr-schedule constant --output-dir run"));
    let said = failed_in_order(&output);
    assert!(said.contains("step 2: loss") && said.contains("the update was not applied"), "{said}");
    assert_eq!(room.losses("run").len(), 1);
    assert!(!room.path("run/hf").exists());
    // Where the last step is the one that ruins the parameters, the export notices.
    let output = room.run(&format!("{TRAIN} --lr 1e300 --max-steps 1 --output-dir last"));
    let said = failed_in_order(&output);
    assert!(said.contains("last/hf/model.safetensors: "), "{said}");
    assert!(!room.path("last/hf/model.safetensors").exists());
}

#[test]
fn prompts_without_meaning_are_refused() {
    let room = Room::with_model();
    let generate = |prompt: &[&str]| {
        let output = room.command(&[&["generate", "--model", "run/hf"], prompt].concat()).output().unwrap();
        failed_in_order(&output)
    };
    assert!(generate(&["--prompt", ""]).contains("the prompt holds no token"));
    assert!(generate(&["--prompt-ids", "1,257"]).contains("token 257, but the model's vocabulary has 257"));
    // The command line itself is clap's to refuse; it says how to go on in its own words.
    for prompt in
        [&["--prompt-ids", "1,x"][..], &["--prompt-ids=-1"], &[], &["--prompt", "a", "--prompt-ids", "1"]]
    {
        let output = room.command(&[&["generate", "--model", "run/hf"], prompt].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{prompt:?}");
        assert!(stderr(&output).starts_with("error: ") && stderr(&output).contains("--help"));
    }
}

#[test]
fn text_that_gives_no_block_is_refused() {
    let room = Room::new();
    room.write("empty.txt", "");
    room.write("short.txt", "ten bytes!");
    fs::write(room.path("binary.txt"), [0xff, 0xfe, 0x00]).unwrap();
    fs::create_dir(room.path("folder")).unwrap();
    let before = room.names(".");
    let line = "tokenize --tokenizer bytes --seq-len 32 --save-path data --dataset";
    room.refuses(&format!("{line} empty.txt"), &["no text"]);
    let said = room.refuses(&format!("{line} short.txt"), &["10 tokens long", "block of 32"]);
    assert!(said.contains("--seq-len 10"), "{said}");
    room.refuses(&format!("{line} binary.txt"), &["binary.txt is not UTF-8"]);
    room.refuses(&format!("{line} folder"), &["folder holds no file"]);
    room.refuses(&format!("{line} nowhere.txt"), &["nowhere.txt"]);
    room.refuses(&format!("{line} text.txt --seq-len 1"), &["--seq-len is 1"]);
    room.refuses(&format!("{line} text.txt --num-proc 100000"), &["--num-proc is 100000"]);
    room.refuses(&format!("{line} text.txt --tokenizer nowhere"), &["nowhere"]);
    room.refuses(&format!("{line} text.txt --tokenizer tiny.json"), &["tiny.json"]);
    room.refuses(&format!("{line} text.txt --seq-len 18446744073709551615"), &["18446744073709551615"]);
    let output = room.run("quickstart --text short.txt --output-dir q");
    failed_in_order(&output);
    assert_eq!(room.names("."), before);
}

#[test]
fn damaged_tokenizers_stop_a_run_before_its_first_step() {
    let room = Room::with_data();
    room.write("data/tokenizer/tokenizer.json", "{");
    no_training_after_start(&room, "data/tokenizer/tokenizer.json");
}

fn no_training_after_start(room: &Room, expected: &str) {
    let output = room.run(&format!("{TRAIN} --output-dir run"));
    let said = failed_in_order(&output);
    assert!(said.contains(expected) && !said.contains("step 1/"), "{said}");
    assert!(!room.path("run").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_behind_stdout_is_an_error() {
    let room = Room::with_model();
    for line in [
        "eval --model run/hf --data-dir data --json",
        "generate --model run/hf --prompt a --max-new-tokens 2",
        "generate --model run/hf --prompt a --max-new-tokens 2 --json",
    ] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output =
            room.command(&line.split_whitespace().collect::<Vec<_>>()).stdout(full).output().unwrap();
        assert!(failed_in_order(&output).contains("cannot write to stdout: No space left"), "{line}");
    }
}

/// Fills a tmpfs of 192 KiB. Needs root for the mount: skipped, with a line saying so, without.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_leaves_nothing_half_written() {
    let room = Room::with_model();
    fs::create_dir(room.path("small")).unwrap();
    let small = room.path("small");
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=192k", "none"]).arg(&small).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no right to mount a tmpfs");
        return;
    }
    let text = room.read("text.txt").repeat(200);
    room.write("long.txt", &text);
    let tokenize =
        room.run("tokenize --dataset long.txt --tokenizer bytes --seq-len 32 --save-path small/data");
    let after_tokenize = room.names("small");
    // What is finished stays, and the work goes on when there is room.
    let shards = "tokenize --dataset long.txt --tokenizer bytes --seq-len 32 --max-shard-size 40KB --save-path small/data";
    let full = room.run(shards);
    let kept = room.names("small");
    let more = Command::new("mount").args(["-o", "remount,size=8m"]).arg(&small).status();
    let resumed = more.is_ok_and(|status| status.success()).then(|| room.run(shards));
    let straight = room.run(&shards.replace("small/data", "straight"));
    let same = fs::read(room.path("small/data/data-00000-of-00033.arrow")).ok()
        == fs::read(room.path("straight/data-00000-of-00033.arrow")).ok();
    let _ = fs::remove_dir_all(room.path("small/data"));
    let _ = Command::new("mount").args(["-o", "remount,size=192k"]).arg(&small).status();
    // Parameters of 257·64 + …: more than the 192 KiB in fp32.
    room.write(
        "wide.json",
        &common::CONFIG
            .replace("\"hidden_size\": 16", "\"hidden_size\": 64")
            .replace("\"num_heads\": 4", "\"num_heads\": 16"),
    );
    let train = room.run("train --model wide.json --data-dir data --max-steps 1 --output-dir small/run");
    let (run, hf) = (room.names("small/run"), room.names("small/run/hf"));
    assert!(Command::new("umount").arg(&small).status().unwrap().success());

    let said = failed_in_order(&tokenize);
    assert!(said.contains("small") && said.contains("No space left"), "{said}");
    assert!(after_tokenize.is_empty(), "{after_tokenize:?}");
    assert!(failed_in_order(&full).contains("No space left"));
    assert_eq!(kept, [".data.partial"]);
    let resumed = resumed.expect("mounted before");
    assert!(resumed.status.success() && straight.status.success(), "{}", common::stderr(&resumed));
    assert!(common::stderr(&resumed).contains("going on after") && same);
    let said = failed_in_order(&train);
    assert!(said.contains("small/run/hf/model.safetensors") && said.contains("No space left"), "{said}");
    assert_eq!(run, [".lock", "hf", "metrics.jsonl", "run.toml"]);
    assert!(hf.is_empty(), "{hf:?}");
}
