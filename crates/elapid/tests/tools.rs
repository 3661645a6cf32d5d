//! `doctor`, `inspect` and `bench`, as the real binary.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};

use common::{Room, TRAIN, failed_in_order, one_object, stderr, write_dataset};
use elapid_cpu::Isa;
use serde_json::{Value, json};

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// Three steps, a checkpoint after each, all with a tag.
fn room_with_run() -> Room {
    let room = Room::with_data();
    room.ok(&format!("{TRAIN} --checkpoint-freq 1 --tag exp --output-dir run"));
    room
}

fn flip_last_byte(room: &Room, name: &str) {
    let mut bytes = fs::read(room.path(name)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(room.path(name), bytes).unwrap();
}

#[test]
fn doctor_is_green_on_every_path() {
    let room = Room::new();
    let report = room.json("doctor --json");
    assert_eq!(keys(&report), BTreeSet::from(["machine", "instruction_sets", "paths", "checks", "ok"]));
    assert_eq!(report["ok"], true);
    assert!(report["machine"]["threads"].as_u64().unwrap() > 0);
    assert!(report["machine"]["memory_bytes"].as_u64().unwrap() > 0);
    let name = |path: &Value| path.as_str().unwrap().to_owned();
    let paths: BTreeSet<_> = rows(&report["paths"]["elementwise"]).iter().map(name).collect();
    let checked = rows(&report["checks"]);
    assert_eq!(checked.iter().map(|row| name(&row["path"])).collect::<BTreeSet<_>>(), paths);
    assert!(paths.contains(&name(&report["paths"]["chosen"])));
    for path in &paths {
        let of_path = checked.iter().filter(|row| row["path"] == **path);
        let kernels: BTreeSet<_> = of_path.map(|row| row["kernel"].as_str().unwrap()).collect();
        let all = ["embedding", "rms_norm", "linear", "mamba2", "head_loss", "clip", "adamw"];
        assert!(all.iter().all(|kernel| kernels.contains(kernel)), "{path}: {kernels:?}");
    }
    for row in checked {
        assert!(row["comparisons"].as_u64().unwrap() > 0 && row["failed"] == 0, "{row}");
        assert!(row["worst_error"].as_f64() <= row["tolerance"].as_f64(), "{row}");
    }
}

#[test]
fn inspect_models_and_configurations() {
    let room = Room::with_model();
    let preset = room.json("inspect mamba2-130m --json");
    assert_eq!((&preset["kind"], &preset["parameters"]), (&json!("preset"), &json!(128_989_632)));
    let config = room.json("inspect tiny.json --json");
    let folder = room.json("inspect run/hf --json");
    assert_eq!((&config["kind"], &folder["kind"]), (&json!("config"), &json!("model")));
    let described = ["parameters", "dimensions", "parameters_in", "flops_per_token"];
    for field in described {
        assert_eq!(config[field], folder[field]);
    }
    let parts: u64 = config["parameters_in"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(config["parameters"], parts);
    assert_eq!(folder["tokenizer"], true);
    let file = &rows(&folder["files"])[0];
    let size = fs::metadata(room.path("run/hf/model.safetensors")).unwrap().len();
    assert_eq!((&file["bytes"], &file["dtype"]), (&json!(size), &json!(["F32"])));
    assert!(size > 4 * parts);
    for row in rows(&config["training_memory"]) {
        assert!(row["total_bytes"].as_u64().unwrap() > 16 * parts, "{row}");
    }
    assert!(room.ok("inspect run/hf").contains("parameters"));

    // A configuration alone is a model without weights.
    fs::create_dir(room.path("bare")).unwrap();
    fs::copy(room.path("tiny.json"), room.path("bare/config.json")).unwrap();
    assert_eq!(room.json("inspect bare --json")["files"], json!([]));
    let bytes = fs::read(room.path("run/hf/model.safetensors")).unwrap();
    fs::write(room.path("run/hf/model.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    room.refuses("inspect run/hf", &["model.safetensors", "not a whole safetensors file"]);
}

#[test]
fn inspect_a_dataset() {
    let room = Room::with_data();
    let found = room.json("inspect data --json");
    assert_eq!(found["kind"], "dataset");
    assert_eq!(found["seq_len"], 32);
    assert_eq!(found["columns"], json!(["input_ids", "labels"]));
    let count = |name: &str| found[name].as_u64().unwrap();
    let bytes = room.read("text.txt").len() as u64;
    assert_eq!((count("documents"), count("text_bytes"), count("eos_id")), (1, bytes, 256));
    assert_eq!(count("tokens"), 32 * count("blocks"));
    assert_eq!(count("tokens") + count("dropped_tokens"), bytes + 1);
    let samples = rows(&found["samples"]);
    assert_eq!((samples.len(), samples[0].as_str().unwrap()), (3, &room.read("text.txt")[..32]));

    // Documents are told apart where the dataset knows them.
    room.write("two.jsonl", "{\"text\": \"first one\"}\n{\"text\": \"second one\"}\n");
    room.ok("tokenize --dataset two.jsonl --tokenizer bytes --seq-len 16 --save-path two --document-ids");
    let found = room.json("inspect two --json");
    assert_eq!(found["columns"], json!(["input_ids", "labels", "document_ids"]));
    assert_eq!(found["samples"], json!(["first one ⟨next document⟩ second "]));

    // A pass through all blocks: documents that were not cut, a block that comes again, no unknown token.
    let text = "{\"text\": \"0123456\"}\n{\"text\": \"0123456\"}\n{\"text\": \"012\"}\n{\"text\": \"3\"}\n{\"text\": \"45\"}\n";
    room.write("five.jsonl", text);
    for flags in ["", "--document-ids"] {
        let flags = format!("--seq-len 8 --append-eos --save-path five{flags} {flags}");
        room.ok(&format!("tokenize --dataset five.jsonl --tokenizer bytes {flags}"));
    }
    for name in ["five", "five--document-ids"] {
        let found = room.json(&format!("inspect {name} --json"));
        assert_eq!(
            (&found["duplicate_blocks"], &found["duplicates_estimated"]),
            (&json!(1), &json!(false)),
            "{name}"
        );
        assert_eq!((&found["unknown_tokens"], &found["unknown_share"]), (&Value::Null, &Value::Null));
        // The last document lost its end with the last, incomplete block.
        let lengths = &found["document_lengths"];
        let figures =
            ["documents", "shortest", "median", "longest"].map(|name| lengths[name].as_u64().unwrap());
        assert_eq!(figures, [5, 2, 4, 8], "{name}: {lengths}");
        assert_eq!(lengths["histogram"][0], json!({ "from": 2, "to": 3, "documents": 2, "share": 0.4 }));
        assert!(room.ok(&format!("inspect {name}")).contains("duplicate blocks"));
    }

    // One that Python wrote says less of itself.
    write_dataset(&room.path("foreign"), &[vec![Some(1), Some(2)]], &[vec![Some(1), Some(2)]]);
    let found = room.json("inspect foreign --json");
    assert_eq!((&found["documents"], &found["samples"]), (&Value::Null, &json!(["1 2"])));
    fs::write(room.path("foreign/data-00000-of-00001.arrow"), "no arrow").unwrap();
    room.refuses("inspect foreign", &["data-00000-of-00001.arrow"]);
}

#[test]
fn inspect_checkpoints_and_verify_them() {
    let room = room_with_run();
    let one = "run/checkpoints/step-00000002-exp";
    let found = room.json(&format!("inspect {one} --json"));
    assert_eq!(found["kind"], "checkpoint");
    assert_eq!((&found["step"], &found["samples"], &found["tag"]), (&json!(2), &json!(2), &json!("exp")));
    assert_eq!(found["mesh"], json!({ "dp": 1, "tp": 1 }));
    assert_eq!(found["settings"]["max-steps"], 3);
    assert_eq!(found["model"]["parameters"], room.json("inspect tiny.json --json")["parameters"]);
    let names: Vec<_> = rows(&found["files"]).iter().map(|file| &file["name"]).collect();
    assert_eq!(names, ["config.json", "rank-00000.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(room.json(&format!("inspect {one} --verify --json"))["verified"], true);

    let all = room.json("inspect run/checkpoints --verify --json");
    assert_eq!((&all["kind"], &all["latest"]), (&json!("checkpoints"), &json!("step-00000003-exp")));
    let steps: Vec<_> = rows(&all["checkpoints"]).iter().map(|row| &row["step"]).collect();
    assert_eq!(steps, [1, 2, 3]);

    flip_last_byte(&room, &format!("{one}/rank-00000.safetensors"));
    // The manifest alone does not know.
    room.ok(&format!("inspect {one}"));
    room.ok("inspect run/checkpoints");
    for path in [one, "run/checkpoints", "run"] {
        let output = room.run(&format!("inspect {path} --verify --json"));
        let said = failed_in_order(&output);
        assert!(said.contains(&format!("{one}/rank-00000.safetensors has checksum")), "{said}");
        let object = one_object(&String::from_utf8(output.stdout).unwrap());
        let list = if path == one { &object["files"] } else { &object["checkpoints"] };
        let faults: Vec<_> = rows(list).iter().map(|row| row["fault"].is_string()).collect();
        assert_eq!(
            faults,
            if path == one { vec![false, true, false, false] } else { vec![false, true, false] }
        );
    }
    flip_last_byte(&room, &format!("{one}/manifest.json"));
    room.refuses(&format!("inspect {one}"), &["manifest.json", "checksum"]);
    assert!(failed_in_order(&room.run("inspect run/checkpoints")).contains(&format!("{one}/manifest.json")));
}

#[test]
fn inspect_a_run_and_its_settings() {
    let room = room_with_run();
    let found = room.json("inspect run --json");
    assert_eq!((&found["kind"], &found["state"]), (&json!("run"), &json!("finished")));
    assert_eq!((&found["step"], &found["max_steps"]), (&json!(3), &json!(3)));
    assert_eq!(found["last_loss"].as_f64(), room.losses("run").last().copied());
    let losses: Vec<_> = rows(&found["last_steps"]).iter().map(|row| row["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses, room.losses("run"));
    assert_eq!(rows(&found["checkpoints"]).len(), 3);
    let settings = room.json("inspect run/run.toml --json");
    assert_eq!((&settings["kind"], &settings["settings"]["max-steps"]), (&json!("settings"), &json!(3)));

    fs::remove_file(room.path("run/finished.json")).unwrap();
    assert_eq!(room.json("inspect run --json")["state"], "stopped");
    let lock = File::open(room.path("run/.lock")).unwrap();
    lock.lock().unwrap();
    assert_eq!(room.json("inspect run --json")["state"], "running");
    drop(lock);
    // A line that is being written while it is read.
    room.write("run/metrics.jsonl", &(room.read("run/metrics.jsonl") + "{\"step\": 4, \"lo"));
    assert_eq!(room.json("inspect run --json")["step"], 3);
    room.write("run/run.toml", "max-steps = ");
    room.refuses("inspect run/run.toml", &["run.toml"]);
}

#[test]
fn inspect_says_what_it_looked_for() {
    let room = Room::new();
    let said = room.refuses("inspect .", &["nothing that elapid knows"]);
    for sign in ["manifest.json", "step-", "state.json", "config.json", "run.toml"] {
        assert!(said.contains(sign), "{said}");
    }
    room.refuses("inspect text.txt", &["text.txt is nothing that elapid knows"]);
    room.refuses("inspect mamba2-130", &["neither a path nor a preset", "did you mean mamba2-130m?"]);
}

const SETUP: [&str; 9] =
    ["bench", "model", "parameters", "batch", "seq_len", "dtype", "threads", "path", "peaks"];

fn check_setup(report: &Value, bench: &str) {
    assert!(SETUP.iter().all(|field| keys(report).contains(field)), "{report}");
    assert_eq!((&report["bench"], &report["model"]), (&json!(bench), &json!("tiny")));
    let peaks = &report["peaks"];
    for rate in [
        "fp32_fma_gflops",
        "fp32_matrix_gflops",
        "fp32_product_gflops",
        "bf16_product_gflops",
        "read_gb_per_s",
        "triad_gb_per_s",
    ] {
        assert!(peaks[rate].as_f64().is_some_and(|rate| rate > 0.0), "{peaks}");
    }
}

#[test]
fn bench_kernels_times_every_kernel_forward_and_adjoint() {
    let room = Room::new();
    let all: Vec<_> = Isa::available().iter().map(|isa| format!("{isa:?}")).collect();
    let best = all.last().unwrap();
    let linear = ["linear", "linear adjoint", "linear d_input", "linear d_weight"];
    let kernels = [
        &["embedding", "embedding adjoint", "add", "cast", "rms_norm", "rms_norm adjoint"][..],
        &linear,
        &linear,
        &["mamba2", "mamba2 adjoint", "head_loss", "head_loss adjoint"],
        &["clip", "adamw", "zero_buffer", "cast_buffer"],
    ]
    .concat();
    let few = [&linear[..], &linear, &["adamw"]].concat();
    let asked = format!("--dtype bfloat16 --kernels linear,adamw --paths {}", best.to_lowercase());
    for (flags, paths, kernels) in [("", &all[..], kernels), (&asked, &all[all.len() - 1..], few)] {
        let report = room.json(&format!("bench kernels --model tiny --seq-len 64 --batch 2 {flags} --json"));
        check_setup(&report, "kernels");
        assert_eq!(report["path"], **best);
        let names = |list: &str, field: &str| -> Vec<String> {
            rows(&report[list]).iter().map(|row| row[field].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names("paths", "path"), paths);
        let found: Vec<_> = names("kernels", "path").into_iter().zip(names("kernels", "kernel")).collect();
        let expected: Vec<_> = paths
            .iter()
            .flat_map(|path| kernels.iter().map(|kernel| (path.clone(), (*kernel).to_owned())))
            .collect();
        assert_eq!(found, expected);
        for row in rows(&report["paths"]) {
            let rate = |name: &str| row[name].as_f64().unwrap();
            assert!(rate("fp32_fma_gflops") > 0.0, "{row}");
            assert!(rate("fp32_fma_gflops") <= rate("fp32_matrix_gflops"), "{row}");
        }
        for row in rows(&report["kernels"]) {
            assert_eq!(row["refused"], Value::Null);
            let number = |name: &str| row[name].as_f64().unwrap();
            assert!(number("best_s") > 0.0 && number("best_s") <= number("median_s"), "{row}");
            assert!(number("gb_per_s") > 0.0 && number("roofline_share") > 0.0, "{row}");
            // What is bound by memory lies in caches at this size; and a shared machine may take half of a rate away while its
            // peak is measured.
            assert!(number("roofline_share") <= 2.2 || row["bound"] == "memory", "{row}");
            let moves = ["embedding", "cast", "zero_buffer", "cast_buffer"];
            assert!(number("gflops") > 0.0 || moves.contains(&row["kernel"].as_str().unwrap()), "{row}");
        }
    }
    let refused = |flags: &str, with: &str| {
        let output = room.run(&format!("bench kernels --model tiny {flags}"));
        assert!(!output.status.success() && stderr(&output).contains(with), "{}", stderr(&output));
    };
    refused("--paths sse9", "this machine can run portable");
    refused("--kernels linera", "linear");
}

#[test]
fn bench_train_adds_up() {
    let room = Room::new();
    let report = room.json("bench train --model tiny --seq-len 64 --batch 2 --steps 2 --json");
    check_setup(&report, "train");
    let step = report["best_step_s"].as_f64().unwrap();
    let sum = |name: &str| rows(&report["ops"]).iter().map(|row| row[name].as_f64().unwrap()).sum::<f64>();
    assert!((sum("total_s") / step - 1.0).abs() < 1e-9 && (sum("share") - 1.0).abs() < 1e-9);
    let of = |op: &str| {
        let row = rows(&report["ops"]).iter().find(|row| row["op"] == op).unwrap();
        row["share"].as_f64().unwrap()
    };
    let mixer = of("mamba2") + of("mamba2 adjoint") + of("rms_norm") + of("rms_norm adjoint");
    assert!((report["scan_conv_norm_share"].as_f64().unwrap() / mixer - 1.0).abs() < 1e-9);
    let calls = |op: &str| rows(&report["ops"]).iter().find(|row| row["op"] == op).unwrap()["calls"].clone();
    // Four layers.
    assert_eq!(
        (calls("linear adjoint"), calls("mamba2 adjoint"), calls("adamw")),
        (json!(8), json!(4), json!(1))
    );
    assert!((report["tokens_per_s"].as_f64().unwrap() * step / 128.0 - 1.0).abs() < 1e-9);
    assert!(report["mfu"].as_f64().unwrap() > 0.0);
    let left = rows(&report["ops"]).last().unwrap();
    assert!(left["op"] == "between ops" && left["total_s"].as_f64().unwrap() > 0.0, "{left}");
}

#[test]
fn bench_data_goes_from_text_to_batches() {
    let room = Room::new();
    let line = "bench data --model tiny --seq-len 64 --batch 2 --threads 2 --json";
    let made_up = room.json(&format!("{line} --megabytes 1"));
    let figure =
        |found: &Value, name: &str| found[name].as_f64().unwrap_or_else(|| panic!("{name}: {found}"));
    assert!((1e6..2e6).contains(&figure(&made_up, "text_bytes")), "{made_up}");
    assert_eq!(
        (&made_up["bench"], &made_up["tokenizer"], &made_up["dataset"]),
        (&json!("data"), &json!("bytes"), &Value::Null)
    );
    let rates = [
        "tokenizer_mb_per_s",
        "pipeline_mb_per_s",
        "end_to_end_mb_per_s",
        "loader_tokens_per_s",
        "loader_shuffled_tokens_per_s",
        "train_tokens_per_s",
        "loader_times_training",
    ];
    for rate in rates {
        assert!(figure(&made_up, rate) > 0.0, "{rate}: {made_up}");
    }
    let slower =
        figure(&made_up, "loader_tokens_per_s").min(figure(&made_up, "loader_shuffled_tokens_per_s"));
    let times = slower / figure(&made_up, "train_tokens_per_s");
    assert!((figure(&made_up, "loader_times_training") / times - 1.0).abs() < 1e-9);

    let own = room.json(&format!("{line} --dataset text.txt"));
    let bytes = room.read("text.txt").len();
    assert_eq!(
        (&own["text_bytes"], &own["documents"], &own["tokens"]),
        (&json!(bytes), &json!(1), &json!(bytes))
    );
    assert!(room.ok("bench data --model tiny --seq-len 64 --megabytes 1").contains("loader times training"));
    room.refuses("bench data --dataset nothing.txt", &["nothing.txt"]);
}

#[test]
fn bench_train_on_ranks_says_what_is_hidden() {
    let room = Room::new();
    let bench = "bench train --model tiny --seq-len 64 --steps 2 --threads 2 --json";
    for (mesh, dp, ops) in [
        ("dp=2", 2, &["send row", "await row"][..]),
        ("dp=2,zero-1", 2, &["collective"]),
        ("tp=2,sp", 1, &["collective"]),
    ] {
        let report = room.json(&format!("{bench} --mesh {mesh}"));
        check_setup(&report, "train");
        let step = report["best_step_s"].as_f64().unwrap();
        assert!((report["tokens_per_s"].as_f64().unwrap() * step / f64::from(64 * dp) - 1.0).abs() < 1e-9);
        for op in ops {
            assert!(rows(&report["ops"]).iter().any(|row| row["op"] == **op), "{mesh}: {op}");
        }
        let of_ranks = |name: &str| report["ranks"][name].as_f64().unwrap();
        let (taken, waited, hidden) =
            (of_ranks("collectives_s"), of_ranks("waited_s"), of_ranks("hidden_share"));
        assert!(taken > 0.0 && waited > 0.0 && (0.0..1.0).contains(&hidden), "{report}");
        assert!((hidden - (1.0 - waited / taken).max(0.0)).abs() < 1e-9);
        // All collectives of tensor parallelism are waited for.
        assert!(mesh != "tp=2,sp" || hidden < 1e-6, "{hidden}");
    }
    room.refuses("bench train --model tiny.json --mesh tp=3", &["--tp is 3"]);
}

#[test]
fn bench_comm_measures_every_collective() {
    let room = Room::new();
    let report = room.json("bench comm --dp 3 --max-mib 1 --json");
    assert_eq!(keys(&report), BTreeSet::from(["bench", "engine", "ranks", "copies", "collectives"]));
    assert_eq!((&report["engine"], &report["ranks"]), (&json!("threads"), &json!(3)));
    assert_eq!(rows(&report["copies"]).len(), 3);
    let measured = rows(&report["collectives"]);
    assert_eq!(measured.len(), 6 * 3);
    for row in measured {
        let number = |name: &str| row[name].as_f64().unwrap();
        let sent = match (row["collective"].as_str().unwrap(), row["of"].as_str().unwrap()) {
            ("all_reduce", "float32" | "bfloat16") => 4.0 / 3.0,
            ("reduce_scatter", "float32" | "bfloat16") | ("all_gather", "bytes") => 2.0 / 3.0,
            ("broadcast", "bytes") => 1.0,
            other => panic!("{other:?}"),
        };
        let bus = sent * number("bytes") / number("median_s") / 1e9;
        assert!(
            (number("bus_gb_per_s") / bus - 1.0).abs() < 1e-9 && number("best_s") <= number("median_s"),
            "{row}"
        );
        let copies = rows(&report["copies"]).iter().find(|copy| copy["bytes"] == row["bytes"]).unwrap();
        assert!(
            (number("copy_share") * copies["gb_per_s"].as_f64().unwrap() / bus - 1.0).abs() < 1e-9,
            "{row}"
        );
    }
    assert!(room.ok("bench comm --max-mib 1").contains("bus gb/s"));
    room.refuses("bench comm --dp 1", &["one rank has nobody to speak with"]);
}

#[test]
fn bench_decode_counts_the_weights_once_a_token() {
    let room = Room::new();
    let report = room.json("bench decode --model tiny --seq-len 32 --tokens 5 --dtype bfloat16 --json");
    check_setup(&report, "decode");
    let number = |name: &str| report[name].as_f64().unwrap();
    let (parameters, weights) = (number("parameters"), number("weights_bytes"));
    assert!(weights > 2.0 * parameters && weights < 2.1 * parameters);
    assert!((number("tokens_per_s") * number("median_step_s") - 1.0).abs() < 1e-9);
    assert!(number("bandwidth_share") > 0.0 && number("prefill_tokens_per_s") > 0.0);
    assert_eq!(rows(&report["ops"]).iter().find(|row| row["op"] == "logits").unwrap()["calls"], 5);
}

#[test]
fn bench_refuses_what_cannot_be() {
    let room = Room::new();
    room.refuses("bench kernels --model Mamba7B --batch 1000000 --seq-len 1000000", &["memory"]);
    room.refuses("bench decode --model Mamba7B --batch 1000000 --seq-len 1000000", &["memory"]);
    room.refuses("bench train --model Mamba7B --batch 1000000 --seq-len 1000000", &["memory"]);
    room.refuses("bench kernels --model tin", &["did you mean tiny"]);
    room.refuses("bench kernels --model tiny --threads 0", &["--threads is 0"]);
    let output = room.run("bench train --model tiny --batch 0");
    assert!(!output.status.success() && stderr(&output).contains("--batch"));
}
