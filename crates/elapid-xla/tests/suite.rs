//! Every op, forward and adjoint, recorded, compiled and run by XLA, against the f64 oracle.
#![allow(missing_docs)]

mod jaxlib;

use elapid_tensor::suite::{self, Report};
use elapid_xla::{Options, XlaBackend};
use jaxlib::Jaxlib;

fn check(op: impl FnOnce(&XlaBackend) -> Vec<Report>) {
    let Some(jaxlib) = Jaxlib::start() else { return };
    // Small blocks, so that the vocabulary is met in several.
    let backend = XlaBackend::new(Options { block: 1 << 16, ..Options::default() }, Some(Box::new(jaxlib)));
    let reports = op(&backend);
    let worst = reports.iter().max_by(|a, b| (a.error / a.tolerance).total_cmp(&(b.error / b.tolerance)));
    println!(
        "{} comparisons; closest to its tolerance: {}",
        reports.len(),
        worst.expect("something is compared")
    );
    suite::assert_passes(&reports);
}

#[test]
fn flat_buffers() {
    check(suite::flat_buffers);
}

#[test]
fn embedding() {
    check(suite::embedding);
}

#[test]
fn rms_norm() {
    check(suite::rms_norm);
}

#[test]
fn linear() {
    check(suite::linear);
}

#[test]
fn add_bias() {
    check(suite::add_bias);
}

#[test]
fn resize() {
    check(suite::resize);
}

#[test]
fn add_and_cast() {
    check(suite::add_and_cast);
}

#[test]
fn mamba2() {
    check(|backend| {
        let mut reports = suite::mamba2(backend);
        elapid_xla::driver::widen_limits(&mut reports);
        reports
    });
}

#[test]
fn head_loss() {
    check(suite::head_loss);
}

#[test]
fn clip() {
    check(suite::clip);
}

#[test]
fn adamw() {
    check(suite::adamw);
}
