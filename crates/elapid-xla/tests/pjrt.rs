//! The PJRT driver on real plugins: XLA's own for CPUs, and that for NVIDIA GPUs where there is none.
//!
//! `ELAPID_PJRT_CPU` and `ELAPID_PJRT_CUDA` name the plugins; without them these tests say that they are skipped.
#![allow(missing_docs)]

mod collective;

use std::process::Command;

use collective::sum_over;
use elapid_tensor::suite;
use elapid_xla::driver::pjrt::Client;
use elapid_xla::driver::{Driver, Kind, OnDevice, widen_limits};
use elapid_xla::{Literal, Options, Shape, Type, XlaBackend};

/// None, with a line that says so, where the variable is not set.
fn plugin(variable: &str) -> Option<String> {
    let found = std::env::var(variable).ok();
    if found.is_none() {
        eprintln!("skipped: {variable} names no plugin");
    }
    found
}

#[test]
fn every_op_passes_the_suite() {
    let Some(path) = plugin("ELAPID_PJRT_CPU") else { return };
    let device = Client::open(&path).unwrap().device(0, 1).unwrap();
    println!("{}", device.describe());
    let backend = XlaBackend::new(Options::default(), Some(Box::new(OnDevice::new(Box::new(device)))));
    let mut reports = suite::check_all(&backend);
    widen_limits(&mut reports);
    suite::assert_passes(&reports);
}

#[test]
fn a_machine_without_a_gpu_is_an_error() {
    let Some(path) = plugin("ELAPID_PJRT_CUDA") else { return };
    let fault = Client::open(&path).err().expect("no GPU");
    println!("{fault}\n{}", fault.hint);
    assert_eq!(fault.kind, Kind::NoDevice);
}

#[test]
fn what_is_no_plugin_is_an_error() {
    let fault = Client::open("/nowhere.so").err().unwrap();
    assert_eq!(fault.kind, Kind::Missing);
    assert!(fault.to_string().contains("/nowhere.so"));
    let fault = Client::open(&std::env::current_exe().unwrap().display().to_string()).err().unwrap();
    assert_eq!(fault.kind, Kind::Missing);
    assert!(fault.to_string().contains("cannot be used as a PJRT plugin"), "{fault}");
}

/// Threads as ranks, each with a device of its own, run one program together. XLA is told of its devices by a variable.
#[test]
fn several_devices_sum() {
    if plugin("ELAPID_PJRT_CPU").is_none() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "four_devices", "--ignored", "--nocapture"]);
    child.env("XLA_FLAGS", "--xla_force_host_platform_device_count=4");
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "run by several_devices_sum, as a process of its own"]
fn four_devices() {
    let Some(path) = plugin("ELAPID_PJRT_CPU") else { return };
    let client = Client::open(&path).unwrap();
    assert_eq!(client.devices(), 4);
    assert_eq!(client.device(0, 5).err().unwrap().kind, Kind::NoDevice);
    let module = sum_over(4, "total");
    std::thread::scope(|scope| {
        for rank in 0..4 {
            let (client, module) = (&client, &module);
            scope.spawn(move || {
                let mut device = client.device(rank, 4).unwrap();
                let program = device.load(module).unwrap();
                for round in 0..3 {
                    let x = Literal::F32(vec![(rank + round) as f32; 4]);
                    device.write("x", &Shape::new(Type::F32, &[4]), &x).unwrap();
                    device.run(program).unwrap();
                    let want = 2 * (6 + 4 * round);
                    assert_eq!(device.read("total").unwrap(), Literal::F32(vec![want as f32; 4]));
                }
            });
        }
    });
}
