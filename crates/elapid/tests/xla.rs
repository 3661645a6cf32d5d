//! Recorded modules as a whole: rules, size and text.
#![allow(missing_docs)]

#[path = "../../elapid-xla/tests/jaxlib/mod.rs"]
mod jaxlib;

use elapid::config::ModelConfig;
use elapid::record::Recording;
use elapid_tensor::{AdamW, Checkpointing, DType};
use elapid_xla::{LoopKind, Module, Options};
use jaxlib::Jaxlib;

fn recording(config: &ModelConfig, layers: LoopKind, dtype: DType) -> Recording<'_> {
    Recording {
        config,
        dtype,
        batch: 1,
        length: 512,
        documents: true,
        checkpointing: Checkpointing::Block,
        hyper: AdamW { lr: 1.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 },
        max_norm: 1.0,
        sequence_parallel: false,
        zero1: false,
        options: Options { layers, ..Options::default() },
    }
}

fn modules(recording: &Recording<'_>) -> [Module; 4] {
    [recording.micro_step(), recording.update(), recording.eval(), recording.decode()]
}

#[test]
fn modules_keep_the_rules() {
    for name in ["tiny", "Mamba130M"] {
        for layers in [LoopKind::Call, LoopKind::While, LoopKind::Unrolled] {
            for dtype in [DType::F32, DType::Bf16] {
                for module in modules(&recording(&ModelConfig::preset(name).unwrap(), layers, dtype)) {
                    let broken = elapid_xla::lint(&module.proto);
                    assert!(
                        broken.is_empty(),
                        "{name} {layers:?} {dtype:?} {}: {broken:?}",
                        module.proto.name
                    );
                }
            }
        }
    }
}

/// 24 layers of 12 heads, and 64 of 64.
#[test]
fn text_does_not_grow_with_the_model() {
    for layers in [LoopKind::Call, LoopKind::While] {
        let [small, large] = ["Mamba130M", "Mamba7B"].map(|name| {
            let config = ModelConfig::preset(name).unwrap();
            let modules = modules(&recording(&config, layers, DType::Bf16));
            modules.map(|module| module.instructions())
        });
        for (small, large) in small.into_iter().zip(large) {
            println!("{layers:?}: {small} and {large} instructions");
            assert!(large as f64 <= 1.2 * small as f64, "{layers:?}: {small} and {large}");
        }
    }
}

/// The text beside a module is what XLA's own parser reads, with the same number of instructions.
#[test]
fn text_is_hlo() {
    let Some(jaxlib) = Jaxlib::start() else { return };
    for layers in [LoopKind::Call, LoopKind::While] {
        for module in modules(&recording(&ModelConfig::preset("tiny").unwrap(), layers, DType::Bf16)) {
            let entry = module.proto.computations.last().unwrap();
            assert_eq!(jaxlib.parse(&module.to_text()), Ok(entry.instructions.len()), "{}", entry.name);
        }
    }
}
