//! The tape on a small model in f64, against central finite differences.

use std::cell::RefCell;
use std::rc::Rc;

use elapid_tensor::oracle::{OracleBackend, OracleBuffer, OracleTensor};
use elapid_tensor::{
    Backend, Checkpointing, DType, FlatShape, IGNORE_LABEL, Kind, Mamba2Spec, Mamba2Weights, NormGroup, Row,
    Seen, Slot, State, Tape, Var, Weight,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SPEC: Mamba2Spec = Mamba2Spec {
    heads: 4,
    head_dim: 2,
    groups: 2,
    state: 2,
    conv_kernel: 3,
    chunk: 2,
    dt_limit: (0.0, f32::INFINITY),
    norm: NormGroup::PerGroup,
    norm_ranks: 1,
    norm_eps: 1e-3,
};
const LAYERS: usize = 2;
const B: usize = 2;
const L: usize = 5;
const D: usize = 6;
const V: usize = 7;
const EPS: f32 = 1e-3;

/// The slots of `shapes`, one after the other in `row`.
fn slots<const S: usize>(row: Row, shapes: [&[usize]; S]) -> [Slot; S] {
    let mut offset = 0;
    shapes.map(|shape| {
        let slot = Slot { row, offset, shape: shape.to_vec() };
        offset += slot.len();
        slot
    })
}

/// norm, in_proj and its bias, the mixer's six, out_proj.
fn layer_slots(layer: usize) -> [Slot; 10] {
    let (e, c, w) = (SPEC.inner(), SPEC.conv_channels(), SPEC.projection());
    let shapes: [&[usize]; 10] = [&[D], &[w, D], &[w], &[c, 1, 3], &[c], &[4], &[4], &[4], &[e], &[D, e]];
    slots(Row::Layer(layer), shapes)
}

/// Embedding, which is the head as well, and final norm.
fn shared_slots() -> [Slot; 2] {
    slots(Row::Shared, [&[V, D], &[D]])
}

fn weight(params: &OracleBuffer, slot: Slot) -> Weight<OracleTensor> {
    Weight { value: OracleBackend.view(params, &slot), slot }
}

fn random_params() -> OracleBuffer {
    let size = |slots: &[Slot]| slots.iter().map(Slot::len).sum();
    let shape = FlatShape { layers: LAYERS, row: size(&layer_slots(0)), shared: size(&shared_slots()) };
    let mut params = OracleBackend.buffer(shape, DType::F32);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    params.values.fill_with(|| rng.random_range(-1.0..1.0));
    params
}

type States = Vec<State<OracleTensor>>;

/// embedding → layers(rms_norm → linear → mamba2 → linear → add): `[B, len, D]`.
fn trunk<'a>(
    tape: &mut Tape<'a, OracleBackend>,
    params: &OracleBuffer,
    tokens: (&[i32], &[i32]),
    checkpointing: Checkpointing,
    states: Option<&mut States>,
) -> Var<OracleTensor> {
    let shape = [B, tokens.0.len() / B];
    let ids = OracleBackend.tensor_i32(tokens.0, &shape);
    let documents = OracleBackend.tensor_i32(tokens.1, &shape);
    let layers: Vec<_> = (0..LAYERS).map(|l| layer_slots(l).map(|slot| weight(params, slot))).collect();
    let [embedding, _] = shared_slots().map(|slot| weight(params, slot));
    let x = tape.embedding(&embedding, &ids, DType::F32);
    let body = move |tape: &mut Tape<'_, OracleBackend>,
                     layer: usize,
                     x: Var<OracleTensor>,
                     before: Option<State<OracleTensor>>| {
        let [norm, in_proj, in_bias, conv_weight, conv_bias, dt_bias, a_log, d, norm_weight, out_proj] =
            layers[layer].clone();
        let mixer = Mamba2Weights { conv_weight, conv_bias: Some(conv_bias), dt_bias, a_log, d, norm_weight };
        let before = before.map(|s| State { conv: Var::constant(s.conv), ssm: Var::constant(s.ssm) });
        let normed = tape.rms_norm(&x, &norm, EPS, DType::F32);
        let projected = tape.linear(&normed, &in_proj, Some(&in_bias));
        let (y, after) = tape.mamba2(&SPEC, &projected, Some(&documents), before, &mixer);
        let y = tape.linear(&y, &out_proj, None);
        (tape.add(&x, &y), State { conv: after.conv.value, ssm: after.ssm.value })
    };
    tape.layers(LAYERS, x, states, checkpointing, Rc::new(body))
}

const TOKENS: [i32; B * L] = [0, 3, 3, 6, 1, 5, 4, 3, 2, 2];
const DOCUMENTS: [i32; B * L] = [0, 0, 0, 1, 1, 4, 4, 4, 4, 4];
const LABELS: [i32; B * L] = [3, 3, IGNORE_LABEL, 1, 0, 4, 3, 2, 2, IGNORE_LABEL];

/// The trunk, then rms_norm → head_loss.
fn loss(
    tape: &mut Tape<'_, OracleBackend>,
    params: &OracleBuffer,
    checkpointing: Checkpointing,
    states: Option<&mut States>,
) -> f64 {
    let x = trunk(tape, params, (&TOKENS, &DOCUMENTS), checkpointing, states);
    let [embedding, norm] = shared_slots().map(|slot| weight(params, slot));
    let x = tape.rms_norm(&x, &norm, EPS, DType::F32);
    tape.head_loss(&x, &embedding, &OracleBackend.tensor_i32(&LABELS, &[B, L]), V).values[0]
}

/// Random states before position 0.
fn random_states() -> States {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut tensor = |shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        OracleBackend.tensor(&values, shape, DType::F32)
    };
    let mut state =
        || State { conv: tensor(&[B, 2, SPEC.conv_channels()]), ssm: tensor(&[B, 4, 2, SPEC.state]) };
    (0..LAYERS).map(|_| state()).collect()
}

/// A gradient buffer that starts at 0.5 everywhere, and the loss.
fn gradients(
    params: &OracleBuffer,
    checkpointing: Checkpointing,
    mut states: Option<States>,
) -> (f64, Vec<f64>) {
    let mut grads = OracleBackend.buffer(params.shape, DType::F32);
    grads.values.fill(0.5);
    let mut tape = Tape::training(&OracleBackend, &mut grads);
    let loss = loss(&mut tape, params, checkpointing, states.as_mut());
    tape.backward(&[], &[]);
    (loss, grads.values)
}

#[test]
fn gradients_of_a_model_are_those_of_finite_differences() {
    for states in [None, Some(random_states())] {
        let mut params = random_params();
        let (value, got) = gradients(&params, Checkpointing::None, states.clone());
        let step = 1e-5;
        let at = |params: &OracleBuffer| {
            loss(&mut Tape::inference(&OracleBackend), params, Checkpointing::None, states.clone().as_mut())
        };
        assert_eq!(value, at(&params), "training and inference agree");
        let (mut off, mut size) = (0.0, 0.0);
        for (i, got) in got.iter().enumerate() {
            let here = params.values[i];
            params.values[i] = here + step;
            let above = at(&params);
            params.values[i] = here - step;
            let want = (above - at(&params)) / (2.0 * step);
            params.values[i] = here;
            assert!(
                (got - 0.5 - want).abs() < 1e-6 * want.abs().max(1.0),
                "element {i}: {got}, {want} + 0.5"
            );
            off += (got - 0.5 - want).powi(2);
            size += want * want;
        }
        assert!((off / size).sqrt() < 1e-7, "relative error {:e}", (off / size).sqrt());
    }
}

#[test]
fn layers_run_again_give_the_same_gradients() {
    let params = random_params();
    for states in [None, Some(random_states())] {
        let kept = gradients(&params, Checkpointing::None, states.clone());
        assert_eq!(kept, gradients(&params, Checkpointing::Block, states));
    }
}

#[test]
fn a_watched_tape_shows_every_tensor_and_changes_none() {
    let params = random_params();
    let wanted = gradients(&params, Checkpointing::None, None);
    let layer = |ops: &[&'static str], layer| ops.iter().map(|&op| (op, Some(layer))).collect::<Vec<_>>();
    let forward = ["rms_norm", "linear", "mamba2", "linear", "add"];
    let outputs = [
        vec![("embedding", None)],
        layer(&forward, 0),
        layer(&forward, 1),
        vec![("rms_norm", None), ("head_loss", None)],
    ];
    let backward = ["linear", "mamba2", "linear", "rms_norm"];
    let cotangents =
        [vec![("head_loss", None), ("rms_norm", None)], layer(&backward, 1), layer(&backward, 0)];
    for checkpointing in [Checkpointing::None, Checkpointing::Block] {
        let seen = RefCell::new(Vec::new());
        let watch = |now: Seen<'_, OracleTensor>| {
            seen.borrow_mut().push((now.kind, now.site.op, now.site.layer, now.site.weight.clone()));
        };
        let mut grads = OracleBackend.buffer(params.shape, DType::F32);
        grads.values.fill(0.5);
        let mut tape = Tape::training(&OracleBackend, &mut grads).watched(Some(&watch));
        let value = loss(&mut tape, &params, checkpointing, None);
        tape.backward(&[], &[]);
        assert_eq!((value, grads.values), wanted);

        let seen = seen.into_inner();
        let of = |kind: Kind| seen.iter().filter(move |now| now.0 == kind).map(|now| (now.1, now.2));
        let mut made: Vec<_> = of(Kind::Output).collect();
        made.dedup(); // y and the two states
        let end = made.iter().position(|now| now.0 == "head_loss").unwrap();
        assert_eq!(made[..=end], outputs.concat());
        assert_eq!(of(Kind::Cotangent).collect::<Vec<_>>(), cotangents.concat());
        let weights = seen.iter().filter(|now| now.0 == Kind::Gradient).map(|now| now.3.clone().unwrap());
        let weights: Vec<_> = weights.collect();
        let all: Vec<Slot> = (0..LAYERS)
            .flat_map(layer_slots)
            .chain(shared_slots())
            .chain([shared_slots()[0].clone()])
            .collect();
        assert_eq!(weights.len(), all.len(), "the embedding is the head as well");
        assert!(all.iter().all(|slot| weights.contains(slot)));
    }
}

#[test]
fn states_carry_a_sequence_over_a_cut() {
    let params = random_params();
    let run = |columns: std::ops::Range<usize>, states: &mut States| {
        let cut = |x: &[i32]| x.chunks(L).flat_map(|row| row[columns.clone()].to_vec()).collect::<Vec<_>>();
        let (ids, documents) = (cut(&TOKENS), cut(&[0; B * L]));
        let tape = &mut Tape::inference(&OracleBackend);
        trunk(tape, &params, (&ids, &documents), Checkpointing::None, Some(states)).value
    };
    let (mut whole, mut cut) = (Vec::new(), Vec::new());
    let y = run(0..L, &mut whole);
    let (first, second) = (run(0..2, &mut cut), run(2..L, &mut cut));
    for b in 0..B {
        assert_eq!(y.values[b * L * D..][..2 * D], first.values[b * 2 * D..][..2 * D]);
        assert_eq!(y.values[(b * L + 2) * D..][..3 * D], second.values[b * 3 * D..][..3 * D]);
    }
    assert_eq!(whole.len(), LAYERS);
    for (whole, cut) in whole.iter().zip(&cut) {
        assert_eq!((&whole.conv.values, &whole.ssm.values), (&cut.conv.values, &cut.ssm.values));
    }
}

#[test]
fn cotangents_flow_from_the_final_state_to_the_initial_one() {
    let (params, before) = (random_params(), random_states().remove(0));
    let [_, _, _, conv_weight, conv_bias, dt_bias, a_log, d, norm_weight, _] =
        layer_slots(0).map(|slot| weight(&params, slot));
    let mixer = Mamba2Weights { conv_weight, conv_bias: Some(conv_bias), dt_bias, a_log, d, norm_weight };
    let mut grads = OracleBackend.buffer(params.shape, DType::F32);
    let mut tape = Tape::training(&OracleBackend, &mut grads);
    let width = SPEC.projection();
    let values: Vec<f32> = params.values[..B * width].iter().map(|&x| x as f32).collect();
    let projected = tape.leaf(OracleBackend.tensor(&values, &[B, 1, width], DType::F32));
    let initial = State { conv: tape.leaf(before.conv), ssm: tape.leaf(before.ssm) };
    let (y, after) = tape.mamba2(&SPEC, &projected, None, Some(initial.clone()), &mixer);
    let ones = |var: &Var<OracleTensor>| {
        let shape = OracleBackend.shape(&var.value);
        OracleBackend.tensor(&vec![1.0; shape.iter().product()], &shape, DType::F32)
    };
    let seeds = [(&after.conv, ones(&after.conv)), (&after.ssm, ones(&after.ssm))];
    let [d_projected, d_conv, d_ssm] = tape
        .backward(&seeds, &[&projected, &initial.conv, &initial.ssm])
        .try_into()
        .map(|all: [Option<OracleTensor>; 3]| all.map(|d| d.expect("all three were used")))
        .unwrap();
    // One position: S = exp(Δt·A)·S_before + …, and y took no part.
    for (i, d) in d_ssm.values.iter().enumerate() {
        let (b, h) = (i / (4 * 2 * SPEC.state), i / (2 * SPEC.state) % 4);
        let raw = f64::from(values[b * width + width - 4 + h]) + mixer.dt_bias.value.values[h];
        let decay = (-raw.exp().ln_1p() * mixer.a_log.value.values[h].exp()).exp();
        assert!((d - decay).abs() < 1e-12, "{i}: {d}, {decay}");
    }
    // z has no way into the state; the conv state hands its own last row straight on to the new input.
    assert!(d_projected.values.chunks(width).all(|row| row[..SPEC.inner()].iter().all(|&dz| dz == 0.0)));
    assert!(d_conv.values.iter().any(|&d| d != 0.0));
    assert_eq!(OracleBackend.shape(&y.value), [B, 1, SPEC.inner()]);
}
