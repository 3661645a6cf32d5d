//! A whole archive of `torch.save`.
#![no_main]

use elapid::convert::{Dimensions, compare};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|archive: &[u8]| {
    elapid_fuzz::with_files(&[("model.bin", archive)], |dir| {
        let path = dir.join("model.bin");
        let _ = compare(&path, &path, &Dimensions::default());
    });
});
