//! Every op against the f64 oracle, on every instruction-set path, in poisoned memory; and the same bits with any
//! number of threads.
#![allow(missing_docs)]

use elapid_cpu::{CpuBackend, CpuOptions, Isa};
use elapid_tensor::suite;

fn backend(threads: usize, isa: Isa) -> CpuBackend {
    CpuBackend::new(&CpuOptions {
        threads: Some(threads),
        isa: Some(isa),
        poison: true,
        ..CpuOptions::default()
    })
    .unwrap()
}

#[test]
fn every_op_agrees_with_the_oracle() {
    for isa in Isa::available() {
        println!("{isa:?}");
        suite::assert_passes(&suite::check_all(&backend(2, isa)));
    }
}

/// Nor do they on which way the mixer goes: the chunks of a sequence in turn, or at once where threads are many.
#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for isa in Isa::available() {
        let one = suite::bits(&backend(1, isa));
        for threads in [2, 3, 7] {
            assert!(one == suite::bits(&backend(threads, isa)), "{isa:?}, {threads} threads");
        }
    }
}
