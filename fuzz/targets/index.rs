//! The index of a model in several files.
#![no_main]

use elapid::config::ModelConfig;
use elapid::model::Layout;
use elapid::model::pretrained::load_weights;
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = include_str!("../../crates/elapid/tests/golden/models/base/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../crates/elapid/tests/golden/models/base/model.safetensors");

fuzz_target!(|index: &[u8]| {
    let layout = Layout::new(&ModelConfig::from_json(CONFIG).unwrap());
    let files = [("model.safetensors.index.json", index), ("a.safetensors", WEIGHTS)];
    elapid_fuzz::with_files(&files, |dir| {
        let _ = load_weights(dir, &layout, |_, _| {});
    });
});
