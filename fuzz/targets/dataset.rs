//! A dataset folder of `datasets`: `state.json`, and behind an empty line the Arrow file that it may name.
#![no_main]

use elapid::data::Dataset;
use libfuzzer_sys::fuzz_target;

const STATE: &[u8] = include_bytes!("../../crates/elapid/tests/golden/datasets/plain/state.json");

fuzz_target!(|bytes: &[u8]| {
    let cut = bytes.windows(2).position(|pair| pair == b"\n\n");
    let (state, arrow) = cut.map_or((STATE, bytes), |at| (&bytes[..at], &bytes[at + 2..]));
    elapid_fuzz::with_files(&[("state.json", state), ("data-00000-of-00001.arrow", arrow)], |dir| {
        if let Ok(dataset) = Dataset::open(dir) {
            let _ = (0..dataset.len().min(4)).try_for_each(|index| dataset.sample(index).map(drop));
        }
    });
});
