//! The PJRT driver on real plugins: XLA's own for CPUs, and that for NVIDIA GPUs where there is none.
//!
//! `ELAPID_PJRT_CPU` and `ELAPID_PJRT_CUDA` name the plugins; without them these tests say that they are skipped.
#![allow(missing_docs)]

use elapid_tensor::suite;
use elapid_xla::driver::pjrt::Client;
use elapid_xla::driver::{Driver, Kind, OnDevice, widen_limits};
use elapid_xla::{Options, XlaBackend};

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
