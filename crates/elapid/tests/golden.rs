//! The model against transformers: files that the real library wrote (`tools/golden.py`).
#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

use elapid::config::ModelConfig;
use elapid::data::Sample;
use elapid::generate::{Sampling, generate};
use elapid::model::{Layout, Mamba2ForCausalLM};
use elapid::train::{Batch, Trainer};
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Backend, Checkpointing, DType, Tape};
use safetensors::SafeTensors;

fn cases() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    let mut cases: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert_eq!(cases.len(), 10);
    cases
}

fn backend() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(2), poison: true, ..CpuOptions::default() }).unwrap()
}

/// `golden.safetensors` of one case.
struct Golden(Vec<u8>);

impl Golden {
    fn read(case: &Path) -> Self {
        Self(fs::read(case.join("golden.safetensors")).unwrap())
    }

    fn words(&self, name: &str) -> Option<Vec<[u8; 4]>> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let data = tensors.tensor(name).ok()?.data().to_vec();
        Some(data.chunks_exact(4).map(|b| b.try_into().unwrap()).collect())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        Some(self.words(name)?.into_iter().map(f32::from_le_bytes).collect())
    }

    fn ids(&self, name: &str) -> Vec<i32> {
        self.words(name).unwrap().into_iter().map(i32::from_le_bytes).collect()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().shape().to_vec()
    }

    /// The batch of `input_ids`, labels = ids.
    fn batch(&self) -> Batch {
        let length = self.shape("input_ids")[1];
        batch(&self.ids("input_ids"), length)
    }
}

/// Rows of `length` ids, labels = ids.
fn batch(ids: &[i32], length: usize) -> Batch {
    let sample = |row: &[i32]| Sample { input_ids: row.to_vec(), labels: row.to_vec(), documents: None };
    Batch::new(&ids.chunks_exact(length).map(sample).collect::<Vec<_>>())
}

/// Every value of the grid that the model is held to stands in at least one case, so that dropping a case is noticed.
#[test]
fn the_grid_is_covered() {
    let found: Vec<_> =
        cases().iter().map(|case| (ModelConfig::load(case).unwrap(), Golden::read(case))).collect();
    let covers = |name: &str, wanted: &[usize], of: &dyn Fn(&ModelConfig, &Golden) -> usize| {
        let values: Vec<_> = found.iter().map(|(config, golden)| of(config, golden)).collect();
        for value in wanted {
            assert!(values.contains(value), "{name} {value} is in no case");
        }
    };
    covers("G", &[1, 2], &|config, _| config.n_groups);
    covers("P", &[16, 32, 64], &|config, _| config.head_dim);
    covers("N", &[16, 64, 128], &|config, _| config.state_size);
    covers("Q", &[64, 128, 256], &|config, _| config.chunk_size);
    covers("L", &[1, 63, 255, 257], &|_, golden| golden.shape("input_ids")[1]);
    covers("tied", &[0, 1], &|config, _| config.tie_word_embeddings.into());
    covers("bias", &[0, 1], &|config, _| config.use_bias.into());
    covers("conv bias", &[0, 1], &|config, _| config.use_conv_bias.into());
    covers("finite limit", &[0, 1], &|config, _| config.time_step_limit.1.is_finite().into());
    // A loss curve of 20 steps and all gradients, in every case that has a loss.
    for (config, golden) in &found {
        let trains = golden.shape("input_ids")[1] > 1;
        assert_eq!(golden.floats("curve").map(|curve| curve.len()), trains.then_some(20));
        for (name, ..) in Layout::new(config).iter() {
            assert_eq!(golden.floats(&format!("grad.{name}")).is_some(), trains, "{name}");
        }
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(ours: &[f32], theirs: &[f32]) -> f64 {
    distance_over(ours, theirs, 0.0)
}

/// ‖ours − theirs‖ / ‖theirs‖, or over `least` where that is more.
fn distance_over(ours: &[f32], theirs: &[f32], least: f64) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let difference = norm(ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(theirs.iter().map(|&b| f64::from(b))).max(least)
}

/// The largest error over all cases and tensors, and where.
#[derive(Default)]
struct Worst(f64, String);

impl Worst {
    fn see(&mut self, error: f64, what: String) {
        // A NaN is worse than anything.
        if error.is_nan() || error >= self.0 {
            *self = Self(error, what);
        }
        assert!(!self.0.is_nan(), "{}", self.1);
    }

    fn below(&self, limit: f64) {
        println!("worst {:.2e} of {limit:e}: {}", self.0, self.1);
        assert!(self.0 < limit, "{:e} at {}", self.0, self.1);
    }
}

fn gradients(
    backend: &CpuBackend,
    case: &Path,
    dtype: DType,
    checkpointing: Checkpointing,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let model = Mamba2ForCausalLM::from_pretrained(backend, case, dtype).unwrap();
    let batch = Golden::read(case).batch();
    let mut trainer = Trainer::new(backend, model, checkpointing);
    trainer.micro_step(&batch);
    let valid = batch.valid();
    let slots: Vec<_> = trainer.model().layout().iter().map(|(name, slot, _)| (name, slot)).collect();
    let gradients = slots.into_iter().map(|(name, slot)| {
        let sum = backend.values(&backend.view(trainer.grads(), &slot));
        (name, sum.into_iter().map(|g| g / valid as f32).collect())
    });
    let gradients = gradients.collect();
    let still = AdamW { lr: 0.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, step: 1 };
    (trainer.update(&still, 0.0, valid).loss, gradients)
}

#[test]
fn logits() {
    let (backend, mut worst) = (backend(), Worst::default());
    for case in cases() {
        let golden = Golden::read(&case);
        let model = Mamba2ForCausalLM::from_pretrained(&backend, &case, DType::F32).unwrap();
        let ids = backend.tensor_i32(&golden.ids("input_ids"), &golden.shape("input_ids"));
        let logits = model.logits(&backend, &ids);
        worst.see(distance(&logits, &golden.floats("logits").unwrap()), format!("{case:?}"));
    }
    worst.below(1e-5);
}

#[test]
fn loss_and_every_gradient() {
    let (backend, mut loss, mut gradient) = (backend(), Worst::default(), Worst::default());
    for case in cases() {
        let golden = Golden::read(&case);
        let Some(expected) = golden.floats("loss") else { continue };
        for checkpointing in [Checkpointing::None, Checkpointing::Block] {
            let (ours, gradients) = gradients(&backend, &case, DType::F32, checkpointing);
            loss.see((ours / f64::from(expected[0]) - 1.0).abs(), format!("{case:?}"));
            for (name, ours) in gradients {
                let theirs =
                    golden.floats(&format!("grad.{name}")).unwrap_or_else(|| panic!("{case:?} {name}"));
                gradient.see(distance(&ours, &theirs), format!("{case:?} {name}"));
            }
        }
    }
    loss.below(1e-5);
    gradient.below(1e-4);
}

/// Left out: dt_bias where Δt is clamped. There its gradient jumps as a Δt crosses the limit, so no rounding of
/// activations leaves it close (transformers' own bf16 is off by up to 0.2); the op's suite checks it on equal inputs.
///
/// A gradient is measured by at least a hundredth of the norm of them all: that of a single D, say, may be what terms of both
/// signs leave over, and then has no digits in bf16.
#[test]
fn bf16_stays_near_fp32() {
    let (backend, mut loss, mut gradient) = (backend(), Worst::default(), Worst::default());
    for case in cases() {
        let golden = Golden::read(&case);
        let Some(expected) = golden.floats("loss") else { continue };
        let (ours, gradients) = gradients(&backend, &case, DType::Bf16, Checkpointing::None);
        loss.see((ours - f64::from(expected[0])).abs(), format!("{case:?}"));
        let clamps = ModelConfig::load(&case).unwrap().time_step_limit != (0.0, f64::INFINITY);
        let theirs = |name: &str| golden.floats(&format!("grad.{name}")).unwrap();
        let all = norm(gradients.iter().flat_map(|(name, _)| theirs(name)).map(f64::from));
        for (name, ours) in gradients {
            if clamps && name.ends_with("dt_bias") {
                continue;
            }
            let error = distance_over(&ours, &theirs(&name), all / 100.0);
            gradient.see(error, format!("{case:?} {name}"));
        }
    }
    loss.below(2e-2);
    gradient.below(5e-2);
}

/// 20 steps of clipped AdamW on two alternating batches: loss and gradient norm of each, and the parameters at the end
/// where the file has them.
#[test]
fn training_curve() {
    let (backend, mut loss, mut norm, mut after) =
        (backend(), Worst::default(), Worst::default(), Worst::default());
    for case in cases() {
        let golden = Golden::read(&case);
        let Some(curve) = golden.floats("curve") else { continue };
        let norms = golden.floats("curve_grad_norms").unwrap();
        let ids = golden.ids("curve_ids");
        let shape = golden.shape("curve_ids");
        let batches: Vec<_> = ids.chunks_exact(shape[1] * shape[2]).map(|ids| batch(ids, shape[2])).collect();
        let model = Mamba2ForCausalLM::from_pretrained(&backend, &case, DType::F32).unwrap();
        let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
        for (i, (their_loss, their_norm)) in curve.iter().zip(&norms).enumerate() {
            let batch = &batches[i % batches.len()];
            trainer.micro_step(batch);
            let step = i as u64 + 1;
            let hyper = AdamW { lr: 2e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step };
            let report = trainer.update(&hyper, 1.0, batch.valid());
            loss.see((report.loss / f64::from(*their_loss) - 1.0).abs(), format!("{case:?} step {step}"));
            norm.see(
                (report.grad_norm / f64::from(*their_norm) - 1.0).abs(),
                format!("{case:?} step {step}"),
            );
        }
        for (name, slot, _) in trainer.model().layout().iter() {
            if let Some(theirs) = golden.floats(&format!("after.{name}")) {
                let ours = trainer.model().parameter(&backend, &slot);
                after.see(distance(&ours, &theirs), format!("{case:?} {name}"));
            }
        }
    }
    loss.below(1e-3);
    norm.below(1e-3);
    after.below(1e-3);
}

/// T6 and T16: prefill of any length and then steps, with the state carried, give the logits of one forward pass.
#[test]
fn t6_t16_forward_equals_prefill_and_steps() {
    let (backend, mut worst) = (backend(), Worst::default());
    for case in cases() {
        let golden = Golden::read(&case);
        let model = Mamba2ForCausalLM::from_pretrained(&backend, &case, DType::F32).unwrap();
        let (length, vocab) = (golden.shape("input_ids")[1], model.config().vocab_size);
        let ids = &golden.ids("input_ids")[..length];
        let expected = golden.floats("logits").unwrap();
        for prefill in [1, 2, 5, length / 2, length] {
            if prefill == 0 || prefill > length {
                continue;
            }
            let mut states = Vec::new();
            let mut read = |ids: &[i32]| {
                let ids = backend.tensor_i32(ids, &[1, ids.len()]);
                model.next_logits(&backend, &ids, None, &mut states)
            };
            let mut last = read(&ids[..prefill]);
            let until = length.min(prefill + 20);
            for t in prefill..until {
                last = read(&ids[t..t + 1]);
            }
            let theirs = &expected[(until - 1) * vocab..until * vocab];
            worst.see(distance(&last, theirs), format!("{case:?} prefill {prefill}"));
        }
    }
    worst.below(2e-5);
}

#[test]
fn greedy_continuation() {
    let backend = backend();
    let mut seen = 0;
    for case in cases() {
        let golden = Golden::read(&case);
        if golden.words("decode_ids").is_none() {
            continue;
        }
        seen += 1;
        let model = Mamba2ForCausalLM::from_pretrained(&backend, &case, DType::F32).unwrap();
        let prompt: Vec<u32> = golden.ids("decode_prompt").iter().map(|&id| id as u32).collect();
        let expected: Vec<u32> = golden.ids("decode_ids").iter().map(|&id| id as u32).collect();
        let greedy = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
        let ids = generate(&backend, &model, &[prompt], expected.len(), greedy, |_| false, |_, _| {});
        assert_eq!(ids, [expected], "{case:?}");
    }
    assert_eq!(seen, 2);
}

/// Design decision 8: the same bits with any number of threads, over a whole training step.
#[test]
fn a_step_has_the_same_bits_with_any_number_of_threads() {
    let case = cases().into_iter().find(|case| case.ends_with("groups")).unwrap();
    let bits = |threads| {
        let backend =
            CpuBackend::new(&CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap();
        let (loss, gradients) = gradients(&backend, &case, DType::F32, Checkpointing::None);
        let gradients = gradients.into_iter().flat_map(|(_, g)| g.into_iter().map(f32::to_bits));
        (loss.to_bits(), gradients.collect::<Vec<_>>())
    };
    let one = bits(1);
    assert!(one == bits(2) && one == bits(5));
}

/// T19: accumulated over micro-steps of unequal numbers of labels, loss and update are those of one large batch.
#[test]
fn t19_micro_steps_equal_one_batch() {
    let case = cases().into_iter().find(|case| case.ends_with("base")).unwrap();
    let backend = backend();
    let whole = Golden::read(&case).batch();
    let length = whole.length;
    let mut rows: Vec<Batch> = (0..whole.size)
        .map(|row| {
            let range = row * length..(row + 1) * length;
            Batch {
                size: 1,
                length,
                ids: whole.ids[range.clone()].to_vec(),
                labels: whole.labels[range].to_vec(),
                ..Batch::default()
            }
        })
        .collect();
    // Half of the first row's labels do not count.
    rows[0].labels[..length / 2].fill(elapid_tensor::IGNORE_LABEL);
    let joined = Batch {
        size: rows.len(),
        length,
        ids: rows.iter().flat_map(|r| r.ids.clone()).collect(),
        labels: rows.iter().flat_map(|r| r.labels.clone()).collect(),
        ..Batch::default()
    };
    let step = |batches: &[Batch]| {
        let model = Mamba2ForCausalLM::from_pretrained(&backend, &case, DType::F32).unwrap();
        let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
        batches.iter().for_each(|batch| trainer.micro_step(batch));
        let valid = batches.iter().map(Batch::valid).sum();
        let hyper = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };
        trainer.update(&hyper, 1.0, valid)
    };
    let (split, one) = (step(&rows), step(&[joined]));
    assert!((split.loss - one.loss).abs() < 1e-6 && (split.grad_norm / one.grad_norm - 1.0).abs() < 1e-5);
}

/// A loss that is not finite stops before the update: not one parameter changes.
#[test]
fn nothing_changes_where_the_loss_is_not_finite() {
    let case = &cases()[0];
    let backend = backend();
    let mut model = Mamba2ForCausalLM::from_pretrained(&backend, case, DType::F32).unwrap();
    let (name, slot) = model.layout().iter().map(|(name, slot, _)| (name, slot)).next().unwrap();
    let mut values = model.parameter(&backend, &slot);
    values[0] = f32::NAN;
    backend.write_slot(model.masters_mut(), &slot, &values);
    let all = |model: &Mamba2ForCausalLM<CpuBackend>| -> Vec<u32> {
        let slots = model.layout().iter();
        slots.flat_map(|(_, slot, _)| model.parameter(&backend, &slot)).map(f32::to_bits).collect()
    };
    let before = all(&model);
    let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
    let batch = Golden::read(case).batch();
    trainer.micro_step(&batch);
    let hyper = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };
    assert!(!trainer.update(&hyper, 1.0, batch.valid()).finite, "{name}");
    assert!(before == all(trainer.model()));
}

/// The tape of an inference run remembers nothing, so evaluation and training agree to the bit on the loss.
#[test]
fn evaluation_and_training_compute_the_same_loss() {
    let case = &cases()[0];
    let backend = backend();
    let model = Mamba2ForCausalLM::from_pretrained(&backend, case, DType::F32).unwrap();
    let batch = Golden::read(case).batch();
    let loss = batch.loss(&mut Tape::inference(&backend), &model, None, Checkpointing::None);
    let evaluated = f64::from(backend.values(&loss)[0]) / batch.valid() as f64;
    let (trained, _) = gradients(&backend, case, DType::F32, Checkpointing::None);
    assert_eq!(evaluated, trained);
}
