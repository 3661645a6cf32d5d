//! The adjoint of the mixer.

use elapid_tensor::{Mamba2Grads, Mamba2Inputs, Mamba2Sinks, Mamba2Spec, Mamba2Weights, State};

use super::scan::{Scan, strict};
use super::{Dims, Front, Params, norm_over};
use crate::backend::XlaBackend;
use crate::buffer::XlaBuffer;
use crate::hlo::Type;
use crate::hlo::graph::{DotAxes, Value};
use crate::ops::norm;
use crate::tensor::XlaTensor;

pub(crate) fn adjoint(
    backend: &XlaBackend,
    spec: &Mamba2Spec,
    inputs: &Mamba2Inputs<XlaTensor>,
    weights: &Mamba2Weights<XlaTensor>,
    saved: &[XlaTensor],
    dy: &XlaTensor,
    d_state: Option<&State<XlaTensor>>,
    grads: &mut XlaBuffer,
    sinks: &Mamba2Sinks<'_>,
) -> Mamba2Grads<XlaTensor> {
    let projected = backend.get(&inputs.projected);
    let dims = Dims::new(spec, projected);
    let params = Params::new(backend, spec, weights);
    let front = Front::new(backend, &dims, inputs, &params);
    let y = backend.get(saved.first().expect("saved by the forward op"));

    // out = unit(y · silu(z)) · weight
    let gate = front.z.silu();
    let unit = norm::unit(y * gate, norm_over(spec), spec.norm_eps);
    let dy = backend.get(dy).to(Type::F32);
    let (d_gated, d_norm) = norm::pull(unit, norm_over(spec), params.norm_weight, dy);
    let d_z = d_gated * y * front.z.silu_slope();

    let d_last = d_state.map(|d| backend.get(&d.ssm));
    let pulled = Pulled::new(&dims, &front.scan, &params, d_gated * gate, d_last);

    let active = [dims.unheads(pulled.x), dims.ungroups(pulled.b), dims.ungroups(pulled.c)];
    let d_pre = dims.graph.concatenate(&active, 2) * front.conv.pre.silu_slope();
    let d_conv = d_state.filter(|d| d.conv.shape().elements() > 0).map(|d| backend.get(&d.conv));
    let (d_inputs, d_weight) = front.conv.pull(&dims, &params, d_pre, d_conv);
    let d_raw = dims.by_position(pulled.dt) * slope(spec, front.raw);

    let carried = spec.conv_kernel - 1;
    let d_xbc = d_inputs.slice(1, carried, carried + dims.len);
    let d_projected = dims.graph.concatenate(&[d_z, d_xbc, d_raw], 2);

    backend.sink(grads, sinks.conv_weight, d_weight);
    if let Some(slot) = sinks.conv_bias {
        backend.sink(grads, slot, d_pre.sum(&[0, 1]));
    }
    backend.sink(grads, sinks.dt_bias, d_raw.sum(&[0, 1]));
    backend.sink(grads, sinks.a_log, pulled.a * params.a);
    backend.sink(grads, sinks.d, pulled.d);
    backend.sink(grads, sinks.norm_weight, d_norm);
    Mamba2Grads {
        projected: backend.keep(d_projected.to(dims.compute)),
        initial: inputs.initial.as_ref().map(|initial| State {
            conv: match carried {
                0 => initial.conv.clone(),
                _ => backend.keep(d_inputs.slice(1, 0, carried)),
            },
            ssm: backend.keep(pulled.initial),
        }),
    }
}

/// Derivative of Δt by dt. As torch.clamp: the ends of the interval still pass the gradient.
fn slope<'g>(spec: &Mamba2Spec, raw: Value<'g>) -> Value<'g> {
    let (low, high) = spec.dt_limit;
    let soft = raw.softplus();
    let mut slope = raw.sigmoid();
    if low > 0.0 {
        slope = slope * soft.compare_to("GE", f64::from(low)).to(Type::F32);
    }
    if high.is_finite() {
        slope = slope * soft.compare_to("LE", f64::from(high)).to(Type::F32);
    }
    slope
}

/// Cotangents of what goes into the scan.
struct Pulled<'g> {
    /// `[Z, G, R, Q, P]`.
    x: Value<'g>,
    /// `[Z, G, Q, N]`.
    b: Value<'g>,
    /// `[Z, G, Q, N]`.
    c: Value<'g>,
    /// `[Z, G, R, Q]`.
    dt: Value<'g>,
    /// `[H]`.
    a: Value<'g>,
    /// `[H]`.
    d: Value<'g>,
    /// `[B, H, P, N]`.
    initial: Value<'g>,
}

impl<'g> Pulled<'g> {
    /// From the cotangents of the scan's outputs `[B, L, E]` and of its last state `[B, H, P, N]`.
    fn new(
        dims: &Dims<'g>,
        scan: &Scan<'g>,
        params: &Params<'g>,
        dy: Value<'g>,
        d_last: Option<Value<'g>>,
    ) -> Self {
        let Dims { spec, q, chunks, batch, compute, .. } = *dims;
        let (heads, p, pn) = (spec.heads, spec.head_dim, spec.head_dim * spec.state);
        let dy = dims.heads(dy); // [Z, G, R, Q, P]
        let (narrow_dy, narrow_x) = (dy.to(compute), scan.x.to(compute));
        let square = scan.decay.dims();
        let per_head = scan.dt.dims();

        // Inside the chunk: y_i = Σ_j (C·Bᵀ)_ij · decay_ij · Δt_j · x_j.
        let d_mixing = narrow_dy.batch_dot(narrow_x, 3, 4, 4);
        let through = d_mixing * scan.decay;
        let d_cb = (through * scan.dt.expand(&square, &[0, 1, 2, 4])).sum(&[2]).to(compute);
        let shares = through * scan.cb.expand(&square, &[0, 1, 3, 4]); // of Δt_j, from i
        let of_dt = shares.sum(&[3]);
        let at_i = (shares * scan.dt.expand(&square, &[0, 1, 2, 4])).sum(&[4]);
        let mut d_c = d_cb.batch_dot(scan.b, 2, 3, 2);
        let mut d_b = d_cb.batch_dot(scan.c, 2, 2, 2);
        let mut d_x = scan.mixing().to(compute).batch_dot(narrow_dy, 3, 3, 3);
        let mut d_cum = at_i - of_dt * scan.dt;

        // From before the chunk: y_i = decay into i · S·C_i.
        let into = dy * dims.over(scan.into, p);
        let narrow_into = into.to(compute);
        let before = scan.before(dims);
        d_cum = d_cum + (dy * scan.of_before(dims)).sum(&[4]);
        let both = |a: &[usize], b: &[usize]| DotAxes {
            batch: [vec![0, 1], vec![0, 1]],
            contract: [a.to_vec(), b.to_vec()],
        };
        d_c = d_c + narrow_into.dot(before, both(&[2, 4], &[2, 3]));
        let d_before = narrow_into.batch_dot(scan.c, 2, 3, 2); // [Z, G, R, P, N]

        // From chunk to chunk: states = between · sources.
        let d_last = match d_last {
            Some(d) => d.reshape(&[batch, 1, heads, pn]),
            None => dims.graph.full(Type::F32, &[batch, 1, heads, pn], 0.0),
        };
        let d_states = dims.graph.concatenate(&[d_before.reshape(&[batch, chunks, heads, pn]), d_last], 1);
        let d_sources = scan
            .between
            .dot(d_states, DotAxes { batch: [vec![0, 1], vec![0, 2]], contract: [vec![2], vec![1]] });
        let d_sources = d_sources.transpose(&[0, 2, 1, 3]); // [B, chunks + 1, H, P·N]
        let d_between = d_states
            .dot(scan.sources, DotAxes { batch: [vec![0, 2], vec![0, 2]], contract: [vec![3], vec![3]] });
        let d_exponent = d_between * scan.between;
        let d_totals = d_exponent.sum(&[3]) - d_exponent.sum(&[2]); // [B, H, chunks + 1]
        let d_end = d_totals.batch_dot(strict(dims, chunks + 1, chunks), 0, 2, 0).transpose(&[0, 2, 1]);

        // What a chunk adds: Σ_j Δt_j · decay to the end · x_j B_jᵀ.
        let d_added = d_sources.slice(1, 1, chunks + 1);
        let d_added = d_added.reshape(&[dims.z(), spec.groups, dims.r(), p, spec.state]).to(compute);
        let seen = scan.b.batch_dot(d_added, 2, 3, 4).transpose(&[0, 1, 3, 2, 4]); // [Z, G, R, Q, P]
        let weight = scan.dt * scan.out;
        d_x = d_x + seen * dims.over(weight, p);
        d_b = d_b + (scan.x * dims.over(weight, p)).to(compute).dot(d_added, both(&[2, 4], &[2, 3]));
        let d_weight = (scan.x * seen).sum(&[4]);
        let to_end = d_weight * weight;
        d_cum = d_cum - to_end;
        let d_end = to_end.sum(&[3]) + d_end.reshape(&per_head[..3]);
        d_cum = d_cum + d_end.reshape(&[&per_head[..3], &[1]].concat()).pad(3, q - 1, 0);

        // cum_i = Σ_{s ≤ i} Δt_s·A.
        let d_steps = d_cum.batch_dot(dims.graph.triangle(q), 0, 3, 0);
        let d_dt = of_dt + d_weight * scan.out + d_steps * dims.of_heads(params.a, &per_head);
        let initial = d_sources.slice(1, 0, 1).reshape(&[batch, heads, p, spec.state]);
        Self {
            x: d_x + dy * dims.of_heads(params.d, &dy.dims()),
            b: d_b,
            c: d_c,
            dt: d_dt,
            a: dims.flat_heads((d_steps * scan.dt).sum(&[0, 3])),
            d: dims.flat_heads((dy * scan.x).sum(&[0, 3, 4])),
            initial,
        }
    }
}
