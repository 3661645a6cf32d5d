//! The ops between the mixers.

use super::Report;
use super::check::{Check, FP32, Gradient, rounded_inside, rounded_once};
use crate::backend::{Backend, DType, IGNORE_LABEL, Sink};
use crate::oracle;

use DType::{Bf16, F32};

/// [`Backend::embedding`] and its adjoint.
pub fn embedding<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    for (dtype, out) in [(F32, F32), (Bf16, Bf16), (Bf16, F32)] {
        // Far fewer ids than positions: rows of the gradient are sums.
        for [v, d, b, l] in [[1, 1, 1, 1], [7, 5, 2, 9], [31, 64, 2, 257]] {
            let case = format!("V{v} D{d} B{b} L{l} {dtype:?} to {out:?}");
            let mut check = Check::new(backend, "embedding", case);
            let table = check.random_parameter(&[v, d], dtype, 1.0);
            let mut ids = check.whole(b * l, 0, v as i32);
            ids[b * l - 1] = v as i32 - 1;
            let on_device = backend.tensor_i32(&ids, &[b, l]);
            let y = backend.embedding(&table.device, &on_device, out);
            // A copy: no rounding at all.
            check.compare("y", &y, &oracle::embedding(&table.host, d, &ids), &[b, l, d], out, 0.0);
            let dy = check.random(&[b, l, d], out, 1.0);
            let want = oracle::embedding_adjoint(v, d, &ids, &dy.host);
            let wanted = [Gradient { name: "table", shape: &[v, d], want: &want, tolerance: FP32 }];
            check.gradients(&wanted, |buffer, slots| {
                backend.embedding_adjoint(&on_device, &dy.device, Sink { buffer, slot: &slots[0] });
            });
            reports.extend(check.finish());
        }
    }
    reports
}

/// [`Backend::rms_norm`] and its adjoint.
pub fn rms_norm<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    for (dtype, out) in [(F32, F32), (F32, Bf16), (Bf16, Bf16)] {
        // The small scale makes eps count.
        for ([b, l, d], scale) in
            [([1, 1, 3], 1.0), ([2, 5, 33], 2.0), ([2, 63, 257], 30.0), ([1, 3, 768], 3e-3)]
        {
            let case = format!("B{b} L{l} D{d} scale {scale} {dtype:?} to {out:?}");
            let mut check = Check::new(backend, "rms_norm", case);
            let (x, eps) = (check.random(&[b, l, d], dtype, scale), 1e-5);
            let weight = check.random_parameter(&[d], F32, 1.5);
            let y = backend.rms_norm(&x.device, &weight.device, eps, out);
            let want = oracle::rms_norm(&x.host, &weight.host, f64::from(eps));
            check.compare("y", &y, &want, &[b, l, d], out, rounded_once(out));
            let dy = check.random(&[b, l, d], out, 1.0);
            let (dx, dw) = oracle::rms_norm_adjoint(&x.host, &weight.host, f64::from(eps), &dy.host);
            let wanted = [Gradient { name: "weight", shape: &[d], want: &dw, tolerance: FP32 }];
            let got = check.gradients(&wanted, |buffer, slots| {
                let sink = Sink { buffer, slot: &slots[0] };
                backend.rms_norm_adjoint(&x.device, &weight.device, eps, &dy.device, sink)
            });
            check.compare("cotangent of x", &got, &dx, &[b, l, d], dtype, rounded_once(dtype));
            reports.extend(check.finish());
        }
    }
    reports
}

/// [`Backend::linear`] and its adjoint.
pub fn linear<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    for dtype in [F32, Bf16] {
        for bias in [false, true] {
            // Leading axes of x, then I and O.
            let sizes: [(&[usize], usize, usize); 6] = [
                (&[1, 1], 1, 1),
                (&[1, 3], 5, 7),
                (&[5, 13], 130, 257),
                (&[2], 96, 33),
                (&[2, 64], 64, 128),
                (&[2, 150], 520, 300),
            ];
            for (rows, i, o) in sizes {
                let with = if bias { "bias" } else { "no bias" };
                let mut check = Check::new(backend, "linear", format!("{rows:?}x{i}x{o} {with} {dtype:?}"));
                let (shape_x, shape_y) = ([rows, &[i]].concat(), [rows, &[o]].concat());
                let x = check.random(&shape_x, dtype, 1.0);
                let weight = check.random_parameter(&[o, i], dtype, 1.0);
                let b = bias.then(|| check.random_parameter(&[o], dtype, 1.0));
                let y = backend.linear(&x.device, &weight.device, b.as_ref().map(|b| &b.device));
                let want = oracle::linear(&x.host, &weight.host, b.as_ref().map(|b| &b.host[..]), i);
                check.compare("y", &y, &want, &shape_y, dtype, rounded_once(dtype));

                let dy = check.random(&shape_y, dtype, 1.0);
                let (dx, dw, db) = oracle::linear_adjoint(&x.host, &weight.host, &dy.host, i);
                // Products of bf16 numbers are exact in fp32, and gradients are fp32 sums of them.
                let wanted = [
                    Gradient { name: "weight", shape: &[o, i], want: &dw, tolerance: FP32 },
                    Gradient { name: "bias", shape: &[o], want: &db, tolerance: FP32 },
                ];
                let got = check.gradients(&wanted[..1 + usize::from(bias)], |buffer, slots| {
                    let sink = Sink { buffer, slot: &slots[0] };
                    backend.linear_adjoint(&x.device, &weight.device, &dy.device, sink, slots.get(1))
                });
                check.compare("cotangent of x", &got, &dx, &shape_x, dtype, rounded_once(dtype));
                reports.extend(check.finish());
            }
        }
    }
    reports
}

/// [`Backend::add_bias`] and its adjoint.
pub fn add_bias<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    for (dtype, kind) in [(F32, F32), (F32, Bf16), (Bf16, Bf16)] {
        for [b, l, o] in [[1, 1, 1], [2, 5, 33], [2, 63, 257]] {
            let mut check = Check::new(backend, "add_bias", format!("B{b} L{l} O{o} {dtype:?} + {kind:?}"));
            let shape = [b, l, o];
            let (x, bias) = (check.random(&shape, dtype, 1.0), check.random_parameter(&[o], kind, 1.0));
            let want: Vec<f64> = x.host.iter().zip(bias.host.iter().cycle()).map(|(x, b)| x + b).collect();
            let y = backend.add_bias(&x.device, &bias.device);
            check.compare("y", &y, &want, &shape, dtype, rounded_once(dtype));
            let dy = check.random(&shape, dtype, 1.0);
            let sums: Vec<f64> = (0..o).map(|i| dy.host.iter().skip(i).step_by(o).sum()).collect();
            let wanted = [Gradient { name: "bias", shape: &[o], want: &sums, tolerance: FP32 }];
            check.gradients(&wanted, |buffer, slots| {
                backend.add_bias_adjoint(&dy.device, Sink { buffer, slot: &slots[0] });
            });
            reports.extend(check.finish());
        }
    }
    reports
}

/// [`Backend::resize`].
pub fn resize<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    for dtype in [F32, Bf16] {
        for (rest, old, new) in
            [(&[3, 5][..], 7, 7), (&[3, 5], 7, 4), (&[3, 5], 4, 9), (&[], 5, 8), (&[], 8, 5)]
        {
            let mut check = Check::new(backend, "resize", format!("B2 L{old} {rest:?} to {new} {dtype:?}"));
            let x = check.random(&[&[2, old], rest].concat(), dtype, 1.0);
            let width: usize = rest.iter().product();
            let mut want = vec![0.0; 2 * new * width];
            for (to, from) in want.chunks_mut(new * width).zip(x.host.chunks(old * width)) {
                let len = to.len().min(from.len());
                to[..len].copy_from_slice(&from[..len]);
            }
            let y = backend.resize(&x.device, new);
            check.compare("y", &y, &want, &[&[2, new], rest].concat(), dtype, 0.0);
            reports.extend(check.finish());
        }
    }
    reports
}

/// [`Backend::add`] and [`Backend::cast`].
pub fn add_and_cast<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    let shape = [2, 3, 37];
    for (left, right) in [(F32, F32), (F32, Bf16), (Bf16, Bf16), (Bf16, F32)] {
        let mut check = Check::new(backend, "add", format!("{left:?} + {right:?}"));
        let (a, b) = (check.random(&shape, left, 1.0), check.random(&shape, right, 1.0));
        let want: Vec<f64> = a.host.iter().zip(&b.host).map(|(a, b)| a + b).collect();
        let sum = backend.add(&a.device, &b.device);
        check.compare("sum", &sum, &want, &shape, left, rounded_once(left));
        reports.extend(check.finish());
    }
    for (from, to) in [(F32, F32), (F32, Bf16), (Bf16, F32), (Bf16, Bf16)] {
        let mut check = Check::new(backend, "cast", format!("{from:?} to {to:?}"));
        let mut values = check.uniform(220, -3.0, 3.0);
        // Halfway between two bf16 numbers: to the even one, which is below, then above.
        values.extend([1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)]);
        let x = check.activation(&values, &shape, from);
        let want: Vec<f64> = match to {
            Bf16 => x.host.iter().map(|&x| f64::from(oracle::round_to_bf16(x as f32))).collect(),
            _ => x.host.clone(),
        };
        check.compare("value", &backend.cast(&x.device, to), &want, &shape, to, 0.0);
        reports.extend(check.finish());
    }
    reports
}

/// [`Backend::head_loss`], its adjoint and [`Backend::logits`].
pub fn head_loss<B: Backend>(backend: &B) -> Vec<Report> {
    let mut reports = Vec::new();
    for dtype in [F32, Bf16] {
        // The last size is that of the vocabulary among the V rows of the table.
        for ([b, l, d, v, vocab], labelled, scale) in [
            ([1, 1, 8, 5, 5], "all labelled", 1.0),
            ([2, 63, 32, 257, 257], "all labelled", 1.0),
            ([2, 257, 24, 1001, 1001], "some ignored", 1.0),
            ([2, 63, 16, 40, 33], "some ignored, padded vocabulary", 1.0),
            ([1, 64, 16, 33, 33], "all ignored", 1.0),
            ([1, 65, 16, 33, 33], "some ignored, large logits", 50.0),
        ] {
            let case = format!("B{b} L{l} D{d} V{v} {labelled} {dtype:?}");
            let mut check = Check::new(backend, "head_loss", case);
            let x = check.random(&[b, l, d], dtype, scale);
            let weight = check.random_parameter(&[v, d], dtype, scale.sqrt());
            let mut labels = check.whole(b * l, 0, vocab as i32);
            labels[b * l - 1] = vocab as i32 - 1;
            let ignored = check.uniform(b * l, 0.0, 1.0);
            for (label, chance) in labels.iter_mut().zip(ignored) {
                if labelled == "all ignored" || (labelled.contains("some") && chance < 0.4) {
                    *label = IGNORE_LABEL;
                }
            }
            let on_device = backend.tensor_i32(&labels, &[b, l]);
            let (loss, dx, mut dw) =
                oracle::head_loss_adjoint(&x.host, &weight.host[..vocab * d], &labels, d);
            dw.resize(v * d, 0.0);

            let got = backend.head_loss(&x.device, &weight.device, &on_device, vocab);
            check.compare("loss", &got, &[loss], &[], F32, FP32);
            // A logit of some hundreds is itself off by 2⁻²⁴ of that, and its exponential by as much relatively.
            let tolerance = if scale > 1.0 { 1e-3 } else { FP32 }.max(rounded_inside(dtype));
            let wanted = [Gradient { name: "weight", shape: &[v, d], want: &dw, tolerance }];
            let (got, got_dx) = check.gradients(&wanted, |buffer, slots| {
                let sink = Sink { buffer, slot: &slots[0] };
                backend.head_loss_adjoint(&x.device, &weight.device, &on_device, vocab, sink)
            });
            check.compare("loss beside its adjoint", &got, &[loss], &[], F32, FP32);
            check.compare("cotangent of x", &got_dx, &dx, &[b, l, d], dtype, tolerance);

            let logits = oracle::linear(&x.host, &weight.host, None, d);
            let got = backend.logits(&x.device, &weight.device);
            check.compare("logits", &got, &logits, &[b, l, v], F32, FP32);
            reports.extend(check.finish());
        }
    }
    reports
}
