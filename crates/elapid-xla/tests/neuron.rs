//! The Neuron driver from end to end, with a simulated runtime and compiler in the places of the real ones.
//!
//! Each scenario runs in processes of its own: this test itself, told by a variable what to be.
#![allow(missing_docs)]
#![cfg(target_os = "linux")]

mod collective;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use collective::sum_over;
use elapid_sim::install;
use elapid_tensor::{Backend, DType, suite};
use elapid_xla::driver::neuron::{Compiler, NeuronDevice, Place, Settings, Target};
use elapid_xla::driver::{Driver, Fault, OnDevice};
use elapid_xla::{Literal, Module, Options, Result as Named, Shape, Type, XlaBackend};
use tempfile::TempDir;

/// Says what a child is to do.
const SCENARIO: &str = "ELAPID_TEST_SCENARIO";

fn place() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn start(dir: &Path, scenario: &str, variables: &[(&str, &str)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture", "--test-threads", "1"]);
    command.current_dir(dir).env(SCENARIO, scenario).envs(install(dir));
    command.env("ELAPID_SIM_COMPILATIONS", dir.join("compilations"));
    command.envs(variables.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What a child says that must succeed.
fn succeeds(dir: &Path, scenario: &str, variables: &[(&str, &str)]) -> String {
    let output = start(dir, scenario, variables).wait_with_output().unwrap();
    assert!(output.status.success(), "{scenario}: {}", said(&output));
    said(&output)
}

/// What a child says that must end with a fault that names all of `expected`.
fn faults(dir: &Path, scenario: &str, variables: &[(&str, &str)], expected: &[&str]) -> String {
    let output = start(dir, scenario, variables).wait_with_output().unwrap();
    let said = said(&output);
    assert!(!output.status.success() && said.contains("FAULT "), "{scenario}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    for part in expected {
        assert!(said.contains(part), "{scenario}: no {part:?} in {said}");
    }
    said
}

fn compilations(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("compilations")).map_or(0, |text| text.lines().count())
}

/// y = x / d and, in place, sum = sum + y.
fn module() -> Module {
    let backend = XlaBackend::new(Options::default(), None);
    let shape = Shape::new(Type::F32, &[2, 3]);
    let [x, sum] = ["x", "sum"].map(|name| backend.declare(shape.clone(), name));
    let number = backend.input_number(&sum, "sum");
    let y = backend.add(&x, &x);
    let total = backend.add(&sum, &y);
    let results = [
        Named { name: String::new(), tensor: &total, replaces: number },
        Named { name: "y".into(), tensor: &y, replaces: None },
    ];
    backend.module("step", &results)
}

fn device() -> Result<NeuronDevice, Fault> {
    let compiler = Compiler::new(Target::Trn1, Path::new("cache"), |line| eprintln!("{line}"))?;
    let place = Place::find(|name| std::env::var(name).ok())?.unwrap_or_else(Place::alone);
    NeuronDevice::open(Settings { compiler, place, tp: None })
}

fn floats(values: &[f32]) -> Literal {
    Literal::F32(values.to_vec())
}

/// What a child does.
fn play(scenario: &str) -> Result<(), Fault> {
    match scenario {
        "step" => {
            let mut device = device()?;
            println!("{}", device.describe());
            let (module, shape) = (module(), Shape::new(Type::F32, &[2, 3]));
            let program = device.load(&module)?;
            device.write("sum", &shape, &floats(&[1.0; 6]))?;
            for round in 1..=3 {
                device.write("x", &shape, &floats(&[round as f32; 6]))?;
                device.run(program)?;
            }
            assert_eq!(device.read("y")?, floats(&[6.0; 6]));
            assert_eq!(device.read("sum")?, floats(&[13.0; 6]));
            device.write("x", &shape, &floats(&[f32::NAN; 6]))?;
            let fault = device.run(program).unwrap_err();
            assert!(device.read("y")?.floats()[0].is_nan());
            Err(fault)
        }
        "suite" => {
            let device = OnDevice::new(Box::new(device()?));
            let backend = XlaBackend::new(Options::default(), Some(Box::new(device)));
            for check in [suite::linear::<XlaBackend>, suite::rms_norm, suite::adamw, suite::head_loss] {
                suite::assert_passes(&check(&backend));
            }
            assert_eq!(backend.dtype(&backend.tensor(&[1.0], &[1], DType::F32)), DType::F32);
            Ok(())
        }
        "sum" | "killed" => {
            let mut device = device()?;
            let rank: usize = std::env::var("RANK").unwrap().parse().unwrap();
            let ranks: usize = std::env::var("WORLD_SIZE").unwrap().parse().unwrap();
            let program = device.load(&sum_over(ranks, "total"))?;
            let shape = Shape::new(Type::F32, &[4]);
            for round in 0..3 {
                device.write("x", &shape, &floats(&[(rank + round) as f32; 4]))?;
                if scenario == "killed" && rank == 1 && round == 1 {
                    std::process::exit(9);
                }
                device.run(program)?;
                let want: usize = (0..ranks).map(|rank| 2 * (rank + round)).sum();
                assert_eq!(device.read("total")?, floats(&[want as f32; 4]));
            }
            Ok(())
        }
        other => panic!("no scenario {other}"),
    }
}

#[test]
#[ignore = "run by the others, as a process of its own"]
fn child() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    if let Err(fault) = play(&scenario) {
        println!("FAULT {:?}: {fault}\nhint: {}", fault.kind, fault.hint);
        std::process::exit(3);
    }
}

#[test]
fn a_step_runs_in_place_and_nan_is_told() {
    let dir = place();
    let said = faults(dir.path(), "step", &[], &["NotFinite", "run step", "status 1003"]);
    assert!(said.contains("core of rank 0 of 1, Neuron runtime 2.99.0"), "{said}");
    assert_eq!(compilations(dir.path()), 1);
    // The second time it comes from the cache, also where there is no compiler.
    faults(dir.path(), "step", &[("PATH", "/usr/bin:/bin")], &["NotFinite"]);
    assert_eq!(compilations(dir.path()), 1);
}

#[test]
fn ops_pass_the_suite_on_the_runtime() {
    let dir = place();
    succeeds(dir.path(), "suite", &[]);
}

#[test]
fn a_library_that_is_missing_too_old_or_no_runtime() {
    let dir = place();
    let dir = dir.path();
    faults(dir, "step", &[("ELAPID_LIBNRT", "/nowhere/libnrt.so.1")], &["Missing", "/nowhere/libnrt.so.1"]);
    faults(dir, "step", &[("ELAPID_SIM_VERSION", "1")], &["Version", "is version 1.99.0", "2"]);
    faults(dir, "step", &[("ELAPID_LIBNRT", "libm.so.6")], &["Version", "has no nrt_init", "nrt_execute"]);
}

#[test]
fn memory_that_runs_out() {
    let dir = place();
    let expected = ["Memory", "allocate 24 bytes for sum", "--batch"];
    faults(dir.path(), "step", &[("ELAPID_SIM_MEMORY", "20")], &expected);
}

#[test]
fn a_compiler_that_refuses_or_is_missing() {
    let dir = place();
    let proto = module().proto;
    let add = proto.computations.last().unwrap().instructions.iter().find(|i| i.opcode == "add").unwrap();
    let expected =
        ["Compile", "cannot compile step", "NCC_EUOC002", &format!("{} (add)", add.name), "failed.log"];
    faults(dir.path(), "step", &[("ELAPID_SIM_REFUSES", &add.name)], &expected);
    let cache: Vec<_> = std::fs::read_dir(dir.path().join("cache")).unwrap().flatten().collect();
    let log = cache.iter().find(|e| e.file_name().to_string_lossy().ends_with(".failed.log")).unwrap();
    assert!(std::fs::read_to_string(log.path()).unwrap().contains("INFO: reading"));
    let dir = place();
    faults(dir.path(), "step", &[("PATH", "/usr/bin:/bin")], &["Missing", "neuronx-cc is not on the path"]);
}

/// Four processes, one compilation; each waits for the others at the lock.
#[test]
fn four_processes_sum_and_compile_once() {
    let dir = place();
    for child in ranks(dir.path(), "sum", 4, &[("ELAPID_SIM_SLOW", "1")]) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    assert_eq!(compilations(dir.path()), 1);
}

fn ranks(dir: &Path, scenario: &str, ranks: usize, more: &[(&str, &str)]) -> Vec<Child> {
    // Two free ports side by side: the second is the runtime's.
    let port = loop {
        let first = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        if port < u16::MAX && std::net::TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            break port.to_string();
        }
    };
    let size = ranks.to_string();
    (0..ranks)
        .map(|rank| {
            let rank = rank.to_string();
            let variables = [
                ("RANK", rank.as_str()),
                ("WORLD_SIZE", &size),
                ("LOCAL_RANK", &rank),
                ("LOCAL_WORLD_SIZE", &size),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &port),
                ("NEURON_RT_EXEC_TIMEOUT", "3"),
            ];
            start(dir, scenario, &[&variables, more].concat())
        })
        .collect()
}

#[test]
fn a_killed_rank() {
    let dir = place();
    let mut children = ranks(dir.path(), "killed", 3, &[]);
    let killed = children.remove(1).wait_with_output().unwrap();
    assert_eq!(killed.status.code(), Some(9), "{}", said(&killed));
    for child in children {
        let said = said(&child.wait_with_output().unwrap());
        assert!(
            said.contains("FAULT Ranks: libnrt.so.1 cannot run sum") && said.contains("status 5"),
            "{said}"
        );
    }
}

/// A compilation that was killed leaves neither a lock nor half a result.
#[test]
fn a_killed_compilation_is_done_again() {
    let dir = place();
    let mut child = start(dir.path(), "step", &[("ELAPID_SIM_SLOW", "30")]);
    while compilations(dir.path()) == 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    faults(dir.path(), "step", &[], &["NotFinite"]);
    assert_eq!(compilations(dir.path()), 2);
}
