//! Micro-steps on a model of the backend's memory pool. Each function stands for the op of its name and changes with it.

use std::collections::BTreeMap;

use elapid_cpu::{Isa, tile_extents};
use elapid_tensor::{Checkpointing, DType};

use super::Demand;

/// What the pool may hold beyond the most that was ever live: `MAX_SPARE_LINES` of the backend.
const MAX_SPARE: u128 = 1 << 30;

/// The backend's memory pool, without the memory. A block is its size; 128 bits, so that no --batch wraps it around.
#[derive(Default)]
pub(super) struct Pool {
    free: BTreeMap<u128, u128>,
    idle: u128,
    pub(super) live: u128,
    /// The most that was live.
    most: u128,
    /// The most that was held, free blocks included.
    pub(super) peak: u128,
}

impl Pool {
    fn take(&mut self, size: u128) -> u128 {
        let size = size.next_multiple_of(64);
        self.live += size;
        self.most = self.most.max(self.live);
        match self.free.get_mut(&size) {
            Some(count) if *count > 0 => {
                *count -= 1;
                self.idle -= size;
            }
            _ if self.live + self.idle > self.most + MAX_SPARE => {
                self.free.clear();
                self.idle = 0;
            }
            _ => {}
        }
        self.peak = self.peak.max(self.live + self.idle);
        size
    }

    fn give(&mut self, blocks: impl IntoIterator<Item = u128>) {
        for size in blocks {
            self.live -= size;
            self.idle += size;
            *self.free.entry(size).or_default() += 1;
        }
    }
}

/// One run, played through.
pub(super) struct Play {
    pub(super) pool: Pool,
    /// B·L.
    rows: u128,
    /// Rows of the residual stream, and of all ranks' together.
    span: u128,
    padded: u128,
    tp: u128,
    sequence_parallel: bool,
    batch: u128,
    threads: u128,
    /// Bytes of an activation's element, and of the residual stream's.
    compute: u128,
    residual: u128,
    layers: usize,
    checkpointing: Checkpointing,
    carries: bool,
    /// D, E, C, H, V.
    d: u128,
    e: u128,
    c: u128,
    h: u128,
    v: u128,
    /// E + C + H.
    proj: u128,
    /// P, N, K.
    p: u128,
    n: u128,
    k: u128,
    /// Chunk length and chunks of a sequence.
    q: u128,
    chunks: u128,
    /// G; blocks of heads over all groups, and the channels of one.
    groups: u128,
    blocks: u128,
    width: u128,
    /// Ranks that share a mean of the gated norm.
    norm_ranks: usize,
}

const F32: u128 = 4;

impl Play {
    pub(super) fn new(demand: &Demand<'_>) -> Self {
        let mesh = demand.mesh;
        let spec = demand.layout().spec;
        let sequence_parallel = demand.sequence_parallel && mesh.tp > 1;
        let part = demand.length.div_ceil(mesh.tp);
        let compute = if demand.dtype == DType::F32 { 4 } else { 2 };
        // The CPU scan's own limits: `MAX_CHUNK` and `HEAD_BLOCK` of its `mamba2`.
        let q = spec.chunk.min(128).min(demand.length).max(1);
        let heads = spec.heads / spec.groups;
        let block = heads.div_ceil(heads.div_ceil(12).next_power_of_two());
        Self {
            pool: Pool::default(),
            rows: (demand.batch * demand.length) as u128,
            span: (demand.batch * if sequence_parallel { part } else { demand.length }) as u128,
            padded: (demand.batch * part * mesh.tp) as u128,
            tp: mesh.tp as u128,
            sequence_parallel,
            batch: demand.batch as u128,
            threads: demand.threads as u128,
            compute,
            residual: if demand.config.residual_in_fp32 { F32 } else { compute },
            layers: demand.config.num_hidden_layers,
            checkpointing: demand.checkpointing,
            carries: demand.carries,
            d: demand.config.hidden_size as u128,
            e: spec.inner() as u128,
            c: spec.conv_channels() as u128,
            h: spec.heads as u128,
            v: demand.config.vocab_size.div_ceil(mesh.tp) as u128,
            proj: spec.projection() as u128,
            p: spec.head_dim as u128,
            n: spec.state as u128,
            k: spec.conv_kernel as u128,
            q: q as u128,
            chunks: demand.length.div_ceil(q) as u128,
            groups: spec.groups as u128,
            blocks: (spec.groups * heads.div_ceil(block)) as u128,
            width: (block * spec.head_dim) as u128,
            norm_ranks: spec.norm_ranks,
        }
    }

    /// Forward and backward of one batch. Gives the bytes that are held between the two.
    pub(super) fn micro_step(&mut self) -> u128 {
        let Self { rows, span, d, compute, residual, .. } = *self;
        // Those before the micro-step and those after it.
        let carried = if self.carries { 2 * self.layers } else { 0 };
        let carried: Vec<_> = (0..carried).flat_map(|_| self.carried()).collect();
        let mut x = self.embedding();
        let mut kept = Vec::new();
        for _ in 0..self.layers {
            let (out, mut saved) = self.layer(self.checkpointing == Checkpointing::None);
            saved.push(x);
            kept.push(saved);
            x = out;
        }
        let hidden = self.pool.take(span * d * compute); // final norm
        let hidden = self.gather(hidden, d * compute);

        // head_loss computes value and adjoint at once.
        let dx = self.pool.take(rows * d * F32);
        self.head(true);
        let dy = self.round(dx, rows * d);
        self.pool.give([hidden]);
        let held = self.pool.live;

        let dy = self.reduce(dy, d * compute);
        let mut cotangent = self.pool.take(span * d * residual); // final norm
        self.pool.give([dy, x]);
        for saved in kept.into_iter().rev() {
            cotangent = self.layer_adjoint(saved, cotangent);
        }
        let cotangent = self.gather(cotangent, d * residual);
        let dy = self.cast(rows * d, residual, F32); // embedding
        self.pool.give(dy.into_iter().chain([cotangent]).chain(carried));
        held
    }

    /// The loss of one batch, for an evaluation.
    pub(super) fn inference(&mut self) {
        let Self { span, d, compute, .. } = *self;
        let mut x = self.embedding();
        for _ in 0..self.layers {
            let (out, _) = self.layer(false);
            self.pool.give([x]);
            x = out;
        }
        let hidden = self.pool.take(span * d * compute); // final norm
        let hidden = self.gather(hidden, d * compute);
        self.head(false);
        self.pool.give([x, hidden]);
    }

    fn embedding(&mut self) -> u128 {
        let x = self.pool.take(self.rows * self.d * self.residual);
        self.reduce(x, self.d * self.residual)
    }

    /// The sum of a block of `width` bytes a row over the tensor-parallel ranks, or this rank's rows of it.
    fn reduce(&mut self, block: u128, width: u128) -> u128 {
        let Self { rows, span, padded, tp, sequence_parallel, .. } = *self;
        if tp == 1 {
            return block;
        }
        let sum = if sequence_parallel {
            let filled = (padded > rows).then(|| self.pool.take(padded * width));
            let turned = self.pool.take(padded * width);
            let sum = self.pool.take(span * width);
            self.pool.give(filled.into_iter().chain([turned]));
            sum
        } else {
            self.pool.take(rows * width)
        };
        self.pool.give([block]);
        sum
    }

    /// All rows from a block of this rank's, of `width` bytes each.
    fn gather(&mut self, block: u128, width: u128) -> u128 {
        let Self { rows, padded, batch, sequence_parallel, .. } = *self;
        if !sequence_parallel {
            return block;
        }
        let mut all = self.pool.take(padded * width);
        if batch > 1 {
            let turned = self.pool.take(padded * width);
            self.pool.give([all]);
            all = turned;
        }
        if padded > rows {
            let cut = self.pool.take(rows * width);
            self.pool.give([all]);
            all = cut;
        }
        self.pool.give([block]);
        all
    }

    /// What head_loss needs for a moment: the logits of a block of positions and, in the adjoint, their rounded cotangents.
    fn head(&mut self, adjoint: bool) {
        let Self { rows, v, compute, .. } = *self;
        // `BLOCK` and `POSITIONS` of the backend's `head`.
        let most = ((16 << 20) / v).max(16);
        let most = if most > 256 { most / 256 * 256 } else { most };
        let block = rows.div_ceil(rows.div_ceil(most));
        let logits = self.pool.take(block * v * F32);
        let rounded = (adjoint && compute != F32).then(|| self.pool.take(block * v * compute));
        self.pool.give([logits].into_iter().chain(rounded));
    }

    /// One layer: its output and what the ops save. The last of what is saved, the layer's input, is the caller's.
    fn layer(&mut self, save: bool) -> (u128, Vec<u128>) {
        let Self { span, d, proj, compute, residual, .. } = *self;
        let normed = self.pool.take(span * d * compute);
        let normed = self.gather(normed, d * compute);
        let projected = self.linear(proj);
        let (y, scanned, states, state) = self.mamba2(save);
        if !save {
            self.pool.give([scanned]);
        }
        let out = self.linear(d);
        let out = self.reduce(out, d * compute);
        let sum = self.pool.take(span * d * residual);
        self.pool.give([out].into_iter().chain(state));
        let Some(states) = states else {
            self.pool.give([normed, projected, y]);
            return (sum, Vec::new());
        };
        (sum, vec![normed, projected, scanned, states, y])
    }

    /// The adjoint of one layer: from the cotangent of its output to that of its input.
    fn layer_adjoint(&mut self, mut saved: Vec<u128>, dy: u128) -> u128 {
        let Self { span, d, e, compute, residual, .. } = *self;
        let x = saved.pop().expect("a layer saves its input");
        let again = match self.checkpointing {
            Checkpointing::None => None,
            Checkpointing::Block => {
                let (out, inside) = self.layer(true);
                saved = inside;
                Some(out)
            }
        };
        let [normed, projected, scanned, states, y] = saved[..] else {
            panic!("a layer saves five blocks and its input")
        };
        // add: the residual's share is dy itself.
        let mut d_out = self.cast(span * d, residual, compute);
        if self.sequence_parallel {
            let block = d_out.take().unwrap_or_else(|| self.pool.take(span * d * compute));
            d_out = Some(self.gather(block, d * compute));
        }
        let dy_mixer = self.linear(e);
        self.pool.give(d_out.into_iter().chain([y]));
        let d_projected = self.mamba2_adjoint();
        self.pool.give([projected, scanned, states, dy_mixer]);
        let d_normed = self.linear(d);
        self.pool.give([d_projected, normed]);
        let d_normed = self.reduce(d_normed, d * compute);
        let dx_norm = self.pool.take(span * d * residual);
        let dx = self.pool.take(span * d * residual); // sum of the two ways
        self.pool.give([d_normed, dx_norm, dy, x].into_iter().chain(again));
        dx
    }

    /// The output `[rows, output]`, or of the adjoint the cotangent of the input. Where it is rounded, a tile of its fp32 sums is
    /// held by each thread for a moment.
    fn linear(&mut self, output: u128) -> u128 {
        let Self { rows, threads, compute, .. } = *self;
        let y = self.pool.take(rows * output * compute);
        if compute != F32 {
            let [rows, output, count] =
                [rows, output, threads].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
            let (rows, cols) = tile_extents(Isa::best(), rows, output, count);
            self.scratch(threads, (rows * cols) as u128);
        }
        y
    }

    /// The mixer: its output `[rows, E]`; the scan's output in fp32 and, if asked for, the states that enter chunks; the final state.
    fn mamba2(&mut self, save: bool) -> (u128, u128, Option<u128>, [u128; 2]) {
        let Self { rows, compute, e, .. } = *self;
        let front = self.front();
        let scanned = self.pool.take(rows * e * F32);
        let y = self.pool.take(rows * e * compute);
        let saved = save.then(|| self.states(compute));
        let unit = self.unit();
        let states = self.passes_over_chunks().then(|| {
            let states = self.states(F32);
            self.scratch(self.at_once(), unit);
            states
        });
        let state = self.carried();
        self.scratch(self.at_once(), unit);
        self.scratch(self.at_the_gate(), 2 * e);
        self.pool.give(front.into_iter().chain(states));
        (y, scanned, saved, state)
    }

    /// Pieces of the gate that are under way at once.
    fn at_the_gate(&self) -> u128 {
        self.threads.min(self.batch * self.part() * self.q.div_ceil(16))
    }

    /// Chunks of a part: `PART` of the backend's `mamba2`.
    fn part(&self) -> u128 {
        if self.passes_over_chunks() || self.norm_ranks > 1 { self.chunks } else { self.chunks.min(2) }
    }

    /// Sequences times blocks of heads.
    fn lanes(&self) -> u128 {
        self.batch * self.blocks
    }

    /// Whether the mixer goes over the chunks of a sequence in phases, since there are too few lanes for its threads.
    fn passes_over_chunks(&self) -> bool {
        self.chunks > 1 && !self.lanes().is_multiple_of(self.threads) && self.lanes() < 4 * self.threads
    }

    /// Units of the mixer that are under way at once.
    fn at_once(&self) -> u128 {
        let units = if self.passes_over_chunks() { self.lanes() * self.chunks } else { self.lanes() };
        units.min(self.threads)
    }

    /// Scratch of one unit forward.
    fn unit(&self) -> u128 {
        let Self { q, k, width, .. } = *self;
        (k - 1 + 3 * q) * width + 2 * q * q + q + self.split()
    }

    /// Numbers of the tables of decays of one unit.
    fn split(&self) -> u128 {
        self.q.div_ceil(16) * self.q + 18 * self.q
    }

    /// A layer's state between two stretches of a sequence.
    fn carried(&mut self) -> [u128; 2] {
        let Self { batch, e, c, n, k, .. } = *self;
        [e * n, (k - 1) * c].map(|len| self.pool.take(batch * len * F32))
    }

    fn mamba2_adjoint(&mut self) -> u128 {
        let Self { rows, batch, threads, compute, e, c, h, proj, p, n, k, q, chunks, blocks, width, .. } =
            *self;
        let front = self.front();
        let d_projected = self.pool.take(rows * proj * compute);
        let partial = self.pool.take(batch * chunks * q.div_ceil(16) * e * F32); // of the gated norm's weight
        let pieces = batch * chunks;
        let taps = k.next_multiple_of(4);
        let sums = [
            blocks * rows * 2 * n,
            h * rows,
            h * rows,
            pieces * h,
            pieces * (taps + 1) * c,
            pieces * 2 * (k - 1) * c,
        ]
        .map(|len| self.pool.take(len * F32));
        let d_scan = self.pool.take(batch * (self.part() * q).min(rows / batch) * e * F32);
        let d_running = self.pool.take(batch * e * n * F32);
        self.scratch(self.at_the_gate(), 5 * e);
        let d_states = self.passes_over_chunks().then(|| {
            let units = self.lanes() * (chunks - 1);
            let d_states = self.states(F32);
            self.scratch(threads.min(units), self.unit());
            d_states
        });
        let unit = (k + 5 * q) * width + 3 * q * q + q * (p + n) + p * n + 4 * q + self.split();
        self.scratch(self.at_once(), unit);
        self.pool.give([partial].into_iter().chain(d_states));
        self.scratch(threads.min(pieces * self.groups * 2), (k - 1 + 3 * q + 1) * n);
        let d_conv = self.pool.take(batch * (k - 1) * c * F32);
        self.pool.give(front.into_iter().chain([d_scan, d_running, d_conv]).chain(sums));
        d_projected
    }

    /// B and C after the convolution, Δt and its cumulative sum.
    fn front(&mut self) -> Vec<u128> {
        let Self { rows, threads, batch, chunks, c, e, h, k, q, .. } = *self;
        let blocks = [rows * (c - e), h * rows, h * rows].map(|len| self.pool.take(len * F32));
        let pieces = batch * chunks;
        self.scratch(threads.min(pieces * (c - e).div_ceil(256)), (k - 1 + q) * (c - e).min(256));
        self.scratch(threads.min(pieces), 2 * q * h.next_multiple_of(16));
        blocks.to_vec()
    }

    /// `[B, chunks, H, P, N]`.
    fn states(&mut self, width: u128) -> u128 {
        self.pool.take(self.batch * self.chunks * self.e * self.n * width)
    }

    /// `count` pieces of `len` numbers at a time, for a moment.
    fn scratch(&mut self, count: u128, len: u128) {
        let blocks: Vec<u128> = (0..count).map(|_| self.pool.take(len * F32)).collect();
        self.pool.give(blocks);
    }

    /// A copy in another element size; None where it is that size already.
    fn cast(&mut self, len: u128, from: u128, to: u128) -> Option<u128> {
        (from != to).then(|| self.pool.take(len * to))
    }

    /// An fp32 result in the compute dtype.
    fn round(&mut self, block: u128, len: u128) -> u128 {
        match self.cast(len, F32, self.compute) {
            None => block,
            Some(rounded) => {
                self.pool.give([block]);
                rounded
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_that_of_the_backend() {
        let mut pool = Pool::default();
        let blocks = [pool.take(100), pool.take(100), pool.take(64)];
        assert_eq!(blocks, [128, 128, 64]);
        pool.give(blocks);
        assert_eq!(pool.take(120), 128);
        assert_eq!((pool.peak, pool.live, pool.idle), (320, 128, 192));
        // Another size finds nothing among the free ones, which stay.
        pool.take(256);
        assert_eq!(pool.peak, 576);
        // What was live at once is kept, and 1 GiB more.
        let large = pool.take(2 << 30);
        pool.give([large]);
        pool.take(4096);
        assert_eq!(pool.idle, (2 << 30) + 192);
        pool.take((1 << 30) - 8192);
        assert_eq!(pool.idle, (2 << 30) + 192);
        pool.take(4096);
        assert_eq!(pool.idle, 0);
    }
}
