//! Whole steps: what the recorded modules compute in XLA is what the CPU backend computes.
#![allow(missing_docs)]

#[path = "../../elapid-xla/tests/jaxlib/mod.rs"]
mod jaxlib;

use std::collections::HashMap;

use elapid::config::ModelConfig;
use elapid::model::Mamba2ForCausalLM;
use elapid::model::init::Init;
use elapid::record::Recording;
use elapid::train::{Batch, StepReport, Trainer};
use elapid_cpu::{Buffer, CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Backend, Checkpointing, DType, FlatShape, IGNORE_LABEL, Row, Slot, Tape};
use elapid_xla::{Executor, Literal, LoopKind, Module, Options};
use jaxlib::Jaxlib;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: u64 = 3;
const MICRO_STEPS: usize = 2;

/// What rounding may cost AdamW's moments after three steps, in fp32.
const MOMENTS: f64 = 5e-4;

/// What bf16 may cost losses, norms and logits.
const BF16: f64 = 2e-2;

/// A device with named arrays: modules run on it as a driver would let them.
struct Device<'j> {
    jaxlib: &'j Jaxlib,
    arrays: HashMap<String, Literal>,
}

impl Device<'_> {
    fn set(&mut self, name: &str, value: Literal) {
        self.arrays.insert(name.to_owned(), value);
    }

    fn floats(&self, name: &str) -> &[f32] {
        self.arrays[name].floats()
    }

    fn run(&mut self, module: &Module) {
        let plain = |name: &str| name.trim_end_matches(".must_alias_input").to_owned();
        let inputs: Vec<Literal> =
            module.inputs.iter().map(|port| self.arrays[&plain(&port.name)].clone()).collect();
        let outputs =
            self.jaxlib.run(module, &inputs).unwrap_or_else(|why| panic!("{}: {why}", module.proto.name));
        for (port, value) in module.outputs.iter().zip(outputs) {
            self.arrays.insert(plain(&port.name), value);
        }
    }
}

/// The two arrays of a flat buffer.
fn arrays(cpu: &CpuBackend, buffer: &Buffer, flat: FlatShape) -> [Vec<f32>; 2] {
    let row = |row, len| cpu.values(&cpu.view(buffer, &Slot { row, offset: 0, shape: vec![len] }));
    let layers = (0..flat.layers).flat_map(|layer| row(Row::Layer(layer), flat.row)).collect();
    [layers, row(Row::Shared, flat.shared)]
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (off / want.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

fn config(groups: usize, layers: usize, tied: bool) -> ModelConfig {
    ModelConfig {
        num_heads: 6,
        head_dim: 8,
        hidden_size: 24,
        state_size: 8,
        num_hidden_layers: layers,
        n_groups: groups,
        vocab_size: 101,
        chunk_size: 16,
        tie_word_embeddings: tied,
        use_bias: !tied,
        ..ModelConfig::preset("tiny").unwrap()
    }
}

fn batch(rng: &mut ChaCha8Rng, size: usize, length: usize, vocab: i32, documents: bool) -> Batch {
    let count = size * length;
    let ids: Vec<i32> = (0..count).map(|_| rng.random_range(0..vocab)).collect();
    let label = |_| if rng.random_range(0..5) == 0 { IGNORE_LABEL } else { rng.random_range(0..vocab) };
    let labels = (0..count).map(label).collect();
    let documents = documents.then(|| (0..count).map(|t| (t / 13) as i32).collect());
    Batch { size, length, ids, labels, documents, continued: vec![false; size] }
}

fn hyper(step: u64) -> AdamW {
    AdamW { lr: 1e-2 / step as f32, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step }
}

/// Three optimizer steps of two micro-steps on both sides, then an evaluation and some decoding.
fn agrees(
    jaxlib: &Jaxlib,
    config: &ModelConfig,
    dtype: DType,
    documents: bool,
    checkpointing: Checkpointing,
    options: Options,
) {
    let limit = if dtype == DType::F32 { 1e-4 } else { BF16 };
    let (size, length) = (2, 37);
    let cpu = CpuBackend::new(&CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = |dtype| Mamba2ForCausalLM::new(&cpu, config, dtype, Init::StateSpaces, 5);
    let mut trainer = Trainer::new(&cpu, model(DType::F32), checkpointing);
    let mut narrow = (dtype != DType::F32).then(|| Trainer::new(&cpu, model(dtype), checkpointing));
    let flat = trainer.model().layout().flat;
    let recording = Recording {
        config,
        dtype,
        batch: size,
        length,
        documents,
        checkpointing,
        hyper: hyper(1),
        max_norm: 1.0,
        options,
    };
    let mut device = Device { jaxlib, arrays: HashMap::new() };
    let masters = arrays(&cpu, trainer.model().masters(), flat);
    if let Some(compute) = narrow.as_ref().and_then(|narrow| narrow.model().compute()) {
        let [layers, shared] = arrays(&cpu, compute, flat);
        device.set("compute.layers", Literal::Bf16(layers));
        device.set("compute.shared", Literal::Bf16(shared));
    }
    for (part, values) in ["layers", "shared"].into_iter().zip(masters) {
        for zero in ["grads", "m", "v"] {
            device.set(&format!("{zero}.{part}"), Literal::F32(vec![0.0; values.len()]));
        }
        device.set(&format!("masters.{part}"), Literal::F32(values));
    }
    device.set("loss", Literal::F32(vec![0.0]));
    let (micro_step, update) = (recording.micro_step(), recording.update());

    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for step in 1..=STEPS {
        let mut valid = 0;
        for _ in 0..MICRO_STEPS {
            let batch = batch(&mut rng, size, length, config.vocab_size as i32, documents);
            valid += batch.valid();
            trainer.micro_step(&batch);
            narrow.iter_mut().for_each(|narrow| narrow.micro_step(&batch));
            device.set("ids", Literal::S32(batch.ids));
            device.set("labels", Literal::S32(batch.labels));
            if let Some(documents) = batch.documents {
                device.set("documents", Literal::S32(documents));
            }
            device.run(&micro_step);
        }
        let hyper = hyper(step);
        let want: StepReport = trainer.update(&hyper, 1.0, valid);
        narrow.iter_mut().for_each(|narrow| assert!(narrow.update(&hyper, 1.0, valid).finite));
        for (name, value) in elapid_xla::XlaBackend::step_inputs(&hyper, 1.0 / valid as f32) {
            device.set(name, Literal::F32(vec![value]));
        }
        device.run(&update);
        let &[norm, _, finite] = device.floats("outcome") else { panic!("outcome is three numbers") };
        let loss = device.floats("loss_sum")[0] / valid as f32;
        assert_eq!((finite, want.finite), (1.0, true));
        assert!(relative_error(&[loss, norm], &[want.loss as f32, want.grad_norm as f32]) < limit);
        assert!(device.floats("grads.layers").iter().chain(device.floats("loss")).all(|&g| g == 0.0));
    }
    for (which, name) in ["masters", "m", "v"].into_iter().enumerate() {
        let want = arrays(&cpu, trainer.state()[which], flat);
        let narrow = narrow.as_ref().map(|narrow| arrays(&cpu, narrow.state()[which], flat));
        for (part, array) in ["layers", "shared"].into_iter().enumerate() {
            let error = relative_error(device.floats(&format!("{name}.{array}")), &want[part]);
            // AdamW makes a full step of the rounding of the smallest gradient, and the next gradients, which the moments
            // hold, are taken there. In bf16 the CPU's own is the measure.
            let exact = if name == "masters" { limit } else { MOMENTS };
            let limit =
                narrow.as_ref().map_or(exact, |narrow| 2.0 * relative_error(&narrow[part], &want[part]));
            println!("{name}.{array} after {STEPS} steps: error {error:.1e}, limit {limit:.1e}");
            assert!(error < limit, "{name}.{array}: error {error:.1e}, limit {limit:.1e}");
        }
    }

    // Evaluation and decoding of the same parameters on both sides.
    for (part, values) in ["layers", "shared"].into_iter().zip(arrays(&cpu, trainer.model().masters(), flat))
    {
        device.set(&format!("compute.{part}"), Literal::Bf16(values.clone()));
        device.set(&format!("masters.{part}"), Literal::F32(values));
    }
    let batch = batch(&mut rng, size, length, config.vocab_size as i32, documents);
    let want = batch.loss(&mut Tape::inference(&cpu), trainer.model(), None, Checkpointing::None);
    device.set("ids", Literal::S32(batch.ids.clone()));
    device.set("labels", Literal::S32(batch.labels));
    if let Some(documents) = batch.documents {
        device.set("documents", Literal::S32(documents));
    }
    device.run(&recording.eval());
    assert!(relative_error(device.floats("loss_sum"), &cpu.values(&want)) < limit);

    let decode = recording.decode();
    for port in decode.inputs.iter().filter(|port| port.name.starts_with("states")) {
        let name = port.name.trim_end_matches(".must_alias_input");
        device.set(name, Literal::F32(vec![0.0; port.shape.elements()]));
    }
    let mut states = Vec::new();
    for position in 0..4 {
        let ids: Vec<i32> = batch.ids.chunks_exact(length).map(|row| row[position]).collect();
        let on_cpu = cpu.tensor_i32(&ids, &[size, 1]);
        let want = trainer.model().next_logits(&cpu, &on_cpu, None, &mut states);
        device.set("ids", Literal::S32(ids));
        device.run(&decode);
        let error = relative_error(device.floats("logits"), &want);
        assert!(error < limit, "logits at {position}: {error:.1e}");
    }
}

#[test]
fn steps_equal_those_of_the_cpu() {
    let Some(jaxlib) = Jaxlib::start() else { return };
    use LoopKind::{Call, Unrolled, While};
    for (groups, depth, tied, documents, checkpointing, layers) in [
        (1, 2, true, false, Checkpointing::None, Unrolled),
        (2, 3, false, true, Checkpointing::Block, Unrolled),
        (2, 3, false, true, Checkpointing::None, Call),
        (3, 3, true, true, Checkpointing::Block, Call),
        (6, 2, true, true, Checkpointing::None, While),
        (1, 3, false, false, Checkpointing::Block, While),
    ] {
        println!(
            "G{groups} {depth} layers, tied {tied}, documents {documents}, {checkpointing:?}, {layers:?}"
        );
        let options = Options { layers, ..Options::default() };
        agrees(&jaxlib, &config(groups, depth, tied), DType::F32, documents, checkpointing, options);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for _ in 0..4 {
        let mut one_of = |count: usize| rng.random_range(0..count);
        let (groups, depth, tied) = ([1, 2, 3, 6][one_of(4)], 1 + one_of(3), one_of(2) == 0);
        let (documents, layers) = (one_of(2) == 0, [Unrolled, Call, While][one_of(3)]);
        let checkpointing = [Checkpointing::None, Checkpointing::Block][one_of(2)];
        let config = ModelConfig {
            conv_kernel: 1 + one_of(4),
            chunk_size: [8, 16, 64][one_of(3)],
            residual_in_fp32: one_of(2) == 0,
            use_conv_bias: one_of(2) == 0,
            ..config(groups, depth, tied)
        };
        println!("{documents} {checkpointing:?} {layers:?} {config:?}");
        let options = Options { layers, block: 1 << 10 };
        agrees(&jaxlib, &config, DType::F32, documents, checkpointing, options);
    }
    let options = Options::default();
    agrees(&jaxlib, &config(2, 3, true), DType::Bf16, true, Checkpointing::None, options);
    agrees(&jaxlib, &config(3, 2, false), DType::Bf16, false, Checkpointing::Block, options);
}

fn recording(config: &ModelConfig, layers: LoopKind, dtype: DType) -> Recording<'_> {
    Recording {
        config,
        dtype,
        batch: 1,
        length: 512,
        documents: true,
        checkpointing: Checkpointing::Block,
        hyper: hyper(1),
        max_norm: 1.0,
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
        for module in modules(&recording(&config(2, 3, false), layers, DType::Bf16)) {
            let entry = module.proto.computations.last().unwrap();
            assert_eq!(jaxlib.parse(&module.to_text()), Ok(entry.instructions.len()), "{}", entry.name);
        }
    }
}
