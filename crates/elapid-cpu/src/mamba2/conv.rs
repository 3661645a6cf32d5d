//! Causal depthwise convolution with SiLU, Δt, and their adjoints.

use elapid_tensor::{DType, Mamba2Inputs, State};

use super::{Call, Dims, Documents, Front, Target};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::{Floats, Tensor};

/// Taps that one loop over channels takes at a time. Where a kernel has fewer, zeros stand for the others.
pub(super) const TAPS: usize = 4;

/// Copies the conv inputs of positions `from..` of sequence `b` into the rows of `dst`, as many channels from `channel` on as a
/// row of `width` holds; `from` may reach K−1 positions back before the sequence, into the initial state `[B, K−1, C]`.
#[inline(always)]
fn load_inputs(
    dims: &Dims,
    projected: Floats<'_>,
    initial: Option<&Tensor>,
    b: usize,
    from: isize,
    (channel, width): (usize, usize),
    dst: &mut [f32],
) {
    let before = dims.spec.conv_kernel - 1;
    for (l, row) in (from..).zip(dst.chunks_exact_mut(width)) {
        if l >= 0 {
            let at = (b * dims.len + l as usize) * dims.proj + dims.e;
            projected.load(at + channel, row);
        } else if let Some(initial) = initial {
            let at = (b * before + (l + before as isize) as usize) * dims.c;
            row.copy_from_slice(&initial.f32()[at + channel..][..width]);
        } else {
            row.fill(0.0);
        }
    }
}

/// sum + Σ w · x over taps, of channel `i`.
#[inline(always)]
fn plus_terms(sum: f32, w: &[&[f32]; TAPS], x: &[&[f32]; TAPS], i: usize) -> f32 {
    sum + w[0][i] * x[0][i] + w[1][i] * x[1][i] + w[2][i] * x[2][i] + w[3][i] * x[3][i]
}

/// to = from + Σ w · x over taps.
#[inline(always)]
fn products(to: &mut [f32], from: &[f32], w: [&[f32]; TAPS], x: [&[f32]; TAPS]) {
    let len = to.len();
    let (from, w, x) = (&from[..len], w.map(|w| &w[..len]), x.map(|x| &x[..len]));
    for (i, to) in to.iter_mut().enumerate() {
        *to = plus_terms(from[i], &w, &x, i);
    }
}

/// to += Σ w · x over taps.
#[inline(always)]
fn add_products(to: &mut [f32], w: [&[f32]; TAPS], x: [&[f32]; TAPS]) {
    let len = to.len();
    let (w, x) = (w.map(|w| &w[..len]), x.map(|x| &x[..len]));
    for (i, to) in to.iter_mut().enumerate() {
        *to = plus_terms(*to, &w, &x, i);
    }
}

/// Gradient of each tap += d · x. (Only of arguments does the compiler know that they do not overlap.)
#[inline(always)]
fn add_outer(
    to0: &mut [f32],
    to1: &mut [f32],
    to2: &mut [f32],
    to3: &mut [f32],
    d: &[f32],
    x: [&[f32]; TAPS],
) {
    let len = d.len();
    let (to0, to1, to2, to3) = (&mut to0[..len], &mut to1[..len], &mut to2[..len], &mut to3[..len]);
    let x = x.map(|x| &x[..len]);
    for (i, &d) in d.iter().enumerate() {
        to0[i] += d * x[0][i];
        to1[i] += d * x[1][i];
        to2[i] += d * x[2][i];
        to3[i] += d * x[3][i];
    }
}

/// to += x.
#[inline(always)]
pub(super) fn add(to: &mut [f32], x: &[f32]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
}

/// Replaces x by silu(x).
#[inline(always)]
fn activate(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = math::silu(*x));
}

/// The same, and the slope of silu at x.
#[inline(always)]
fn activate_with_slope(x: &mut [f32], slope: &mut [f32]) {
    for (x, slope) in x.iter_mut().zip(slope) {
        let s = math::sigmoid(*x);
        *slope = math::slope_at(*x, s);
        *x *= s;
    }
}

/// Some channels of one chunk of a sequence.
pub(super) struct Tile<'a> {
    call: &'a Call<'a>,
    b: usize,
    /// Chunk, its first position, its positions.
    chunk: usize,
    pub(super) first: usize,
    pub(super) n: usize,
    /// First channel and their number.
    channel: usize,
    width: usize,
}

impl<'a> Tile<'a> {
    /// `width` channels of a chunk from `channel` on.
    pub(super) fn new(call: &'a Call<'a>, b: usize, chunk: usize, channel: usize, width: usize) -> Self {
        let first = chunk * call.dims.q;
        Self { call, b, chunk, first, n: call.dims.q.min(call.dims.len - first), channel, width }
    }

    /// Numbers of the inputs.
    pub(super) fn inputs_len(&self) -> usize {
        (self.call.dims.spec.conv_kernel - 1 + self.n) * self.width
    }

    /// The inputs `[K − 1 + n, width]`, from K − 1 positions before the chunk on.
    #[inline(always)]
    fn load(&self, to: &mut [f32]) {
        let Self { call, b, first, channel, width, .. } = *self;
        let from = first as isize - (call.dims.spec.conv_kernel as isize - 1);
        let initial = call.inputs.initial.as_ref().map(|state| &state.conv);
        load_inputs(&call.dims, call.inputs.projected.floats(), initial, b, from, (channel, width), to);
    }

    /// The convolution at position `i` of the chunk, before SiLU.
    #[inline(always)]
    fn row(&self, inputs: &[f32], i: usize, to: &mut [f32]) {
        let bias = &self.call.params.conv_bias[self.channel..];
        products(to, bias, self.four_taps(0), self.four_inputs(inputs, i, 0));
        for tap in (TAPS..self.call.dims.spec.conv_kernel).step_by(TAPS) {
            add_products(to, self.four_taps(tap), self.four_inputs(inputs, i, tap));
        }
    }

    /// The weights of a tap.
    #[inline(always)]
    fn taps(&self, tap: usize) -> &[f32] {
        &self.call.params.conv_weight[tap * self.call.dims.c + self.channel..][..self.width]
    }

    // What returns slices inside of a closure of `vectorize!` is a function and not a closure: it must be inlined before that one
    // can be, for how slices are returned might depend on the instruction set.

    #[inline(always)]
    fn four_taps(&self, tap: usize) -> [&[f32]; TAPS] {
        [self.taps(tap), self.taps(tap + 1), self.taps(tap + 2), self.taps(tap + 3)]
    }

    #[inline(always)]
    fn four_inputs<'x>(&'x self, inputs: &'x [f32], i: usize, tap: usize) -> [&'x [f32]; TAPS] {
        [
            self.input(inputs, i, tap),
            self.input(inputs, i, tap + 1),
            self.input(inputs, i, tap + 2),
            self.input(inputs, i, tap + 3),
        ]
    }

    /// What position `i` of the chunk sees through a tap: zeros where that belongs to another document.
    #[inline(always)]
    fn input<'x>(&'x self, inputs: &'x [f32], i: usize, tap: usize) -> &'x [f32] {
        let Call { dims, params, documents, .. } = self.call;
        let l = self.first + i;
        let sees = tap < dims.spec.conv_kernel
            && documents.sees(self.b, l, (l + tap + 1) as isize - dims.spec.conv_kernel as isize);
        if sees { &inputs[(i + tap) * self.width..][..self.width] } else { &params.zeros[..self.width] }
    }

    /// The cotangent `d` of what sees the input of position `i` of the chunk through a tap: zeros where nothing does. It must be in the
    /// chunk.
    #[inline(always)]
    fn served<'x>(&'x self, d: &'x [f32], i: usize, tap: usize) -> &'x [f32] {
        let Call { dims, params, documents, .. } = self.call;
        let k = dims.spec.conv_kernel;
        let j = (i + k - 1).wrapping_sub(tap);
        let sees = tap < k && documents.sees(self.b, self.first + j, (self.first + i) as isize);
        if sees { self.row_of(d, j) } else { &params.zeros[..self.width] }
    }

    #[inline(always)]
    fn four_served<'x>(&'x self, d: &'x [f32], i: usize, tap: usize) -> [&'x [f32]; TAPS] {
        [
            self.served(d, i, tap),
            self.served(d, i, tap + 1),
            self.served(d, i, tap + 2),
            self.served(d, i, tap + 3),
        ]
    }

    /// Row `i` of `[n, width]`.
    #[inline(always)]
    fn row_of<'x>(&self, rows: &'x [f32], i: usize) -> &'x [f32] {
        &rows[i * self.width..][..self.width]
    }

    /// This tile's channels in row `row` of a buffer `[rows, C]`.
    ///
    /// # Safety
    /// No other piece may touch them meanwhile.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    unsafe fn channels<'x>(&self, of: &'x Shared<'_, f32>, row: usize) -> &'x mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { of.slice(row * self.call.dims.c + self.channel, self.width) }
    }

    /// Loads the inputs, `[K − 1 + n, width]`, and computes SiLU of the convolution, `[n, width]`.
    #[inline(always)]
    pub(super) fn forward(&self, inputs: &mut [f32], act: &mut [f32]) {
        self.load(inputs);
        for (i, act) in act.chunks_exact_mut(self.width).enumerate() {
            self.row(inputs, i, act);
            activate(act);
        }
    }

    /// The same, and the slope of SiLU, `[n, width]`.
    #[inline(always)]
    pub(super) fn forward_with_slope(&self, inputs: &mut [f32], act: &mut [f32], slope: &mut [f32]) {
        self.load(inputs);
        let rows = act.chunks_exact_mut(self.width).zip(slope.chunks_exact_mut(self.width));
        for (i, (act, slope)) in rows.enumerate() {
            self.row(inputs, i, act);
            activate_with_slope(act, slope);
        }
    }

    /// Adjoint of the convolution, from the cotangent `d` `[n, width]` of its output before SiLU. The cotangents of inputs that
    /// only positions of this chunk see go to the columns of `d_projected`; what the others need is left in [`ConvSums`].
    #[inline(always)]
    pub(super) fn adjoint(
        &self,
        inputs: &[f32],
        d: &[f32],
        spare: &mut [f32],
        d_projected: &Target<'_>,
        (grads, edges): &(Shared<'_, f32>, Shared<'_, f32>),
    ) {
        let Self { call, b, chunk, first, n, channel, width } = *self;
        let dims = &call.dims;
        let k = dims.spec.conv_kernel;
        let (before, piece) = (k - 1, b * dims.chunks + chunk);
        let grads_at = piece * (dims.taps() + 1);
        for tap in (0..k).step_by(TAPS) {
            // SAFETY: each (sequence, chunk, channel) belongs to one tile, and these are different rows.
            let (to0, to1, to2, to3) = unsafe {
                let at = grads_at + tap;
                (
                    self.channels(grads, at),
                    self.channels(grads, at + 1),
                    self.channels(grads, at + 2),
                    self.channels(grads, at + 3),
                )
            };
            [&mut *to0, &mut *to1, &mut *to2, &mut *to3].into_iter().for_each(|to| to.fill(0.0));
            for i in 0..n {
                add_outer(to0, to1, to2, to3, self.row_of(d, i), self.four_inputs(inputs, i, tap));
            }
        }
        // SAFETY: as above.
        let bias = unsafe { self.channels(grads, grads_at + dims.taps()) };
        bias.fill(0.0);
        let edges_at = piece * 2 * before;
        for i in 0..n {
            let d_row = self.row_of(d, i);
            add(bias, d_row);
            if i + before < n {
                let at = (b * dims.len + first + i) * dims.proj + dims.e + channel;
                // SAFETY: tiles cover disjoint positions and channels.
                let row = unsafe { d_projected.row(at, &mut spare[..width]) };
                products(row, &call.params.zeros, self.four_taps(0), self.four_served(d, i, 0));
                for tap in (TAPS..k).step_by(TAPS) {
                    add_products(row, self.four_taps(tap), self.four_served(d, i, tap));
                }
                // SAFETY: as above.
                unsafe { d_projected.done(at, row) };
            }
            // The first K − 1 positions, and the last ones.
            if i < before {
                // SAFETY: each (sequence, chunk, channel) belongs to one tile.
                unsafe { self.channels(edges, edges_at + i) }.copy_from_slice(d_row);
            }
            if i + before >= n {
                // SAFETY: as above.
                unsafe { self.channels(edges, edges_at + 2 * before + i - n) }.copy_from_slice(d_row);
            }
        }
    }
}

/// Δt of all positions, and SiLU of the convolution in the channels of B and C.
pub(super) fn front(call: &Call<'_>) -> Front {
    /// Channels of one tile.
    const CHANNELS: usize = 256;
    let Call { backend, ref dims, inputs, ref params, .. } = *call;
    let (heads, rows, channels) = (dims.spec.heads, dims.rows(), dims.c - dims.e);
    let mut bc = backend.pool.take::<f32>(rows * channels);
    let mut dt = backend.pool.take::<f32>(heads * rows);
    let mut cum = backend.pool.take::<f32>(heads * rows);
    let shared_bc = Shared::new(bc.as_mut_slice::<f32>(rows * channels));
    let shared_dt = Shared::new(dt.as_mut_slice::<f32>(heads * rows));
    let shared_cum = Shared::new(cum.as_mut_slice::<f32>(heads * rows));
    let tiles = channels.div_ceil(CHANNELS);
    backend.workers.each(dims.batch * dims.chunks * (tiles + 1), |piece| {
        let (piece, part) = (piece / (tiles + 1), piece % (tiles + 1));
        let (b, chunk) = (piece / dims.chunks, piece % dims.chunks);
        let first = chunk * dims.q;
        let n = dims.q.min(dims.len - first);
        if part < tiles {
            let (from, width) = (part * CHANNELS, CHANNELS.min(channels - part * CHANNELS));
            let tile = Tile::new(call, b, chunk, dims.e + from, width);
            let mut scratch = backend.pool.take::<f32>(tile.inputs_len());
            let raw = scratch.as_mut_slice::<f32>(tile.inputs_len());
            vectorize!(backend.isa, || {
                tile.load(raw);
                for i in 0..n {
                    // SAFETY: tiles cover disjoint positions and channels.
                    let act = unsafe { shared_bc.slice((b * dims.len + first + i) * channels + from, width) };
                    tile.row(raw, i, act);
                    activate(act);
                }
            });
            return;
        }
        // All heads together, and as many more as fill vectors.
        let padded = params.dt_bias.len();
        let mut scratch = backend.pool.take::<f32>(2 * n * padded);
        let (steps, sums) = scratch.as_mut_slice::<f32>(2 * n * padded).split_at_mut(n * padded);
        vectorize!(backend.isa, || {
            for (i, step) in steps.chunks_exact_mut(padded).enumerate() {
                load_dt(dims, inputs, b * dims.len + first + i, &mut step[..heads]);
                step[heads..].fill(0.0);
                add(step, &params.dt_bias);
            }
            steps.iter_mut().for_each(|step| *step = clamped(math::softplus(*step), dims.spec.dt_limit));
            for i in 0..n {
                let (before, sum) = sums[..(i + 1) * padded].split_at_mut(i * padded);
                match before.len().checked_sub(padded) {
                    Some(last) => sum.copy_from_slice(&before[last..]),
                    None => sum.fill(0.0),
                }
                for ((sum, step), a) in sum.iter_mut().zip(&steps[i * padded..]).zip(&params.a) {
                    *sum += step * a;
                }
            }
        });
        for h in 0..heads {
            for (shared, rows) in [(&shared_dt, &*steps), (&shared_cum, &*sums)] {
                // SAFETY: pieces cover disjoint positions.
                let to = unsafe { shared.slice((b * heads + h) * dims.len + first, n) };
                for (to, from) in to.iter_mut().zip(rows[h..].iter().step_by(padded)) {
                    *to = *from;
                }
            }
        }
    });
    Front { bc, dt, cum }
}

/// Δt clamped to its limits; NaN stays NaN.
#[inline(always)]
pub(super) fn clamped(dt: f32, (low, high): (f32, f32)) -> f32 {
    dt.clamp(low, high)
}

/// The dt `[H]` of the projection at one row, before bias and softplus.
#[inline(always)]
pub(super) fn load_dt(dims: &Dims, inputs: &Mamba2Inputs<Tensor>, row: usize, dst: &mut [f32]) {
    inputs.projected.floats().load(row * dims.proj + dims.e + dims.c, dst);
}

/// The last K−1 conv inputs `[B, K−1, C]`, zeros where they belong to a document before the last position's.
pub(super) fn last_inputs(
    backend: &CpuBackend,
    dims: &Dims,
    projected: &Tensor,
    initial: Option<&Tensor>,
    documents: &Documents,
) -> Tensor {
    let (c, before, len) = (dims.c, dims.spec.conv_kernel - 1, dims.len);
    let mut last = backend.pool.take::<f32>(dims.batch * before * c);
    let rows = last.as_mut_slice::<f32>(dims.batch * before * c);
    for b in 0..dims.batch {
        let rows = &mut rows[b * before * c..][..before * c];
        let from = len as isize - before as isize;
        load_inputs(dims, projected.floats(), initial, b, from, (0, c), rows);
        for (l, row) in (from..).zip(rows.chunks_exact_mut(c)) {
            if !documents.sees(b, len - 1, l) {
                row.fill(0.0);
            }
        }
    }
    Tensor::new(last, &[dims.batch, before, c], DType::F32)
}

/// Gradients of the convolution's parameters.
pub(super) struct ConvGrads {
    /// `[K, C]`.
    pub(super) weight: Vec<f32>,
    /// `[C]`.
    pub(super) bias: Vec<f32>,
}

/// What the adjoints of tiles leave for the end.
pub(super) struct ConvSums {
    /// `[B, chunks, taps + 1, C]`: gradients of the weight and of the bias.
    grads: Block,
    /// `[B, chunks, 2·(K − 1), C]`: the cotangents before SiLU at the first and the last positions of each chunk.
    edges: Block,
}

impl ConvSums {
    pub(super) fn new(call: &Call<'_>) -> Self {
        let [grads, edges] = Self::lens(&call.dims).map(|len| call.backend.pool.take::<f32>(len));
        Self { grads, edges }
    }

    fn lens(dims: &Dims) -> [usize; 2] {
        let pieces = dims.batch * dims.chunks * dims.c;
        [pieces * (dims.taps() + 1), pieces * 2 * (dims.spec.conv_kernel - 1)]
    }

    pub(super) fn shared(&mut self, dims: &Dims) -> (Shared<'_, f32>, Shared<'_, f32>) {
        let [grads, edges] = Self::lens(dims);
        (Shared::new(self.grads.as_mut_slice(grads)), Shared::new(self.edges.as_mut_slice(edges)))
    }

    /// Once the tiles of all channels are done: the cotangents of the inputs that the next chunk sees too, that of the initial conv
    /// state, `[B, K−1, C]`, and the parameters' gradients.
    pub(super) fn finish(
        &self,
        call: &Call<'_>,
        d_state: Option<&State<Tensor>>,
        d_projected: &Target<'_>,
    ) -> (ConvGrads, Block) {
        let Call { backend, ref dims, .. } = *call;
        let [grads_len, edges_len] = Self::lens(dims);
        let (c, k) = (dims.c, dims.spec.conv_kernel);
        let before = k - 1;
        let side = Side { call, d_state, edges: self.edges.as_slice(edges_len) };
        let mut d_initial = backend.pool.take::<f32>(dims.batch * before * c);
        let initial = Shared::new(d_initial.as_mut_slice::<f32>(dims.batch * before * c));
        backend.workers.each(dims.batch * dims.chunks, |piece| {
            let (b, chunk) = (piece / dims.chunks, piece % dims.chunks);
            let end = dims.len.min((chunk + 1) * dims.q);
            let mut scratch = backend.pool.take::<f32>(c);
            let row = scratch.as_mut_slice::<f32>(c);
            vectorize!(backend.isa, || {
                for l in end.saturating_sub(before).max(chunk * dims.q)..end {
                    let at = (b * dims.len + l) * dims.proj + dims.e;
                    // SAFETY: pieces cover disjoint rows.
                    let row = unsafe { d_projected.row(at, row) };
                    side.input(b, l as isize, row);
                    // SAFETY: as above.
                    unsafe { d_projected.done(at, row) };
                }
                if chunk == 0 {
                    for s in 0..before {
                        // SAFETY: a sequence has one first chunk.
                        let row = unsafe { initial.slice((b * before + s) * c, c) };
                        side.input(b, s as isize - before as isize, row);
                    }
                }
            });
        });
        let mut grads = ConvGrads { weight: vec![0.0; k * c], bias: vec![0.0; c] };
        for part in self.grads.as_slice::<f32>(grads_len).chunks_exact((dims.taps() + 1) * c) {
            add(&mut grads.weight, part);
            add(&mut grads.bias, &part[dims.taps() * c..]);
        }
        (grads, d_initial)
    }
}

/// What the cotangents of inputs at the ends of chunks come from.
struct Side<'a> {
    call: &'a Call<'a>,
    d_state: Option<&'a State<Tensor>>,
    /// As in [`ConvSums`].
    edges: &'a [f32],
}

impl Side<'_> {
    /// The cotangent `[C]` of the input at position `s`, from −(K−1) on: Σ over taps of w · d at the position that a tap serves.
    #[inline(always)]
    fn input(&self, b: usize, s: isize, row: &mut [f32]) {
        let Call { dims, params, documents, .. } = self.call;
        let (c, before, len) = (dims.c, dims.spec.conv_kernel - 1, dims.len);
        row.fill(0.0);
        for tap in 0..=before {
            let l = s + (before - tap) as isize;
            if l >= 0 && (l as usize) < len && documents.sees(b, l as usize, s) {
                let (chunk, i) = (l as usize / dims.q, l as usize % dims.q);
                let n = dims.q.min(len - chunk * dims.q);
                // A position that sees inputs of two chunks is itself at an end of one.
                let place = if i < before { i } else { 2 * before + i - n };
                let d = &self.edges[((b * dims.chunks + chunk) * 2 * before + place) * c..][..c];
                for ((r, w), d) in row.iter_mut().zip(&params.conv_weight[tap * c..]).zip(d) {
                    *r += w * d;
                }
            }
        }
        // The final state holds the inputs of the last K−1 positions, as far as the last document reaches.
        if let Some(state) = self.d_state
            && s >= len as isize - before as isize
            && documents.sees(b, len - 1, s)
        {
            let at = (b * before + (s + before as isize) as usize - len) * c;
            add(row, &state.conv.f32()[at..at + c]);
        }
    }
}
