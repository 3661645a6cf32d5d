//! `elapid compile`: what it writes, prints and refuses.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{Room, stderr};
use serde_json::Value;

const COMPILE: &str = "compile --model tiny.json --target trn1 --seq-len 48 --output-dir modules";

#[test]
fn modules_text_and_manifest() {
    let room = Room::new();
    let printed = room.ok(COMPILE);
    let names = ["micro_step", "update", "eval", "decode"];
    for name in names {
        assert!(room.path(&format!("modules/{name}.hlo.pb")).metadata().unwrap().len() > 1000);
        assert!(room.read(&format!("modules/{name}.txt")).starts_with(&format!("HloModule {name}")));
        assert!(printed.contains(&format!("neuronx-cc compile --framework XLA {name}.hlo.pb --target trn1")));
    }
    assert!(printed.contains("not on this machine's path") && printed.contains("Neuron SDK"), "{printed}");
    assert_eq!(room.names("modules").len(), 2 * names.len() + 1, "nothing is left half written");

    let manifest: Value = serde_json::from_str(&room.read("modules/manifest.json")).unwrap();
    assert_eq!((&manifest["target"], &manifest["seq_len"]), (&"trn1".into(), &48.into()));
    let port = |port: &Value| (port["name"].as_str().unwrap().to_owned(), port["shape"].clone());
    let ports = |module: usize, side: &str| -> Vec<_> {
        manifest["modules"][module][side].as_array().unwrap().iter().map(port).collect()
    };
    // What is updated in place has one name and one shape on both sides.
    for (module, name) in names.iter().enumerate() {
        let [inputs, outputs] = ["inputs", "outputs"].map(|side| ports(module, side));
        for alias in manifest["modules"][module]["aliases"].as_array().unwrap() {
            let at = |side: usize| alias[side].as_u64().unwrap() as usize;
            assert_eq!(inputs[at(0)], outputs[at(1)], "{name}");
            assert!(inputs[at(0)].0.ends_with(".must_alias_input"), "{name}");
        }
    }
    let inputs =
        |module: usize| ports(module, "inputs").into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    // The rate of a step and the like come in from outside: one module serves all steps.
    for scalar in ["scale", "lr", "bias_correction1", "bias_correction2_root"] {
        assert!(inputs(1).contains(&scalar.to_owned()), "{scalar} of {:?}", inputs(1));
        assert!(manifest["step_inputs"][scalar].is_string());
    }
    assert!(!inputs(0).contains(&"documents".to_owned()));
}

#[test]
fn flags_change_the_modules() {
    let room = Room::new();
    room.ok(COMPILE);
    let plain = room.read("modules/micro_step.txt");
    for flags in [
        "--documents",
        "--carry-state",
        "--not-in-place",
        "--tp 2",
        "--tp 2 --sequence-parallel-enabled",
        "--dtype bfloat16",
        "--batch 3",
        "--n-groups 4",
        "--vocab-size 300",
        "--rmsnorm-across-groups",
        "--activation-checkpointing block",
        "--layer-loop while",
        "--layer-loop unrolled",
    ] {
        room.ok(&format!("{COMPILE} {flags}"));
        assert_ne!(room.read("modules/micro_step.txt"), plain, "{flags}");
    }
    let update = room.read("modules/update.txt");
    for flags in [
        "--beta1 0.8",
        "--beta2 0.99",
        "--eps 1e-6",
        "--weight-decay 0.2",
        "--max-grad-norm 0",
        "--dp 2",
        "--dp 2 --use-zero-1",
    ] {
        room.ok(&format!("{COMPILE} {flags}"));
        assert_ne!(room.read("modules/update.txt"), update, "{flags}");
    }
    assert!(room.ok(&format!("{COMPILE} --target trn2")).contains("--target trn2 --lnc 2"));
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let room = Room::new();
    for (flags, what) in [
        ("--tp 3", "--tp is 3"),
        ("--tp 0", "--tp is 0"),
        ("--dp 0", "--dp is 0"),
        ("--tp 2 --dp 40000", "too many"),
        ("--seq-len 0", "--seq-len"),
        ("--batch 0", "--batch"),
        ("--batch 1000000", "too many tokens"),
        ("--beta1 1", "--beta1"),
        ("--eps 0", "--eps"),
        ("--n-groups 3", "3"),
        ("--model mamba2-130M", "mamba2-130M"),
    ] {
        let words = format!("{COMPILE} {flags}");
        let output = room.command(&words.split(' ').collect::<Vec<_>>()).output().unwrap();
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(what) && text.contains("hint:"), "{flags}: {text}");
    }
    assert!(!room.path("modules").exists(), "a refused command leaves nothing");
}

/// The command that the replaced system trained its 7B model with: modules for 32 cores of trn1.
#[test]
fn a_large_model_on_many_ranks() {
    let room = Room::new();
    let start = Instant::now();
    let printed = room.ok(
        "compile --model Mamba7B --tp 8 --dp 4 --dtype bfloat16 --use-zero-1 --sequence-parallel-enabled --seq-len 2048 \
         --vocab-size 50288 --target trn1 --output-dir modules",
    );
    assert!(start.elapsed() < Duration::from_secs(60), "{printed}");
    let manifest: Value = serde_json::from_str(&room.read("modules/manifest.json")).unwrap();
    for module in manifest["modules"].as_array().unwrap() {
        let estimate = |what: &str| module["estimate"][what].as_u64().unwrap();
        assert!(estimate("memory") < estimate("memory_of_target"), "{module}");
        assert!(estimate("device_instructions") < estimate("most_device_instructions"), "{module}");
        // Parameters in bf16 and gradients in fp32 are those of one of 8 ranks, masters and moments those of one of 32.
        let inputs = module["inputs"].as_array().unwrap();
        assert!(inputs.iter().any(|port| port["name"] == "rank" && port["shape"] == serde_json::json!([2])));
    }
    assert!(manifest["held"].as_u64().unwrap() < 8 << 30);
}

/// Where a step does not fit, what would is said; where nothing would, that.
#[test]
fn a_step_that_is_too_large() {
    let room = Room::new();
    let compile = |flags: &str| {
        let line = format!("compile --target trn1 --seq-len 2048 --output-dir modules {flags}");
        let output = room.run(&line);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let model = "--model mamba2-130m --batch 16";
    let said = compile(&format!("{model} --layer-groups 1"));
    assert!(said.contains("warning: micro_step needs about"), "{said}");
    let hint = said.lines().find(|line| line.starts_with("hint: it would fit with ")).unwrap();
    let flags = hint.trim_start_matches("hint: it would fit with ").split(", or with ");
    let flags: Vec<&str> = flags.map(|form| form.split(" (").next().unwrap()).collect();
    assert_eq!(flags, ["--activation-checkpointing block", "--layer-groups 2"], "{said}");
    for form in flags {
        let said = compile(&format!("{model} --layer-groups 1 {form}"));
        assert!(!said.contains("GiB of device memory"), "{form}: {said}");
    }
    let said = compile("--model Mamba7B");
    assert!(
        said.contains("hint: no way to write the layers makes it fit") && said.contains("--tp"),
        "{said}"
    );
    assert!(!said.contains("it would fit"), "{said}");
}
