//! A configuration, as transformers, state-spaces and Codestral write it.
#![no_main]

use elapid::config::ModelConfig;
use elapid::convert::{Dimensions, compare};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Ok(text) = std::str::from_utf8(text)
        && let Ok(config) = ModelConfig::from_json(text)
    {
        let again = ModelConfig::from_json(&config.to_json()).expect("what was written is read");
        assert_eq!(again.to_json(), config.to_json());
    }
    for name in ["config.json", "params.json"] {
        elapid_fuzz::with_files(&[(name, text)], |dir| {
            let _ = compare(dir, dir, &Dimensions::default());
        });
    }
});
