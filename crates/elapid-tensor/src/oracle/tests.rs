//! Every adjoint against central finite differences, and the recurrence against what it must mean.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::backend::{AdamW, Mamba2Inputs, Mamba2Spec, Mamba2Weights, NormGroup, State};
use crate::flat::FlatShape;

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f64> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Gradient of `f` at `x`.
fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let here = x[i];
            x[i] = here + step;
            let above = f(&x);
            x[i] = here - step;
            let below = f(&x);
            x[i] = here;
            (above - below) / (2.0 * step)
        })
        .collect()
}

#[track_caller]
fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    let error: Vec<f64> = got.iter().zip(want).map(|(a, b)| a - b).collect();
    let relative = dot(&error, &error).sqrt() / dot(want, want).sqrt().max(1e-12);
    assert!(relative <= tolerance, "{name}: relative error {relative:e}");
}

#[test]
fn embedding_adjoint_sums_the_rows_of_repeated_ids() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (table, dy, ids) = (random(&mut rng, 15), random(&mut rng, 12), [4, 0, 4, 2]);
    let want = differences(&table, |table| dot(&embedding(table, 3, &ids), &dy));
    assert_close("table", &embedding_adjoint(5, 3, &ids, &dy), &want, 1e-6);
}

#[test]
fn rms_norm_adjoint_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (x, weight, dy) = (random(&mut rng, 10), random(&mut rng, 5), random(&mut rng, 10));
    let (dx, dw) = rms_norm_adjoint(&x, &weight, 1e-2, &dy);
    assert_close("x", &dx, &differences(&x, |x| dot(&rms_norm(x, &weight, 1e-2), &dy)), 1e-6);
    assert_close("weight", &dw, &differences(&weight, |w| dot(&rms_norm(&x, w, 1e-2), &dy)), 1e-6);
}

#[test]
fn linear_adjoint_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (x, weight) = (random(&mut rng, 6), random(&mut rng, 12));
    let (bias, dy) = (random(&mut rng, 4), random(&mut rng, 8));
    let loss = |x: &[f64], w: &[f64], b: &[f64]| dot(&linear(x, w, Some(b), 3), &dy);
    let (dx, dw, db) = linear_adjoint(&x, &weight, &dy, 3);
    assert_close("x", &dx, &differences(&x, |x| loss(x, &weight, &bias)), 1e-6);
    assert_close("weight", &dw, &differences(&weight, |w| loss(&x, w, &bias)), 1e-6);
    assert_close("bias", &db, &differences(&bias, |b| loss(&x, &weight, b)), 1e-6);
}

#[test]
fn head_loss_adjoint_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (x, weight) = (random(&mut rng, 12), random(&mut rng, 15));
    let labels = [4, IGNORE_LABEL, 0, 2];
    let (loss, dx, dw) = head_loss_adjoint(&x, &weight, &labels, 3);
    assert_eq!(loss, head_loss(&x, &weight, &labels, 3));
    assert_close("x", &dx, &differences(&x, |x| head_loss(x, &weight, &labels, 3)), 1e-6);
    assert_close("weight", &dw, &differences(&weight, |w| head_loss(&x, w, &labels, 3)), 1e-6);
}

#[test]
fn head_loss_of_equal_logits_is_the_logarithm_of_their_number() {
    let loss = head_loss(&[1.0, 2.0], &[0.5; 14], &[3], 2);
    assert!((loss - 7f64.ln()).abs() < 1e-12);
}

#[test]
fn t21_clip_scales_to_the_wanted_norm_and_flags_what_is_not_finite() {
    let clipped = clip(&[3.0, 4.0], 1.0, 0.5, 1.0);
    assert!((clipped.norm - 2.5).abs() < 1e-12);
    assert!((clipped.factor - 0.5 / 2.500001).abs() < 1e-12);
    assert!(clipped.finite);
    assert_eq!(clip(&[3.0, 4.0], 1.0, 0.5, 0.0).factor, 0.5);
    assert_eq!(clip(&[3.0, 4.0], 1.0, 0.5, 10.0).factor, 0.5);
    assert!(!clip(&[3.0, f64::NAN], 1.0, 0.5, 1.0).finite);
    assert!(!clip(&[3.0, 4.0], f64::INFINITY, 0.5, 1.0).finite);
}

#[test]
fn first_adamw_step_moves_by_the_learning_rate_and_decays_where_told() {
    let hyper = AdamW { lr: 0.5, beta1: 0.5, beta2: 0.75, eps: 0.0, weight_decay: 0.125, step: 1 };
    let shape = FlatShape { layers: 2, row: 2, shared: 2 };
    let clip = Clip { norm: 1.0, factor: 2.0, finite: true };
    let grads = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0];
    let (mut p, mut m, mut v) = ([1.0; 6], [0.0; 6], [0.0; 6]);
    adamw(&hyper, shape, (1, 2), clip, &grads, &mut p, &mut m, &mut v);
    // At step 1 the corrected moments give sign(g); decay is lr·wd = 1/16 on the first of each row, both of shared.
    assert_eq!(p, [0.4375, 1.5, 0.4375, 1.5, 0.4375, 1.4375]);
    assert_eq!(m, grads);
    assert_eq!(v, grads.map(|g| g * g));
}

struct Case {
    spec: Mamba2Spec,
    batch: usize,
    len: usize,
    bias: bool,
    documents: Option<Vec<f64>>,
    initial: bool,
    seed: u64,
}

/// Values of one case.
struct Values {
    projected: Vec<f64>,
    initial: Option<State<Vec<f64>>>,
    weights: Mamba2Weights<Vec<f64>>,
}

const SPEC: Mamba2Spec = Mamba2Spec {
    heads: 4,
    head_dim: 2,
    groups: 2,
    state: 3,
    conv_kernel: 4,
    chunk: 2,
    dt_limit: (0.0, f32::INFINITY),
    norm: NormGroup::PerGroup,
    norm_ranks: 1,
    norm_eps: 1e-3,
};

impl Case {
    fn values(&self) -> Values {
        let rng = &mut ChaCha8Rng::seed_from_u64(self.seed);
        let (s, c) = (self.spec, self.spec.conv_channels());
        Values {
            projected: random(rng, self.batch * self.len * s.projection()),
            initial: self.initial.then(|| State {
                conv: random(rng, self.batch * (s.conv_kernel - 1) * c),
                ssm: random(rng, self.batch * s.inner() * s.state),
            }),
            weights: Mamba2Weights {
                conv_weight: random(rng, c * s.conv_kernel),
                conv_bias: self.bias.then(|| random(rng, c)),
                dt_bias: random(rng, s.heads),
                a_log: random(rng, s.heads),
                d: random(rng, s.heads),
                norm_weight: random(rng, s.inner()),
            },
        }
    }

    fn inputs<'a>(&'a self, values: &'a Values) -> Mamba2Inputs<&'a [f64]> {
        Mamba2Inputs {
            projected: &values.projected,
            documents: self.documents.as_deref(),
            initial: values.initial.as_ref().map(|s| State { conv: &s.conv[..], ssm: &s.ssm[..] }),
        }
    }

    fn run(&self, values: &Values) -> (Vec<f64>, State<Vec<f64>>) {
        let weights = values.weights.as_ref().map(Vec::as_slice);
        mamba2(&self.spec, self.batch, &self.inputs(values), &weights)
    }

    /// Checks every gradient of ⟨dy, y⟩ + ⟨d_state, final state⟩.
    fn check(&self) {
        let values = self.values();
        let (y, last) = self.run(&values);
        let rng = &mut ChaCha8Rng::seed_from_u64(self.seed + 1000);
        let dy = random(rng, y.len());
        let d_last = State { conv: random(rng, last.conv.len()), ssm: random(rng, last.ssm.len()) };
        let grads = mamba2_adjoint(
            &self.spec,
            self.batch,
            &self.inputs(&values),
            &values.weights.as_ref().map(Vec::as_slice),
            &dy,
            Some(&State { conv: &d_last.conv[..], ssm: &d_last.ssm[..] }),
        );
        let compare = |name: &str, got: &[f64], place: &dyn Fn(&mut Values) -> &mut Vec<f64>| {
            let here = place(&mut self.values()).clone();
            let want = differences(&here, |x| {
                let mut values = self.values();
                *place(&mut values) = x.to_vec();
                let (y, last) = self.run(&values);
                dot(&y, &dy) + dot(&last.conv, &d_last.conv) + dot(&last.ssm, &d_last.ssm)
            });
            assert_close(name, got, &want, 1e-6);
        };
        compare("projected", &grads.projected, &|v| &mut v.projected);
        compare("conv_weight", &grads.weights.conv_weight, &|v| &mut v.weights.conv_weight);
        if let Some(d_bias) = &grads.weights.conv_bias {
            compare("conv_bias", d_bias, &|v| v.weights.conv_bias.as_mut().unwrap());
        }
        compare("dt_bias", &grads.weights.dt_bias, &|v| &mut v.weights.dt_bias);
        compare("a_log", &grads.weights.a_log, &|v| &mut v.weights.a_log);
        compare("d", &grads.weights.d, &|v| &mut v.weights.d);
        compare("norm_weight", &grads.weights.norm_weight, &|v| &mut v.weights.norm_weight);
        if self.initial {
            compare("initial conv", &grads.initial.conv, &|v| &mut v.initial.as_mut().unwrap().conv);
            compare("initial ssm", &grads.initial.ssm, &|v| &mut v.initial.as_mut().unwrap().ssm);
        }
    }
}

#[test]
fn mamba2_adjoint_is_the_derivative() {
    let plain =
        || Case { spec: SPEC, batch: 1, len: 6, bias: true, documents: None, initial: false, seed: 1 };
    plain().check();
    Case { initial: true, batch: 2, ..plain() }.check();
    // Shorter than the conv's memory: the final conv state still holds rows of the initial one.
    Case { initial: true, len: 2, ..plain() }.check();
    Case { documents: Some(vec![1., 1., 0., 1., 1., 1.]), initial: true, ..plain() }.check();
    Case { documents: Some(vec![1., 2., 2., 2., 2., 3.]), initial: true, bias: false, ..plain() }.check();
    Case { spec: Mamba2Spec { norm: NormGroup::Across, ..SPEC }, ..plain() }.check();
    Case { spec: Mamba2Spec { conv_kernel: 1, groups: 4, ..SPEC }, initial: true, ..plain() }.check();
    Case { spec: Mamba2Spec { conv_kernel: 2, groups: 1, ..SPEC }, initial: true, ..plain() }.check();
}

#[test]
fn t6_mamba2_adjoint_is_the_derivative_where_dt_is_clamped() {
    let spec = Mamba2Spec { dt_limit: (0.4, 0.9), ..SPEC };
    let case = Case { spec, batch: 1, len: 6, bias: true, documents: None, initial: true, seed: 2 };
    let values = case.values();
    let soft: Vec<f64> = (0..24)
        .map(|i| {
            values.projected[i / 4 * spec.projection() + spec.projection() - 4 + i % 4]
                + values.weights.dt_bias[i % 4]
        })
        .map(|raw| raw.exp().ln_1p())
        .collect();
    assert!(soft.iter().any(|&s| s < 0.4) && soft.iter().any(|&s| s > 0.9), "both ends are in use");
    assert!(soft.iter().any(|s| (0.4..0.9).contains(s)), "and the middle");
    case.check();
}

#[test]
fn t4_documents_packed_equal_documents_alone() {
    let packed = Case {
        spec: SPEC,
        batch: 1,
        len: 7,
        bias: true,
        documents: Some(vec![3., 3., 3., 3., 5., 5., 3.]),
        initial: true,
        seed: 3,
    };
    let values = packed.values();
    let (y, last) = packed.run(&values);
    let (mut alone, mut state) = (Vec::new(), State { conv: vec![], ssm: vec![] });
    for (range, initial) in [(0..4, true), (4..6, false), (6..7, false)] {
        let case = Case { len: range.len(), documents: None, initial, ..packed };
        let w = SPEC.projection();
        let part = Values {
            projected: values.projected[range.start * w..range.end * w].to_vec(),
            initial: if initial { values.initial.clone() } else { None },
            weights: values.weights.clone(),
        };
        let (y, last) = case.run(&part);
        alone.extend(y);
        state = last;
    }
    assert_eq!(y, alone);
    assert_eq!((last.conv, last.ssm), (state.conv, state.ssm));
}

#[test]
fn t16_a_sequence_in_two_stretches_equals_the_whole() {
    let whole = Case { spec: SPEC, batch: 1, len: 7, bias: true, documents: None, initial: false, seed: 4 };
    let values = whole.values();
    let (y, last) = whole.run(&values);
    for cut in 1..7 {
        let (head, tail) = values.projected.split_at(cut * SPEC.projection());
        let stretch = |projected: &[f64], initial: Option<State<Vec<f64>>>| {
            let case = Case { initial: initial.is_some(), ..Case { documents: None, ..whole } };
            case.run(&Values { projected: projected.to_vec(), initial, weights: values.weights.clone() })
        };
        let (mut both, middle) = stretch(head, None);
        let (rest, end) = stretch(tail, Some(middle));
        both.extend(rest);
        assert_eq!(y, both);
        assert_eq!((&last.conv, &last.ssm), (&end.conv, &end.ssm));
    }
}

#[test]
fn t10_one_head_one_channel_by_hand() {
    // K = 1 with weight 1 and no bias: x, B, C pass through SiLU alone. Two positions.
    let spec =
        Mamba2Spec { heads: 1, head_dim: 1, groups: 1, state: 1, conv_kernel: 1, norm_eps: 0.0, ..SPEC };
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let (x, b, c, raw) = ([0.5, -1.0], [1.5, 2.0], [1.0, -0.5], [0.1, 30.0]);
    let projected: Vec<f64> = (0..2).flat_map(|t| [1.0, x[t], b[t], c[t], raw[t]]).collect();
    let weights = Mamba2Weights {
        conv_weight: &[1.0, 1.0, 1.0][..],
        conv_bias: None,
        dt_bias: &[0.25],
        a_log: &[-1.0],
        d: &[2.0],
        norm_weight: &[1.0],
    };
    let inputs = Mamba2Inputs { projected: &projected[..], documents: None, initial: None };
    let (_, last) = mamba2(&spec, 1, &inputs, &weights);
    let delta = [(1.0 + 0.35f64.exp()).ln(), 30.25];
    let first = delta[0] * silu(x[0]) * silu(b[0]);
    let second = (-delta[1] * (-1f64).exp()).exp() * first + delta[1] * silu(x[1]) * silu(b[1]);
    assert_close("state", &last.ssm, &[second], 1e-12);
    assert!(last.conv.is_empty());
}

#[test]
fn bf16_rounds_to_nearest_even() {
    let ulp = 2f32.powi(-7); // of bf16 at 1
    for (x, want) in [
        (1.0 + ulp / 2.0, 1.0),
        (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
        (1.0 + 0.51 * ulp, 1.0 + ulp),
        (-1.0 - 0.49 * ulp, -1.0),
        (f32::MAX, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
    ] {
        assert_eq!(round_to_bf16(x), want, "{x}");
    }
    assert!(round_to_bf16(f32::NAN).is_nan());
}

/// One position in which the scan's output is known: no B, so that y = D·silu(x) goes into gate and norm; weight 1 and
/// no epsilon. E = 8 in two groups, projection `[z 8 | x 8 | B 6 | C 6 | dt 4]`.
fn skip_alone(norm: NormGroup, z: &[f64], x: &[f64]) -> Vec<f64> {
    let spec = Mamba2Spec { conv_kernel: 1, norm, norm_eps: 0.0, ..SPEC };
    let projected = [z, x, &[0.0; 6], &[1.0; 6], &[0.5; 4]].concat();
    let (channels, ones) = (vec![1.0; spec.conv_channels()], [1.0; 8]);
    let weights = Mamba2Weights {
        conv_weight: &channels[..],
        conv_bias: None,
        dt_bias: &[0.0; 4][..],
        a_log: &[0.0; 4],
        d: &[2.0; 4],
        norm_weight: &ones,
    };
    let inputs = Mamba2Inputs { projected: &projected[..], documents: None, initial: None };
    mamba2(&spec, 1, &inputs, &weights).0
}

const Z: [f64; 8] = [0.5, -1.0, 2.0, 1.5, -0.5, 3.0, 1.0, -2.0];
const X: [f64; 8] = [1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 3.0, 1.0];

fn mean_square(values: &[f64]) -> f64 {
    dot(values, values) / values.len() as f64
}

#[test]
fn t1_the_gated_norm_is_per_group_unless_told_otherwise() {
    let y = skip_alone(NormGroup::PerGroup, &Z, &X);
    y.chunks(4).for_each(|group| assert!((mean_square(group) - 1.0).abs() < 1e-12));
    let y = skip_alone(NormGroup::Across, &Z, &X);
    assert!((mean_square(&y) - 1.0).abs() < 1e-12);
    assert!(y.chunks(4).all(|group| (mean_square(group) - 1.0).abs() > 0.1));
}

#[test]
fn t15_the_gate_comes_before_the_norm() {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let gated: Vec<f64> = Z.iter().zip(X).map(|(&z, x)| 2.0 * silu(x) * silu(z)).collect();
    let size = mean_square(&gated).sqrt();
    let want: Vec<f64> = gated.iter().map(|y| y / size).collect();
    assert_close("y", &skip_alone(NormGroup::Across, &Z, &X), &want, 1e-12);
}

/// Each group's B and C serve H/G heads that lie side by side: without the C of group 1, heads 2 and 3 fall silent.
#[test]
fn t2_heads_of_a_group_are_neighbours() {
    let case = Case { spec: SPEC, batch: 1, len: 3, bias: false, documents: None, initial: false, seed: 5 };
    let mut values = case.values();
    values.weights.d.fill(0.0);
    let (inner, state) = (SPEC.inner(), SPEC.state);
    // C of group 1 is the last segment before dt.
    let first = 2 * inner + 3 * state;
    values.projected.chunks_mut(SPEC.projection()).for_each(|row| row[first..first + state].fill(0.0));
    let (y, _) = case.run(&values);
    for row in y.chunks(inner) {
        assert!(row[..inner / 2].iter().all(|&y| y != 0.0) && row[inner / 2..].iter().all(|&y| y == 0.0));
    }
}

/// The convolution reads x, B and C of the positions before; z and dt act where they stand.
#[test]
fn t10_the_convolution_covers_x_b_and_c_only() {
    let case = Case { spec: SPEC, batch: 1, len: 2, bias: true, documents: None, initial: false, seed: 6 };
    let width = SPEC.projection();
    // Δt = 0 at position 0: it has no way to position 1 but the convolution.
    let last = |place: usize, more: f64| {
        let mut values = case.values();
        values.projected[width - SPEC.heads..width].fill(-1e3);
        values.projected[place] += more;
        case.run(&values).0[SPEC.inner()..].to_vec()
    };
    let seen = |place: usize| last(place, 0.5) != last(place, 0.0);
    assert!(!(0..SPEC.inner()).any(seen), "z");
    assert!((SPEC.inner()..width - SPEC.heads).all(seen), "x, B, C");
    assert!(!(width - SPEC.heads..width).any(seen), "dt");
}
