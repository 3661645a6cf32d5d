//! A mesh of ranks against one rank with the same weights and the same samples: losses, norms and parameters over
//! several updates.
#![allow(missing_docs)]

use std::time::Duration;

use elapid::config::ModelConfig;
use elapid::data::Sample;
use elapid::model::Mamba2ForCausalLM;
use elapid::model::init::Init;
use elapid::model::shard::gather;
use elapid::parallel::{Launch, Mesh, Rank, launch};
use elapid::train::{Batch, StepReport, Trainer};
use elapid_cpu::CpuBackend;
use elapid_tensor::{AdamW, Checkpointing, DType};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One case: a model, and how it and the samples of a step are shared out.
#[derive(Clone, Copy, Debug)]
struct Case {
    dp: usize,
    tp: usize,
    sequence_parallel: bool,
    zero1: bool,
    accum: usize,
    tied: bool,
    bias: bool,
    dtype: DType,
    seed: u64,
}

const STEPS: u64 = 5;
const LENGTH: usize = 12;

impl Case {
    fn config(&self) -> ModelConfig {
        ModelConfig {
            num_heads: 4,
            head_dim: 6,
            hidden_size: 12,
            expand: 2,
            n_groups: 2,
            state_size: 5,
            vocab_size: 37,
            num_hidden_layers: 2,
            use_bias: self.bias,
            tie_word_embeddings: self.tied,
            ..ModelConfig::preset("tiny").unwrap()
        }
    }

    /// The samples of one global micro-step, with labels that do not count here and there, so that ranks have
    /// different numbers of them.
    fn samples(&self, step: u64, micro: usize) -> Vec<Sample> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(step * 100 + micro as u64);
        let sample = |_| {
            let input_ids: Vec<i32> = (0..LENGTH).map(|_| rng.random_range(0..37)).collect();
            let labels = input_ids.iter().map(|id| if rng.random_bool(0.3) { -100 } else { *id }).collect();
            Sample { input_ids, labels, documents: None }
        };
        (0..2 * self.dp).map(sample).collect()
    }

    /// Runs all steps on one rank; what each came to, and all parameters after the last.
    fn run(&self, rank: &Rank) -> (Vec<StepReport>, Vec<f32>) {
        let backend = rank.cpu().unwrap();
        let model =
            Mamba2ForCausalLM::new(&backend, &self.config(), self.dtype, Init::StateSpaces, self.seed);
        let model = model.with_sequence_parallel(self.sequence_parallel);
        let model = if self.zero1 { model.with_zero1(&backend) } else { model };
        let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
        let share = 2 * self.dp / rank.mesh().dp;
        let report = |step| {
            let mut valid = 0;
            for micro in 0..self.accum {
                let samples = self.samples(step, micro);
                let batch = Batch::new(&samples[rank.dp_rank() * share..][..share]);
                trainer.micro_step(&batch);
                valid += batch.valid() as u64;
            }
            let valid = rank.sum_over_samples(valid) as usize;
            let hyper = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step };
            trainer.update(&hyper, 1.0, valid)
        };
        let reports = (1..=STEPS).map(report).collect();
        let model = trainer.into_model().without_zero1(&backend);
        (reports, parameters(&backend, &model))
    }
}

fn parameters(backend: &CpuBackend, model: &Mamba2ForCausalLM<CpuBackend>) -> Vec<f32> {
    let layout = model.layout();
    layout.iter().flat_map(|(_, slot, info)| gather(backend, model.masters(), layout, &slot, info)).collect()
}

/// Largest difference, in units of the largest number.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0.0f64, |max, x| max.max(f64::from(x.abs())));
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / largest
}

#[test]
fn t21_a_mesh_is_as_one_rank() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for seed in 0..40 {
        let case = Case {
            dp: rng.random_range(1..5),
            tp: [1, 1, 2, 4][rng.random_range(0..4)],
            sequence_parallel: rng.random(),
            zero1: rng.random_bool(0.6),
            accum: rng.random_range(1..4),
            tied: rng.random(),
            bias: rng.random(),
            dtype: if rng.random() { DType::F32 } else { DType::Bf16 },
            seed,
        };
        let (want, want_parameters) = case.run(&Rank::single(Some(1)));
        let mesh = Mesh { dp: case.dp, tp: case.tp };
        let start = Launch { mesh, threads: Some(1), timeout: Duration::from_secs(60) };
        let ranks = launch(&start, |rank| Ok(case.run(rank))).unwrap();
        // Between tensor-parallel ranks partial sums are rounded to bf16.
        let rounded = case.tp > 1 && case.dtype == DType::Bf16;
        let (close, params_close) = if rounded { (0.1, 0.02) } else { (1e-5, 2e-4) };
        let (mut worst, mut worst_parameters) = (0.0f64, 0.0f64);
        for (reports, parameters) in &ranks {
            // Not only close: all ranks have the same bits.
            assert_eq!(parameters, &ranks[0].1, "{case:?}");
            assert_eq!(format!("{reports:?}"), format!("{:?}", ranks[0].0), "{case:?}");
            for (got, want) in reports.iter().zip(&want) {
                assert!(got.finite);
                worst = worst.max((got.loss / want.loss - 1.0).abs());
                worst = worst.max((got.grad_norm / want.grad_norm - 1.0).abs());
            }
            worst_parameters = worst_parameters.max(apart(&want_parameters, parameters));
        }
        println!("{case:?}: losses and norms {worst:.1e}, parameters {worst_parameters:.1e}");
        assert!(worst < close && worst_parameters < params_close, "{case:?}");
    }
}
