//! What a mesh of ranks saves, any other loads: every logical tensor to the byte, by reading no byte that it does not need,
//! and training goes on as it would have. Random models and pairs of meshes, always the same ones.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use elapid::checkpoint::{Checkpoint, Data, PREFIXES, Progress, Saver, State, Store};
use elapid::config::ModelConfig;
use elapid::data::Order;
use elapid::model::Mamba2ForCausalLM;
use elapid::model::init::Init;
use elapid::model::shard::{gather, possible_ranks};
use elapid::parallel::{Launch, Mesh, Rank, launch};
use elapid::train::{Batch, Trainer};
use elapid_cpu::CpuBackend;
use elapid_tensor::{AdamW, Checkpointing, DType, NormGroup};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Sequences of a step, which any number of data-parallel ranks up to 3 shares.
const BATCH: usize = 6;
const LENGTH: usize = 8;
/// Steps before the checkpoint and after it.
const BEFORE: u64 = 2;
const AFTER: u64 = 5;

/// The logical tensors of a checkpoint, as bits.
type Tensors = BTreeMap<String, Vec<u32>>;

#[derive(Clone, Copy, Debug)]
struct Ranks {
    mesh: Mesh,
    zero1: bool,
    sequence_parallel: bool,
}

#[derive(Debug)]
struct Case {
    config: ModelConfig,
    from: Ranks,
    to: Ranks,
    /// Saved while the run goes on.
    asynchronous: bool,
    seed: u64,
}

impl Case {
    fn random(seed: u64) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let coin = |rng: &mut ChaCha8Rng| rng.random_bool(0.5);
        let (num_heads, n_groups) =
            *[(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (8, 2)].choose(rng).unwrap();
        let config = ModelConfig {
            num_heads,
            n_groups,
            head_dim: 4,
            hidden_size: num_heads * 2,
            expand: 2,
            state_size: rng.random_range(1..6),
            num_hidden_layers: rng.random_range(1..4),
            vocab_size: rng.random_range(5..40),
            conv_kernel: rng.random_range(2..5),
            chunk_size: 4,
            use_bias: coin(rng),
            use_conv_bias: coin(rng),
            tie_word_embeddings: coin(rng),
            norm_group: if coin(rng) { NormGroup::PerGroup } else { NormGroup::Across },
            ..ModelConfig::preset("tiny").unwrap()
        };
        config.validate().unwrap();
        let possible: Vec<usize> = possible_ranks(&config).collect();
        let mut ranks = || Ranks {
            mesh: Mesh { dp: rng.random_range(1..4), tp: *possible.choose(rng).unwrap() },
            zero1: coin(rng),
            sequence_parallel: coin(rng),
        };
        let (from, to) = (ranks(), ranks());
        Self { config, from, to, asynchronous: coin(rng), seed }
    }

    /// What one rank gets of a step.
    fn batch(&self, step: u64, rank: &Rank) -> Batch {
        let rng = &mut ChaCha8Rng::seed_from_u64(self.seed * 100 + step);
        let all: Vec<i32> =
            (0..BATCH * LENGTH).map(|_| rng.random_range(0..self.config.vocab_size as i32)).collect();
        let size = BATCH / rank.mesh().dp;
        let ids = all[rank.dp_rank() * size * LENGTH..][..size * LENGTH].to_vec();
        let labels = (0..ids.len()).map(|i| if i % LENGTH + 1 < LENGTH { ids[i + 1] } else { -100 });
        let labels = labels.collect();
        Batch { size, length: LENGTH, ids, labels, documents: None, continued: vec![false; size] }
    }

    fn trainer<'b>(&self, backend: &'b CpuBackend, ranks: Ranks) -> Trainer<'b, CpuBackend> {
        let model = Mamba2ForCausalLM::new(backend, &self.config, DType::F32, Init::StateSpaces, self.seed)
            .with_sequence_parallel(ranks.sequence_parallel);
        let model = if ranks.zero1 { model.with_zero1(backend) } else { model };
        Trainer::new(backend, model, Checkpointing::None)
    }

    /// Loss and gradient norm of a step.
    fn step(&self, step: u64, rank: &Rank, trainer: &mut Trainer<'_, CpuBackend>) -> [f64; 2] {
        let batch = self.batch(step, rank);
        trainer.last_micro_step(&batch);
        // An eps that keeps the update a smooth function of the gradient.
        let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1, step };
        let report = trainer.update(&hyper, 1.0, rank.sum_over_samples(batch.valid() as u64) as usize);
        [report.loss, report.grad_norm]
    }

    fn steps(&self, rank: &Rank, trainer: &mut Trainer<'_, CpuBackend>, from: u64, to: u64) -> Vec<[f64; 2]> {
        (from..=to).map(|step| self.step(step, rank, trainer)).collect()
    }

    fn progress(&self) -> Progress {
        Progress {
            step: BEFORE,
            samples: BEFORE * BATCH as u64,
            tokens: BEFORE * (BATCH * LENGTH) as u64,
            seconds: 1.0,
            first_loss: 5.0,
            last_loss: 4.0,
            order: Order::Dataset,
            data: Data { blocks: 100, seq_len: LENGTH, fingerprint: None, tokenizer: None },
            metrics: serde_json::Value::Null,
            settings: serde_json::Value::Null,
        }
    }
}

fn on_ranks<T: Send>(ranks: Ranks, body: impl Fn(&Rank, &CpuBackend) -> T + Sync) -> Vec<T> {
    let start = Launch { mesh: ranks.mesh, threads: Some(1), timeout: Duration::from_secs(60) };
    launch(&start, |rank| Ok(body(rank, &rank.cpu()?))).unwrap()
}

fn open(rank: &Rank, dir: &Path) -> Store {
    let open = if rank.is_first() { Store::open } else { Store::of_first_rank };
    open(dir, None, None).unwrap()
}

fn state<'a>(trainer: &'a Trainer<'_, CpuBackend>) -> State<'a, CpuBackend> {
    State { model: trainer.model(), buffers: trainer.state(), carried: None, tokenizer: None }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn tensors(dir: &Path) -> Tensors {
    let checkpoint = Checkpoint::find(dir).unwrap();
    let values = |name: &String| bits(&checkpoint.tensor(name).unwrap().unwrap().1);
    checkpoint.manifest().tensors.keys().map(|name| (name.clone(), values(name))).collect()
}

/// What a rank holds of masters and moments, gathered over the tensor-parallel ranks; without ZeRO-1.
fn in_memory(backend: &CpuBackend, trainer: &Trainer<'_, CpuBackend>) -> Tensors {
    let layout = trainer.model().layout();
    let mut found = Tensors::new();
    for (prefix, buffer) in PREFIXES.iter().zip(trainer.state()) {
        for (name, slot, info) in layout.iter() {
            found.insert(format!("{prefix}.{name}"), bits(&gather(backend, buffer, layout, &slot, info)));
        }
    }
    found
}

/// Bytes of masters and moments that the rank has to read.
fn needed(backend: &CpuBackend, trainer: &Trainer<'_, CpuBackend>) -> u64 {
    let (model, layout) = (trainer.model(), trainer.model().layout());
    let (parts, part) = model.part(backend);
    let elements: usize =
        layout.iter().map(|(_, slot, _)| layout.within_part(&slot, parts, part).0.len()).sum();
    (3 * 4 * elements) as u64
}

fn reshard(case: &Case) {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let first = on_ranks(case.from, |rank, backend| {
        let mut trainer = case.trainer(backend, case.from);
        let before = case.steps(rank, &mut trainer, 1, BEFORE);
        assert!(before.iter().flatten().all(|figure| figure.is_finite()));
        let memory = (!case.from.zero1).then(|| in_memory(backend, &trainer));
        let store = open(rank, dirs[0].path());
        let mut after = Vec::new();
        if case.asynchronous {
            std::thread::scope(|scope| {
                let mut saver = Saver::new(scope, &store, rank, backend);
                saver.start(&state(&trainer), case.progress()).unwrap();
                // It goes on at once; what is written is the state before.
                after.push(case.step(BEFORE + 1, rank, &mut trainer));
                saver.finish().unwrap();
            });
        } else {
            store.save(rank, backend, &state(&trainer), case.progress()).unwrap();
            after.push(case.step(BEFORE + 1, rank, &mut trainer));
        }
        after.extend(case.steps(rank, &mut trainer, BEFORE + 2, BEFORE + AFTER));
        (memory, after)
    });
    let saved = tensors(dirs[0].path());
    if let Some(memory) = &first[0].0 {
        assert!(*memory == saved, "what is saved is not what was there: {case:#?}");
    }
    let second = on_ranks(case.to, |rank, backend| {
        let mut trainer = case.trainer(backend, case.to);
        let checkpoint = Checkpoint::open_on(rank, &Checkpoint::locate(dirs[0].path()).unwrap()).unwrap();
        trainer
            .replace_state(|which, layout, part, write| checkpoint.read(PREFIXES[which], layout, part, write))
            .unwrap();
        let (read, needed) = (checkpoint.bytes_read(), needed(backend, &trainer));
        // A padded vocabulary is in no file.
        let padded = !case.config.vocab_size.is_multiple_of(case.to.mesh.tp);
        assert!(read == needed || padded && read < needed, "{read} bytes read of {needed}: {case:#?}");
        let store = open(rank, dirs[1].path());
        store.save(rank, backend, &state(&trainer), case.progress()).unwrap();
        case.steps(rank, &mut trainer, BEFORE + 1, BEFORE + AFTER)
    });
    assert!(saved == tensors(dirs[1].path()), "what is loaded is not what was saved: {case:#?}");
    for (got, want) in second[0].iter().flatten().zip(first[0].1.iter().flatten()) {
        assert!((got - want).abs() <= 2e-4 * want.abs(), "{got} instead of {want}: {case:#?}");
    }
}

#[test]
fn any_mesh_goes_on_from_the_checkpoint_of_any_other() {
    for seed in 0..60 {
        reshard(&Case::random(seed));
    }
}
