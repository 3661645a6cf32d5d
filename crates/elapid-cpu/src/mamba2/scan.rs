//! The chunked scan, forward.
//!
//! Inside a chunk, with c the cumulative sum of Δt·A: y_i = Σ_{j ≤ i} (C_i·B_j) e^{c_i − c_j} Δt_j x_j + e^{c_i} S C_i,
//! where S is the state that enters the chunk. Differences of cumulative sums are masked before `exp` (trap T18).

use super::{Dims, Documents, Front, Params, Unit};
use crate::CpuBackend;
use crate::math;
use crate::matmul::{Into, Mat, product, small};
use crate::memory::Block;
use crate::parallel::Shared;

/// The decays of one chunk and head.
pub(super) struct Decays<'a> {
    /// `[n]`, Δt.
    pub(super) dt: &'a [f32],
    /// `[n]`, cumulative sum of Δt·A.
    pub(super) cum: &'a [f32],
    /// First position of the chunk, inside the sequence.
    row: usize,
    b: usize,
    documents: &'a Documents,
}

impl<'a> Decays<'a> {
    pub(super) fn new(
        dims: &Dims,
        front: &'a Front,
        documents: &'a Documents,
        unit: &Unit,
        head: usize,
    ) -> Self {
        let len = dims.spec.heads * dims.rows();
        let at = (unit.b * dims.spec.heads + head) * dims.len + unit.row;
        Self {
            dt: &front.dt.as_slice(len)[at..at + unit.n],
            cum: &front.cum.as_slice(len)[at..at + unit.n],
            row: unit.row,
            b: unit.b,
            documents,
        }
    }

    fn last(&self) -> usize {
        self.dt.len() - 1
    }

    /// First position of the chunk in the document of position `i`.
    #[inline(always)]
    pub(super) fn first(&self, i: usize) -> usize {
        (self.documents.start(self.b, self.row + i) - self.row as isize).max(0) as usize
    }

    /// Weight at position `i` of the state that enters the chunk.
    #[inline(always)]
    pub(super) fn entering(&self, i: usize) -> f32 {
        let reaches_back = self.documents.start(self.b, self.row + i) < self.row as isize;
        if reaches_back { math::exp(self.cum[i]) } else { 0.0 }
    }

    /// Decay from position `j` to the end of the chunk; 0 where another document lies between.
    #[inline(always)]
    pub(super) fn leaving(&self, j: usize) -> f32 {
        let last = self.last();
        if j >= self.first(last) { math::exp(self.cum[last] - self.cum[j]) } else { 0.0 }
    }

    /// Decay over the whole chunk.
    #[inline(always)]
    pub(super) fn whole(&self) -> f32 {
        self.entering(self.last())
    }
}

/// Views into the activated conv output of one unit.
pub(super) struct Views<'a> {
    act: &'a [f32],
    c: usize,
    from: usize,
    n: usize,
    p: usize,
    state: usize,
    b_channel: usize,
    c_channel: usize,
}

impl<'a> Views<'a> {
    pub(super) fn new(dims: &Dims, front: &'a Front, unit: &Unit) -> Self {
        Self {
            act: front.act.as_slice(dims.rows() * dims.c),
            c: dims.c,
            from: (unit.b * dims.len + unit.row) * dims.c,
            n: unit.n,
            p: dims.spec.head_dim,
            state: dims.spec.state,
            b_channel: dims.b_channel(unit.group),
            c_channel: dims.c_channel(unit.group),
        }
    }

    /// x of a head at one position, `[P]`.
    #[inline(always)]
    pub(super) fn x_row(&self, head: usize, i: usize) -> &'a [f32] {
        &self.act[self.from + i * self.c + head * self.p..][..self.p]
    }

    /// C of the group at one position, `[N]`.
    #[inline(always)]
    pub(super) fn c_row(&self, i: usize) -> &'a [f32] {
        &self.act[self.from + i * self.c + self.c_channel..][..self.state]
    }

    /// x of a head, `[n, P]`.
    pub(super) fn x(&self, head: usize) -> Mat<'a> {
        Mat::strided(&self.act[self.from + head * self.p..], self.n, self.p, self.c)
    }

    /// B of the group, `[n, N]`.
    pub(super) fn b(&self) -> Mat<'a> {
        Mat::strided(&self.act[self.from + self.b_channel..], self.n, self.state, self.c)
    }

    /// C of the group, `[n, N]`.
    pub(super) fn c(&self) -> Mat<'a> {
        Mat::strided(&self.act[self.from + self.c_channel..], self.n, self.state, self.c)
    }
}

/// `[B, chunks, H, P, N]`: what each chunk alone adds to the state by its end, Σ_j e^{c_n − c_j} Δt_j x_j B_jᵀ.
pub(super) fn local_states(backend: &CpuBackend, dims: &Dims, front: &Front, documents: &Documents) -> Block {
    let (p, n_state) = (dims.spec.head_dim, dims.spec.state);
    let len = dims.batch * dims.chunks * dims.spec.heads * dims.state();
    let mut states = backend.pool.take::<f32>(len);
    let shared = Shared::new(states.as_mut_slice::<f32>(len));
    backend.workers.each(dims.units(), |index| {
        let unit = dims.unit(index);
        let views = Views::new(dims, front, &unit);
        let mut scratch = backend.pool.take::<f32>(unit.n * p);
        let weighted = scratch.as_mut_slice::<f32>(unit.n * p);
        for head in unit.heads.clone() {
            let decays = Decays::new(dims, front, documents, &unit, head);
            backend.isa.run(|| {
                for (j, row) in weighted.chunks_exact_mut(p).enumerate() {
                    let w = decays.leaving(j) * decays.dt[j];
                    for (r, x) in row.iter_mut().zip(views.x_row(head, j)) {
                        *r = w * x;
                    }
                }
            });
            // SAFETY: each (sequence, chunk, head) belongs to one unit.
            let local = unsafe { shared.slice(dims.state_at(unit.b, unit.chunk, head), dims.state()) };
            small(backend, Into::Set, local, n_state, Mat::new(&*weighted, unit.n, p).t(), views.b());
        }
    });
    states
}

/// The recurrence over chunks. Turns what each chunk adds into the state that *enters* each chunk, in place; gives
/// the state after the last chunk, `[B, H, P, N]`.
pub(super) fn pass_states(
    backend: &CpuBackend,
    dims: &Dims,
    front: &Front,
    documents: &Documents,
    initial: Option<&[f32]>,
    states: &mut Block,
) -> Block {
    let (heads, state) = (dims.spec.heads, dims.state());
    let mut last = backend.pool.zeros::<f32>(dims.batch * heads * state);
    if let Some(initial) = initial {
        last.as_mut_slice::<f32>(dims.batch * heads * state).copy_from_slice(initial);
    }
    let shared = Shared::new(states.as_mut_slice::<f32>(dims.batch * dims.chunks * heads * state));
    backend.workers.rows(last.as_mut_slice::<f32>(dims.batch * heads * state), state, 1, |index, running| {
        let (b, head) = (index / heads, index % heads);
        for chunk in 0..dims.chunks {
            let decay = chunk_decay(dims, front, documents, b, chunk, head);
            // SAFETY: each (sequence, head) is one piece.
            let slot = unsafe { shared.slice(dims.state_at(b, chunk, head), state) };
            backend.isa.run(|| {
                for (r, s) in running.iter_mut().zip(slot) {
                    let local = *s;
                    *s = *r;
                    *r = decay * *r + local;
                }
            });
        }
    });
    last
}

/// Decay of the state over one whole chunk.
pub(super) fn chunk_decay(
    dims: &Dims,
    front: &Front,
    documents: &Documents,
    b: usize,
    chunk: usize,
    head: usize,
) -> f32 {
    let row = chunk * dims.q;
    let unit = Unit { b, chunk, row, n: dims.q.min(dims.len - row), group: 0, block: 0, heads: 0..0 };
    Decays::new(dims, front, documents, &unit, head).whole()
}

/// Scan output `[B·L, E]`, D skip included, from the states that enter the chunks.
pub(super) fn outputs(
    backend: &CpuBackend,
    dims: &Dims,
    front: &Front,
    documents: &Documents,
    params: &Params,
    states: &Block,
) -> Block {
    let (p, n_state, e) = (dims.spec.head_dim, dims.spec.state, dims.e);
    let states = states.as_slice::<f32>(dims.batch * dims.chunks * dims.spec.heads * dims.state());
    let mut y = backend.pool.take::<f32>(dims.rows() * e);
    let shared = Shared::new(y.as_mut_slice::<f32>(dims.rows() * e));
    backend.workers.each(dims.units(), |index| {
        let unit = dims.unit(index);
        let n = unit.n;
        let views = Views::new(dims, front, &unit);
        let mut scratch = backend.pool.take::<f32>(2 * n * n + n * p);
        let (scores, rest) = scratch.as_mut_slice::<f32>(2 * n * n + n * p).split_at_mut(n * n);
        let (weights, from_state) = rest.split_at_mut(n * n);
        // C·Bᵀ is shared by the heads of the group.
        small(backend, Into::Set, scores, n, views.c(), views.b().t());
        for head in unit.heads.clone() {
            let decays = Decays::new(dims, front, documents, &unit, head);
            let state = Mat::new(&states[dims.state_at(unit.b, unit.chunk, head)..], p, n_state);
            small(backend, Into::Set, from_state, p, views.c(), state.t());
            let at = (unit.b * dims.len + unit.row) * e + head * p;
            backend.isa.run(|| {
                for i in 0..n {
                    let first = decays.first(i);
                    let row = &mut weights[i * n..][..n];
                    row[..first].fill(0.0);
                    row[i + 1..].fill(0.0);
                    let live = first..i + 1;
                    let cum = decays.cum[i];
                    for (((w, s), c), dt) in row[live.clone()]
                        .iter_mut()
                        .zip(&scores[i * n..][live.clone()])
                        .zip(&decays.cum[live.clone()])
                        .zip(&decays.dt[live])
                    {
                        *w = s * math::exp(cum - c) * dt;
                    }
                    let entering = decays.entering(i);
                    // SAFETY: each (position, head) belongs to one unit.
                    let out = unsafe { shared.slice(at + i * e, p) };
                    for ((o, s), x) in out.iter_mut().zip(&from_state[i * p..]).zip(views.x_row(head, i)) {
                        *o = entering * s + params.d[head] * x;
                    }
                }
            });
            // SAFETY: as above.
            unsafe { product(backend, Into::Add, &shared, at, e, Mat::new(&*weights, n, n), views.x(head)) };
        }
    });
    y
}
