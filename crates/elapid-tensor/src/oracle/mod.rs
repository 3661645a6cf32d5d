//! Plain f64 definitions of every op and its adjoint.
//!
//! Written to be read next to the formulas in [`Backend`](crate::Backend): no blocking, no reuse, no speed. Arrays
//! are row-major; extents that no argument states follow from the lengths. Adjoints return fresh gradients, which
//! whoever owns a gradient buffer adds to it.

mod backend;
mod mamba2;
mod update;

pub use backend::{OracleBackend, OracleBuffer, OracleTensor, round_to_bf16};
pub use mamba2::{Mamba2Adjoint, mamba2, mamba2_adjoint};
pub use update::{Clip, adamw, clip};

use crate::backend::IGNORE_LABEL;

/// Rows `ids` of `table` `[V, D]`.
pub fn embedding(table: &[f64], width: usize, ids: &[i32]) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).copied().collect()
}

/// Gradient of the table `[V, D]`: row v is the sum of `dy` over the positions that hold v.
pub fn embedding_adjoint(rows: usize, width: usize, ids: &[i32], dy: &[f64]) -> Vec<f64> {
    let mut d_table = vec![0.0; rows * width];
    for (&id, dy) in ids.iter().zip(dy.chunks(width)) {
        add_scaled(&mut d_table[id as usize * width..][..width], 1.0, dy);
    }
    d_table
}

/// `x / sqrt(mean(x²) + eps) · weight` over rows as long as `weight` `[D]`.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let scale = inverse_rms(x, eps);
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// (cotangent of `x`, gradient of `weight`). With x̂ = x·r, r = 1 / sqrt(mean(x²) + eps) and g = dy·weight:
/// dx = r·(g − x̂·mean(g·x̂)), d_weight = Σ dy·x̂.
pub fn rms_norm_adjoint(x: &[f64], weight: &[f64], eps: f64, dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let mut d_weight = vec![0.0; width];
    let mut dx = Vec::with_capacity(x.len());
    for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
        let scale = inverse_rms(x, eps);
        let unit: Vec<f64> = x.iter().map(|x| x * scale).collect();
        let g: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
        let mean = dot(&g, &unit) / width as f64;
        for i in 0..width {
            d_weight[i] += dy[i] * unit[i];
            dx.push(scale * (g[i] - unit[i] * mean));
        }
    }
    (dx, d_weight)
}

fn inverse_rms(x: &[f64], eps: f64) -> f64 {
    (dot(x, x) / x.len() as f64 + eps).sqrt().recip()
}

/// `x [.., I] · weight [O, I]ᵀ + bias [O]`.
pub fn linear(x: &[f64], weight: &[f64], bias: Option<&[f64]>, inputs: usize) -> Vec<f64> {
    let outputs = weight.len() / inputs;
    let mut y = Vec::with_capacity(x.len() / inputs * outputs);
    for x in x.chunks(inputs) {
        for (o, w) in weight.chunks(inputs).enumerate() {
            y.push(dot(x, w) + bias.map_or(0.0, |bias| bias[o]));
        }
    }
    y
}

/// (cotangent of `x`, gradient of `weight` `[O, I]`, gradient of the bias `[O]`).
pub fn linear_adjoint(
    x: &[f64],
    weight: &[f64],
    dy: &[f64],
    inputs: usize,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let outputs = weight.len() / inputs;
    let (mut dx, mut d_weight) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
    let mut d_bias = vec![0.0; outputs];
    for ((x, dx), dy) in x.chunks(inputs).zip(dx.chunks_mut(inputs)).zip(dy.chunks(outputs)) {
        for (o, &dy) in dy.iter().enumerate() {
            let row = o * inputs..(o + 1) * inputs;
            add_scaled(dx, dy, &weight[row.clone()]);
            add_scaled(&mut d_weight[row], dy, x);
            d_bias[o] += dy;
        }
    }
    (dx, d_weight, d_bias)
}

/// Sum over the positions that have a label of −log softmax(x · weightᵀ) at the label; `x` `[.., D]`,
/// `weight` `[V, D]`.
pub fn head_loss(x: &[f64], weight: &[f64], labels: &[i32], width: usize) -> f64 {
    head_loss_adjoint(x, weight, labels, width).0
}

/// (loss, cotangent of `x`, gradient of `weight`): the cotangent of a position's logits is softmax − one-hot.
pub fn head_loss_adjoint(
    x: &[f64],
    weight: &[f64],
    labels: &[i32],
    width: usize,
) -> (f64, Vec<f64>, Vec<f64>) {
    let (mut loss, mut d_logits) = (0.0, Vec::new());
    for (x, &label) in x.chunks(width).zip(labels) {
        let logits = linear(x, weight, None, width);
        if label == IGNORE_LABEL {
            d_logits.extend(logits.iter().map(|_| 0.0));
            continue;
        }
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
        loss += log_sum - logits[label as usize];
        let hot = |v| f64::from(u8::from(v == label as usize));
        d_logits.extend(logits.iter().enumerate().map(|(v, l)| (l - log_sum).exp() - hot(v)));
    }
    let (dx, d_weight, _) = linear_adjoint(x, weight, &d_logits, width);
    (loss, dx, d_weight)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += factor · from`.
fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

#[cfg(test)]
mod tests;
