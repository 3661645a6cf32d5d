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
    let selftest = |ops: &str, more: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        command
            .current_dir(dir.path())
            .args(["selftest", "--json", "--ops", ops])
            .args(device.flags.split(' '));
        command.envs(device.variables.iter().map(|(name, value)| (name, value))).envs(more.iter().copied());
        command.output().unwrap()
    };
    let output = selftest("linear,adamw", &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], true);
    assert_eq!(report["checks"].as_array().unwrap().len(), 2);

    // One op that the device cannot run is one line, and the others are checked all the same.
    let output = selftest("linear,adamw", &[("ELAPID_SIM_MEMORY", "3000")]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("it does not run") && !said.contains("panicked"),
        "{said}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["checks"][0]["worst"].as_str().unwrap().contains("status 4"), "{report}");
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
}
