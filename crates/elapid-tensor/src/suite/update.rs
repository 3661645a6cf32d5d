//! Flat buffers, clipping and AdamW.

use super::Report;
use super::check::{Check, FP32, read_all, rounded, same_bits, widened, write_all};
use crate::backend::{AdamW, Backend, Clipping, DType, Decayed};
use crate::flat::{FlatShape, Row, Slot};
use crate::oracle::{self, Clip};

use DType::{Bf16, F32};

/// [`Backend::buffer`], `write_slot`, `view`, `cast_buffer`, `zero_buffer`.
pub fn flat_buffers<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    let shape = FlatShape { layers: 3, row: 11, shared: 7 };
    for dtype in [F32, Bf16] {
        let mut check = Check::new(backend, "flat buffer", format!("{dtype:?}"));
        let mut want = vec![0.0; shape.len()];
        let mut buffer = backend.buffer(shape, dtype);
        check.holds("new buffer is zero", same_bits(&read_all(backend, &buffer, shape), &want));
        for (row, offset) in [(Row::Layer(0), 0), (Row::Layer(1), 3), (Row::Layer(2), 5), (Row::Shared, 1)] {
            let slot = Slot { row, offset, shape: vec![2, 3] };
            let values = check.uniform(6, -1.0, 1.0);
            backend.write_slot(&mut buffer, &slot, &values);
            let values = rounded(&values, dtype);
            want[shape.range(&slot)].copy_from_slice(&values);
            let view = backend.view(&buffer, &slot);
            check.compare(&format!("view of {row:?}"), &view, &widened(&values), &[2, 3], dtype, 0.0);
        }
        check.holds("writes stay in their slots", same_bits(&read_all(backend, &buffer, shape), &want));
        for to in [F32, Bf16] {
            let mut copy = backend.buffer(shape, to);
            backend.cast_buffer(&buffer, &mut copy);
            let same = same_bits(&read_all(backend, &copy, shape), &rounded(&want, to));
            check.holds(&format!("cast to {to:?}"), same);
        }
        backend.zero_buffer(&mut buffer);
        let zeros = vec![0.0; shape.len()];
        check.holds("zeroed buffer", same_bits(&read_all(backend, &buffer, shape), &zeros));
        reports.extend(check.finish());
    }
    reports
}

/// [`Backend::clip`].
pub fn clip<B: Backend>(backend: &B) -> Vec<Report> {
    const SHAPE: FlatShape = FlatShape { layers: 3, row: 4099, shared: 517 };
    let (first, middle, last) = (0, 4099 + 5, SHAPE.len() - 1);
    let mut reports = Vec::new();
    // Norm of the gradients: about 65 times `scale`.
    for (case, scale, max_norm, poison, loss) in [
        ("above the limit", 0.25, 1.0, None, 3.0),
        ("below the limit", 1e-3, 1.0, None, 3.0),
        ("no limit", 0.25, 0.0, None, 3.0),
        ("negative limit", 0.25, -1.0, None, 3.0),
        ("NaN first", 0.25, 1.0, Some((first, f32::NAN)), 3.0),
        ("infinity within", 0.25, 0.0, Some((middle, f32::INFINITY)), 3.0),
        ("negative infinity last", 0.25, 1.0, Some((last, f32::NEG_INFINITY)), 3.0),
        ("loss NaN", 0.25, 1.0, None, f32::NAN),
        ("loss infinite", 0.25, 1.0, None, f32::INFINITY),
    ] {
        let mut check = Check::new(backend, "clip", case);
        let mut grads = check.uniform(SHAPE.len(), -1.0, 1.0);
        if let Some((at, value)) = poison {
            grads[at] = value;
        }
        report_clip(&mut check, SHAPE, &grads, loss, scale, max_norm);
        reports.extend(check.finish());
    }
    // Squares that fp32 cannot hold belong to norms that it can.
    for (case, size) in [("no gradient", 0.0), ("squares overflow", 1e25), ("squares vanish", 1e-25)] {
        let mut check = Check::new(backend, "clip", case);
        let grads: Vec<f32> = check.uniform(SHAPE.len(), -1.0, 1.0).iter().map(|g| g * size).collect();
        report_clip(&mut check, SHAPE, &grads, 3.0, 0.25, 1.0);
        reports.extend(check.finish());
    }
    reports
}

fn report_clip<B: Backend>(
    check: &mut Check<'_, B>,
    shape: FlatShape,
    grads: &[f32],
    loss: f32,
    scale: f32,
    max_norm: f32,
) {
    let backend = check.backend;
    let mut buffer = backend.buffer(shape, F32);
    write_all(backend, &mut buffer, shape, grads);
    let got = backend.clip(&buffer, &backend.tensor(&[loss], &[], F32), &Clipping::alone(scale, max_norm));
    let scalars = [loss, scale, max_norm].map(f64::from);
    let want = oracle::clip(&widened(grads), scalars[0], scalars[1], scalars[2]);
    let well_formed = backend.shape(&got) == [3] && backend.dtype(&got) == F32;
    check.holds("three fp32 numbers", well_formed);
    if !well_formed {
        return;
    }
    let got = widened(&backend.values(&got));
    check.holds("finite", got[2] == if want.finite { 1.0 } else { 0.0 });
    // Norm and factor mean nothing where they are not finite.
    if want.finite {
        check.compare_values("norm", &got[..1], &[want.norm], FP32);
        check.compare_values("factor", &got[1..2], &[want.factor], FP32);
    }
}

/// [`Backend::adamw`].
pub fn adamw<B: Backend>(backend: &B) -> Vec<Report> {
    const SHAPE: FlatShape = FlatShape { layers: 3, row: 1031, shared: 517 };
    let mut reports = Vec::new();
    for (case, step, decayed, weight_decay, poison) in [
        ("first step, part of each row decays", 1, (700, 300), 0.1, None),
        ("late step, only layers decay", 1000, (1031, 0), 0.1, None),
        ("only the shared region decays", 7, (0, 517), 0.1, None),
        ("decay of zero", 7, (700, 300), 0.0, None),
        ("not finite", 7, (700, 300), 0.1, Some(f32::NAN)),
    ] {
        let mut check = Check::new(backend, "adamw", case);
        let finite = poison.is_none();
        // A large rate, so that the update is a good part of the parameters it is compared in.
        let hyper = AdamW { lr: 0.3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, step };
        let mut grads = check.uniform(SHAPE.len(), -1.0, 1.0);
        grads[0] = poison.unwrap_or(grads[0]);
        let params = check.uniform(SHAPE.len(), -1.0, 1.0);
        let m = check.uniform(SHAPE.len(), -0.5, 0.5);
        let v = check.uniform(SHAPE.len(), 0.01, 0.5);
        let factor = 0.37;
        let clip = backend.tensor(&[2.0, factor, if finite { 1.0 } else { 0.0 }], &[3], F32);
        let [mut grads_on, mut params_on, mut m_on, mut v_on] = [&grads, &params, &m, &v].map(|values| {
            let mut buffer = backend.buffer(SHAPE, F32);
            write_all(backend, &mut buffer, SHAPE, values);
            buffer
        });
        let first = Decayed { layer: decayed.0, shared: decayed.1, dealt: false };
        let mut copy_on = backend.buffer(SHAPE, Bf16);
        backend.cast_buffer(&params_on, &mut copy_on);
        // Training in fp32 has no copy.
        let copy = (step != 1000).then_some(&mut copy_on);
        let copied = copy.is_some();
        backend.adamw(&hyper, first, &clip, &mut grads_on, &mut params_on, &mut m_on, &mut v_on, copy);
        let [got_grads, got_params, got_m, got_v, got_copy] =
            [&grads_on, &params_on, &m_on, &v_on, &copy_on].map(|b| read_all(backend, b, SHAPE));
        let of = if copied { &got_params } else { &params };
        check.holds("copy in bf16", same_bits(&got_copy, &rounded(of, Bf16)));
        if !finite {
            check.holds("gradients unchanged", same_bits(&got_grads, &grads));
            check.holds("params unchanged", same_bits(&got_params, &params));
            check.holds("m unchanged", same_bits(&got_m, &m));
            check.holds("v unchanged", same_bits(&got_v, &v));
        } else {
            check.holds("gradients are zeros", same_bits(&got_grads, &vec![0.0; SHAPE.len()]));
            let [mut params, mut m, mut v] = [params, m, v].map(|x| widened(&x));
            let clip = Clip { norm: 2.0, factor: f64::from(factor), finite };
            oracle::adamw(&hyper, SHAPE, decayed, clip, &widened(&grads), &mut params, &mut m, &mut v);
            check.compare_values("params", &widened(&got_params), &params, FP32);
            check.compare_values("m", &widened(&got_m), &m, FP32);
            check.compare_values("v", &widened(&got_v), &v, FP32);
        }
        reports.extend(check.finish());
    }
    reports
}
