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
        carried: false,
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

/// Mamba7B over 32 ranks of trn1: XLA takes the modules, in full where layers are a loop, and with two layers where they
/// are calls, which it would write out; a rank's memory and instructions keep to the limits.
#[test]
fn a_large_model_on_many_ranks() {
    let config = ModelConfig { vocab_size: 50288, ..ModelConfig::preset("Mamba7B").unwrap() };
    let recorded = |config, layers, tp| {
        let options = Options { layers, dp: 4, tp, ..Options::default() };
        let recording = Recording {
            length: 2048,
            documents: false,
            checkpointing: Checkpointing::None,
            sequence_parallel: true,
            zero1: true,
            options,
            ..recording(config, layers, DType::Bf16)
        };
        modules(&recording)
    };
    for layers in [LoopKind::Call, LoopKind::While] {
        for module in recorded(&config, layers, 8) {
            assert_eq!(elapid_xla::lint(&module.proto), Vec::<String>::new());
            let needs = elapid_xla::estimate(&module.proto);
            assert!(needs.memory() < 16 << 30 && needs.work.instructions < 5_000_000, "{needs:?}");
            assert!(needs.work.collectives > 0 && needs.work.sent > 0, "{needs:?}");
        }
    }
    let micro_step = |tp| recorded(&config, LoopKind::Call, tp)[0].instructions() as f64;
    assert!(micro_step(8) < 1.1 * micro_step(2), "the text does not grow with the mesh");
    let Some(jaxlib) = Jaxlib::start() else { return };
    let shallow = ModelConfig { num_hidden_layers: 2, ..config.clone() };
    for (config, layers) in [(&config, LoopKind::While), (&shallow, LoopKind::Call)] {
        for module in recorded(config, layers, 8) {
            assert_eq!(jaxlib.compile(&module, 32), Ok(()), "{}", module.proto.name);
        }
    }
    let text = recorded(&shallow, LoopKind::Call, 8)[0].to_text();
    assert!(jaxlib.parse(&text).is_ok_and(|instructions| instructions > 100));
}
