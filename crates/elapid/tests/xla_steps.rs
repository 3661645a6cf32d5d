//! Whole steps: what the recorded modules compute in XLA, on any mesh of ranks, is what the CPU backend computes on one.
#![allow(missing_docs)]

#[path = "../../elapid-xla/tests/jaxlib/mod.rs"]
mod jaxlib;
mod random;

use std::collections::HashMap;

use elapid::config::ModelConfig;
use elapid::model::init::Init;
use elapid::model::shard::{Share, possible_ranks};
use elapid::model::{Layout, Mamba2ForCausalLM};
use elapid::parallel::Mesh;
use elapid::record::Recording;
use elapid::train::{Batch, StepReport, Trainer};
use elapid_cpu::{Buffer, CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Backend, Checkpointing, DType, IGNORE_LABEL, Row, Tape};
use elapid_xla::{Literal, LoopKind, Module, Options};
use jaxlib::Jaxlib;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use random::{Extents, coin};

const STEPS: u64 = 3;

/// What rounding may cost AdamW's moments after three steps, in fp32.
const MOMENTS: f64 = 5e-4;

/// What bf16 may cost losses, norms and logits, also where the residual stream is bf16.
const BF16: f64 = 4e-2;

/// One configuration.
#[derive(Clone, Debug)]
struct Case {
    config: ModelConfig,
    dtype: DType,
    mesh: Mesh,
    sequence_parallel: bool,
    zero1: bool,
    documents: bool,
    /// States pass from micro-step to micro-step.
    carried: bool,
    checkpointing: Checkpointing,
    layers: LoopKind,
    in_place: bool,
    /// Modules of a micro-step: groups of layers, forward and backward.
    groups: usize,
    micro_steps: usize,
    /// Samples of a micro-step, of one rank.
    batch: usize,
    length: usize,
}

impl Case {
    /// A small model on one rank.
    fn alone(groups: usize, depth: usize, tied: bool) -> Self {
        let config = ModelConfig {
            num_heads: 6,
            head_dim: 8,
            hidden_size: 24,
            state_size: 8,
            num_hidden_layers: depth,
            n_groups: groups,
            vocab_size: 101,
            chunk_size: 16,
            tie_word_embeddings: tied,
            use_bias: !tied,
            ..ModelConfig::preset("tiny").unwrap()
        };
        Self {
            config,
            dtype: DType::F32,
            mesh: Mesh::SINGLE,
            sequence_parallel: false,
            zero1: false,
            documents: false,
            carried: false,
            checkpointing: Checkpointing::None,
            layers: LoopKind::Call,
            in_place: true,
            groups: 1,
            micro_steps: 2,
            batch: 2,
            length: 37,
        }
    }

    /// Any model on `ranks` ranks.
    fn random(rng: &mut ChaCha8Rng, ranks: usize) -> Self {
        let (config, mesh) = loop {
            let extents = Extents {
                heads: &[(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (6, 6), (8, 2), (8, 1), (8, 4)],
                state: 1..9,
                vocab: 20..90,
                chunks: &[8, 16, 64],
            };
            let config = random::model(rng, &extents);
            let tp: Vec<usize> = possible_ranks(&config).filter(|tp| ranks.is_multiple_of(*tp)).collect();
            let tp = *tp.choose(rng).unwrap();
            // Half of the models that could be cut up are.
            if tp > 1 || coin(rng) {
                break (config, Mesh { dp: ranks / tp, tp });
            }
        };
        let mut coin = || rng.random_bool(0.5);
        let (sequence_parallel, zero1, documents) = (coin(), coin(), coin());
        let (carried, in_place, split) = (coin(), coin(), coin());
        let groups = if carried || !split { 1 } else { rng.random_range(1..=config.num_hidden_layers) };
        Self {
            config,
            dtype: DType::F32,
            mesh,
            sequence_parallel,
            zero1,
            documents,
            carried,
            in_place,
            groups,
            checkpointing: *[Checkpointing::None, Checkpointing::Block].choose(rng).unwrap(),
            layers: *[LoopKind::Call, LoopKind::While, LoopKind::Unrolled].choose(rng).unwrap(),
            micro_steps: rng.random_range(1..3),
            batch: rng.random_range(1..3),
            length: rng.random_range(5..40),
        }
    }

    fn recording(&self) -> Recording<'_> {
        let Mesh { dp, tp } = self.mesh;
        Recording {
            config: &self.config,
            dtype: self.dtype,
            batch: self.batch,
            length: self.length,
            documents: self.documents,
            carried: self.carried,
            checkpointing: self.checkpointing,
            hyper: hyper(1),
            max_norm: 1.0,
            sequence_parallel: self.sequence_parallel,
            zero1: self.zero1,
            options: Options { layers: self.layers, block: 1 << 10, in_place: self.in_place, dp, tp },
        }
    }

    /// Parameters are held in bf16 beside the masters.
    fn narrow(&self) -> bool {
        self.dtype != DType::F32
    }

    /// Each data-parallel rank holds its part of the masters and moments.
    fn dealt(&self) -> bool {
        self.zero1 && self.mesh.dp > 1
    }

    /// The samples of all ranks.
    fn samples(&self, rng: &mut ChaCha8Rng) -> Batch {
        let (size, vocab) = (self.batch * self.mesh.dp, self.config.vocab_size as i32);
        let count = size * self.length;
        let ids: Vec<i32> = (0..count).map(|_| rng.random_range(0..vocab)).collect();
        let label = |_| if rng.random_range(0..5) == 0 { IGNORE_LABEL } else { rng.random_range(0..vocab) };
        let labels = (0..count).map(label).collect();
        let documents = self.documents.then(|| (0..count).map(|t| (t / 13) as i32).collect());
        let continued = (0..size).map(|_| self.carried && rng.random_bool(0.7)).collect();
        Batch { size, length: self.length, ids, labels, documents, continued }
    }
}

fn hyper(step: u64) -> AdamW {
    AdamW { lr: 1e-2 / step as f32, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step }
}

/// Ranks with named arrays: modules run on them as a driver would let them.
struct Devices<'a> {
    jaxlib: &'a Jaxlib,
    case: &'a Case,
    layouts: Vec<Layout>,
    arrays: Vec<HashMap<String, Literal>>,
}

impl<'a> Devices<'a> {
    fn new(jaxlib: &'a Jaxlib, case: &'a Case) -> Self {
        let Mesh { dp, tp } = case.mesh;
        let layout = |share| Layout::sharded(&case.config, share).dealt_to(dp);
        let rank = |rank| {
            let (dp, tp) = case.mesh.place(rank);
            HashMap::from([("rank".to_owned(), Literal::S32(vec![dp as i32, tp as i32]))])
        };
        let layouts = Share::all(tp).map(layout).collect();
        Self { jaxlib, case, layouts, arrays: (0..case.mesh.size()).map(rank).collect() }
    }

    fn set(&mut self, name: &str, value: &Literal) {
        self.arrays.iter_mut().for_each(|arrays| drop(arrays.insert(name.to_owned(), value.clone())));
    }

    /// The values of rank 0, which all ranks have.
    fn same(&self, name: &str) -> &[f32] {
        let first = self.arrays[0][name].floats();
        assert!(self.arrays.iter().all(|arrays| arrays[name].floats() == first), "{name}");
        first
    }

    /// Each data-parallel rank gets its samples.
    fn set_samples(&mut self, name: &str, values: &[i32], per_sample: usize) {
        let own = self.case.batch * per_sample;
        for (rank, arrays) in self.arrays.iter_mut().enumerate() {
            let values = &values[self.case.mesh.place(rank).0 * own..][..own];
            arrays.insert(name.to_owned(), Literal::S32(values.to_vec()));
        }
    }

    fn set_batch(&mut self, batch: &Batch) {
        self.set_samples("ids", &batch.ids, batch.length);
        self.set_samples("labels", &batch.labels, batch.length);
        if let Some(documents) = &batch.documents {
            self.set_samples("documents", documents, batch.length);
        }
        let continued: Vec<i32> = batch.continued.iter().map(|&goes_on| i32::from(goes_on)).collect();
        self.set_samples("continued", &continued, 1);
    }

    /// States of zeros, as a module takes them.
    fn zero_states(&mut self, module: &Module) {
        for port in module
            .inputs
            .iter()
            .filter(|port| ["states", "eval"].iter().any(|name| port.name.starts_with(name)))
        {
            let name = port.name.trim_end_matches(".must_alias_input");
            self.set(name, &Literal::F32(vec![0.0; port.shape.elements()]));
        }
    }

    fn run(&mut self, module: &Module) {
        let broken = elapid_xla::lint(&module.proto);
        assert!(broken.is_empty(), "{broken:?}");
        let plain = |name: &str| name.trim_end_matches(".must_alias_input").to_owned();
        let of_rank = |arrays: &HashMap<String, Literal>| {
            module.inputs.iter().map(|port| arrays[&plain(&port.name)].clone()).collect()
        };
        let inputs: Vec<Vec<Literal>> = self.arrays.iter().map(of_rank).collect();
        let outputs = self
            .jaxlib
            .run_on_ranks(module, &inputs)
            .unwrap_or_else(|why| panic!("{}: {why}", module.proto.name));
        for (arrays, outputs) in self.arrays.iter_mut().zip(outputs) {
            for (port, value) in module.outputs.iter().zip(outputs) {
                arrays.insert(plain(&port.name), value);
            }
        }
    }

    /// Gives each rank its part of a flat buffer from the values of the parameters, in the layout's order: `dealt` its
    /// share of every row; of `ends` what weight decay leaves.
    fn set_buffer(&mut self, name: &str, tensors: &[Vec<f32>], dealt: bool, ends: bool, narrow: bool) {
        let Mesh { dp, .. } = self.case.mesh;
        for (rank, arrays) in self.arrays.iter_mut().enumerate() {
            let (dp_rank, tp_rank) = self.case.mesh.place(rank);
            let layout = &self.layouts[tp_rank];
            let mut flat = vec![0.0; layout.flat.len()];
            for ((_, slot, info), values) in layout.iter().zip(tensors) {
                flat[layout.flat.range(&slot)].copy_from_slice(&info.cuts(layout.share).slice(values));
            }
            for (part, rows) in parts(layout) {
                let decayed = if part == "layers" { layout.decayed.0 } else { layout.decayed.1 };
                let own = |row: Row| {
                    let row = &flat[layout.flat.range(&layout.flat.whole(row))];
                    let len = row.len() / dp;
                    match (dealt, ends) {
                        (true, _) => row[dp_rank * len..][..len].to_vec(),
                        (false, true) => row[decayed..].to_vec(),
                        (false, false) => row.to_vec(),
                    }
                };
                let values: Vec<f32> = rows.into_iter().flat_map(own).collect();
                let value = if narrow { Literal::Bf16(values) } else { Literal::F32(values) };
                arrays.insert(format!("{name}.{part}"), value);
            }
        }
    }

    /// The values of all parameters, where a module may look for them.
    fn set_parameters(&mut self, masters: &[Vec<f32>]) {
        let (narrow, dealt) = (self.case.narrow(), self.case.dealt());
        self.set_buffer("masters", masters, dealt, false, false);
        self.set_buffer("compute", masters, false, false, narrow);
        self.set_buffer("ends", masters, false, true, false);
    }

    /// No gradients, moments and loss, of parameters like these.
    fn set_zeros(&mut self, masters: &[Vec<f32>]) {
        let zeros: Vec<Vec<f32>> = masters.iter().map(|values| vec![0.0; values.len()]).collect();
        self.set_buffer("grads", &zeros, false, false, false);
        self.set_buffer("m", &zeros, self.case.dealt(), false, false);
        self.set_buffer("v", &zeros, self.case.dealt(), false, false);
        self.set("loss", &Literal::F32(vec![0.0]));
    }

    /// The parameters' values in a buffer, one after the other.
    fn logical(&self, name: &str, dealt: bool) -> Vec<f32> {
        let Mesh { dp, tp } = self.case.mesh;
        let mut tensors: Vec<Vec<f32>> =
            self.layouts[0].iter().map(|(_, _, info)| vec![f32::NAN; info.elements()]).collect();
        for (tp_rank, layout) in self.layouts.iter().enumerate() {
            let mut flat = Vec::new();
            for (part, rows) in parts(layout) {
                let of =
                    |dp_rank: usize| self.arrays[dp_rank * tp + tp_rank][&format!("{name}.{part}")].floats();
                for (number, _) in rows.iter().enumerate() {
                    let row = |rank| {
                        let len = of(rank).len() / rows.len();
                        &of(rank)[number * len..][..len]
                    };
                    if dealt {
                        (0..dp).for_each(|rank| flat.extend(row(rank)));
                    } else {
                        assert!((1..dp).all(|rank| row(rank) == row(0)), "{name}.{part} on all ranks");
                        flat.extend(row(0));
                    }
                }
            }
            for ((_, slot, info), values) in layout.iter().zip(&mut tensors) {
                info.cuts(layout.share).put(0, &flat[layout.flat.range(&slot)], values);
            }
        }
        tensors.concat()
    }
}

/// The two arrays of a flat buffer and their rows.
fn parts(layout: &Layout) -> [(&'static str, Vec<Row>); 2] {
    [("layers", (0..layout.flat.layers).map(Row::Layer).collect()), ("shared", vec![Row::Shared])]
}

/// The parameters' values in a buffer of the CPU's.
fn tensors(cpu: &CpuBackend, layout: &Layout, buffer: &Buffer) -> Vec<Vec<f32>> {
    layout.iter().map(|(_, slot, _)| cpu.values(&cpu.view(buffer, &slot))).collect()
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (off / want.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

/// Three optimizer steps on both sides, then an evaluation and some decoding.
fn agrees(jaxlib: &Jaxlib, case: &Case) {
    println!("{case:?}");
    let Case { config, dtype, mesh, checkpointing, .. } = case;
    let limit = if *dtype == DType::F32 { 1e-4 } else { BF16 };
    let (narrow, dealt) = (case.narrow(), case.dealt());
    let cpu = CpuBackend::new(&CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = |dtype| Mamba2ForCausalLM::new(&cpu, config, dtype, Init::StateSpaces, 5);
    let trainer = |dtype| {
        let trainer = Trainer::new(&cpu, model(dtype), *checkpointing);
        if case.carried { trainer.with_carried_states() } else { trainer }
    };
    let (mut trainer, mut own) = (trainer(DType::F32), narrow.then(|| trainer(*dtype)));
    let layout = trainer.model().layout().clone();
    let mut devices = Devices::new(jaxlib, case);
    let masters = tensors(&cpu, &layout, trainer.model().masters());
    devices.set_parameters(&masters);
    devices.set_zeros(&masters);
    let recording = case.recording();
    let (micro_step, update) = (recording.micro_steps(case.groups), recording.update());
    assert_eq!(micro_step.len(), 2 * case.groups - 1);
    assert_eq!(update.aliases.is_empty(), !case.in_place);
    devices.zero_states(&micro_step[0]);

    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for step in 1..=STEPS {
        let mut valid = 0;
        for _ in 0..case.micro_steps {
            let batch = case.samples(&mut rng);
            valid += batch.valid();
            trainer.micro_step(&batch);
            own.iter_mut().for_each(|own| own.micro_step(&batch));
            devices.set_batch(&batch);
            micro_step.iter().for_each(|module| devices.run(module));
        }
        let hyper = hyper(step);
        let want: StepReport = trainer.update(&hyper, 1.0, valid);
        own.iter_mut().for_each(|own| assert!(own.update(&hyper, 1.0, valid).finite));
        for (name, value) in elapid_xla::XlaBackend::step_inputs(&hyper, 1.0 / valid as f32) {
            devices.set(name, &Literal::F32(vec![value]));
        }
        devices.run(&update);
        let &[norm, _, finite] = devices.same("outcome") else { panic!("outcome is three numbers") };
        let loss = devices.same("loss_sum")[0] / valid as f32;
        assert_eq!((finite, want.finite), (1.0, true));
        let error = relative_error(&[loss, norm], &[want.loss as f32, want.grad_norm as f32]);
        assert!(error < limit, "loss {loss}, norm {norm}, wanted {want:?}");
        for name in ["grads.layers", "grads.shared", "loss"] {
            assert!(devices.arrays.iter().all(|arrays| arrays[name].floats().iter().all(|&x| x == 0.0)));
        }
    }
    for (which, name) in ["masters", "m", "v"].into_iter().enumerate() {
        let want = tensors(&cpu, &layout, trainer.state()[which]).concat();
        let own = own.as_ref().map(|own| tensors(&cpu, &layout, own.state()[which]).concat());
        let error = relative_error(&devices.logical(name, dealt), &want);
        // AdamW makes a full step of the rounding of the smallest gradient, and the next gradients, which the moments
        // hold, are taken there. In bf16 the CPU's own is the measure.
        let exact = if name == "masters" { limit } else { MOMENTS };
        let limit = own.map_or(exact, |own| 2.0 * relative_error(&own, &want));
        println!("{name} after {STEPS} steps: error {error:.1e}, limit {limit:.1e}");
        assert!(error < limit, "{name}: error {error:.1e}, limit {limit:.1e}");
    }

    // Evaluation and decoding of the same parameters on both sides.
    let masters = tensors(&cpu, &layout, trainer.model().masters());
    devices.set_parameters(&masters);
    let batch = case.samples(&mut rng);
    let want = batch.loss(&mut Tape::inference(&cpu), trainer.model(), None, Checkpointing::None);
    devices.set_batch(&batch);
    let eval = recording.eval();
    devices.zero_states(&eval);
    devices.run(&eval);
    // Each data-parallel rank has the sum of its own samples, as have its neighbours.
    let sum = |rank: usize| devices.arrays[rank]["loss_sum"].floats()[0];
    assert!((0..mesh.size()).all(|rank| sum(rank) == sum(rank / mesh.tp * mesh.tp)));
    let sums: f32 = (0..mesh.size()).step_by(mesh.tp).map(sum).sum();
    assert!(relative_error(&[sums], &cpu.values(&want)) < limit);

    let decode = recording.decode();
    devices.zero_states(&decode);
    let mut states = Vec::new();
    for position in 0..3 {
        let ids: Vec<i32> = batch.ids.chunks_exact(case.length).map(|row| row[position]).collect();
        let on_cpu = cpu.tensor_i32(&ids, &[batch.size, 1]);
        let want = trainer.model().next_logits(&cpu, &on_cpu, None, &mut states);
        devices.set_samples("ids", &ids, 1);
        devices.run(&decode);
        for (rank, arrays) in devices.arrays.iter().enumerate() {
            let own = case.batch * config.vocab_size;
            let want = &want[mesh.place(rank).0 * own..][..own];
            let error = relative_error(arrays["logits"].floats(), want);
            assert!(error < limit, "logits at {position} on rank {rank}: {error:.1e}");
        }
    }
}

/// What every rank holds after two micro-steps: its gradients, then its loss.
fn gradients(jaxlib: &Jaxlib, case: &Case) -> Vec<[Vec<f32>; 3]> {
    let cpu = CpuBackend::new(&CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = Mamba2ForCausalLM::new(&cpu, &case.config, DType::F32, Init::StateSpaces, 5);
    let masters = tensors(&cpu, model.layout(), model.masters());
    let mut devices = Devices::new(jaxlib, case);
    devices.set_parameters(&masters);
    devices.set_zeros(&masters);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let modules = case.recording().micro_steps(case.groups);
    assert_eq!(modules.len(), 2 * case.groups - 1);
    for _ in 0..2 {
        devices.set_batch(&case.samples(&mut rng));
        modules.iter().for_each(|module| devices.run(module));
    }
    let names = ["grads.layers", "grads.shared", "loss"];
    devices.arrays.iter().map(|arrays| names.map(|name| arrays[name].floats().to_vec())).collect()
}

/// Modules of groups of layers, run one after the other, come to what the one module of all layers comes to, on every rank.
#[test]
fn split_micro_steps_are_the_whole() {
    let Some(jaxlib) = Jaxlib::start() else { return };
    let alone = Case { documents: true, ..Case::alone(2, 4, true) };
    let mesh = Mesh { dp: 2, tp: 2 };
    let block = Checkpointing::Block;
    let ranks =
        Case { mesh, sequence_parallel: true, zero1: true, checkpointing: block, ..Case::alone(2, 3, false) };
    let narrow =
        Case { dtype: DType::Bf16, in_place: false, layers: LoopKind::While, ..Case::alone(3, 3, false) };
    // In bf16 a compiler may round elsewhere.
    for (case, counts, limit) in
        [(alone, vec![2, 3, 4], 1e-6), (ranks, vec![2, 3], 1e-6), (narrow, vec![3], 1e-2)]
    {
        let whole = gradients(&jaxlib, &case);
        assert!(whole.iter().flatten().all(|values| values.iter().any(|&x| x != 0.0)));
        for groups in counts {
            let split = gradients(&jaxlib, &Case { groups, ..case.clone() });
            for (rank, (got, want)) in split.iter().zip(&whole).enumerate() {
                for (name, (got, want)) in ["layers", "shared", "loss"].iter().zip(got.iter().zip(want)) {
                    let error = relative_error(got, want);
                    println!("{groups} groups, rank {rank}, {name}: error {error:.1e}");
                    assert!(error < limit, "{groups} groups, rank {rank}, {name}: {error:.1e}\n{case:?}");
                }
            }
        }
    }
}

#[test]
fn steps_of_one_rank() {
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
        let case = Case::alone(groups, depth, tied);
        agrees(&jaxlib, &Case { documents, checkpointing, layers, ..case });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    (0..2).for_each(|_| agrees(&jaxlib, &Case::random(&mut rng, 1)));
}

#[test]
fn steps_of_several_ranks() {
    let Some(jaxlib) = Jaxlib::start() else { return };
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let mut seen = [0; 9];
    for ranks in [2, 4, 8, 2, 4, 8, 2, 4, 8] {
        let case = Case::random(&mut rng, ranks);
        agrees(&jaxlib, &case);
        let (Mesh { dp, tp }, layout) = (case.mesh, Layout::new(&case.config));
        let share = Share { ranks: tp, rank: 0 };
        let replicas = Layout::sharded(&case.config, share).replicas(Row::Layer(0), false);
        let has = [
            tp > 1 && case.sequence_parallel,
            dp > 1 && case.zero1,
            dp > 1 && !case.zero1,
            tp > 1 && !case.config.vocab_size.is_multiple_of(tp),
            replicas.iter().any(|replica| replica.partial && replica.copies < tp),
            Layout::sharded(&case.config, share).spec.norm_ranks > 1,
            layout.shared().head.is_none(),
            case.carried,
            case.groups > 1,
        ];
        seen.iter_mut().zip(has).for_each(|(seen, has)| *seen += u32::from(has));
    }
    println!(
        "sequence parallel, ZeRO-1, not, padded vocabulary, shared groups, shared means, tied, carried, split: {seen:?}"
    );
    assert!(seen.iter().all(|&count| count > 0), "{seen:?}");
}

#[test]
fn steps_in_bf16() {
    let Some(jaxlib) = Jaxlib::start() else { return };
    let dtype = DType::Bf16;
    agrees(&jaxlib, &Case { dtype, documents: true, ..Case::alone(2, 3, true) });
    let block = Checkpointing::Block;
    agrees(&jaxlib, &Case { dtype, checkpointing: block, ..Case::alone(3, 2, false) });
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for ranks in [2, 4, 8] {
        agrees(&jaxlib, &Case { dtype, zero1: ranks > 2, ..Case::random(&mut rng, ranks) });
    }
}
