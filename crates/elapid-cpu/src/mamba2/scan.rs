//! The chunked scan, forward.
//!
//! Inside a chunk, with c the cumulative sum of Δt·A: y_i = Σ_{j ≤ i} (C_i·B_j) e^{c_i − c_j} Δt_j x_j + e^{c_i} S C_i,
//! where S is the state that enters the chunk. What exponentials make of differences that are not asked for, j > i, is masked by its
//! bits (trap T18).

use std::ops::Range;

use super::{Call, Dims, Documents, Front, Target, Unit};
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
    cum: &'a [f32],
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

    /// Decays between positions i ≥ j as products of two, so that few exponentials make them all: one from j to the first position of
    /// a block of [`LANES`], for all blocks after j's, and one from there to i.
    #[inline(always)]
    pub(super) fn split(&self, to: &mut Split<'_>) {
        let n = self.cum.len();
        for (i, within) in to.within.iter_mut().enumerate() {
            *within = self.cum[i] - self.cum[i / LANES * LANES];
        }
        to.within.iter_mut().for_each(|within| *within = math::decay(*within));
        for (block, row) in to.blocks.chunks_exact_mut(n).enumerate() {
            let start = self.cum[block * LANES];
            for (to, cum) in row[..block * LANES].iter_mut().zip(self.cum) {
                *to = math::decay(start - cum);
            }
        }
        for (i, row) in to.own.chunks_exact_mut(LANES).enumerate() {
            let own = &self.cum[i / LANES * LANES..];
            row.iter_mut().zip(own).for_each(|(to, cum)| *to = self.cum[i] - cum);
        }
        to.own.iter_mut().for_each(|own| *own = math::decay(*own));
    }

    /// e^{c_i − c_j} in place j of the row that it gives, for j from `from`, a multiple of [`LANES`], to i. Up to the end of i's block
    /// anything follows.
    #[inline(always)]
    pub(super) fn row<'s>(&self, i: usize, from: usize, split: &'s mut Split<'_>) -> &'s [f32] {
        let n = self.cum.len();
        let block = i / LANES;
        let (before, own) = split.row.split_at_mut(block * LANES);
        let within = split.within[i];
        let starts = &split.blocks[block * n..][..block * LANES];
        for (to, start) in before[from..].iter_mut().zip(&starts[from..]) {
            *to = math::joined(within, *start);
        }
        own.iter_mut().zip(&split.own[i * LANES..][..LANES]).for_each(|(to, own)| *to = *own);
        split.row
    }

    /// Decay over the whole chunk.
    #[inline(always)]
    pub(super) fn whole(&self) -> f32 {
        if self.span.reach == self.cum.len() { math::decay(self.cum[self.cum.len() - 1]) } else { 0.0 }
    }
}

/// Scratch of [`Decays::split`].
pub(super) struct Split<'a> {
    /// `[⌈n / LANES⌉, n]`: from each position to the first of each later block.
    blocks: &'a mut [f32],
    /// `[n]`: to each position from the first of its block.
    within: &'a mut [f32],
    /// `[n, LANES]`: from the positions of its own block.
    own: &'a mut [f32],
    /// `[n]`.
    row: &'a mut [f32],
}

impl<'a> Split<'a> {
    pub(super) fn len(n: usize) -> usize {
        n.div_ceil(LANES) * n + (2 + LANES) * n
    }

    pub(super) fn new(n: usize, block: &mut &'a mut [f32]) -> Self {
        Self {
            blocks: cut(block, n.div_ceil(LANES) * n),
            within: cut(block, n),
            own: cut(block, n * LANES),
            row: cut(block, n),
        }
    }
}

/// `[n]`: the first position of each position's document, inside the chunk.
pub(super) fn firsts(documents: &Documents, unit: &Unit) -> Vec<usize> {
    (0..unit.n).map(|i| (documents.start(unit.b, unit.row + i) - unit.row as isize).max(0) as usize).collect()
}

/// Rows `[n, width]` of heads side by side: row i of head h = weights[i] · row(i).
#[inline(always)]
pub(super) fn weigh<'r>(
    dst: &mut [f32],
    width: usize,
    h: usize,
    weights: &[f32],
    row: impl Fn(usize) -> &'r [f32],
) {
    for (i, (dst, w)) in dst.chunks_exact_mut(width).zip(weights).enumerate() {
        let row = row(i);
        for (d, r) in dst[h * row.len()..].iter_mut().zip(row) {
            *d = w * r;
        }
    }
}

/// Views of what one unit multiplies.
pub(super) struct Views<'a> {
    /// `[n, heads·P]`.
    x: &'a [f32],
    width: usize,
    bc: &'a [f32],
    channels: usize,
    from: usize,
    n: usize,
    p: usize,
    state: usize,
    b_channel: usize,
    c_channel: usize,
}

impl<'a> Views<'a> {
    pub(super) fn new(dims: &Dims, front: &'a Front, unit: &Unit, x: &'a [f32]) -> Self {
        let channels = dims.c - dims.e;
        Self {
            x,
            width: unit.width,
            bc: front.bc.as_slice(dims.rows() * channels),
            channels,
            from: (unit.b * dims.len + unit.row) * channels,
            n: unit.n,
            p: dims.spec.head_dim,
            state: dims.spec.state,
            b_channel: dims.b_channel(unit.group) - dims.e,
            c_channel: dims.c_channel(unit.group) - dims.e,
        }
    }

    /// x of the unit's head `h` at one position, `[P]`.
    #[inline(always)]
    pub(super) fn x_row(&self, h: usize, i: usize) -> &'a [f32] {
        &self.x[i * self.width + h * self.p..][..self.p]
    }

    /// C of the group at one position, `[N]`.
    #[inline(always)]
    pub(super) fn c_row(&self, i: usize) -> &'a [f32] {
        &self.bc[self.from + i * self.channels + self.c_channel..][..self.state]
    }

    /// x of the unit's head `h`, `[n, P]`.
    pub(super) fn x(&self, h: usize) -> Mat<'a> {
        Mat::strided(&self.x[h * self.p..], self.n, self.p, self.width)
    }

    /// B of the group, `[n, N]`.
    pub(super) fn b(&self) -> Mat<'a> {
        Mat::strided(&self.bc[self.from + self.b_channel..], self.n, self.state, self.channels)
    }

    /// C of the group, `[n, N]`.
    pub(super) fn c(&self) -> Mat<'a> {
        Mat::strided(&self.bc[self.from + self.c_channel..], self.n, self.state, self.channels)
    }
}

/// Numbers, cut off one after the other.
pub(super) fn cut<'a>(block: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(block).split_at_mut(len);
    *block = rest;
    front
}

/// Scan output `[B·L, E]`, D skip included, into `y`, and the states that enter the chunks, `[B, chunks, H, P, N]`, into `states`; gives
/// the state after the last chunk, `[B, H, P, N]`. Calls `done` when chunks of all sequences have their output.
pub(super) fn forward(
    call: &Call<'_>,
    front: &Front,
    y: &Shared<'_, f32>,
    states: Option<&Target<'_>>,
    done: impl Fn(Range<usize>),
) -> Block {
    let Call { backend, ref dims, .. } = *call;
    let threads = backend.workers.threads();
    // One unit, from the state that enters it.
    let unit_of = |unit: &Unit, state: &[f32], s: &mut Scratch<'_>| {
        let state = call.enters(unit).then_some(state);
        if let (Some(states), Some(state)) = (states, state) {
            let at = dims.first_state(unit);
            // SAFETY: each (sequence, chunk, head) belongs to one unit.
            vectorize!(backend.isa, || unsafe { states.put(at, state) });
        }
        vectorize!(backend.isa, || call.tile(unit).forward(s.inputs, s.x));
        outputs(call, front, unit, state, s, y);
    };
    if !dims.in_one_pass(threads) {
        let (entering, last) = entering_states(call, front);
        let entering = entering.as_slice::<f32>(dims.states());
        backend.workers.each(dims.units(), |index| {
            let unit = dims.unit(index);
            let mut block = backend.pool.take::<f32>(Scratch::len(dims));
            let mut s = Scratch::new(dims, &unit, block.as_mut_slice(Scratch::len(dims)));
            unit_of(&unit, &entering[dims.first_state(&unit)..][..unit.width * dims.spec.state], &mut s);
        });
        done(0..dims.chunks);
        return last;
    }
    let mut last = starting_states(backend, dims, call.initial());
    let len = dims.batch * dims.e * dims.spec.state;
    let running = Shared::new(last.as_mut_slice::<f32>(len));
    for part in dims.parts(threads) {
        backend.workers.each(dims.lanes(), |lane| {
            let mut block = backend.pool.take::<f32>(Scratch::len(dims));
            let block = block.as_mut_slice(Scratch::len(dims));
            for chunk in part.clone() {
                let unit = dims.unit_of(chunk, lane);
                let mut s = Scratch::new(dims, &unit, block);
                // SAFETY: each (sequence, head) belongs to one lane.
                let state = unsafe { running.slice(dims.running_at(&unit), unit.width * dims.spec.state) };
                unit_of(&unit, state, &mut s);
                advance(call, front, &unit, s.x, state, s.weighted, s.entering);
            }
        });
        done(part);
    }
    last
}

/// The states `[B, H, P, N]` that enter the first positions: `initial`, or zeros.
pub(super) fn starting_states(backend: &CpuBackend, dims: &Dims, initial: Option<&[f32]>) -> Block {
    let len = dims.batch * dims.e * dims.spec.state;
    let mut states = backend.pool.take::<f32>(len);
    match initial {
        Some(initial) => states.as_mut_slice::<f32>(len).copy_from_slice(initial),
        None => states.as_mut_slice::<f32>(len).fill(0.0),
    }
    states
}

/// Takes the states `[heads, P, N]` of a unit from the start of its chunk to the end.
pub(super) fn decay_states(call: &Call<'_>, front: &Front, unit: &Unit, states: &mut [f32]) {
    let span = Span::new(&call.documents, unit);
    for (head, states) in unit.heads.clone().zip(states.chunks_exact_mut(call.dims.state())) {
        let decays = Decays::new(&call.dims, front, span, unit, head);
        vectorize!(call.backend.isa, || {
            let whole = decays.whole();
            states.iter_mut().for_each(|s| *s *= whole);
        });
    }
}

/// Turns the states `[heads, P, N]` that enter the chunk of a unit, if any do, into those that leave it. Scratch is as for
/// [`add_state`].
fn advance(
    call: &Call<'_>,
    front: &Front,
    unit: &Unit,
    x: &[f32],
    states: &mut [f32],
    weighted: &mut [f32],
    weights: &mut [f32],
) {
    let into = if call.enters(unit) { Into::Add } else { Into::Set };
    if into == Into::Add {
        decay_states(call, front, unit, states);
    }
    add_state(call, front, unit, x, into, states, weighted, weights);
}

/// What one unit adds to the states `[heads, P, N]` by the end of its chunk: Σ_j e^{c_n − c_j} Δt_j x_j B_jᵀ. Scratch is `weighted`
/// `[n, heads·P]` and `weights` `[n]`.
fn add_state(
    call: &Call<'_>,
    front: &Front,
    unit: &Unit,
    x: &[f32],
    into: Into,
    states: &mut [f32],
    weighted: &mut [f32],
    weights: &mut [f32],
) {
    let Call { backend, ref dims, .. } = *call;
    let views = Views::new(dims, front, unit, x);
    let span = Span::new(&call.documents, unit);
    for (h, head) in unit.heads.clone().enumerate() {
        let decays = Decays::new(dims, front, span, unit, head);
        vectorize!(backend.isa, || {
            decays.leaving(weights);
            weights.iter_mut().zip(decays.dt).for_each(|(w, dt)| *w *= dt);
            weigh(weighted, unit.width, h, weights, |j| views.x_row(h, j));
        });
    }
    let weighted = Mat::new(&*weighted, unit.n, unit.width).t();
    small(backend, into, states, dims.spec.state, weighted, views.b());
}

/// `[B, chunks, H, P, N]`: the states that enter the chunks, and the state after the last one. The chunks go to all threads.
fn entering_states(call: &Call<'_>, front: &Front) -> (Block, Block) {
    let backend = call.backend;
    let mut states = chunk_products(call, 0..call.dims.chunks, |unit, states, s| {
        vectorize!(backend.isa, || call.tile(unit).forward(s.inputs, s.x));
        add_state(call, front, unit, s.x, Into::Set, states, s.weighted, s.entering);
    });
    let mut last = starting_states(backend, &call.dims, call.initial());
    pass_states(call, front, Direction::Forwards, &mut last, &mut states);
    (states, last)
}

/// `[B, chunks, H, P, N]`: what `fill` writes for the states `[heads, P, N]` of each unit of `chunks`. Other chunks' places hold
/// anything.
pub(super) fn chunk_products(
    call: &Call<'_>,
    chunks: Range<usize>,
    fill: impl Fn(&Unit, &mut [f32], Scratch<'_>) + Sync,
) -> Block {
    let Call { backend, ref dims, .. } = *call;
    let mut states = backend.pool.take::<f32>(dims.states());
    let shared = Shared::new(states.as_mut_slice::<f32>(dims.states()));
    backend.workers.each(dims.units(), |index| {
        let unit = dims.unit(index);
        if chunks.contains(&unit.chunk) {
            let at = dims.first_state(&unit);
            let mut block = backend.pool.take::<f32>(Scratch::len(dims));
            let s = Scratch::new(dims, &unit, block.as_mut_slice(Scratch::len(dims)));
            // SAFETY: each (sequence, chunk, head) belongs to one unit, and its heads' states lie side by side.
            fill(&unit, unsafe { shared.slice(at, unit.width * dims.spec.state) }, s);
        }
    });
    states
}

/// Which way a recurrence over chunks goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Forwards,
    Backwards,
}

/// The recurrence over chunks. Turns what each chunk adds into the state that enters each chunk, in place, and `running`
/// `[B, H, P, N]` from the state before the first chunk into that after the last one. Backwards the last chunk comes first: so cotangents
/// of the states that leave chunks are made, and that of the state before the first one.
pub(super) fn pass_states(
    call: &Call<'_>,
    front: &Front,
    direction: Direction,
    running: &mut Block,
    states: &mut Block,
) {
    let Call { backend, ref dims, ref documents, .. } = *call;
    let (heads, state) = (dims.spec.heads, dims.state());
    let cum = front.cum.as_slice::<f32>(heads * dims.rows());
    let shared = Shared::new(states.as_mut_slice::<f32>(dims.states()));
    backend.workers.rows(
        running.as_mut_slice::<f32>(dims.batch * heads * state),
        state,
        1,
        |index, running| {
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
        },
    );
}

/// Scan output of one unit into `out` `[B·L, E]`, D skip included, from the state `[heads, P, N]` that enters the chunk, if one does.
fn outputs(
    call: &Call<'_>,
    front: &Front,
    unit: &Unit,
    state: Option<&[f32]>,
    s: &mut Scratch<'_>,
    out: &Shared<'_, f32>,
) {
    let Call { backend, ref dims, ref documents, ref params, .. } = *call;
    let (p, e) = (dims.spec.head_dim, dims.e);
    let &Unit { n, width, .. } = unit;
    let views = Views::new(dims, front, unit, s.x);
    let (span, firsts) = (Span::new(documents, unit), firsts(documents, unit));
    // Both are shared by the heads of the group.
    triangular(backend, Triangle::ResultLower, Into::Set, s.scores, n, views.c(), views.b().t());
    let at = |i: usize, h: usize| (unit.b * dims.len + unit.row + i) * e + (unit.heads.start + h) * p;
    if let Some(state) = state {
        let state = Mat::new(state, width, dims.spec.state).t();
        // SAFETY: each (position, head) belongs to one unit.
        unsafe { product(backend, Triangle::None, Into::Set, out, at(0, 0), e, views.c(), state) };
    }
    s.weights.fill(0.0);
    for (h, head) in unit.heads.clone().enumerate() {
        let decays = Decays::new(dims, front, span, unit, head);
        let skip = params.d[head];
        vectorize!(backend.isa, || {
            decays.entering(s.entering);
            for (i, entering) in s.entering.iter().enumerate() {
                // SAFETY: as above.
                let y = unsafe { out.slice(at(i, h), p) };
                match state {
                    Some(_) => {
                        y.iter_mut().zip(views.x_row(h, i)).for_each(|(y, x)| *y = entering * *y + skip * x)
                    }
                    None => y.iter_mut().zip(views.x_row(h, i)).for_each(|(y, x)| *y = skip * x),
                }
            }
            decays.split(&mut s.split);
            for (i, (row, &first)) in s.weights.chunks_exact_mut(n).zip(&firsts).enumerate() {
                let (from, to) = (first / LANES * LANES, n.min((i + 1).next_multiple_of(LANES)));
                let decay = decays.row(i, from, &mut s.split);
                let (first, diagonal) = ((first - from) as u32, (i - from) as u32);
                let inputs =
                    s.scores[i * n..][from..to].iter().zip(&decay[from..to]).zip(&decays.dt[from..to]);
                for (j, (w, ((score, decay), dt))) in row[from..to].iter_mut().zip(inputs).enumerate() {
                    let live = (first <= j as u32) & (j as u32 <= diagonal);
                    *w = math::only(live, score * decay * dt);
                }
            }
        });
        // Σ_j W_ij x_j.
        let weights = Mat::new(&*s.weights, n, n);
        // SAFETY: as above.
        unsafe { product(backend, Triangle::LeftLower, Into::Add, out, at(0, h), e, weights, views.x(h)) };
    }
}

/// Scratch of one unit of n positions.
pub(super) struct Scratch<'a> {
    /// `[K − 1 + n, heads·P]`: the convolution's inputs.
    pub(super) inputs: &'a mut [f32],
    /// `[n, heads·P]`.
    pub(super) x: &'a mut [f32],
    /// `[n, heads·P]`: x_j by what of it is left at the end of the chunk.
    pub(super) weighted: &'a mut [f32],
    /// `[n, n]`: C_i·B_j in row i; only j ≤ i is computed.
    scores: &'a mut [f32],
    /// `[n, n]`: W_ij in row i.
    weights: &'a mut [f32],
    split: Split<'a>,
    /// `[n]`.
    pub(super) entering: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Enough for any unit.
    pub(super) fn len(dims: &Dims) -> usize {
        let width = dims.widest();
        (dims.spec.conv_kernel - 1 + 3 * dims.q) * width + 2 * dims.q * dims.q + dims.q + Split::len(dims.q)
    }

    pub(super) fn new(dims: &Dims, unit: &Unit, mut block: &'a mut [f32]) -> Self {
        let &Unit { n, width, .. } = unit;
        let block = &mut block;
        Self {
            inputs: cut(block, (dims.spec.conv_kernel - 1 + n) * width),
            x: cut(block, n * width),
            weighted: cut(block, n * width),
            scores: cut(block, n * n),
            weights: cut(block, n * n),
            split: Split::new(n, block),
            entering: cut(block, n),
        }
    }
}
