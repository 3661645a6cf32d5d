//! Any mesh of ranks computes what one rank computes, from the same weights and the same samples: loss, every gradient,
//! their norm, and what two updates make of the parameters. Random configurations, always the same ones.

mod random;

use std::collections::BTreeMap;
use std::time::Duration;

use elapid::config::ModelConfig;
use elapid::model::init::Init;
use elapid::model::pretrained::FileDType;
use elapid::model::shard::{gather, possible_ranks};
use elapid::model::{Layout, Mamba2ForCausalLM, Role};
use elapid::parallel::{Launch, Mesh, Rank, launch};
use elapid::train::{Batch, Trainer};
use elapid_cpu::CpuBackend;
use elapid_tensor::{AdamW, Backend, Checkpointing, Clipping, DType, Group, IGNORE_LABEL, Tape};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use random::{Extents, coin};

/// Tensors by name, whole.
type Tensors = BTreeMap<String, Vec<f32>>;

/// Runs `body` on the ranks of a mesh, threads of this process; gives what each returned.
fn on_ranks<T: Send>(dp: usize, tp: usize, body: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    let mesh = Mesh { dp, tp };
    let start = Launch { mesh, threads: Some(1), timeout: Duration::from_secs(20) };
    launch(&start, |rank| Ok(body(rank))).unwrap()
}

fn alone() -> Rank {
    Rank::single(Some(1))
}

/// One configuration.
#[derive(Clone, Debug)]
struct Case {
    config: ModelConfig,
    dtype: DType,
    mesh: Mesh,
    zero1: bool,
    sequence_parallel: bool,
    checkpointing: Checkpointing,
    documents: bool,
    micro_steps: usize,
    /// Samples of a micro-step, over all ranks.
    batch: usize,
    length: usize,
    seed: u64,
}

impl Case {
    fn random(seed: u64) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let extents = Extents {
            heads: &[(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (8, 2), (8, 1), (8, 4)],
            state: 1..6,
            vocab: 5..40,
            chunks: &[2, 4, 16],
        };
        let config = random::model(rng, &extents);
        let mesh = loop {
            let ranks: Vec<usize> = possible_ranks(&config).collect();
            let mesh = Mesh { dp: rng.random_range(1..4), tp: *ranks.choose(rng).unwrap() };
            if mesh.size() > 1 {
                break mesh;
            }
        };
        Self {
            mesh,
            zero1: coin(rng),
            config,
            dtype: if rng.random_bool(0.75) { DType::F32 } else { DType::Bf16 },
            sequence_parallel: coin(rng),
            checkpointing: if coin(rng) { Checkpointing::None } else { Checkpointing::Block },
            documents: coin(rng),
            micro_steps: rng.random_range(1..3),
            batch: mesh.dp * rng.random_range(1..4),
            length: rng.random_range(1..20),
            seed,
        }
    }

    /// Fresh weights, but none of them zero or one as a whole.
    fn weights(&self) -> Tensors {
        let backend = &alone().cpu().unwrap();
        let model = Mamba2ForCausalLM::new(backend, &self.config, DType::F32, Init::StateSpaces, self.seed);
        let rng = &mut ChaCha8Rng::seed_from_u64(self.seed);
        let tensor = |(name, slot, info): (String, _, &elapid::model::ParamInfo)| {
            let mut values = model.parameter(backend, &slot);
            if matches!(info.role, Role::Norm | Role::D | Role::LinearBias | Role::ConvBias | Role::Embedding)
            {
                values.iter_mut().for_each(|value| *value += rng.random_range(-0.3..0.3));
            }
            (name, values)
        };
        model.layout().iter().map(tensor).collect()
    }

    /// What one rank gets of a micro-step.
    fn batch(&self, micro_step: usize, rank: &Rank) -> Batch {
        let rng = &mut ChaCha8Rng::seed_from_u64(self.seed * 100 + micro_step as u64);
        let count = self.batch * self.length;
        let token = |rng: &mut ChaCha8Rng| rng.random_range(0..self.config.vocab_size as i32);
        let ids: Vec<_> = (0..count).map(|_| token(rng)).collect();
        let label = |rng: &mut ChaCha8Rng| if rng.random_bool(0.2) { IGNORE_LABEL } else { token(rng) };
        let mut labels: Vec<i32> = (0..count).map(|_| label(rng)).collect();
        labels[0] = 0;
        let mut document = 0;
        let documents: Vec<_> = (0..count)
            .map(|_| {
                document += i32::from(rng.random_bool(0.2));
                document
            })
            .collect();
        let size = self.batch / rank.mesh().dp;
        let own = |all: Vec<i32>| all[rank.dp_rank() * size * self.length..][..size * self.length].to_vec();
        let documents = self.documents.then(|| own(documents));
        let continued = vec![false; size];
        Batch { size, length: self.length, ids: own(ids), labels: own(labels), documents, continued }
    }

    /// What one rank finds, of the whole model: by name the loss, the norm and the gradients of the sum over all
    /// micro-steps, losses and norms of two updates, and the parameters after them.
    fn run(&self, rank: &Rank, weights: &Tensors) -> Tensors {
        let backend = &rank.cpu().unwrap();
        let mut model = Mamba2ForCausalLM::empty(backend, &self.config, self.dtype)
            .with_sequence_parallel(self.sequence_parallel);
        let layout = model.layout().clone();
        for (name, slot, info) in layout.iter() {
            let part = info.cuts(layout.share).slice(&weights[&name]).into_owned();
            backend.write_slot(model.masters_mut(), &slot, &part);
        }
        model.refresh(backend);
        let mut grads = backend.buffer(layout.flat, DType::F32);
        let mut loss = backend.tensor(&[0.0], &[], DType::F32);
        for micro_step in 0..self.micro_steps {
            let mut tape = Tape::training(backend, &mut grads);
            let one = self.batch(micro_step, rank).loss(&mut tape, &model, None, self.checkpointing);
            tape.backward(&[], &[]);
            loss = backend.add(&loss, &one);
        }
        let loss = backend.all_reduce(&loss, Group::Dp);
        for row in layout.flat.rows() {
            model.sum_replicas(backend, &mut grads, row);
            backend.all_reduce_slot(&mut grads, &layout.flat.whole(row), Group::Dp);
        }
        let (layer, shared) = layout.copies();
        let copies = (&layer[..], &shared[..]);
        let clipping = Clipping { copies, over: &[Group::Tp], ..Clipping::alone(1.0, 0.0) };
        let norm = backend.values(&backend.clip(&grads, &loss, &clipping))[0];
        let mut found = whole(backend, &grads, &layout, "gradient");
        found.insert("loss".into(), backend.values(&loss));
        found.insert("norm".into(), vec![norm]);

        let model = if self.zero1 { model.with_zero1(backend) } else { model };
        let mut trainer = Trainer::new(backend, model, self.checkpointing);
        for step in 1..=2 {
            let mut valid = 0;
            for micro_step in 0..self.micro_steps {
                let batch = self.batch(micro_step, rank);
                // Where an update follows, half of the cases send their gradients ahead of it.
                if micro_step + 1 < self.micro_steps || self.seed.is_multiple_of(2) {
                    trainer.micro_step(&batch);
                } else {
                    trainer.last_micro_step(&batch);
                }
                valid += batch.valid();
            }
            // An eps that keeps the update a smooth function of the gradient.
            let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1, step };
            let report = trainer.update(&hyper, 1.0, rank.sum_over_samples(valid as u64) as usize);
            assert!(report.finite);
            found.insert(format!("loss of step {step}"), vec![report.loss as f32]);
            found.insert(format!("norm of step {step}"), vec![report.grad_norm as f32]);
        }
        let model = trainer.into_model().without_zero1(backend);
        found.append(&mut whole(backend, model.masters(), &layout, "updated"));
        found
    }
}

/// The parameters in a buffer, whole, by name.
fn whole(
    backend: &CpuBackend,
    buffer: &<CpuBackend as Backend>::Buffer,
    layout: &Layout,
    what: &str,
) -> Tensors {
    let one = |(name, slot, info): (String, _, &_)| {
        (format!("{what} {name}"), gather(backend, buffer, layout, &slot, info))
    };
    layout.iter().map(one).collect()
}

/// ‖got − want‖ / max(‖want‖, least).
fn difference(got: &[f32], want: &[f32], least: f64) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(got - want)));
    let size = norm(&mut want.iter().map(|want| f64::from(*want)));
    off / size.max(least)
}

#[test]
fn t12_t21_any_mesh_computes_what_one_rank_computes() {
    // By dtype, for whoever asks with --nocapture.
    let mut worst = BTreeMap::new();
    for seed in 0..300 {
        let case = Case::random(seed);
        let weights = case.weights();
        let want = case.run(&alone(), &weights);
        let ranks = on_ranks(case.mesh.dp, case.mesh.tp, |rank| case.run(rank, &weights));
        for got in &ranks {
            assert!(got == &ranks[0], "ranks differ in {case:?}");
        }
        for (what, want) in &want {
            // A gradient far below the others may be the small difference of large numbers.
            let least =
                if what.starts_with("gradient") { 0.01 * f64::from(ranks[0]["norm"][0]) } else { 0.0 };
            let error = difference(&ranks[0][what], want, least);
            // Partial sums are rounded to bf16 on their way between ranks.
            let limit = if case.dtype == DType::F32 { 1e-5 } else { 0.1 };
            let found = worst.entry(format!("{:?}", case.dtype)).or_insert((0.0, String::new()));
            if error > found.0 || error.is_nan() {
                *found = (error, what.to_owned());
            }
            assert!(error <= limit, "{what} is off by {error:.1e} in {case:#?}");
        }
    }
    println!("{worst:?}");
}

fn config() -> ModelConfig {
    let vocab_size = 37;
    ModelConfig { vocab_size, n_groups: 2, use_bias: true, ..ModelConfig::preset("tiny").unwrap() }
}

#[test]
fn a_fresh_model_is_the_same_on_any_number_of_ranks() {
    let fresh = |rank: &Rank| {
        let backend = &rank.cpu().unwrap();
        let model = Mamba2ForCausalLM::new(backend, &config(), DType::F32, Init::StateSpaces, 3);
        whole(backend, model.masters(), model.layout(), "fresh")
    };
    let want = fresh(&alone());
    for tp in [2, 8] {
        assert!(on_ranks(1, tp, fresh).iter().all(|got| *got == want), "tp {tp}");
    }
}

#[test]
fn folders_are_written_and_read_by_any_number_of_ranks() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let backend = alone().cpu().unwrap();
    let model = Mamba2ForCausalLM::new(&backend, &config(), DType::F32, Init::StateSpaces, 3);
    model.save_pretrained(&backend, dirs[0].path(), FileDType::F32).unwrap();
    on_ranks(1, 4, |rank| {
        let backend = &rank.cpu().unwrap();
        let model = Mamba2ForCausalLM::from_pretrained(backend, dirs[0].path(), DType::F32).unwrap();
        model.save_pretrained(backend, dirs[1].path(), FileDType::F32).unwrap();
    });
    for file in ["model.safetensors", "config.json", "generation_config.json"] {
        let [one, four] = dirs.each_ref().map(|dir| std::fs::read(dir.path().join(file)).unwrap());
        assert!(one == four, "{file}");
    }
}

#[test]
fn t16_ranks_decode_together() {
    let ids: Vec<i32> = (0..2 * 9).map(|i| i * 5 % 37).collect();
    let decode = |rank: &Rank, sequence_parallel| {
        let backend = &rank.cpu().unwrap();
        let model = Mamba2ForCausalLM::new(backend, &config(), DType::F32, Init::StateSpaces, 3)
            .with_sequence_parallel(sequence_parallel);
        let all = model.logits(backend, &backend.tensor_i32(&ids, &[2, 9]));
        let mut states = Vec::new();
        let column = |from: usize, to: usize| {
            let part: Vec<i32> = ids.chunks(9).flat_map(|row| row[from..to].to_vec()).collect();
            backend.tensor_i32(&part, &[2, to - from])
        };
        model.next_logits(backend, &column(0, 7), None, &mut states);
        let last = [7, 8].map(|at| model.next_logits(backend, &column(at, at + 1), None, &mut states));
        [vec![all], last.to_vec()].concat()
    };
    let want = decode(&alone(), false);
    for (tp, sequence_parallel) in [(2, false), (4, true), (8, false)] {
        for got in on_ranks(1, tp, |rank| decode(rank, sequence_parallel)) {
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.len(), want.len());
                assert!(difference(got, want, 0.0) < 1e-5, "tp {tp}");
            }
        }
    }
}
