//! The index of Megatron-LM's tokens.
#![no_main]

use elapid::data::Dataset;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|index: &[u8]| {
    elapid_fuzz::with_files(&[("tokens.idx", index), ("tokens.bin", &[3; 64])], |dir| {
        if let Ok(dataset) = Dataset::open_blocks(&dir.join("tokens"), Some(4)) {
            let _ = (0..dataset.len().min(4)).try_for_each(|index| dataset.sample(index).map(drop));
        }
    });
});
