//! The Mamba-2 mixer, one token after the other, and its adjoint by hand.

use super::{add_scaled, dot, rms_norm, rms_norm_adjoint};
use crate::backend::{Mamba2Inputs, Mamba2Spec, Mamba2Weights, State};

/// Cotangents of everything that goes into [`mamba2`].
#[derive(Clone, Debug)]
pub struct Mamba2Adjoint {
    /// `[B, L, E + C + H]`.
    pub projected: Vec<f64>,
    /// Of the state before position 0, also where none was given and zeros stood in.
    pub initial: State<Vec<f64>>,
    /// Of the parameters.
    pub weights: Mamba2Weights<Vec<f64>>,
}

/// (y `[B, L, E]`, state after the last position) of `batch` sequences. Document ids are whole numbers.
///
/// The convolution never looks across a document boundary and the scan state is zero before the first position of
/// a document, except that position 0 continues the initial state. The final conv state, too, holds inputs of the
/// last document only, and zeros where that is shorter than K − 1.
pub fn mamba2(
    spec: &Mamba2Spec,
    batch: usize,
    inputs: &Mamba2Inputs<&[f64]>,
    weights: &Mamba2Weights<&[f64]>,
) -> (Vec<f64>, State<Vec<f64>>) {
    let mut y = Vec::new();
    let mut last = State { conv: Vec::new(), ssm: Vec::new() };
    for b in 0..batch {
        let sequence = Sequence::new(spec, batch, b, inputs, weights);
        let trace = sequence.forward();
        y.extend((0..sequence.len).flat_map(|t| sequence.gated_norm(t, &trace.scan[t])));
        last.conv.extend(sequence.last_conv_state());
        last.ssm.extend(&trace.states[sequence.len - 1]);
    }
    (y, last)
}

/// Adjoint of [`mamba2`]: `dy` `[B, L, E]`, `d_state` the cotangent of the final state (None: zero).
pub fn mamba2_adjoint(
    spec: &Mamba2Spec,
    batch: usize,
    inputs: &Mamba2Inputs<&[f64]>,
    weights: &Mamba2Weights<&[f64]>,
    dy: &[f64],
    d_state: Option<&State<&[f64]>>,
) -> Mamba2Adjoint {
    let mut grads = Mamba2Adjoint {
        projected: Vec::new(),
        initial: State { conv: Vec::new(), ssm: Vec::new() },
        weights: weights.as_ref().map(|w| vec![0.0; w.len()]),
    };
    for b in 0..batch {
        let sequence = Sequence::new(spec, batch, b, inputs, weights);
        let d_last = d_state.map(|d| State { conv: part(d.conv, batch, b), ssm: part(d.ssm, batch, b) });
        let cotangents = sequence.backward(part(dy, batch, b), d_last, &mut grads.weights);
        grads.projected.extend(cotangents.projected);
        grads.initial.conv.extend(cotangents.conv);
        grads.initial.ssm.extend(cotangents.ssm);
    }
    grads
}

/// The `index`-th of `count` equal parts.
fn part(x: &[f64], count: usize, index: usize) -> &[f64] {
    let size = x.len() / count;
    &x[index * size..][..size]
}

/// What a tap of the convolution reads.
enum Tap {
    /// The input at this position.
    Input(usize),
    /// This row of the initial conv state.
    Initial(usize),
    /// Nothing: another document, or before the beginning.
    Zero,
}

/// One sequence of the batch. Channels c count through `[x|B|C]`.
struct Sequence<'a> {
    spec: &'a Mamba2Spec,
    weights: &'a Mamba2Weights<&'a [f64]>,
    len: usize,
    /// `[L, E + C + H]`.
    projected: &'a [f64],
    /// First position of the document that position t belongs to.
    start: Vec<usize>,
    /// `[K−1, C]` and `[H, P, N]`.
    initial: Option<State<&'a [f64]>>,
}

/// What the forward recurrence leaves for the adjoint; outer index: position.
struct Trace {
    /// `[C]` output of the convolution before SiLU.
    conv: Vec<Vec<f64>>,
    /// `[C]` the same after SiLU.
    active: Vec<Vec<f64>>,
    /// `[H]` Δt.
    delta: Vec<Vec<f64>>,
    /// `[H, P, N]` state after the position.
    states: Vec<Vec<f64>>,
    /// `[E]` S·C + D·x, before the gate.
    scan: Vec<Vec<f64>>,
}

/// Cotangents of one sequence's activations.
struct Cotangents {
    projected: Vec<f64>,
    conv: Vec<f64>,
    ssm: Vec<f64>,
}

impl<'a> Sequence<'a> {
    fn new(
        spec: &'a Mamba2Spec,
        batch: usize,
        b: usize,
        inputs: &Mamba2Inputs<&'a [f64]>,
        weights: &'a Mamba2Weights<&'a [f64]>,
    ) -> Self {
        let projected = part(inputs.projected, batch, b);
        let len = projected.len() / spec.projection();
        let mut start = vec![0; len];
        if let Some(documents) = inputs.documents.map(|d| part(d, batch, b)) {
            for t in 1..len {
                start[t] = if documents[t] == documents[t - 1] { start[t - 1] } else { t };
            }
        }
        let initial = inputs
            .initial
            .as_ref()
            .map(|s| State { conv: part(s.conv, batch, b), ssm: part(s.ssm, batch, b) });
        Self { spec, weights, len, projected, start, initial }
    }

    /// Offset of channel `c` of `[x|B|C]` at position `t` in the projection.
    fn at(&self, t: usize, c: usize) -> usize {
        t * self.spec.projection() + self.spec.inner() + c
    }

    /// Offset of head `h`'s dt at position `t` in the projection.
    fn dt_at(&self, t: usize, h: usize) -> usize {
        self.at(t, self.spec.conv_channels() + h)
    }

    /// `[E]` the gate's input at position `t`.
    fn z(&self, t: usize) -> &[f64] {
        &self.projected[t * self.spec.projection()..][..self.spec.inner()]
    }

    /// What position `t` sees when it looks `back` < K positions back.
    fn tap(&self, t: usize, back: usize) -> Tap {
        if back <= t - self.start[t] {
            Tap::Input(t - back)
        } else if self.start[t] == 0 {
            Tap::Initial(self.spec.conv_kernel - 1 - (back - t))
        } else {
            Tap::Zero
        }
    }

    fn tap_value(&self, tap: &Tap, c: usize) -> f64 {
        match (tap, &self.initial) {
            (Tap::Input(t), _) => self.projected[self.at(*t, c)],
            (Tap::Initial(row), Some(initial)) => initial.conv[row * self.spec.conv_channels() + c],
            _ => 0.0,
        }
    }

    /// `[K−1, C]`: what a next position of the last document would see.
    fn last_conv_state(&self) -> Vec<f64> {
        let rows = self.spec.conv_kernel - 1;
        (0..rows)
            .map(|row| self.tap(self.len - 1, rows - 1 - row))
            .flat_map(|tap| (0..self.spec.conv_channels()).map(move |c| self.tap_value(&tap, c)))
            .collect()
    }

    /// `[H, P, N]`: the state that position `t` continues.
    fn state_before(&self, t: usize, states: &[Vec<f64>]) -> Vec<f64> {
        match &self.initial {
            _ if self.start[t] < t => states[t - 1].clone(),
            Some(initial) if t == 0 => initial.ssm.to_vec(),
            _ => vec![0.0; self.spec.inner() * self.spec.state],
        }
    }

    /// softplus(dt + dt_bias), linear above 20, and its derivative.
    fn softplus(&self, t: usize, h: usize) -> (f64, f64) {
        let raw = self.projected[self.dt_at(t, h)] + self.weights.dt_bias[h];
        if raw > 20.0 { (raw, 1.0) } else { (raw.exp().ln_1p(), sigmoid(raw)) }
    }

    fn dt_limit(&self) -> (f64, f64) {
        (f64::from(self.spec.dt_limit.0), f64::from(self.spec.dt_limit.1))
    }

    /// Channels of head `h`'s x, and of its group's B and C, in `[x|B|C]`; index of its state in `[H, P, N]`.
    fn head(&self, h: usize) -> Head {
        let Mamba2Spec { head_dim: p, state: n, groups, heads, .. } = *self.spec;
        let group = h / (heads / groups);
        let b = self.spec.inner() + group * n;
        let c = b + groups * n;
        Head { x: h * p..(h + 1) * p, b: b..b + n, c: c..c + n, state: h * p * n..(h + 1) * p * n }
    }

    fn forward(&self) -> Trace {
        let Mamba2Spec { heads, state: n, conv_kernel: k, .. } = *self.spec;
        let mut trace = Trace { conv: vec![], active: vec![], delta: vec![], states: vec![], scan: vec![] };
        let (lowest, highest) = self.dt_limit();
        for t in 0..self.len {
            let mut conv =
                self.weights.conv_bias.map_or(vec![0.0; self.spec.conv_channels()], <[f64]>::to_vec);
            for back in 0..k {
                let tap = self.tap(t, back);
                for (c, out) in conv.iter_mut().enumerate() {
                    *out += self.weights.conv_weight[c * k + k - 1 - back] * self.tap_value(&tap, c);
                }
            }
            let active: Vec<f64> = conv.iter().map(|&x| silu(x)).collect();
            let delta: Vec<f64> = (0..heads).map(|h| self.softplus(t, h).0.clamp(lowest, highest)).collect();
            let mut state = self.state_before(t, &trace.states);
            let mut scan = Vec::new();
            for (h, &delta) in delta.iter().enumerate() {
                let head = self.head(h);
                let (b, c) = (&active[head.b], &active[head.c]);
                let decay = (-delta * self.weights.a_log[h].exp()).exp();
                for (x, state) in active[head.x].iter().zip(state[head.state].chunks_mut(n)) {
                    for (s, b) in state.iter_mut().zip(b) {
                        *s = decay * *s + delta * x * b;
                    }
                    scan.push(dot(state, c) + self.weights.d[h] * x);
                }
            }
            trace.conv.push(conv);
            trace.active.push(active);
            trace.delta.push(delta);
            trace.states.push(state);
            trace.scan.push(scan);
        }
        trace
    }

    /// `rms_norm(scan · silu(z)) · weight` at position `t`, one mean for every `norm_width` channels.
    fn gated_norm(&self, t: usize, scan: &[f64]) -> Vec<f64> {
        let width = self.spec.norm_width();
        let gated: Vec<f64> = scan.iter().zip(self.z(t)).map(|(y, &z)| y * silu(z)).collect();
        let groups = gated.chunks(width).zip(self.weights.norm_weight.chunks(width));
        groups.flat_map(|(x, w)| rms_norm(x, w, f64::from(self.spec.norm_eps))).collect()
    }

    /// (cotangent of the scan's output, cotangent of z); adds to the gradient of the norm's weight.
    fn gated_norm_adjoint(
        &self,
        t: usize,
        scan: &[f64],
        dy: &[f64],
        d_norm_weight: &mut [f64],
    ) -> (Vec<f64>, Vec<f64>) {
        let (width, z) = (self.spec.norm_width(), self.z(t));
        let gated: Vec<f64> = scan.iter().zip(z).map(|(y, &z)| y * silu(z)).collect();
        let mut d_gated = Vec::new();
        for first in (0..scan.len()).step_by(width) {
            let group = first..first + width;
            let weight = &self.weights.norm_weight[group.clone()];
            let eps = f64::from(self.spec.norm_eps);
            let (dx, dw) = rms_norm_adjoint(&gated[group.clone()], weight, eps, &dy[group.clone()]);
            d_gated.extend(dx);
            add_scaled(&mut d_norm_weight[group], 1.0, &dw);
        }
        let d_scan = d_gated.iter().zip(z).map(|(d, &z)| d * silu(z)).collect();
        let dz = (0..scan.len()).map(|i| d_gated[i] * scan[i] * silu_slope(z[i])).collect();
        (d_scan, dz)
    }

    /// Walks from the last position to the first with the cotangent of the scan state in hand.
    fn backward(
        &self,
        dy: &[f64],
        d_last: Option<State<&[f64]>>,
        grads: &mut Mamba2Weights<Vec<f64>>,
    ) -> Cotangents {
        let Mamba2Spec { heads, state: n, conv_kernel: k, .. } = *self.spec;
        let (inner, channels) = (self.spec.inner(), self.spec.conv_channels());
        let (lowest, highest) = self.dt_limit();
        let trace = self.forward();
        let mut out = Cotangents {
            projected: vec![0.0; self.projected.len()],
            conv: vec![0.0; (k - 1) * channels],
            ssm: vec![],
        };
        let mut d_state = vec![0.0; inner * n];
        if let Some(d) = d_last {
            d_state.copy_from_slice(d.ssm);
            for row in 0..k - 1 {
                let tap = self.tap(self.len - 1, k - 2 - row);
                for c in 0..channels {
                    self.tap_adjoint(&tap, c, d.conv[row * channels + c], &mut out);
                }
            }
        }
        for t in (0..self.len).rev() {
            let dy = &dy[t * inner..][..inner];
            let (d_scan, dz) = self.gated_norm_adjoint(t, &trace.scan[t], dy, &mut grads.norm_weight);
            out.projected[t * self.spec.projection()..][..inner].copy_from_slice(&dz);

            let before = self.state_before(t, &trace.states);
            let active = &trace.active[t];
            let mut d_active = vec![0.0; channels];
            for h in 0..heads {
                let (head, delta) = (self.head(h), trace.delta[t][h]);
                let a = -self.weights.a_log[h].exp();
                let decay = (delta * a).exp();
                let mut d_exponent = 0.0; // of Δt·A
                let mut d_delta = 0.0;
                for (p, e) in head.x.clone().enumerate() {
                    let row = head.state.start + p * n..head.state.start + (p + 1) * n;
                    let (x, dy) = (active[e], d_scan[e]);
                    let d_state = &mut d_state[row.clone()];
                    // y = S·C + D·x
                    add_scaled(d_state, dy, &active[head.c.clone()]);
                    add_scaled(&mut d_active[head.c.clone()], dy, &trace.states[t][row.clone()]);
                    d_active[e] += self.weights.d[h] * dy;
                    grads.d[h] += dy * x;
                    // S = exp(Δt·A)·S_before + Δt·x·B
                    let d_xb = dot(d_state, &active[head.b.clone()]);
                    d_active[e] += delta * d_xb;
                    d_delta += x * d_xb;
                    add_scaled(&mut d_active[head.b.clone()], delta * x, d_state);
                    d_exponent += decay * dot(d_state, &before[row]);
                    d_state.iter_mut().for_each(|d| *d *= decay);
                }
                d_delta += a * d_exponent;
                grads.a_log[h] += a * delta * d_exponent;
                let (soft, slope) = self.softplus(t, h);
                // As torch.clamp: the ends of the interval still pass the gradient.
                if (lowest..=highest).contains(&soft) {
                    out.projected[self.dt_at(t, h)] = d_delta * slope;
                    grads.dt_bias[h] += d_delta * slope;
                }
            }
            if self.start[t] == t && t > 0 {
                d_state.fill(0.0);
            }

            let d_conv: Vec<f64> =
                (0..channels).map(|c| d_active[c] * silu_slope(trace.conv[t][c])).collect();
            if let Some(d_bias) = &mut grads.conv_bias {
                add_scaled(d_bias, 1.0, &d_conv);
            }
            for back in 0..k {
                let tap = self.tap(t, back);
                for (c, d_conv) in d_conv.iter().enumerate() {
                    let w = c * k + k - 1 - back;
                    grads.conv_weight[w] += d_conv * self.tap_value(&tap, c);
                    self.tap_adjoint(&tap, c, d_conv * self.weights.conv_weight[w], &mut out);
                }
            }
        }
        out.ssm = d_state;
        out
    }

    /// Adds the cotangent of what a tap read to where it came from.
    fn tap_adjoint(&self, tap: &Tap, c: usize, cotangent: f64, out: &mut Cotangents) {
        match tap {
            Tap::Input(t) => out.projected[self.at(*t, c)] += cotangent,
            Tap::Initial(row) => out.conv[row * self.spec.conv_channels() + c] += cotangent,
            Tap::Zero => {}
        }
    }
}

/// Where a head finds its parts.
struct Head {
    x: std::ops::Range<usize>,
    b: std::ops::Range<usize>,
    c: std::ops::Range<usize>,
    state: std::ops::Range<usize>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// Derivative of [`silu`].
fn silu_slope(x: f64) -> f64 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}
