//! The adjoint of one unit.

use super::super::scan::{self, Decays, Span, Split, Views, cut, weigh};
use super::super::{Call, Dims, Unit};
use super::Pass;
use crate::isa::vectorize;
use crate::mamba2::conv::add;
use crate::math::{self, LANES};
use crate::matmul::{Into, Mat, Triangle, small, triangular};
use crate::tensor::Floats;

impl Pass<'_> {
    /// The adjoint of one unit, from the cotangent `[heads, P, N]` of the state that leaves its chunk, where there is one.
    pub(super) fn unit(&self, unit: &Unit, d_state: &[f32], s: &mut UnitScratch<'_>) {
        let Pass { call, front, out, .. } = *self;
        let Call { backend, ref dims, ref documents, ref params, .. } = *call;
        let (rows, heads, n_state) = (dims.rows(), dims.spec.heads, dims.spec.state);
        let &Unit { n, width, .. } = unit;
        let first = dims.first_state(unit);
        let state = call.enters(unit).then(|| self.states.part(first, width * n_state));
        let d_state = self.leaves(unit).then_some(&d_state[..width * n_state]);
        let tile = call.tile(unit);
        vectorize!(backend.isa, || tile.forward_with_slope(s.inputs, s.x, s.slope));
        let views = Views::new(dims, front, unit, s.x);
        let (span, firsts) = (Span::new(documents, unit), scan::firsts(documents, unit));
        // SAFETY: each (block, position) belongs to one unit.
        let d_bc = unsafe {
            let at = (unit.block * rows + unit.b * dims.len + unit.row) * 2 * n_state;
            out.blocks.slice(at, n * 2 * n_state)
        };
        let of_heads = &mut s.heads;
        of_heads.d_scores.fill(0.0);
        triangular(backend, Triangle::ResultLower, Into::Set, of_heads.scores, n, views.c(), views.b().t());
        let leaving = d_state.map(|d_state| Mat::new(d_state, width, n_state));
        match leaving {
            Some(leaving) => small(backend, Into::Set, of_heads.from_end, width, views.b(), leaving.t()),
            None => of_heads.from_end.fill(0.0),
        }
        for (h, head) in unit.heads.clone().enumerate() {
            let decays = Decays::new(dims, front, span, unit, head);
            let at = h * dims.state()..(h + 1) * dims.state();
            let io = HeadIo {
                unit,
                head,
                h,
                firsts: &firsts,
                state: state.map(|state| state.part(at.start, at.len())),
                d_state: d_state.map(|d_state| &d_state[at]),
                skip: params.d[head],
            };
            let per_head = (unit.b * heads + head) * dims.len + unit.row;
            // SAFETY: each (position, head), and each (chunk, head), belongs to one unit.
            let (dt, da, d) = unsafe {
                let d = &mut out.d.slice((unit.b * dims.chunks + unit.chunk) * heads + head, 1)[0];
                (out.dt.slice(per_head, n), out.da.slice(per_head, n), d)
            };
            *d = self.head(&views, &decays, &io, of_heads, d_bc, dt, da, s.slope);
        }
        // B_j gets Σ_heads e^{c_n − c_j} Δt_j Ŝᵀ x_j; then both what the scores give.
        let stride = 2 * n_state;
        if let Some(leaving) = leaving {
            small(backend, Into::Set, d_bc, stride, Mat::new(&*of_heads.from_end, n, width), leaving);
        }
        let d_scores = Mat::new(&*of_heads.d_scores, n, n);
        let [into_b, into_c] =
            [leaving.is_some(), state.is_some()].map(|is| if is { Into::Add } else { Into::Set });
        triangular(backend, Triangle::LeftUpper, into_b, d_bc, stride, d_scores.t(), views.c());
        let d_c = &mut d_bc[n_state..];
        triangular(backend, Triangle::LeftLower, into_c, d_c, stride, d_scores, views.b());
        let d_projected = self.d_projected;
        vectorize!(backend.isa, || tile.adjoint(s.inputs, s.slope, s.spare, d_projected, &out.conv));
    }

    /// The adjoint of one head in one chunk. Writes the cotangents of Δt `[n]` and of Δt·A `[n]`, adds to that of C in `[B|C]` `[n, 2·N]` and
    /// to `d_scores`, leaves in `from_end` what that of B needs, and multiplies those of x into `d_pre` `[n, heads·P]`; returns the
    /// gradient of D.
    #[inline(never)]
    fn head(
        &self,
        views: &Views<'_>,
        decays: &Decays<'_>,
        io: &HeadIo<'_>,
        s: &mut HeadScratch<'_>,
        d_bc: &mut [f32],
        d_dt: &mut [f32],
        d_cum: &mut [f32],
        d_pre: &mut [f32],
    ) -> f32 {
        let Call { backend, ref dims, .. } = *self.call;
        let &Unit { n, width, .. } = io.unit;
        let (p, n_state, last) = (dims.spec.head_dim, dims.spec.state, n - 1);
        let dy_row = |i: usize| self.dy_row(io.unit, io.head, i);
        let dy = Mat::strided(&self.d_scan[self.dy_at(io.unit, io.head)..], n, p, dims.e);

        triangular(backend, Triangle::ResultLower, Into::Set, s.kernel, n, dy, views.x(io.h).t());
        d_cum.fill(0.0);
        let mut d_skip = 0.0;
        vectorize!(backend.isa, || {
            decays.split(&mut s.split);
            for i in 0..n {
                let first = io.firsts[i];
                let (from, to) = (first / LANES * LANES, n.min((i + 1).next_multiple_of(LANES)));
                let kernel = &mut s.kernel[i * n..][..n];
                // The diagonal, where the decay is 1.
                d_skip += kernel[i];
                d_dt[i] = kernel[i] * s.scores[i * n + i];
                kernel[..from].fill(0.0);
                kernel[to..].fill(0.0);
                let decay = decays.row(i, from, &mut s.split);
                let (first, diagonal) = ((first - from) as u32, (i - from) as u32);
                let dt = &decays.dt[from..to];
                let flow = &mut s.flow[..to - from];
                let inputs = s.scores[i * n..][from..to].iter().zip(&decay[from..to]).zip(dt);
                let outputs = kernel[from..to].iter_mut().zip(&mut s.d_scores[i * n..][from..to]);
                let flows = flow.iter_mut().zip(&mut d_cum[from..to]);
                for (j, (((kernel, d_score), (flow, column)), ((score, &decay), dt))) in
                    outputs.zip(flows).zip(inputs).enumerate()
                {
                    let live = (first <= j as u32) & (j as u32 <= diagonal);
                    let weight = math::only(live, *kernel * decay);
                    *kernel = math::only(live, score * decay);
                    *d_score += weight * dt;
                    // What flows through Δt_j e^{c_i − c_j}, j < i, over Δt_j.
                    *flow = math::only(live & (j as u32 != diagonal), weight * score);
                    *column += *flow;
                }
                s.rows[i] = math::dot(flow, dt);
            }
        });

        let kernel = Mat::new(&*s.kernel, n, n).t();
        triangular(backend, Triangle::LeftUpper, Into::Set, s.u, p, kernel, dy);
        vectorize!(backend.isa, || {
            decays.leaving(s.leaving);
            let mut through_end = 0.0;
            for j in 0..n {
                let (x, dy, leaving, dt) = (views.x_row(io.h, j), dy_row(j), s.leaving[j], decays.dt[j]);
                let (u, from_end) = (&s.u[j * p..][..p], &mut s.from_end[j * width + io.h * p..][..p]);
                let end = leaving * math::dot(x, from_end);
                d_dt[j] += d_cum[j] + end;
                d_cum[j] = s.rows[j] - dt * d_cum[j];
                if j < last {
                    d_cum[j] -= dt * end;
                    through_end += dt * end;
                }
                let d_pre = &mut d_pre[j * width + io.h * p..][..p];
                for (((d_pre, from), dy), u) in d_pre.iter_mut().zip(&*from_end).zip(dy).zip(u) {
                    *d_pre *= dt * (u + leaving * from) + io.skip * dy;
                }
                for (from, x) in from_end.iter_mut().zip(x) {
                    *from = leaving * dt * x;
                }
            }
            d_cum[last] += through_end;
        });

        if let Some(state) = io.state {
            vectorize!(backend.isa, || {
                decays.entering(s.entering);
                weigh(s.weighted, width, io.h, s.entering, dy_row);
            });
            let weighted = Mat::strided(&s.weighted[io.h * p..], n, p, width);
            small(backend, Into::Set, s.from_state, n_state, weighted, Mat::new(state, p, n_state));
            vectorize!(backend.isa, || {
                if let Some(d_state) = io.d_state {
                    d_cum[last] += decays.whole() * math::dot(state.row(0, s.state), d_state);
                }
                for (i, dc) in s.from_state.chunks_exact(n_state).enumerate() {
                    d_cum[i] += math::dot(dc, views.c_row(i));
                    let to = &mut d_bc[i * 2 * n_state + n_state..][..n_state];
                    if io.h == 0 { to.copy_from_slice(dc) } else { add(to, dc) }
                }
            });
        }

        // c_i = Σ_{l ≤ i} Δt_l A, so the cotangent of Δt_l·A is the sum of those of c_i from l on.
        for l in (0..last).rev() {
            d_cum[l] += d_cum[l + 1];
        }
        d_skip
    }
}

/// Scratch of one unit, n positions, `width` = heads·P.
pub(super) struct UnitScratch<'a> {
    /// `[K − 1 + n, width]`: the convolution's inputs.
    inputs: &'a mut [f32],
    /// `[n, width]`.
    x: &'a mut [f32],
    /// `[n, width]`: slopes of SiLU, and then the cotangent of what it was applied to.
    slope: &'a mut [f32],
    /// `[width]`.
    spare: &'a mut [f32],
    pub(super) heads: HeadScratch<'a>,
}

/// What of it heads need.
pub(super) struct HeadScratch<'a> {
    /// `[n, n]`, C·Bᵀ on and below the diagonal.
    scores: &'a mut [f32],
    /// `[n, n]`, its cotangent.
    d_scores: &'a mut [f32],
    /// `[n, n]`, Y·xᵀ on and below the diagonal, and then R.
    kernel: &'a mut [f32],
    /// `[n, width]`: Ŝ·B_j, and, once a head has read its own, e^{c_n − c_j} Δt_j x_j.
    from_end: &'a mut [f32],
    /// `[n, width]`, e^{c_i} Y_i.
    pub(super) weighted: &'a mut [f32],
    /// `[n, P]`, u without what comes from the end of the chunk.
    u: &'a mut [f32],
    /// `[n, N]`.
    from_state: &'a mut [f32],
    /// `[P, N]`: a state in fp32.
    state: &'a mut [f32],
    /// `[n]`, e^{c_i}.
    entering: &'a mut [f32],
    /// `[n]`, e^{c_n − c_j}.
    leaving: &'a mut [f32],
    /// `[n]`: what flows through the exponentials of one row.
    flow: &'a mut [f32],
    /// `[n]`: its sums.
    rows: &'a mut [f32],
    split: Split<'a>,
}

impl<'a> UnitScratch<'a> {
    /// Enough for any unit.
    pub(super) fn len(dims: &Dims) -> usize {
        let (n, width) = (dims.q, dims.widest());
        (dims.spec.conv_kernel + 5 * n) * width
            + 3 * n * n
            + n * (dims.spec.head_dim + dims.spec.state)
            + dims.state()
            + 4 * n
            + Split::len(n)
    }

    pub(super) fn new(dims: &Dims, unit: &Unit, mut block: &'a mut [f32]) -> Self {
        let &Unit { n, width, .. } = unit;
        let block = &mut block;
        Self {
            inputs: cut(block, (dims.spec.conv_kernel - 1 + n) * width),
            x: cut(block, n * width),
            slope: cut(block, n * width),
            spare: cut(block, width),
            heads: HeadScratch {
                scores: cut(block, n * n),
                d_scores: cut(block, n * n),
                kernel: cut(block, n * n),
                from_end: cut(block, n * width),
                weighted: cut(block, n * width),
                u: cut(block, n * dims.spec.head_dim),
                from_state: cut(block, n * dims.spec.state),
                state: cut(block, dims.state()),
                entering: cut(block, n),
                leaving: cut(block, n),
                flow: cut(block, n),
                rows: cut(block, n),
                split: Split::new(n, block),
            },
        }
    }
}

/// What belongs to one head of one unit.
struct HeadIo<'a> {
    unit: &'a Unit,
    head: usize,
    /// Its number inside the unit.
    h: usize,
    /// `[n]`: the first position of each position's document.
    firsts: &'a [usize],
    /// S `[P, N]`, if a state enters the chunk.
    state: Option<Floats<'a>>,
    /// Ŝ `[P, N]`, if the state that leaves the chunk has a cotangent.
    d_state: Option<&'a [f32]>,
    /// D.
    skip: f32,
}
