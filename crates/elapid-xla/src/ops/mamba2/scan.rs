//! The scan, forward.

use super::{Dims, Params};
use crate::hlo::Type;
use crate::hlo::graph::Value;

/// Everything between the convolution and the gate. Shapes of a chunk: see [`Dims`].
pub(super) struct Scan<'g> {
    /// `[Z, G, R, Q, P]`.
    pub(super) x: Value<'g>,
    /// `[Z, G, Q, N]`, in the compute dtype.
    pub(super) b: Value<'g>,
    /// `[Z, G, Q, N]`, in the compute dtype.
    pub(super) c: Value<'g>,
    /// `[Z, G, R, Q]`: Δt.
    pub(super) dt: Value<'g>,
    /// `[Z, G, Q, Q]`: C·Bᵀ.
    pub(super) cb: Value<'g>,
    /// `[Z, G, R, Q, Q]`: from position j to a later i of the same document.
    pub(super) decay: Value<'g>,
    /// `[Z, G, R, Q]`: from before the chunk to a position.
    pub(super) into: Value<'g>,
    /// `[Z, G, R, Q]`: from a position to the end of the chunk.
    pub(super) out: Value<'g>,
    /// `[B, H, chunks + 1, chunks + 1]`: from the end of chunk k − 1 to before chunk c.
    pub(super) between: Value<'g>,
    /// `[B, chunks + 1, H, P·N]`: the initial state, then what each chunk adds.
    pub(super) sources: Value<'g>,
    /// `[B, H, chunks + 1, P·N]`: the state before each chunk, then the last one.
    pub(super) states: Value<'g>,
}

/// Where documents begin, in chunks.
struct Breaks<'g> {
    /// `[Z, Q]`: beginnings in the chunk up to and with the position.
    count: Value<'g>,
    /// `[B, chunks]`: 1 where one begins in the chunk.
    any: Value<'g>,
}

/// `[n, m]`: 1 where row > column.
pub(super) fn strict<'g>(dims: &Dims<'g>, n: usize, m: usize) -> Value<'g> {
    let shape = [n, m];
    dims.graph.iota(&shape, 0).compare("GT", dims.graph.iota(&shape, 1)).to(Type::F32)
}

/// e to what is at most 0; where it would be above, in places that are masked, 1.
fn decay(x: Value<'_>) -> Value<'_> {
    x.at_most(0.0).exp()
}

/// `x [.., n]` as rows and as columns of `[.., n, n]`: x_i, x_j.
fn pairs(x: Value<'_>) -> (Value<'_>, Value<'_>) {
    let dims = x.dims();
    let last = dims.len() - 1;
    let square = [&dims[..], &[dims[last]]].concat();
    let rows: Vec<usize> = (0..=last).collect();
    let columns: Vec<usize> = (0..last).chain([last + 1]).collect();
    (x.expand(&square, &rows), x.expand(&square, &columns))
}

fn equal<'g>(a: Value<'g>, b: Value<'g>) -> Value<'g> {
    a.compare("EQ", b).to(Type::F32)
}

impl<'g> Scan<'g> {
    /// `active` `[B, L, C]` after SiLU, `dt` `[B, L, H]`, `initial` `[B, H, P, N]`, `breaks` `[B, L]`.
    pub(super) fn new(
        dims: &Dims<'g>,
        active: Value<'g>,
        dt: Value<'g>,
        initial: Option<Value<'g>>,
        breaks: Option<Value<'g>>,
        params: &Params<'g>,
    ) -> Self {
        let (e, gn, q, z) = (dims.spec.inner(), dims.spec.groups * dims.spec.state, dims.q, dims.z());
        let x = dims.heads(active.slice(2, 0, e));
        let b = dims.groups(active.slice(2, e, e + gn)).to(dims.compute);
        let c = dims.groups(active.slice(2, e + gn, e + 2 * gn)).to(dims.compute);
        let dt = dims.by_head(dt);
        let per_head = dt.dims();
        let square = [&per_head[..], &[q]].concat();
        let triangle = dims.graph.triangle(q);
        let breaks = breaks.map(|b| Breaks::new(dims, b, triangle));

        // Σ Δt·A from the start of the chunk up to and with a position.
        let cum = (dt * dims.of_heads(params.a, &per_head)).batch_dot(triangle, 0, 3, 1);
        let end = cum.slice(3, q - 1, q).reshape(&per_head[..3]); // [Z, G, R]
        let (rows, columns) = pairs(cum);
        let (mut within, mut into, mut out) = (
            decay(rows - columns) * triangle.expand(&square, &[3, 4]),
            cum.exp(),
            decay(end.expand(&per_head, &[0, 1, 2]) - cum),
        );
        if let Some(breaks) = &breaks {
            let (rows, columns) = pairs(breaks.count);
            let last = breaks.count.slice(1, q - 1, q).reshape(&[z]).expand(&[z, q], &[0]);
            within = within * equal(rows, columns).expand(&square, &[0, 3, 4]);
            into = into * breaks.count.compare_to("EQ", 0.0).to(Type::F32).expand(&per_head, &[0, 3]);
            out = out * equal(breaks.count, last).expand(&per_head, &[0, 3]);
        }
        let cb = c.batch_dot(b, 2, 3, 3);

        // What each chunk adds to the state: Σ_j Δt_j · decay to the end · x_j B_jᵀ.
        let (heads, chunks, pn) = (dims.spec.heads, dims.chunks, dims.spec.head_dim * dims.spec.state);
        let weighted = x * dims.over(dt * out, dims.spec.head_dim);
        let added = weighted.to(dims.compute).batch_dot(b, 2, 3, 2); // [Z, G, R, P, N]
        let first = match initial {
            Some(state) => state.reshape(&[dims.batch, 1, heads, pn]),
            None => dims.graph.full(Type::F32, &[dims.batch, 1, heads, pn], 0.0),
        };
        let sources = dims.graph.concatenate(&[first, added.reshape(&[dims.batch, chunks, heads, pn])], 1);
        let between = between(dims, end, breaks.as_ref());
        let states = between.dot(
            sources,
            crate::hlo::graph::DotAxes { batch: [vec![0, 1], vec![0, 2]], contract: [vec![3], vec![1]] },
        );
        Self { x, b, c, dt, cb, decay: within, into, out, between, sources, states }
    }

    /// `[Z, G, R, Q, Q]`: what position i takes of x at j.
    pub(super) fn mixing(&self) -> Value<'g> {
        let square = self.decay.dims();
        let dt = self.dt.expand(&square, &[0, 1, 2, 4]);
        self.cb.expand(&square, &[0, 1, 3, 4]) * self.decay * dt
    }

    /// `[Z, G, R, P, N]` in the compute dtype: the state before each chunk.
    pub(super) fn before(&self, dims: &Dims<'g>) -> Value<'g> {
        let spec = &dims.spec;
        let states = self.states.slice(2, 0, dims.chunks).transpose(&[0, 2, 1, 3]);
        states.reshape(&[dims.z(), spec.groups, dims.r(), spec.head_dim, spec.state]).to(dims.compute)
    }

    /// `[Z, G, R, Q, P]`: what the state before the chunk gives.
    pub(super) fn of_before(&self, dims: &Dims<'g>) -> Value<'g> {
        let seen = self.c.batch_dot(self.before(dims), 2, 3, 4).transpose(&[0, 1, 3, 2, 4]);
        seen * dims.over(self.into, dims.spec.head_dim)
    }

    /// `[B, L, E]`: S·C + D·x.
    pub(super) fn outputs(&self, dims: &Dims<'g>, params: &Params<'g>) -> Value<'g> {
        let within = self.mixing().to(dims.compute).batch_dot(self.x.to(dims.compute), 3, 4, 3);
        let skip = self.x * dims.of_heads(params.d, &self.x.dims());
        dims.unheads(within + self.of_before(dims) + skip)
    }

    /// `[B, H, P, N]`: the state after the last position.
    pub(super) fn last_state(&self, dims: &Dims<'g>) -> Value<'g> {
        let spec = &dims.spec;
        let last = self.states.slice(2, dims.chunks, dims.chunks + 1);
        last.reshape(&[dims.batch, spec.heads, spec.head_dim, spec.state])
    }
}

/// `[B, H, chunks + 1, chunks + 1]` from the Σ Δt·A of whole chunks `[Z, G, R]`.
fn between<'g>(dims: &Dims<'g>, end: Value<'g>, breaks: Option<&Breaks<'g>>) -> Value<'g> {
    let (chunks, heads) = (dims.chunks, dims.spec.heads);
    let square = [dims.batch, heads, chunks + 1, chunks + 1];
    let before = strict(dims, chunks + 1, chunks);
    let totals = end.reshape(&[dims.batch, chunks, heads]).transpose(&[0, 2, 1]);
    let (rows, columns) = pairs(totals.batch_dot(before, 0, 2, 1));
    let all = decay(rows - columns) * dims.graph.triangle(chunks + 1).expand(&square, &[2, 3]);
    match breaks {
        Some(breaks) => {
            let (rows, columns) = pairs(breaks.any.batch_dot(before, 0, 1, 1));
            all * equal(rows, columns).expand(&square, &[0, 2, 3])
        }
        None => all,
    }
}

impl<'g> Breaks<'g> {
    fn new(dims: &Dims<'g>, breaks: Value<'g>, triangle: Value<'g>) -> Self {
        let (z, q) = (dims.z(), dims.q);
        let breaks = dims.chunked(breaks.reshape(&[dims.batch, dims.len, 1])).reshape(&[z, q]);
        let count = breaks.batch_dot(triangle, 0, 1, 1);
        let last = count.slice(1, q - 1, q).reshape(&[dims.batch, dims.chunks]);
        Self { count, any: last.compare_to("GT", 0.0).to(Type::F32) }
    }
}
