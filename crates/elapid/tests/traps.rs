//! Where Mamba-2 implementations go wrong: those of the traps that no other test is about. CONTRIBUTING.md lists all.

use elapid::config::ModelConfig;
use elapid::data::Sample;
use elapid::model::Mamba2ForCausalLM;
use elapid::model::init::Init;
use elapid::model::layout::{Layout, Role};
use elapid::train::{Batch, Trainer};
use elapid_cpu::{CpuBackend, CpuOptions, Tensor};
use elapid_tensor::{AdamW, Backend, Checkpointing, DType, State, Tape};

type Model = Mamba2ForCausalLM<CpuBackend>;

fn backend() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(1), poison: true, ..CpuOptions::default() }).unwrap()
}

fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 16,
        num_heads: 4,
        head_dim: 8,
        state_size: 8,
        vocab_size: 64,
        num_hidden_layers: 2,
        n_groups: 2,
        chunk_size: 16,
        ..ModelConfig::preset("tiny").unwrap()
    }
}

const IDS: [i32; 40] = {
    let mut ids = [0; 40];
    let mut i = 0;
    while i < 40 {
        ids[i] = (i * i * 7 + 3 * i) as i32 % 64;
        i += 1;
    }
    ids
};

/// Replaces every parameter of a role.
fn set(backend: &CpuBackend, model: &mut Model, role: Role, value: impl Fn(usize, f32) -> f32) {
    let slots: Vec<_> =
        model.layout().iter().filter(|(_, _, info)| info.role == role).map(|(_, slot, _)| slot).collect();
    assert!(!slots.is_empty());
    for slot in slots {
        let values: Vec<f32> =
            (0..).zip(model.parameter(backend, &slot)).map(|(i, old)| value(i, old)).collect();
        backend.write_slot(model.masters_mut(), &slot, &values);
    }
    model.refresh(backend);
}

/// Logits after all of `IDS` but the last and, one step of decoding later, after the last; and the states then.
fn read(backend: &CpuBackend, model: &Model) -> (Vec<f32>, Vec<f32>, Vec<State<Tensor>>) {
    let mut states = Vec::new();
    let mut next = |ids: &[i32]| {
        let ids = backend.tensor_i32(ids, &[1, ids.len()]);
        model.next_logits(backend, &ids, None, &mut states)
    };
    let (prefill, step) = (next(&IDS[..39]), next(&IDS[39..]));
    (prefill, step, states)
}

/// Each layer adds 1/512 to channel 0 of a residual stream of ones: fp32 keeps that, bf16 (1/128 apart there) rounds it
/// away every time.
#[test]
fn t7_the_residual_stream_is_fp32_where_the_checkpoint_says_so() {
    let backend = backend();
    let first_over_second = |dtype: DType, residual_in_fp32: bool| {
        let config = ModelConfig { residual_in_fp32, use_bias: true, num_hidden_layers: 32, ..config() };
        let mut model = Mamba2ForCausalLM::new(&backend, &config, dtype, Init::StateSpaces, 1);
        set(&backend, &mut model, Role::Embedding, |_, _| 1.0);
        set(&backend, &mut model, Role::OutProj, |_, _| 0.0);
        // in_proj is 32 + 64 + 4 wide; out_proj's bias has D = 16 elements.
        set(&backend, &mut model, Role::LinearBias, |i, _| if i == 0 { 1.0 / 512.0 } else { 0.0 });
        let ids = backend.tensor_i32(&IDS, &[1, 40]);
        let hidden =
            model.hidden(&mut Tape::inference(&backend), &ids, None, None, Checkpointing::None).value;
        assert_eq!(backend.dtype(&hidden), dtype);
        let hidden = backend.values(&hidden);
        hidden[0] / hidden[1]
    };
    let near = |a: f32, b: f32| (a - b).abs() < 0.01;
    assert!(near(first_over_second(DType::F32, true), 1.0 + 32.0 / 512.0));
    assert!(near(first_over_second(DType::Bf16, true), 1.0 + 32.0 / 512.0));
    assert_eq!(first_over_second(DType::Bf16, false), 1.0);
    // Where a config.json does not say, transformers means fp32.
    assert!(ModelConfig::default().residual_in_fp32);
}

#[test]
fn t8_states_and_what_makes_decays_are_fp32_in_a_bf16_model() {
    let backend = backend();
    for (name, _, info) in Layout::new(&config()).iter() {
        let small = ["A_log", "dt_bias", ".D"].iter().any(|end| name.ends_with(end)) || name.contains("norm");
        assert_eq!(info.dtype(DType::Bf16) == DType::F32, small, "{name}");
    }
    let fresh = || Mamba2ForCausalLM::new(&backend, &config(), DType::Bf16, Init::StateSpaces, 1);
    let state = |model: &Model| -> Vec<f32> {
        let (_, _, states) = read(&backend, model);
        for state in &states {
            assert_eq!(backend.dtype(&state.ssm), DType::F32);
            assert_eq!(backend.dtype(&state.conv), DType::F32);
        }
        states.iter().flat_map(|state| backend.values(&state.ssm)).collect()
    };
    let before = state(&fresh());
    // More digits than bf16 has: rounded on the way it would have none below the upper 16 bits.
    assert!(before.iter().filter(|x| x.to_bits() & 0xffff != 0).count() > before.len() / 2);
    // A change that bf16 does not see, in either of the two that make decays.
    for role in [Role::ALog, Role::DtBias] {
        let mut model = fresh();
        set(&backend, &mut model, role, |_, old| old * (1.0 + 1.0 / 4096.0));
        assert_ne!(before, state(&model), "{role:?}");
    }
}

/// Masks come before `exp`: with Δt·A of −1000 a position, the sums that the mask takes out are far past where it
/// overflows, and 0·∞ would be NaN.
#[test]
fn t18_large_steps_leave_loss_and_gradients_finite() {
    let backend = backend();
    for dtype in [DType::F32, DType::Bf16] {
        let mut model = Mamba2ForCausalLM::new(&backend, &config(), dtype, Init::StateSpaces, 1);
        set(&backend, &mut model, Role::DtBias, |i, _| if i % 2 == 0 { 60.0 } else { 200.0 });
        let (prefill, step, _) = read(&backend, &model);
        assert!(prefill.iter().chain(&step).all(|x| x.is_finite()));
        let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
        let ids: Vec<u32> = IDS.iter().map(|&id| id as u32).collect();
        let batch = Batch::new(&[Sample::new(&ids)]);
        trainer.micro_step(&batch);
        let report = trainer.update(&AdamW { step: 1, ..HYPER }, 1.0, batch.valid());
        assert!(report.finite && report.loss.is_finite() && report.grad_norm > 0.0, "{report:?}");
    }
}

const HYPER: AdamW = AdamW { lr: 1e-1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };

/// After an update a model is what a fresh one with the same parameters is: nothing made of the old ones is left, not
/// −exp(A_log) and not the bf16 copy.
#[test]
fn t20_nothing_of_the_old_parameters_outlives_an_update() {
    let backend = backend();
    for dtype in [DType::F32, DType::Bf16] {
        let model = Mamba2ForCausalLM::new(&backend, &config(), dtype, Init::StateSpaces, 1);
        let (before, ..) = read(&backend, &model);
        let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
        let ids: Vec<u32> = IDS.iter().map(|&id| id as u32).collect();
        let batch = Batch::new(&[Sample::new(&ids)]);
        for step in 1..=2 {
            trainer.micro_step(&batch);
            assert!(trainer.update(&AdamW { step, ..HYPER }, 1.0, batch.valid()).finite);
        }
        let trained = trainer.into_model();
        let mut fresh = Mamba2ForCausalLM::empty(&backend, &config(), dtype);
        for (_, slot, _) in trained.layout().iter() {
            backend.write_slot(fresh.masters_mut(), &slot, &trained.parameter(&backend, &slot));
        }
        fresh.refresh(&backend);
        let (ours, theirs) = (read(&backend, &trained), read(&backend, &fresh));
        assert!(ours.0 == theirs.0 && ours.1 == theirs.1 && ours.0 != before, "{dtype:?}");
    }
}

/// The factor min(1, max / (norm + 1e-6)) acts on the mean gradient, after accumulation: what AdamW's first moment keeps
/// after one step is (1 − β₁)·factor·gradient.
#[test]
fn t21_the_clip_factor_acts_on_the_accumulated_mean_gradient() {
    let backend = backend();
    let ids: Vec<u32> = IDS.iter().map(|&id| id as u32).collect();
    let batches = [Batch::new(&[Sample::new(&ids)]), Batch::new(&[Sample::new(&ids[7..20])])];
    let valid = batches.iter().map(Batch::valid).sum::<usize>();
    let step = |max_norm: f32| {
        let model = Mamba2ForCausalLM::new(&backend, &config(), DType::F32, Init::StateSpaces, 1);
        let mut trainer = Trainer::new(&backend, model, Checkpointing::None);
        batches.iter().for_each(|batch| trainer.micro_step(batch));
        let slots: Vec<_> = trainer.model().layout().iter().map(|(_, slot, _)| slot).collect();
        let all = |buffer: &<CpuBackend as Backend>::Buffer| -> Vec<f64> {
            let values = slots.iter().flat_map(|slot| backend.values(&backend.view(buffer, slot)));
            values.map(f64::from).collect()
        };
        let mean: Vec<f64> = all(trainer.grads()).iter().map(|g| g / valid as f64).collect();
        let report = trainer.update(&AdamW { step: 1, ..HYPER }, max_norm, valid);
        (report.grad_norm, mean, all(trainer.state()[1]))
    };
    for max_norm in [0.0, 1e-2, 1e3] {
        let (norm, mean, moment) = step(max_norm);
        let expected = mean.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!((norm / expected - 1.0).abs() < 1e-5 && norm > 1e-1, "{norm} {expected}");
        let factor = if max_norm > 0.0 { (f64::from(max_norm) / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let off: f64 = mean.iter().zip(&moment).map(|(g, m)| (m - 0.1 * factor * g).powi(2)).sum();
        assert!(off.sqrt() < 1e-5 * 0.1 * factor * norm, "max_norm {max_norm}: {}", off.sqrt());
    }
}
