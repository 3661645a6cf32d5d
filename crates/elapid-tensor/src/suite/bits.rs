//! The bits that a backend computes, for comparing a backend with itself.

use super::check::{Check, read_all, write_all};
use crate::backend::{
    AdamW, Backend, Clipping, DType, Decayed, Mamba2Inputs, Mamba2Spec, Mamba2Weights, NormGroup, Sink, State,
};
use crate::flat::{FlatShape, Row, Slot};

use DType::{Bf16, F32};

/// The bits of outputs and gradients of the ops, at sizes that a backend splits over its threads: equal for equal
/// backends whatever their number of threads.
pub fn bits<B: Backend>(backend: &B) -> Vec<u32> {
    let mut values = Vec::new();
    for dtype in [F32, Bf16] {
        values.extend(model_ops(backend, dtype));
        values.extend(mixer(backend, dtype, 32, 300));
        // Thin products: a state of one number, a last chunk of two positions.
        values.extend(mixer(backend, dtype, 1, 130));
    }
    values.extend(update(backend));
    values.iter().map(|x| x.to_bits()).collect()
}

/// Slots one after the other in one layer row, and the shape of their buffer.
fn layout<const S: usize>(shapes: [&[usize]; S]) -> (FlatShape, [Slot; S]) {
    let mut row = 0;
    let slots = shapes.map(|shape| {
        let slot = Slot { row: Row::Layer(0), offset: row, shape: shape.to_vec() };
        row += slot.len();
        slot
    });
    (FlatShape { layers: 1, row, shared: 0 }, slots)
}

/// embedding → rms_norm → linear → head_loss, each op on random data of its own.
fn model_ops<B: Backend>(backend: &B, dtype: DType) -> Vec<f32> {
    let mut check = Check::new(backend, "bits", "");
    let [b, l, d, o, v] = [2, 300, 130, 257, 1001];
    let ids = check.whole(b * l, 0, 50);
    let ids = backend.tensor_i32(&ids, &[b, l]);
    let table = check.random_parameter(&[v, d], dtype, 1.0).device;
    let weight = check.random_parameter(&[o, d], dtype, 1.0).device;
    let bias = check.random_parameter(&[o], dtype, 1.0).device;
    let norm = check.random_parameter(&[d], F32, 1.0).device;
    let x = check.random(&[b, l, d], dtype, 1.0).device;
    let dy = check.random(&[b, l, o], dtype, 1.0).device;
    let few = [1, 2].map(|rows| check.random(&[1, rows, d], dtype, 1.0).device);
    let (shape, [to_table, to_weight, to_bias, to_norm, to_head]) =
        layout([&[v, d], &[o, d], &[o], &[d], &[v, d]]);
    let mut grads = backend.buffer(shape, F32);

    let mut out = vec![
        backend.embedding(&table, &ids, dtype),
        backend.rms_norm(&x, &norm, 1e-5, dtype),
        backend.linear(&x, &weight, Some(&bias)),
        backend.head_loss(&x, &table, &ids, v),
        backend.logits(&x, &table),
    ];
    out.extend(few.iter().map(|x| backend.logits(x, &table)));
    backend.embedding_adjoint(&ids, &x, Sink { buffer: &mut grads, slot: &to_table });
    let sink = Sink { buffer: &mut grads, slot: &to_norm };
    out.push(backend.rms_norm_adjoint(&x, &norm, 1e-5, &x, sink));
    let sink = Sink { buffer: &mut grads, slot: &to_weight };
    out.push(backend.linear_adjoint(&x, &weight, &dy, sink, Some(&to_bias)));
    let sink = Sink { buffer: &mut grads, slot: &to_head };
    let (loss, dx) = backend.head_loss_adjoint(&x, &table, &ids, v, sink);
    out.extend([loss, dx]);
    let mut values: Vec<f32> = out.iter().flat_map(|t| backend.values(t)).collect();
    values.extend(read_all(backend, &grads, shape));
    values
}

fn mixer<B: Backend>(backend: &B, dtype: DType, state: usize, l: usize) -> Vec<f32> {
    let spec = Mamba2Spec {
        heads: 8,
        head_dim: 16,
        groups: 2,
        state,
        conv_kernel: 4,
        chunk: 64,
        dt_limit: (0.0, f32::INFINITY),
        norm: NormGroup::PerGroup,
        norm_ranks: 1,
        norm_eps: 1e-5,
    };
    let mut check = Check::new(backend, "bits", "");
    let (b, inner, channels) = (2, spec.inner(), spec.conv_channels());
    let documents: Vec<i32> = (0..b * l).map(|t| (t / 110) as i32).collect();
    let mut state = || State {
        conv: check.random(&[b, 3, channels], F32, 1.0).device,
        ssm: check.random(&[b, spec.heads, spec.head_dim, spec.state], F32, 1.0).device,
    };
    let (initial, d_state) = (state(), state());
    let inputs = Mamba2Inputs {
        projected: check.random(&[b, l, spec.projection()], dtype, 1.0).device,
        documents: Some(backend.tensor_i32(&documents, &[b, l])),
        initial: Some(initial),
    };
    let weights = Mamba2Weights {
        conv_weight: check.random_parameter(&[channels, 1, 4], dtype, 1.0).device,
        conv_bias: Some(check.random_parameter(&[channels], dtype, 1.0).device),
        dt_bias: check.random_parameter(&[spec.heads], F32, 1.0).device,
        a_log: check.random_parameter(&[spec.heads], F32, 1.0).device,
        d: check.random_parameter(&[spec.heads], F32, 1.0).device,
        norm_weight: check.random_parameter(&[inner], F32, 1.0).device,
    };
    let dy = check.random(&[b, l, inner], dtype, 1.0).device;
    let heads = [spec.heads];
    let (shape, [conv_weight, conv_bias, dt_bias, a_log, d, norm_weight]) =
        layout([&[channels, 1, 4], &[channels], &heads, &heads, &heads, &[inner]]);
    let slots = Mamba2Weights { conv_weight, conv_bias: Some(conv_bias), dt_bias, a_log, d, norm_weight };
    let mut grads = backend.buffer(shape, F32);
    let out = backend.mamba2(&spec, inputs.clone(), &weights, true);
    let sinks = slots.as_ref();
    let adjoint =
        backend.mamba2_adjoint(&spec, &inputs, &weights, &out.saved, &dy, Some(&d_state), &mut grads, &sinks);
    let mut tensors = vec![out.y, out.state.conv, out.state.ssm, adjoint.projected];
    tensors.extend(adjoint.initial.into_iter().flat_map(|s| [s.conv, s.ssm]));
    let mut values: Vec<f32> = tensors.iter().flat_map(|t| backend.values(t)).collect();
    values.extend(read_all(backend, &grads, shape));
    values
}

fn update<B: Backend>(backend: &B) -> Vec<f32> {
    let mut check = Check::new(backend, "bits", "");
    let shape = FlatShape { layers: 3, row: 100_003, shared: 50_021 };
    let [mut grads, mut params, mut m, mut v] = [-1.0, -1.0, -0.1, 0.0].map(|from| {
        let values = check.uniform(shape.len(), from, 1.0);
        let mut buffer = backend.buffer(shape, F32);
        write_all(backend, &mut buffer, shape, &values);
        buffer
    });
    let clip = backend.clip(&grads, &backend.tensor(&[1.0], &[], F32), &Clipping::alone(0.5, 1.0));
    let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3 };
    let decayed = Decayed { layer: 70_000, shared: 30_000, dealt: false };
    let mut copy = backend.buffer(shape, Bf16);
    backend.adamw(&hyper, decayed, &clip, &mut grads, &mut params, &mut m, &mut v, Some(&mut copy));
    let mut values = backend.values(&clip);
    for buffer in [&params, &m, &v, &copy] {
        values.extend(read_all(backend, buffer, shape));
    }
    values
}
