//! Runs on devices: the Neuron driver with a simulated runtime, and the PJRT driver with XLA's own plugin for CPUs, which
//! `ELAPID_PJRT_CPU` names. Both come to what the CPU backend comes to.
#![cfg(target_os = "linux")]

mod devices;
mod run;

use std::fs;
use std::path::Path;
use std::process::Command;

use devices::{Device, curve, same_curve};
use run::{checkpoints, place, wait_for};
use serde_json::Value;

const STEPS: &str = "--max-steps 8 --batch 3 --grad-accum-usteps 2 --eval-fraction 0.1 --eval-freq 4";

/// The whole way on one device.
fn trains(dir: &Path, device: &Device) {
    // The last batch of an evaluation of 3 blocks is full; of 7 it is not.
    let steps = STEPS.replace("0.1", "0.2");
    run::succeed(dir, &format!("{steps} --checkpoint-freq 4 --output-dir cpu"));
    let said = device.succeeds(dir, &format!("{steps} --checkpoint-freq 4 --output-dir whole"));
    assert!(said.contains("micro_step") && said.contains("eval"), "{said}");
    same_curve(&dir.join("whole"), &dir.join("cpu"));

    // Killed after a checkpoint, and resumed.
    let flags = format!("{steps} --checkpoint-freq 2 --resume auto --output-dir killed");
    let mut child = device.command(dir, &flags).spawn().unwrap();
    let run = dir.join("killed");
    assert!(wait_for(|| checkpoints(&run).len() > 1));
    child.kill().unwrap();
    child.wait().unwrap();
    let said = device.succeeds(dir, &flags);
    assert!(said.contains("going on after step") || said.contains("is finished"), "{said}");
    same_curve(&run, &dir.join("cpu"));

    // A checkpoint moves to the CPU, and one of the CPU to the device.
    let moved = |from: &str, to: &str| {
        run::copy(&dir.join(from).join("checkpoints/step-00000004"), &dir.join(to));
        format!("{steps} --resume {to} --checkpoint-dir {to}-more --output-dir {to}-run")
    };
    run::succeed(dir, &moved("whole", "to-cpu"));
    device.succeeds(dir, &moved("cpu", "to-device"));
    for run in ["to-cpu-run", "to-device-run"] {
        let (got, want) = (curve(&dir.join(run)), curve(&dir.join("cpu")));
        assert_eq!(got.len(), 4);
        for (got, want) in got.iter().zip(&want[4..]) {
            assert!((got[0] - want[0]).abs() < 1e-4 * want[0], "{run}: {got:?} instead of {want:?}");
        }
    }

    // A run that diverges ends as on the CPU: the update is not applied, and the step is kept with its cause.
    let said = device.fails(dir, "--max-steps 20 --batch 2 --lr 1e5 --output-dir wild");
    assert!(said.contains("is not finite; the update was not applied"), "{said}");
    let kept = fs::read_dir(dir.join("wild")).unwrap().flatten();
    assert!(kept.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("nonfinite-step-")));
}

#[test]
fn the_neuron_driver_trains_on_a_simulated_runtime() {
    let dir = place();
    let device = Device::simulated(dir.path());
    trains(dir.path(), &device);

    // Documents, bf16, checkpointing and loops: the first loss is the CPU's, and the run learns.
    run::dataset(&dir.path().join("documents"), 3, 37, true);
    let flags =
        "--data-dir documents --max-steps 3 --batch 2 --dtype bfloat16 --activation-checkpointing block";
    run::succeed(dir.path(), &format!("{flags} --output-dir cpu16"));
    device.succeeds(dir.path(), &format!("{flags} --layer-loop while --output-dir device16"));
    let (got, want) = (curve(&dir.path().join("device16")), curve(&dir.path().join("cpu16")));
    for (got, want) in got.iter().zip(&want) {
        assert!((got[0] - want[0]).abs() < 2e-2 * want[0], "{got:?} instead of {want:?}");
    }
}

#[test]
fn the_pjrt_driver_trains_on_xla() {
    let dir = place();
    let Some(device) = Device::xla() else { return };
    trains(dir.path(), &device);
}

/// Evaluation and continuations of one model on the CPU and on a device.
fn answers(dir: &Path, device: &Device) {
    run::dataset(&dir.join("documents"), 3, 37, true);
    run::succeed(dir, "--max-steps 4 --batch 2 --output-dir cpu");
    let json = |flags: &str, on: &str| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        command.current_dir(dir).args(format!("{flags} --model cpu/hf --json {on}").split_whitespace());
        command.envs(device.variables.iter().map(|(name, value)| (name, value)));
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{flags} {on}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // The last batch is smaller; documents are kept apart.
    for (flags, limit) in [
        ("eval --data-dir data --batch 3", 1e-5),
        ("eval --data-dir documents --batch 5 --eval-fraction 0.3", 1e-5),
        ("eval --data-dir data --batch 100 --dtype bfloat16", 1e-2),
    ] {
        let (want, got) = (json(flags, ""), json(flags, &device.flags));
        assert_eq!(want["tokens"], got["tokens"]);
        let [want, got] = [want, got].map(|result| result["loss"].as_f64().unwrap());
        assert!((got - want).abs() < limit * want, "{flags}: {got} instead of {want}");
    }
    let several = "generate --ignore-eos --prompt-ids 1,2,3 --prompt-ids 5 --prompt-ids 9,8,7,6,5";
    for flags in [
        &format!("{several} --temperature 0 --max-new-tokens 12"),
        &format!("{several} --temperature 1 --top-k 20 --seed 3 --max-new-tokens 7"),
        "generate --prompt-ids 3,1,4,1,5,9,2,6 --max-new-tokens 9 --ignore-eos",
        "generate --prompt-ids 3 --max-new-tokens 0",
    ] {
        assert_eq!(json(flags, &device.flags), json(flags, ""), "{flags}");
    }
}

#[test]
fn the_neuron_driver_evaluates_and_generates() {
    let dir = place();
    answers(dir.path(), &Device::simulated(dir.path()));
}

#[test]
fn the_pjrt_driver_evaluates_and_generates() {
    let dir = place();
    let Some(device) = Device::xla() else { return };
    answers(dir.path(), &device);
}

#[test]
fn modules_are_compiled_without_a_device() {
    let dir = place();
    let mut device = Device::simulated(dir.path());
    let library = device.variables.iter_mut().find(|(name, _)| *name == "ELAPID_LIBNRT").unwrap();
    let there = std::mem::replace(&mut library.1, "/nowhere.so".into());
    device.succeeds(dir.path(), &format!("{STEPS} --compile-only"));
    assert!(!dir.path().join("runs").exists());
    let said = device.fails(dir.path(), &format!("{STEPS} --output-dir run"));
    assert!(said.contains("/nowhere.so"), "{said}");

    // With the runtime, and without the compiler: the cache is enough.
    device.variables = vec![("ELAPID_LIBNRT", there), ("PATH", "/usr/bin:/bin".into())];
    device.succeeds(dir.path(), &format!("{STEPS} --output-dir run"));
}

#[test]
fn selftest_checks_ops_on_a_device() {
    let dir = place();
    let device = Device::simulated(dir.path());
    let ops = "--ops linear,adamw,clip";
    let output = device.selftest(dir.path(), ops, &[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for line in ["checking linear", "linear        108 comparisons ok  (", "checking clip", "modules, "] {
        assert!(said.contains(line), "{said}");
    }
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], true);
    assert_eq!(report["checks"].as_array().unwrap().len(), 3);
    assert!(report["modules"].as_u64().unwrap() > 60 && report["time_s"].as_f64().unwrap() > 0.0, "{report}");

    // One op that the device cannot run is one line, and the others are checked all the same.
    let output = device.selftest(dir.path(), ops, &[("ELAPID_SIM_MEMORY", "3000")]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("it does not run") && !said.contains("panicked"),
        "{said}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["checks"][0]["worst"].as_str().unwrap().contains("status 4"), "{report}");

    let output = device.selftest(dir.path(), "--ops linear,adam", &[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("no op adam") && said.contains("adamw"), "{said}");
}

/// All ops, forward and adjoint, through XLA's own plugin and its optimising compiler.
#[test]
fn selftest_of_all_ops_on_xla() {
    let dir = place();
    let Some(device) = Device::xla() else { return };
    let output = device.selftest(dir.path(), "", &[]);
    println!("{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success() && report["ok"] == true, "{report}");
    let checks = report["checks"].as_array().unwrap();
    let checked: Vec<_> = checks.iter().map(|check| check["kernel"].as_str().unwrap()).collect();
    let all = [
        "flat buffer",
        "add",
        "cast",
        "add_bias",
        "linear",
        "resize",
        "rms_norm",
        "embedding",
        "head_loss",
        "clip",
        "adamw",
        "mamba2",
    ];
    assert_eq!(checked, all);
}

#[test]
fn what_a_device_cannot_do_is_refused() {
    let dir = place();
    let steps = "--max-steps 1 --output-dir run";
    for (flags, expected) in [
        ("--device pjrt", "--plugin"),
        ("--device pjrt --plugin /nowhere.so", "/nowhere.so"),
        ("--plugin cuda", "--device pjrt"),
        ("--target trn1", "--device neuron"),
        ("--compile-only", "--device neuron"),
        ("--device neuron --target trn1 --dp 2", "2 ranks"),
    ] {
        let said = run::fail(dir.path(), &format!("{steps} {flags}"));
        assert!(said.contains(expected), "{flags}: {said}");
        assert!(!dir.path().join("run").exists());
    }
    for (line, expected) in [
        ("eval --model hf --data-dir data --device pjrt", "--plugin"),
        ("eval --model hf --data-dir data --device neuron --target trn1 --carry-state", "--carry-state"),
        ("generate --model hf --prompt-ids 1 --plugin cuda", "--device pjrt"),
        ("generate --model hf --prompt-ids 1 --device pjrt --plugin /nowhere.so", "/nowhere.so"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        let output = command.current_dir(dir.path()).args(line.split(' ')).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {said}");
        assert!(
            said.contains("error: ") && said.contains("hint: ") && said.contains(expected),
            "{line}: {said}"
        );
    }
}

/// What `compile` leaves in the cache is what a run with the same flags looks for.
#[test]
fn compile_fills_the_cache_of_a_run() {
    let dir = place();
    let mut device = Device::simulated(dir.path());
    let log = dir.path().join("compilations");
    device.variables.push(("ELAPID_SIM_COMPILATIONS", log.display().to_string()));
    let compile = |flags: &str| {
        let fixed =
            "compile --target trn1 --model model.json --seq-len 16 --output-dir modules --compile-cache neff";
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        command.current_dir(dir.path()).args(fixed.split(' ')).args(flags.split(' '));
        command.envs(device.variables.iter().map(|(name, value)| (name, value)));
        command
    };
    let compilations = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    let mut modules = 0;
    for (flags, made) in [
        ("--batch 3", 4),
        // The update is another one, the rest is there.
        ("--batch 3 --weight-decay 0.2 --max-grad-norm 0.5", 1),
        ("--batch 2 --dtype bfloat16 --activation-checkpointing block --layer-loop while", 4),
    ] {
        for made in [made, 0] {
            modules += made;
            let output = compile(flags).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            for name in ["micro_step", "update", "eval", "decode"] {
                let line =
                    said.lines().find(|line| line.starts_with(name) && line.contains(" compiled (")).unwrap();
                let neff = dir.path().join(line.split_once(": ").unwrap().1);
                assert!(fs::read(neff).unwrap().starts_with(b"SIMULATED"));
            }
            assert_eq!(compilations(), modules, "{flags}");
        }
        let run = format!("{flags} --max-steps 1 --eval-fraction 0.1 --output-dir run-{modules}");
        device.succeeds(dir.path(), &run);
        assert_eq!(compilations(), modules, "the run has found all of its modules: {flags}");
    }
    device.succeeds(dir.path(), "--batch 1 --max-steps 1 --output-dir other");
    assert!(compilations() > modules, "another batch is another module");

    // What the compiler refuses: every module is tried, its words have our ops, and its log stays.
    assert!(compile("--batch 3").output().unwrap().status.success());
    let text = fs::read_to_string(dir.path().join("modules/micro_step.txt")).unwrap();
    let named = |line: &str| {
        line.trim()
            .strip_prefix('%')?
            .split_once(' ')
            .filter(|(_, rest)| rest.contains(" multiply("))
            .map(|(name, _)| name.to_owned())
    };
    let refused = &text.lines().find_map(named).expect("something is multiplied");
    let output = compile("--batch 5").env("ELAPID_SIM_REFUSES", refused).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("neuronx-cc refuses micro_step, eval, decode\nhint: "), "{said}");
    assert!(said.contains(&format!("Unsupported instruction {refused} (")), "{said}");
    let log = said.split("its whole log is in ").nth(1).unwrap().lines().next().unwrap();
    assert!(fs::read_to_string(dir.path().join(log)).unwrap().contains("INFO: reading"));
    assert!(dir.path().join("modules/manifest.json").is_file());

    // A cache that is asked for, and no compiler.
    let output = compile("--batch 7").env("PATH", "/usr/bin:/bin").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("neuronx-cc is not on the path") && said.contains("hint: "), "{said}");
}
