//! A step that is not finite: what is said of it, what is left of it, and that it can be repeated. `--log-norms`.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::{Room, TRAIN, failed_in_order};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

const PLACE: &str = "run/nonfinite-step-00000001";

/// A room with the folder `hf` of a model in which the first `count` elements from `at` on of the parameter `name` are
/// `value`.
fn room_with(name: &str, at: usize, count: usize, value: f32) -> Room {
    let room = Room::with_model();
    fs::rename(room.path("run/hf"), room.path("hf")).unwrap();
    fs::remove_dir_all(room.path("run")).unwrap();
    let path = room.path("hf/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize + 4 * at
    };
    bytes[start..start + 4 * count].copy_from_slice(&value.to_le_bytes().repeat(count));
    fs::write(path, bytes).unwrap();
    room
}

/// stderr of a run that must stop at step 1.
fn stops(room: &Room, flags: &str) -> String {
    let said = failed_in_order(
        &room.run(&format!("train --init-from hf --data-dir data --max-steps 2 {flags} --output-dir run")),
    );
    assert!(said.contains("step 1: loss") && said.contains("the update was not applied"), "{said}");
    assert!(said.contains(&format!("elapid replay {PLACE}")), "{said}");
    said
}

fn step_json(room: &Room) -> Value {
    serde_json::from_str(&room.read(&format!("{PLACE}/step.json"))).unwrap()
}

#[test]
fn the_op_that_overflows_is_named() {
    let room = room_with("backbone.layers.1.mixer.out_proj.weight", 0, 16 * 32, 3e38);
    let said = stops(&room, "--shuffle --seed 5");
    assert!(said.contains("inf in the output of out_proj of layer 1, at [0, 0, 0], sample "), "{said}");
    let sample = step_json(&room)["micro_steps"][0]["samples"][0].as_u64().unwrap();
    assert!(said.contains(&format!("[0, 0, 0], sample {sample}; it read sample {sample}\n")), "{said}");
    let object = room.json(&format!("replay {PLACE} --json"));
    assert_eq!(object["first"]["parameter"], "backbone.layers.1.mixer.out_proj.weight");
    assert_eq!(object["layers"][0]["activation"]["not_finite"], 0);
    assert!(object["layers"][1]["activation"]["not_finite"].as_u64().unwrap() >= 32 * 16);
}

/// All activations are finite, and so is the loss: the backward pass is looked at as well.
#[test]
fn a_cotangent_is_found_in_the_sample_that_it_belongs_to() {
    let room = room_with("backbone.embeddings.weight", 16 * usize::from(b'3'), 1, 1e30);
    let at = room.read("text.txt").find('3').unwrap();
    let said = stops(&room, &format!("--grad-accum-usteps {}", at / 32 + 1));
    let (micro, position) = (at / 32, at % 32);
    let expected = format!(
        "NaN in the cotangent that norm_f gives back to its input, at [0, {position}, 0], in micro-step {micro}, sample {micro};"
    );
    assert!(said.contains(&expected), "{said}");
    let object = room.json(&format!("replay {PLACE} --json"));
    assert!(object["loss"].as_f64().unwrap() > 1e20);
    for layer in object["layers"].as_array().unwrap() {
        assert_eq!(layer["activation"]["not_finite"], 0);
        assert!(layer["gradient"]["not_finite"].as_u64().unwrap() > 0);
    }
}

#[test]
fn a_diverged_run_leaves_all_that_it_takes_to_repeat_it() {
    let room = Room::with_data();
    let line =
        format!("{TRAIN} --batch 3 --grad-accum-usteps 2 --lr 1e5 --seed 7 --log-norms --output-dir run");
    let said = failed_in_order(&room.run(&line));
    let place = "run/nonfinite-step-00000002";
    let object = room.json(&format!("replay {place} --json"));
    assert_eq!(
        (&object["step"], &object["dtype"], &object["finite"]),
        (&json!(2), &json!("float32"), &json!(false))
    );
    assert!(object["loss"].is_null() && object["grad_norm"].is_null());
    let first = &object["first"];
    assert_eq!(
        (&first["op"], &first["layer"], &first["tensor"]),
        (&json!("mamba2"), &json!(0), &json!("output"))
    );
    assert!(
        said.contains("the first value that is not finite is NaN in the output of mamba2 of layer 0"),
        "{said}"
    );
    assert!(said.contains("samples 6, 7, 8, 9, 10, 11") && said.contains("step 2:"), "{said}");
    // What the run found is what the replay finds, whatever the number of threads.
    let step: Value = serde_json::from_str(&room.read(&format!("{place}/step.json"))).unwrap();
    for threads in [1, 2] {
        let mut again = room.json(&format!("replay {place} --json --threads {threads}"));
        let fields = again.as_object_mut().unwrap();
        fields.retain(|name, _| !matches!(name.as_str(), "step" | "dtype"));
        assert_eq!(again, step["diagnosis"]);
    }
    assert_eq!((&step["step"], &step["seed"], &step["data_dir"]), (&json!(2), &json!(7), &json!("data")));
    assert_eq!(step["micro_steps"][1]["samples"], json!([9, 10, 11]));
    // The batch is that of the dataset.
    let bytes = fs::read(room.path(&format!("{place}/batch.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("ids.1").unwrap();
    assert_eq!((ids.dtype(), ids.shape()), (Dtype::I32, &[3, 32][..]));
    let text: String =
        ids.data().as_chunks().0.iter().map(|id| i32::from_le_bytes(*id) as u8 as char).collect();
    assert_eq!(text, room.read("text.txt")[9 * 32..12 * 32]);
    // Nothing of the step is in the logs, and nothing unfinished is left.
    assert_eq!(room.losses("run").len(), 1);
    assert_eq!(room.read("run/norms.jsonl").lines().count(), 1);
    assert_eq!(
        room.names("run"),
        [".lock", "metrics.jsonl", "nonfinite-step-00000002", "norms.jsonl", "run.toml"]
    );
    let table = room.ok(&format!("replay {place}"));
    for part in
        ["step 2", "layer 0", "layer 1", "outside", "not finite", "mamba2 of layer 0, at [0, 0, 0], sample 6"]
    {
        assert!(table.contains(part), "{table}");
    }
    // The folder is a checkpoint of step 1.
    let output =
        room.run(&format!("{} --resume {place} --output-dir on", line.replace("--output-dir run", "")));
    assert!(
        failed_in_order(&output).contains("NaN in the output of mamba2 of layer 0, at [0, 0, 0], sample 6")
    );
}

#[test]
fn replay_tells_whether_the_dtype_is_the_cause() {
    // Rounded to bf16 it is beyond the largest number; in fp32 the norm takes it.
    let room = room_with("backbone.embeddings.weight", 16 * usize::from(b'3'), 1, 3.4e38);
    let text = room.read("text.txt");
    let sample = text.find('3').unwrap() / 32;
    let said = stops(&room, &format!("--dtype bfloat16 --batch {}", sample + 1));
    assert!(said.contains("inf in the output of embedding, at ["), "{said}");
    assert!(said.contains(&format!(", sample {sample};")), "{said}");
    let first = |flags: &str| room.json(&format!("replay {PLACE} --json {flags}"))["first"].clone();
    assert_eq!(first("")["op"], "embedding");
    assert_eq!(first("")["index"], json!([sample, text.find('3').unwrap() % 32, 0]));
    assert_ne!(first("--dtype float32")["op"], "embedding");
}

#[test]
fn parameters_that_are_not_finite_are_named_before_all_else() {
    let room = Room::with_data();
    let said = failed_in_order(&room.run(&format!("{TRAIN} --lr 1e39 --output-dir run")));
    assert!(said.contains("step 2: loss NaN"), "{said}");
    assert!(
        said.contains("NaN in the parameter backbone.layers.0.mixer.in_proj.weight, at [0, 0] ("),
        "{said}"
    );
    let object = room.json("replay run/nonfinite-step-00000002 --json");
    assert_eq!(object["first"]["tensor"], "parameter");
    assert!(object["parameters"].as_array().unwrap().len() > 10);
}

#[test]
fn carried_states_and_checkpointing_are_repeated_too() {
    let room = Room::with_data();
    for (run, flags) in [("a", "--carry-state --batch 2"), ("b", "--activation-checkpointing block")] {
        let said = failed_in_order(&room.run(&format!("{TRAIN} --lr 1e5 {flags} --output-dir {run}")));
        let place = format!("{run}/nonfinite-step-00000002");
        let step: Value = serde_json::from_str(&room.read(&format!("{place}/step.json"))).unwrap();
        let again = room.json(&format!("replay {place} --json"));
        assert_eq!(again["first"], step["diagnosis"]["first"], "{said}");
        assert_eq!(again["layers"], step["diagnosis"]["layers"]);
        let manifest = room.read(&format!("{place}/manifest.json"));
        assert_eq!(manifest.contains("carried.ssm.1"), run == "a");
    }
}

#[test]
fn replay_refuses_what_is_damaged() {
    let room = Room::with_data();
    failed_in_order(&room.run(&format!("{TRAIN} --lr 1e5 --output-dir run")));
    let place = "run/nonfinite-step-00000002";
    room.refuses("replay data", &["data/step.json"]);
    room.refuses("replay nowhere", &["nowhere/step.json"]);
    let step = room.read(&format!("{place}/step.json"));
    let spoilt = |text: &str, expected: &[&str]| {
        room.write(&format!("{place}/step.json"), text);
        room.refuses(&format!("replay {place}"), expected);
        room.write(&format!("{place}/step.json"), &step);
    };
    spoilt(&step[..step.len() / 2], &["step.json"]);
    spoilt(&step.replace("false\n", "false, false\n"), &["batch.safetensors"]);
    let path = room.path(&format!("{place}/batch.safetensors"));
    let batch = fs::read(&path).unwrap();
    fs::write(&path, &batch[..batch.len() - 1]).unwrap();
    room.refuses(&format!("replay {place}"), &["batch.safetensors"]);
    let mut outside = batch.clone();
    let end = outside.len();
    outside[end - 3] = 0x7f;
    fs::write(&path, outside).unwrap();
    room.refuses(&format!("replay {place}"), &["batch.safetensors", "outside of the vocabulary of 257"]);
    fs::write(&path, batch).unwrap();
    room.ok(&format!("replay {place}"));
    fs::remove_file(room.path(&format!("{place}/rank-00000.safetensors"))).unwrap();
    room.refuses(&format!("replay {place}"), &["rank-00000.safetensors", "missing"]);
}

#[test]
fn the_finding_is_told_where_the_folder_cannot_be_written() {
    let room = Room::with_data();
    fs::create_dir(room.path("run")).unwrap();
    room.write("run/.nonfinite-step-00000002.partial", "in the way");
    let said = failed_in_order(&room.run(&format!("{TRAIN} --lr 1e5 --output-dir run")));
    assert!(said.contains("NaN in the output of mamba2 of layer 0"), "{said}");
    assert!(said.contains("cannot be kept to be repeated: cannot remove run/.nonfinite"), "{said}");
    assert!(!room.path("run/nonfinite-step-00000002").exists());
}

fn norms(room: &Room, run: &str) -> Vec<Value> {
    room.read(&format!("{run}/norms.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Root of the sum of squares.
fn total(norms: &Value) -> f64 {
    norms.as_object().unwrap().values().map(|norm| norm.as_f64().unwrap().powi(2)).sum::<f64>().sqrt()
}

fn weights(room: &Room, run: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(room.path(&format!("{run}/hf/model.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    file.tensors().into_iter().map(|(name, tensor)| (name, values(tensor.data()))).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

#[test]
fn norms_are_those_of_the_step_and_change_nothing() {
    let room = Room::with_data();
    let line = "train --model tiny.json --data-dir data --batch 3 --grad-accum-usteps 2 --shuffle --lr 1e-2";
    room.ok(&format!("{line} --max-steps 1 --lr-schedule constant --output-dir one"));
    room.ok(&format!("{line} --max-steps 2 --lr-schedule constant --log-norms --output-dir two"));
    room.ok(&format!("{line} --max-steps 2 --lr-schedule constant --output-dir plain"));
    assert_eq!(room.losses("plain"), room.losses("two"));
    let (before, after) = (weights(&room, "one"), weights(&room, "two"));
    assert!(after == weights(&room, "plain"), "the weights differ");
    assert!(!room.path("plain/norms.jsonl").exists());

    let norms = norms(&room, "two");
    assert_eq!(norms.len(), 2);
    for (step, (norms, metrics)) in norms.iter().zip(room.metrics("two")).enumerate() {
        assert_eq!(norms["step"], step + 1);
        let (sum, grad_norm) = (total(&norms["gradients"]), metrics["grad_norm"].as_f64().unwrap());
        assert!((sum / grad_norm - 1.0).abs() < 1e-6, "{sum} {grad_norm}");
    }
    let close = |got: &Value, wanted: f64, name: &str| {
        let got = got[name].as_f64().unwrap();
        assert!(wanted > 0.0 && (got / wanted - 1.0).abs() < 1e-6, "{name}: {got} {wanted}");
    };
    assert_eq!(after.len(), norms[1]["updates"].as_object().unwrap().len());
    for (name, after) in &after {
        let change =
            after.iter().zip(&before[name]).map(|(after, before)| f64::from(*after) - f64::from(*before));
        close(&norms[1]["updates"], norm(change), name);
        close(&norms[1]["parameters"], norm(after.iter().map(|x| f64::from(*x))), name);
    }
}

#[test]
fn norms_are_cut_back_as_metrics_are() {
    let room = Room::with_data();
    let line = "train --model tiny.json --data-dir data --max-steps 5 --checkpoint-freq 3";
    room.ok(&format!("{line} --log-norms --output-dir whole"));
    room.ok(&format!("{line} --log-norms --output-dir run"));
    let whole = room.read("whole/norms.jsonl");
    assert_eq!(room.read("run/norms.jsonl"), whole);
    // As a kill after step 5 leaves it, in the middle of a line.
    fs::remove_file(room.path("run/finished.json")).unwrap();
    room.write("run/norms.jsonl", &format!("{whole}{{\"step\": 6, "));
    room.ok(&format!("{line} --log-norms --output-dir run --resume auto"));
    assert_eq!(room.read("run/norms.jsonl"), whole);
    // Without the flag what was written of later steps goes, and no more comes.
    fs::remove_file(room.path("run/finished.json")).unwrap();
    room.ok(&format!("{line} --output-dir run --resume auto"));
    let first: Vec<_> = whole.lines().take(3).collect();
    assert_eq!(room.read("run/norms.jsonl").lines().collect::<Vec<_>>(), first);
}
