//! The chunked scan, forward.
//!
//! Inside a chunk, with c the cumulative sum of Δt·A: y_i = Σ_{j ≤ i} (C_i·B_j) e^{c_i − c_j} Δt_j x_j + e^{c_i} S C_i,
//! where S is the state that enters the chunk. Differences of cumulative sums are masked before `exp` (trap T18).

use std::ops::Range;

use super::{Dims, Documents, Front, Params, Unit};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math::{self, LANES};
use crate::matmul::{Into, Mat, Triangle, product, small, triangular};
use crate::memory::Block;
use crate::parallel::Shared;

/// The decays of one chunk and head.
pub(super) struct Decays<'a> {
    /// `[n]`, Δt.
    pub(super) dt: &'a [f32],
    /// `[n]`, cumulative sum of Δt·A.
    pub(super) cum: &'a [f32],
    span: Span,
}

/// How far the first and the last document of a chunk reach.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// Positions that see the state which enters the chunk.
    reach: usize,
    /// First position of the last document.
    tail: usize,
}

impl Span {
    pub(super) fn new(documents: &Documents, unit: &Unit) -> Self {
        let start = |i: usize| documents.start(unit.b, unit.row + i) - unit.row as isize;
        Self {
            reach: (0..unit.n).take_while(|&i| start(i) < 0).count(),
            tail: start(unit.n - 1).max(0) as usize,
        }
    }
}

impl<'a> Decays<'a> {
    pub(super) fn new(dims: &Dims, front: &'a Front, span: Span, unit: &Unit, head: usize) -> Self {
        let len = dims.spec.heads * dims.rows();
        let at = (unit.b * dims.spec.heads + head) * dims.len + unit.row;
        Self {
            dt: &front.dt.as_slice(len)[at..at + unit.n],
            cum: &front.cum.as_slice(len)[at..at + unit.n],
            span,
        }
    }

    /// Weights `[n]` of the state that enters the chunk.
    #[inline(always)]
    pub(super) fn entering(&self, to: &mut [f32]) {
        let (live, rest) = to.split_at_mut(self.span.reach);
        for (to, cum) in live.iter_mut().zip(self.cum) {
            *to = math::decay(*cum);
        }
        rest.fill(0.0);
    }

    /// Decays `[n]` from each position to the end of the chunk; 0 where another document lies between.
    #[inline(always)]
    pub(super) fn leaving(&self, to: &mut [f32]) {
        let (rest, live) = to.split_at_mut(self.span.tail);
        rest.fill(0.0);
        let end = self.cum[self.cum.len() - 1];
        for (to, cum) in live.iter_mut().zip(&self.cum[self.span.tail..]) {
            *to = math::decay(end - cum);
        }
    }

    /// Decay over the whole chunk.
    #[inline(always)]
    pub(super) fn whole(&self) -> f32 {
        if self.span.reach == self.cum.len() { math::decay(self.cum[self.cum.len() - 1]) } else { 0.0 }
    }
}

/// `[n]`: the first position of each position's document, inside the chunk.
pub(super) fn firsts(documents: &Documents, unit: &Unit) -> Vec<usize> {
    (0..unit.n).map(|i| (documents.start(unit.b, unit.row + i) - unit.row as isize).max(0) as usize).collect()
}

/// Rows `[n, width]` of heads side by side: row i of head h = weights(h)[i] · rows(h, i).
#[inline(always)]
pub(super) fn weigh<'r>(
    dst: &mut [f32],
    width: usize,
    head: usize,
    weights: &[f32],
    row: impl Fn(usize) -> &'r [f32],
) {
    for (i, (dst, w)) in dst.chunks_exact_mut(width).zip(weights).enumerate() {
        let row = row(i);
        for (d, r) in dst[head * row.len()..].iter_mut().zip(row) {
            *d = w * r;
        }
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

/// `[B, chunks, H, P, N]`: what each of `chunks` alone adds to the state by its end, Σ_j e^{c_n − c_j} Δt_j x_j B_jᵀ.
pub(super) fn local_states(
    backend: &CpuBackend,
    dims: &Dims,
    front: &Front,
    documents: &Documents,
    chunks: Range<usize>,
) -> Block {
    chunk_products(backend, dims, chunks, |unit, weighted, weights| {
        let views = Views::new(dims, front, unit);
        let span = Span::new(documents, unit);
        for (h, head) in unit.heads.clone().enumerate() {
            let decays = Decays::new(dims, front, span, unit, head);
            vectorize!(backend.isa, || {
                decays.leaving(weights);
                weights.iter_mut().zip(decays.dt).for_each(|(w, dt)| *w *= dt);
                let width = unit.heads.len() * dims.spec.head_dim;
                weigh(weighted, width, h, weights, |j| views.x_row(head, j));
            });
        }
        views.b()
    })
}

/// `[B, chunks, H, P, N]`: the sums over the positions of each of `chunks` of an outer product: of the rows `[n, heads·P]`
/// that `fill(unit, rows, scratch [n])` writes for the heads of a unit, and of those `[n, N]` of the matrix that it returns.
/// Other chunks' places hold anything.
pub(super) fn chunk_products<'a>(
    backend: &CpuBackend,
    dims: &Dims,
    chunks: Range<usize>,
    fill: impl Fn(&Unit, &mut [f32], &mut [f32]) -> Mat<'a> + Sync,
) -> Block {
    let len = dims.batch * dims.chunks * dims.spec.heads * dims.state();
    let mut states = backend.pool.take::<f32>(len);
    let shared = Shared::new(states.as_mut_slice::<f32>(len));
    backend.workers.each(dims.units(), |index| {
        let unit = dims.unit(index);
        if !chunks.contains(&unit.chunk) {
            return;
        }
        let (n, width) = (unit.n, unit.heads.len() * dims.spec.head_dim);
        let mut scratch = backend.pool.take::<f32>(n * width + n);
        let (weighted, weights) = scratch.as_mut_slice::<f32>(n * width + n).split_at_mut(n * width);
        let rows = fill(&unit, weighted, weights);
        let at = dims.state_at(unit.b, unit.chunk, unit.heads.start);
        // SAFETY: each (sequence, chunk, head) belongs to one unit, and its heads' states lie side by side.
        let states = unsafe { shared.slice(at, unit.heads.len() * dims.state()) };
        small(backend, Into::Set, states, dims.spec.state, Mat::new(&*weighted, n, width).t(), rows);
    });
    states
}

/// Which way a recurrence over chunks goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Forwards,
    Backwards,
}

/// The recurrence over chunks. Turns what each chunk adds into the state that enters each chunk, in place; gives the state
/// after the last chunk, `[B, H, P, N]`, if what that one adds is there. Backwards the last chunk comes first: so cotangents of the
/// states that leave chunks are made, and that of the state before the first one.
pub(super) fn pass_states(
    backend: &CpuBackend,
    dims: &Dims,
    front: &Front,
    documents: &Documents,
    direction: Direction,
    initial: Option<&[f32]>,
    states: &mut Block,
) -> Block {
    let (heads, state) = (dims.spec.heads, dims.state());
    let cum = front.cum.as_slice::<f32>(heads * dims.rows());
    let mut last = backend.pool.zeros::<f32>(dims.batch * heads * state);
    if let Some(initial) = initial {
        last.as_mut_slice::<f32>(dims.batch * heads * state).copy_from_slice(initial);
    }
    let shared = Shared::new(states.as_mut_slice::<f32>(dims.batch * dims.chunks * heads * state));
    backend.workers.rows(last.as_mut_slice::<f32>(dims.batch * heads * state), state, 1, |index, running| {
        let (b, head) = (index / heads, index % heads);
        for step in 0..dims.chunks {
            let chunk = if direction == Direction::Forwards { step } else { dims.chunks - 1 - step };
            let end = dims.len.min((chunk + 1) * dims.q) - 1;
            // Nothing passes where a document begins inside the chunk.
            let passes = documents.start(b, end) < (chunk * dims.q) as isize;
            let decay = if passes { math::decay(cum[index * dims.len + end]) } else { 0.0 };
            // SAFETY: each (sequence, head) is one piece.
            let slot = unsafe { shared.slice(dims.state_at(b, chunk, head), state) };
            vectorize!(backend.isa, || {
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

/// Scan output `[B·L, E]`, D skip included, from the states that enter the chunks; into the first one only an `initial` one does.
pub(super) fn outputs(
    backend: &CpuBackend,
    dims: &Dims,
    front: &Front,
    documents: &Documents,
    params: &Params,
    states: &Block,
    initial: bool,
) -> Block {
    let (p, n_state, e) = (dims.spec.head_dim, dims.spec.state, dims.e);
    let states = states.as_slice::<f32>(dims.batch * dims.chunks * dims.spec.heads * dims.state());
    let mut y = backend.pool.take::<f32>(dims.rows() * e);
    let shared = Shared::new(y.as_mut_slice::<f32>(dims.rows() * e));
    backend.workers.each(dims.units(), |index| {
        let unit = dims.unit(index);
        let (n, width) = (unit.n, unit.heads.len() * p);
        let views = Views::new(dims, front, &unit);
        let (span, ends) = (Span::new(documents, &unit), ends(documents, &unit));
        let len = OutputScratch::len(n, width);
        let mut scratch = backend.pool.take::<f32>(len);
        let s = OutputScratch::new(n, width, scratch.as_mut_slice::<f32>(len));
        // Both are shared by the heads of the group.
        triangular(backend, Triangle::ResultUpper, Into::Set, s.scores, n, views.b(), views.c().t());
        if initial || unit.chunk > 0 {
            let entering = &states[dims.state_at(unit.b, unit.chunk, unit.heads.start)..];
            let entering = Mat::new(entering, width, n_state).t();
            small(backend, Into::Set, s.from_state, width, views.c(), entering);
        } else {
            s.from_state.fill(0.0);
        }
        for (h, head) in unit.heads.clone().enumerate() {
            let decays = Decays::new(dims, front, span, &unit, head);
            let at = (unit.b * dims.len + unit.row) * e + head * p;
            vectorize!(backend.isa, || {
                decays.entering(s.entering);
                for i in 0..n {
                    // SAFETY: each (position, head) belongs to one unit.
                    let out = unsafe { shared.slice(at + i * e, p) };
                    let from_state = &s.from_state[i * width + h * p..][..p];
                    let (entering, skip) = (s.entering[i], params.d[head]);
                    for ((o, from), x) in out.iter_mut().zip(from_state).zip(views.x_row(head, i)) {
                        *o = entering * from + skip * x;
                    }
                }
                for (j, (row, &end)) in s.weights.chunks_exact_mut(n).zip(&ends).enumerate() {
                    let (from, to) = (j / LANES * LANES, n.min(end.next_multiple_of(LANES)));
                    row[..from].fill(0.0);
                    row[to..].fill(0.0);
                    let (cum, dt) = (decays.cum[j], decays.dt[j]);
                    let (first, end) = ((j - from) as u32, (end - from) as u32);
                    let scores = s.scores[j * n..][from..to].iter().zip(&decays.cum[from..to]);
                    for (i, (w, (score, c))) in row[from..to].iter_mut().zip(scores).enumerate() {
                        let live = (first <= i as u32) & ((i as u32) < end);
                        *w = math::only(live, score * math::decay(c - cum) * dt);
                    }
                }
            });
            // Σ_j W_ij x_j.
            let weights = Mat::new(&*s.weights, n, n).t();
            let triangle = Triangle::LeftLower;
            // SAFETY: as above.
            unsafe { product(backend, triangle, Into::Add, &shared, at, e, weights, views.x(head)) };
        }
    });
    y
}

/// `[n]`: the position that follows the last one of each position's document, inside the chunk.
fn ends(documents: &Documents, unit: &Unit) -> Vec<usize> {
    let firsts = firsts(documents, unit);
    let mut ends = vec![unit.n; unit.n];
    for j in (0..unit.n - 1).rev() {
        ends[j] = if firsts[j + 1] > j { j + 1 } else { ends[j + 1] };
    }
    ends
}

/// Scratch of one unit, n positions, `width` = heads·P.
struct OutputScratch<'a> {
    /// `[n, n]`: B_j·C_i in row j; only i ≥ j is computed.
    scores: &'a mut [f32],
    /// `[n, n]`: W_ij in row j.
    weights: &'a mut [f32],
    /// `[n, heads·P]`: C_i·S.
    from_state: &'a mut [f32],
    /// `[n]`.
    entering: &'a mut [f32],
}

impl<'a> OutputScratch<'a> {
    fn len(n: usize, width: usize) -> usize {
        2 * n * n + n * width + n
    }

    fn new(n: usize, width: usize, block: &'a mut [f32]) -> Self {
        let (scores, rest) = block.split_at_mut(n * n);
        let (weights, rest) = rest.split_at_mut(n * n);
        let (from_state, entering) = rest.split_at_mut(n * width);
        Self { scores, weights, from_state, entering }
    }
}
