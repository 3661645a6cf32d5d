//! The header of a safetensors file, with the length before it and some data behind it.
#![no_main]

use elapid::convert::{Dimensions, compare};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|header: &[u8]| {
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length, header, &[0; 64]].concat();
    elapid_fuzz::with_files(&[("model.safetensors", &file)], |dir| {
        let path = dir.join("model.safetensors");
        let _ = compare(&path, &path, &Dimensions::default());
    });
});
