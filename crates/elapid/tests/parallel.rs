//! Any cut of a model over ranks computes what one rank computes, from the same weights and the same batch: loss, every
//! gradient and their norm. Random configurations, always the same ones.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use elapid::config::ModelConfig;
use elapid::model::init::Init;
use elapid::model::pretrained::FileDType;
use elapid::model::shard::{gather, possible_ranks};
use elapid::model::{Mamba2ForCausalLM, Role};
use elapid_cpu::comm::{Abort, Groups, threads};
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{Backend, Checkpointing, Clipping, DType, Group, IGNORE_LABEL, NormGroup, Tape};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tensors by name, whole.
type Tensors = BTreeMap<String, Vec<f32>>;

/// Runs `body` on `tp` ranks that are threads of this process; gives what each returned.
fn on_ranks<T: Send>(tp: usize, body: impl Fn(&CpuBackend) -> T + Sync) -> Vec<T> {
    let ranks: Vec<usize> = (0..tp).collect();
    let group = threads(&ranks, Duration::from_secs(20), &Abort::default());
    thread::scope(|scope| {
        let body = &body;
        let start = |tp| {
            let groups = Groups { tp, ..Groups::default() };
            let options = CpuOptions { threads: Some(1), poison: true, groups, ..CpuOptions::default() };
            scope.spawn(move || body(&CpuBackend::new(&options).unwrap()))
        };
        let running: Vec<_> = group.into_iter().map(start).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn alone() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

/// One configuration.
#[derive(Clone, Debug)]
struct Case {
    config: ModelConfig,
    dtype: DType,
    tp: usize,
    sequence_parallel: bool,
    checkpointing: Checkpointing,
    documents: bool,
    micro_steps: usize,
    batch: usize,
    length: usize,
    seed: u64,
}

impl Case {
    fn random(seed: u64) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let coin = |rng: &mut ChaCha8Rng| rng.random_bool(0.5);
        // (H, G)
        let (num_heads, n_groups) =
            *[(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (8, 2), (8, 1), (8, 4)].choose(rng).unwrap();
        let head_dim = *[4, 8].choose(rng).unwrap();
        let config = ModelConfig {
            num_heads,
            n_groups,
            head_dim,
            hidden_size: num_heads * head_dim / 2,
            expand: 2,
            state_size: rng.random_range(1..6),
            num_hidden_layers: rng.random_range(1..4),
            vocab_size: rng.random_range(5..40),
            conv_kernel: rng.random_range(1..5),
            chunk_size: *[2, 4, 16].choose(rng).unwrap(),
            use_bias: coin(rng),
            use_conv_bias: coin(rng),
            tie_word_embeddings: coin(rng),
            residual_in_fp32: coin(rng),
            norm_group: if coin(rng) { NormGroup::PerGroup } else { NormGroup::Across },
            time_step_limit: if coin(rng) { (0.0, f64::INFINITY) } else { (0.002, 0.05) },
            ..ModelConfig::preset("tiny").unwrap()
        };
        config.validate().unwrap();
        let ranks: Vec<usize> = possible_ranks(&config).filter(|ranks| *ranks > 1).collect();
        Self {
            tp: *ranks.choose(rng).unwrap(),
            config,
            dtype: if rng.random_bool(0.75) { DType::F32 } else { DType::Bf16 },
            sequence_parallel: coin(rng),
            checkpointing: if coin(rng) { Checkpointing::None } else { Checkpointing::Block },
            documents: coin(rng),
            micro_steps: rng.random_range(1..3),
            batch: rng.random_range(1..4),
            length: rng.random_range(1..20),
            seed,
        }
    }

    /// Fresh weights, but none of them zero or one as a whole.
    fn weights(&self) -> Tensors {
        let backend = &alone();
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

    /// Token ids, labels and document ids of one micro-step, `[B, L]` each.
    fn batch(&self, micro_step: usize) -> [Vec<i32>; 3] {
        let rng = &mut ChaCha8Rng::seed_from_u64(self.seed * 100 + micro_step as u64);
        let count = self.batch * self.length;
        let token = |rng: &mut ChaCha8Rng| rng.random_range(0..self.config.vocab_size as i32);
        let ids = (0..count).map(|_| token(rng)).collect();
        let label = |rng: &mut ChaCha8Rng| if rng.random_bool(0.2) { IGNORE_LABEL } else { token(rng) };
        let mut labels: Vec<i32> = (0..count).map(|_| label(rng)).collect();
        labels[0] = 0;
        let mut document = 0;
        let documents = (0..count).map(|_| {
            document += i32::from(rng.random_bool(0.2));
            document
        });
        [ids, labels, documents.collect()]
    }

    /// Loss, norm and gradients of the sum over all micro-steps, of the whole model on every rank.
    fn run(&self, backend: &CpuBackend, weights: &Tensors) -> (f32, f32, Tensors) {
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
            let [ids, labels, documents] =
                self.batch(micro_step).map(|x| backend.tensor_i32(&x, &[self.batch, self.length]));
            let documents = self.documents.then_some(&documents);
            let mut tape = Tape::training(backend, &mut grads);
            let one = model.loss(&mut tape, &ids, &labels, documents, None, self.checkpointing);
            tape.backward(&[], &[]);
            loss = backend.add(&loss, &one);
        }
        model.sum_replicas(backend, &mut grads);
        let uncounted = layout.part(1, 0).uncounted;
        let clipping = Clipping { uncounted: &uncounted, over: &[Group::Tp], ..Clipping::alone(1.0, 0.0) };
        let norm = backend.values(&backend.clip(&grads, &loss, &clipping))[0];
        let whole =
            |(name, slot, info): (String, _, &_)| (name, gather(backend, &grads, &layout, &slot, info));
        (backend.values(&loss)[0], norm, layout.iter().map(whole).collect())
    }
}

/// ‖got − want‖ / max(‖want‖, least).
fn difference(got: &[f32], want: &[f32], least: f64) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(got - want)));
    let size = norm(&mut want.iter().map(|want| f64::from(*want)));
    off / size.max(least)
}

#[test]
fn t12_any_cut_gives_the_loss_and_the_gradients_of_one_rank() {
    // By dtype, for whoever asks with --nocapture.
    let mut worst = BTreeMap::new();
    for seed in 0..300 {
        let case = Case::random(seed);
        let weights = case.weights();
        let (loss, norm, grads) = case.run(&alone(), &weights);
        let ranks = on_ranks(case.tp, |backend| case.run(backend, &weights));
        for got in &ranks {
            assert!(got == &ranks[0], "ranks differ in {case:?}");
        }
        let (got_loss, got_norm, got_grads) = &ranks[0];
        let mut compare = |what: &str, got: &[f32], want: &[f32]| {
            // A gradient far below the others may be the small difference of large numbers.
            let least = if what == "loss" { 0.0 } else { 0.01 * f64::from(norm) };
            let error = difference(got, want, least);
            let limit = if case.dtype == DType::F32 { 1e-5 } else { 0.1 };
            let found = worst.entry(format!("{:?}", case.dtype)).or_insert((0.0, String::new()));
            if error > found.0 || error.is_nan() {
                *found = (error, what.to_owned());
            }
            assert!(error <= limit, "{what} is off by {error:.1e} in {case:#?}");
        };
        compare("loss", &[*got_loss], &[loss]);
        compare("norm", &[*got_norm], &[norm]);
        for (name, want) in &grads {
            compare(name, &got_grads[name], want);
        }
    }
    println!("{worst:?}");
}

/// The parameters of a model, whole.
fn parameters(backend: &CpuBackend, model: &Mamba2ForCausalLM<CpuBackend>) -> Tensors {
    let layout = model.layout();
    let whole =
        |(name, slot, info): (String, _, &_)| (name, gather(backend, model.masters(), layout, &slot, info));
    layout.iter().map(whole).collect()
}

fn config() -> ModelConfig {
    let vocab_size = 37;
    ModelConfig { vocab_size, n_groups: 2, use_bias: true, ..ModelConfig::preset("tiny").unwrap() }
}

#[test]
fn a_fresh_model_is_the_same_on_any_number_of_ranks() {
    let fresh = |backend: &CpuBackend| {
        let model = Mamba2ForCausalLM::new(backend, &config(), DType::F32, Init::StateSpaces, 3);
        parameters(backend, &model)
    };
    let want = fresh(&alone());
    for tp in [2, 8] {
        assert!(on_ranks(tp, fresh).iter().all(|got| *got == want), "tp {tp}");
    }
}

#[test]
fn folders_are_written_and_read_by_any_number_of_ranks() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let model = Mamba2ForCausalLM::new(&alone(), &config(), DType::F32, Init::StateSpaces, 3);
    model.save_pretrained(&alone(), dirs[0].path(), FileDType::F32).unwrap();
    on_ranks(4, |backend| {
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
    let decode = |backend: &CpuBackend, sequence_parallel| {
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
        for got in on_ranks(tp, |backend| decode(backend, sequence_parallel)) {
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.len(), want.len());
                assert!(difference(got, want, 0.0) < 1e-5, "tp {tp}");
            }
        }
    }
}
