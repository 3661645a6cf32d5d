//! The `mamba2` op in products: the chunked form of the scan, without a loop.
//!
//! Inside a chunk of Q positions the scan is a product with a masked decay matrix; the states at the chunks' ends come
//! from the chunks' own by one product with a matrix of decays from chunk to chunk. Cumulative sums are products with
//! a triangle of ones. Masks are factors 0 and 1 after exponentials of numbers that are at most 0, so nothing is
//! infinite anywhere. Source: Dao & Gu 2024, "Transformers are SSMs", section 6.

mod adjoint;
mod conv;
mod scan;

use elapid_tensor::{Mamba2Inputs, Mamba2Output, Mamba2Spec, Mamba2Weights, State};

pub(crate) use adjoint::adjoint;

use super::norm;
use crate::backend::XlaBackend;
use crate::hlo::Type;
use crate::hlo::graph::{Graph, Value};
use crate::tensor::XlaTensor;
use conv::Conv;
use scan::Scan;

/// Longest chunk, whatever the model's `chunk_size`: the rows of a matrix unit. The result is the same.
const MAX_CHUNK: usize = 128;

/// Extents of one call. Shape comments: Z = B·⌈L/Q⌉ chunks, R = H/G heads of a group.
#[derive(Clone, Copy)]
struct Dims<'g> {
    graph: &'g Graph,
    spec: Mamba2Spec,
    /// B.
    batch: usize,
    /// L.
    len: usize,
    /// Q.
    q: usize,
    /// ⌈L/Q⌉.
    chunks: usize,
    /// Operands of large products are rounded to it.
    compute: Type,
}

impl<'g> Dims<'g> {
    fn new(spec: &Mamba2Spec, projected: Value<'g>) -> Self {
        let shape = projected.shape();
        let &[batch, len, width] = &shape.dims[..] else { panic!("projected must be [B, L, E + C + H]") };
        assert_eq!(width, spec.projection(), "width of the projection");
        let q = spec.chunk.min(MAX_CHUNK).min(len).max(1);
        Self {
            graph: projected.graph,
            spec: *spec,
            batch,
            len,
            q,
            chunks: len.div_ceil(q),
            compute: shape.ty,
        }
    }

    fn z(&self) -> usize {
        self.batch * self.chunks
    }

    fn r(&self) -> usize {
        self.spec.heads / self.spec.groups
    }

    /// `[B, L, W]` → `[Z, Q, W]`, filled up with zeros (trap T17).
    fn chunked(&self, x: Value<'g>) -> Value<'g> {
        let width = x.dims()[2];
        x.pad(1, 0, self.chunks * self.q - self.len).reshape(&[self.z(), self.q, width])
    }

    /// The reverse.
    fn unchunked(&self, x: Value<'g>) -> Value<'g> {
        let width = x.dims()[2];
        x.reshape(&[self.batch, self.chunks * self.q, width]).slice(1, 0, self.len)
    }

    /// `[B, L, H·W]` → `[Z, G, R, Q, W]`.
    fn heads(&self, x: Value<'g>) -> Value<'g> {
        let width = x.dims()[2] / self.spec.heads;
        let parts = self.chunked(x).reshape(&[self.z(), self.q, self.spec.groups, self.r(), width]);
        parts.transpose(&[0, 2, 3, 1, 4])
    }

    /// The reverse.
    fn unheads(&self, x: Value<'g>) -> Value<'g> {
        let width = x.dims()[4] * self.spec.heads;
        self.unchunked(x.transpose(&[0, 3, 1, 2, 4]).reshape(&[self.z(), self.q, width]))
    }

    /// `[B, L, H]` → `[Z, G, R, Q]`.
    fn by_head(&self, x: Value<'g>) -> Value<'g> {
        self.heads(x).reshape(&[self.z(), self.spec.groups, self.r(), self.q])
    }

    /// The reverse.
    fn by_position(&self, x: Value<'g>) -> Value<'g> {
        self.unheads(x.reshape(&[self.z(), self.spec.groups, self.r(), self.q, 1]))
    }

    /// `[B, L, G·N]` → `[Z, G, Q, N]`.
    fn groups(&self, x: Value<'g>) -> Value<'g> {
        let parts = self.chunked(x).reshape(&[self.z(), self.q, self.spec.groups, self.spec.state]);
        parts.transpose(&[0, 2, 1, 3])
    }

    /// The reverse.
    fn ungroups(&self, x: Value<'g>) -> Value<'g> {
        let width = self.spec.groups * self.spec.state;
        self.unchunked(x.transpose(&[0, 2, 1, 3]).reshape(&[self.z(), self.q, width]))
    }

    /// `[H]` as `[G, R]`, repeated to `dims` `[Z, G, R, ..]`.
    fn of_heads(&self, x: Value<'g>, dims: &[usize]) -> Value<'g> {
        x.reshape(&[self.spec.groups, self.r()]).expand(dims, &[1, 2])
    }

    /// `[G, R]` as `[H]`.
    fn flat_heads(&self, x: Value<'g>) -> Value<'g> {
        x.reshape(&[self.spec.heads])
    }

    /// `[Z, G, R, Q]` repeated over a last axis of `width`.
    fn over(&self, x: Value<'g>, width: usize) -> Value<'g> {
        let dims = [x.dims(), vec![width]].concat();
        x.expand(&dims, &[0, 1, 2, 3])
    }
}

/// Parameters in fp32.
struct Params<'g> {
    /// `[C, K]`.
    conv_weight: Value<'g>,
    /// `[C]`.
    conv_bias: Option<Value<'g>>,
    /// `[H]`.
    dt_bias: Value<'g>,
    /// `[H]`, −exp(A_log).
    a: Value<'g>,
    /// `[H]`.
    d: Value<'g>,
    /// `[E]`.
    norm_weight: Value<'g>,
}

impl<'g> Params<'g> {
    fn new(backend: &'g XlaBackend, spec: &Mamba2Spec, weights: &Mamba2Weights<XlaTensor>) -> Self {
        let get = |t: &XlaTensor| backend.get(t).to(Type::F32);
        Self {
            conv_weight: get(&weights.conv_weight).reshape(&[spec.conv_channels(), spec.conv_kernel]),
            conv_bias: weights.conv_bias.as_ref().map(get),
            dt_bias: get(&weights.dt_bias),
            a: get(&weights.a_log).exp() * -1.0,
            d: get(&weights.d),
            norm_weight: get(&weights.norm_weight),
        }
    }
}

/// What both directions compute first.
struct Front<'g> {
    /// `[B, L, E]`, the gate's input.
    z: Value<'g>,
    conv: Conv<'g>,
    /// `[B, L, H]`, dt + dt_bias.
    raw: Value<'g>,
    scan: Scan<'g>,
}

impl<'g> Front<'g> {
    fn new(
        backend: &'g XlaBackend,
        dims: &Dims<'g>,
        inputs: &Mamba2Inputs<XlaTensor>,
        params: &Params<'g>,
    ) -> Self {
        let projected = backend.get(&inputs.projected).to(Type::F32);
        let (e, c) = (dims.spec.inner(), dims.spec.conv_channels());
        let breaks = inputs.documents.as_ref().map(|ids| breaks(dims, backend.get(ids)));
        let initial = inputs.initial.as_ref();
        let conv_state = initial.filter(|s| s.conv.shape().elements() > 0).map(|s| backend.get(&s.conv));
        let conv = Conv::new(dims, projected.slice(2, e, e + c), conv_state, breaks, params);
        let rows = [dims.batch, dims.len, dims.spec.heads];
        let raw = projected.slice(2, e + c, e + c + dims.spec.heads) + params.dt_bias.expand(&rows, &[2]);
        let (low, high) = dims.spec.dt_limit;
        let mut dt = raw.softplus().at_least(low);
        if high.is_finite() {
            dt = dt.at_most(high);
        }
        let state = initial.map(|s| backend.get(&s.ssm));
        let scan = Scan::new(dims, conv.pre.silu(), dt, state, breaks, params);
        Self { z: projected.slice(2, 0, e), conv, raw, scan }
    }
}

/// Over what the gated norm takes its mean.
fn norm_over(spec: &Mamba2Spec) -> norm::Over {
    norm::Over { width: spec.norm_width(), ranks: spec.norm_ranks }
}

/// `[B, L]`, fp32: 1 where a document begins after another one.
fn breaks<'g>(dims: &Dims<'g>, ids: Value<'g>) -> Value<'g> {
    let len = dims.len;
    let before = ids.slice(1, 0, len - 1);
    if len == 1 {
        return dims.graph.full(Type::F32, &[dims.batch, 1], 0.0);
    }
    ids.slice(1, 1, len).compare("NE", before).to(Type::F32).pad(1, 1, 0)
}

pub(crate) fn forward(
    backend: &XlaBackend,
    spec: &Mamba2Spec,
    inputs: &Mamba2Inputs<XlaTensor>,
    weights: &Mamba2Weights<XlaTensor>,
    save: bool,
) -> Mamba2Output<XlaTensor> {
    let projected = backend.get(&inputs.projected);
    let dims = Dims::new(spec, projected);
    let params = Params::new(backend, spec, weights);
    let front = Front::new(backend, &dims, inputs, &params);
    let y = front.scan.outputs(&dims, &params); // [B, L, E]
    let gated = y * front.z.silu();
    let (unit, _) = norm::unit(gated, norm_over(spec), spec.norm_eps);
    let out = unit * params.norm_weight.expand(&y.dims(), &[2]);
    Mamba2Output {
        y: backend.keep(out.to(dims.compute)),
        state: State {
            conv: backend.keep(front.conv.last_inputs(&dims)),
            ssm: backend.keep(front.scan.last_state(&dims)),
        },
        saved: if save { vec![backend.keep(y)] } else { Vec::new() },
    }
}
