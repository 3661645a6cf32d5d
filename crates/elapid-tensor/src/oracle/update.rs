//! Clipping and AdamW.

use crate::backend::AdamW;
use crate::flat::FlatShape;

/// What `Backend::clip` gives back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// Global norm of the scaled gradients, before clipping.
    pub norm: f64,
    /// What every gradient is multiplied by.
    pub factor: f64,
    /// Whether norm and loss are finite.
    pub finite: bool,
}

/// Norm of `grads · scale` and the factor that brings it down to `max_norm` (≤ 0: no clipping).
pub fn clip(grads: &[f64], loss: f64, scale: f64, max_norm: f64) -> Clip {
    let norm = super::dot(grads, grads).sqrt() * scale;
    let clipped = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
    Clip { norm, factor: scale * clipped, finite: norm.is_finite() && loss.is_finite() }
}

/// One AdamW update with gradients `grads · clip.factor`; nothing changes unless `clip.finite`. `decayed` counts the
/// leading elements of (a layer row, the shared region) that weight decay applies to.
pub fn adamw(
    hyper: &AdamW,
    shape: FlatShape,
    decayed: (usize, usize),
    clip: Clip,
    grads: &[f64],
    params: &mut [f64],
    m: &mut [f64],
    v: &mut [f64],
) {
    if !clip.finite {
        return;
    }
    let [lr, beta1, beta2, eps, decay] =
        [hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay].map(f64::from);
    for i in 0..shape.len() {
        let decays = if i < shape.layers * shape.row {
            i % shape.row < decayed.0
        } else {
            i - shape.layers * shape.row < decayed.1
        };
        let g = grads[i] * clip.factor;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let m_hat = m[i] / (1.0 - beta1.powf(hyper.step as f64));
        let v_hat = v[i] / (1.0 - beta2.powf(hyper.step as f64));
        let decay = if decays { decay } else { 0.0 };
        params[i] -= lr * (m_hat / (v_hat.sqrt() + eps) + decay * params[i]);
    }
}
