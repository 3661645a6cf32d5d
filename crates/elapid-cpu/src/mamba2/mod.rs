//! The `mamba2` op: conv + SiLU, Δt, chunked scan, D skip, gated norm, forward and adjoint.
//!
//! The unit of work is one chunk of one sequence times one block of heads of one group: its convolution, its scan and, in the
//! adjoint, their cotangents, in scratch of a few megabytes that never leaves the caches. Where sequences and blocks of heads are enough for
//! all threads, each goes from chunk to chunk with its state in hand ([`Dims::in_one_pass`]). Otherwise the chunks of a sequence
//! go to several threads, in three phases: states of single chunks, the recurrence over chunks, outputs of chunks. The numbers are
//! the same bits. Source of the chunked form: Dao & Gu 2024, "Transformers are SSMs", section 6.

mod adjoint;
mod conv;
mod gate;
mod scan;
mod step;
mod target;

use std::ops::Range;

use elapid_tensor::{DType, Mamba2Inputs, Mamba2Output, Mamba2Spec, Mamba2Weights, State};

pub(crate) use adjoint::adjoint;
use conv::Tile;
use target::Target;

use crate::CpuBackend;
use crate::math::LANES;
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::Tensor;

/// Most heads of one unit. More heads share one C·Bᵀ, fewer give more units (docs/lab.md).
const HEAD_BLOCK: usize = 12;

/// Longest chunk of this device, whatever the model's `chunk_size`: the result is the same, and beyond it the square
/// of the chunk costs more than its larger products gain (docs/lab.md).
const MAX_CHUNK: usize = 128;

/// Chunks of a sequence that scan and gate take together: what one hands to the other does not leave the caches.
const PART: usize = 2;

/// Extents of one call.
#[derive(Clone, Copy)]
struct Dims {
    spec: Mamba2Spec,
    /// B.
    batch: usize,
    /// L.
    len: usize,
    /// E.
    e: usize,
    /// C.
    c: usize,
    /// E + C + H.
    proj: usize,
    /// Q, at most L and at most [`MAX_CHUNK`].
    q: usize,
    /// ⌈L / Q⌉.
    chunks: usize,
    /// Blocks of heads in a group.
    blocks: usize,
    /// Heads of a block; the last one may have fewer.
    block: usize,
}

/// One chunk of one sequence, for one block of heads.
struct Unit {
    b: usize,
    chunk: usize,
    /// First position, inside the sequence.
    row: usize,
    /// Positions.
    n: usize,
    group: usize,
    /// Block of heads, counted over all groups.
    block: usize,
    heads: Range<usize>,
    /// heads·P.
    width: usize,
}

impl Dims {
    fn new(spec: &Mamba2Spec, projected: &Tensor) -> Self {
        let &[batch, len, proj] = projected.shape() else { panic!("projected must be [B, L, E + C + H]") };
        assert_eq!(proj, spec.projection());
        Self::of(spec, batch, len)
    }

    fn of(spec: &Mamba2Spec, batch: usize, len: usize) -> Self {
        assert_eq!(spec.heads % spec.groups, 0);
        let q = spec.chunk.min(MAX_CHUNK).min(len).max(1);
        // As many blocks as a power of two, where heads divide so, for equal shares of 2, 4, … threads.
        let heads = spec.heads / spec.groups;
        let block = heads.div_ceil(heads.div_ceil(HEAD_BLOCK).next_power_of_two());
        Self {
            spec: *spec,
            batch,
            len,
            e: spec.inner(),
            c: spec.conv_channels(),
            proj: spec.projection(),
            q,
            chunks: len.div_ceil(q),
            blocks: heads.div_ceil(block),
            block,
        }
    }

    /// B·L.
    fn rows(&self) -> usize {
        self.batch * self.len
    }

    /// P·N.
    fn state(&self) -> usize {
        self.spec.head_dim * self.spec.state
    }

    /// Rows of the convolution's weight: K, and zeros.
    fn taps(&self) -> usize {
        self.spec.conv_kernel.next_multiple_of(conv::TAPS)
    }

    /// Sequences times blocks of heads.
    fn lanes(&self) -> usize {
        self.batch * self.spec.groups * self.blocks
    }

    /// Whether these keep all of `threads` busy.
    fn in_one_pass(&self, threads: usize) -> bool {
        self.chunks == 1 || self.lanes().is_multiple_of(threads) || self.lanes() >= 4 * threads
    }

    /// Chunks that scan and gate take together. All, where chunks go to all threads, or where ranks come together for the gate.
    fn part(&self, threads: usize) -> usize {
        if self.in_one_pass(threads) && self.spec.norm_ranks == 1 {
            PART.min(self.chunks)
        } else {
            self.chunks
        }
    }

    /// The parts of all sequences.
    fn parts(&self, threads: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let (chunks, part) = (self.chunks, self.part(threads));
        (0..chunks.div_ceil(part)).map(move |i| i * part..chunks.min((i + 1) * part))
    }

    /// Channels of a block of heads.
    fn widest(&self) -> usize {
        self.block * self.spec.head_dim
    }

    fn units(&self) -> usize {
        self.chunks * self.lanes()
    }

    fn unit(&self, index: usize) -> Unit {
        self.unit_of(index / self.lanes(), index % self.lanes())
    }

    fn unit_of(&self, chunk: usize, lane: usize) -> Unit {
        let blocks = self.spec.groups * self.blocks;
        let (b, block) = (lane / blocks, lane % blocks);
        let group = block / self.blocks;
        let per_group = self.spec.heads / self.spec.groups;
        let first = block % self.blocks * self.block;
        let heads = group * per_group + first..group * per_group + per_group.min(first + self.block);
        let row = chunk * self.q;
        let width = heads.len() * self.spec.head_dim;
        Unit { b, chunk, row, n: self.q.min(self.len - row), group, block, heads, width }
    }

    /// First channel of B, respectively C, of a group inside the conv channels `[x|B|C]`.
    fn b_channel(&self, group: usize) -> usize {
        self.e + group * self.spec.state
    }

    fn c_channel(&self, group: usize) -> usize {
        self.e + (self.spec.groups + group) * self.spec.state
    }

    /// Place of the state of (sequence, chunk, head) in a buffer `[B, chunks, H, P, N]`.
    fn state_at(&self, b: usize, chunk: usize, head: usize) -> usize {
        ((b * self.chunks + chunk) * self.spec.heads + head) * self.state()
    }

    /// That of a unit's.
    fn first_state(&self, unit: &Unit) -> usize {
        self.state_at(unit.b, unit.chunk, unit.heads.start)
    }

    /// Numbers of such a buffer.
    fn states(&self) -> usize {
        self.batch * self.chunks * self.spec.heads * self.state()
    }

    /// Place of a unit's states in a buffer `[B, H, P, N]`.
    fn running_at(&self, unit: &Unit) -> usize {
        (unit.b * self.spec.heads + unit.heads.start) * self.state()
    }
}

/// Parameters in fp32.
struct Params {
    /// `[taps, C]`.
    conv_weight: Vec<f32>,
    /// `[C]`, zeros without a bias.
    conv_bias: Vec<f32>,
    /// `[C]`.
    zeros: Vec<f32>,
    /// `[H]`, and zeros that fill vectors.
    dt_bias: Vec<f32>,
    /// The same of −exp(A_log).
    a: Vec<f32>,
    /// `[H]`.
    d: Vec<f32>,
    /// `[E]`.
    norm_weight: Vec<f32>,
}

fn load(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.len()];
    tensor.floats().load(0, &mut values);
    values
}

impl Params {
    fn new(dims: &Dims, weights: &Mamba2Weights<Tensor>) -> Self {
        let k = dims.spec.conv_kernel;
        let taps = load(&weights.conv_weight);
        assert_eq!(taps.len(), dims.c * k);
        let mut conv_weight = Vec::with_capacity(dims.taps() * dims.c);
        (0..k).for_each(|tap| conv_weight.extend(taps[tap..].iter().step_by(k)));
        conv_weight.resize(dims.taps() * dims.c, 0.0);
        let conv_bias = weights.conv_bias.as_ref().map_or_else(|| vec![0.0; dims.c], load);
        let filled = |mut values: Vec<f32>| {
            values.resize(values.len().next_multiple_of(LANES), 0.0);
            values
        };
        Self {
            conv_weight,
            conv_bias,
            zeros: vec![0.0; dims.c],
            dt_bias: filled(load(&weights.dt_bias)),
            a: filled(load(&weights.a_log).iter().map(|a| -a.exp()).collect()),
            d: load(&weights.d),
            norm_weight: load(&weights.norm_weight),
        }
    }
}

/// Where documents begin.
struct Documents {
    /// `[B·L]`: first position, inside the sequence, of the document that a position belongs to; −1 where it reaches
    /// back before position 0, so that the initial state counts.
    start: Vec<isize>,
    len: usize,
}

impl Documents {
    fn new(dims: &Dims, ids: Option<&Tensor>) -> Self {
        let mut start = vec![-1; dims.rows()];
        if let Some(ids) = ids {
            let ids = ids.i32();
            assert_eq!(ids.len(), dims.rows());
            for row in 0..dims.rows() {
                let l = row % dims.len;
                if l > 0 {
                    start[row] = if ids[row] == ids[row - 1] { start[row - 1] } else { l as isize };
                }
            }
        }
        Self { start, len: dims.len }
    }

    /// Start of the document of position `l` of sequence `b`.
    #[inline(always)]
    fn start(&self, b: usize, l: usize) -> isize {
        self.start[b * self.len + l]
    }

    /// May position `l` see position `s`, which is −(K−1)… for the initial conv state?
    #[inline(always)]
    fn sees(&self, b: usize, l: usize, s: isize) -> bool {
        let start = self.start(b, l);
        start < 0 || s >= start
    }
}

/// What every part of one call reads.
struct Call<'a> {
    backend: &'a CpuBackend,
    dims: Dims,
    inputs: &'a Mamba2Inputs<Tensor>,
    params: Params,
    documents: Documents,
}

impl<'a> Call<'a> {
    fn new(
        backend: &'a CpuBackend,
        dims: Dims,
        inputs: &'a Mamba2Inputs<Tensor>,
        weights: &Mamba2Weights<Tensor>,
    ) -> Self {
        let params = Params::new(&dims, weights);
        let documents = Documents::new(&dims, inputs.documents.as_ref());
        Self { backend, dims, inputs, params, documents }
    }

    /// The x channels of a unit.
    fn tile(&self, unit: &Unit) -> Tile<'_> {
        Tile::new(self, unit.b, unit.chunk, unit.heads.start * self.dims.spec.head_dim, unit.width)
    }

    /// The state that enters the first chunk `[B, H, P, N]`, if any.
    fn initial(&self) -> Option<&[f32]> {
        self.inputs.initial.as_ref().map(|state| state.ssm.f32())
    }

    /// Whether a state enters the chunk.
    fn enters(&self, unit: &Unit) -> bool {
        unit.chunk > 0 || self.inputs.initial.is_some()
    }
}

/// What both directions compute first.
struct Front {
    /// `[B·L, 2·G·N]`, B and C.
    bc: Block,
    /// `[B, H, L]`, Δt.
    dt: Block,
    /// `[B, H, L]`, Σ Δt·A from the start of the chunk up to and including the position.
    cum: Block,
}

pub(crate) fn forward(
    backend: &CpuBackend,
    spec: &Mamba2Spec,
    inputs: Mamba2Inputs<Tensor>,
    weights: &Mamba2Weights<Tensor>,
    save: bool,
) -> Mamba2Output<Tensor> {
    let dims = Dims::new(spec, &inputs.projected);
    if dims.len == 1 && !save {
        return step::step(backend, &dims, inputs, weights);
    }
    let inputs = &inputs;
    let call = Call::new(backend, dims, inputs, weights);
    let front = conv::front(&call);
    let dtype = inputs.projected.dtype();
    let len = dims.rows() * dims.e;
    let mut y = backend.pool.take::<f32>(len);
    let mut out = target::take(backend, dtype, len);
    let mut states = save.then(|| target::take(backend, dtype, dims.states()));
    let last = {
        let y = Shared::new(y.as_mut_slice::<f32>(len));
        let out = Target::new(&mut out, dtype, len);
        let states = states.as_mut().map(|block| Target::new(block, dtype, dims.states()));
        let (z, norm_weight) = (inputs.projected.floats(), &call.params.norm_weight);
        scan::forward(&call, &front, &y, states.as_ref(), |part| {
            gate::forward(backend, &dims, z, norm_weight, part, &y, &out);
        })
    };
    drop(front);
    let state = State {
        conv: conv::last_inputs(
            backend,
            &dims,
            &inputs.projected,
            inputs.initial.as_ref().map(|state| &state.conv),
            &call.documents,
        ),
        ssm: Tensor::new(last, &[dims.batch, spec.heads, spec.head_dim, spec.state], DType::F32),
    };
    let tensor = |block, dtype| Tensor::new(block, &[dims.batch, dims.len, dims.e], dtype);
    let saved = states.map(|states| {
        let shape = [dims.batch, dims.chunks, spec.heads, spec.head_dim, spec.state];
        vec![tensor(y, DType::F32), Tensor::new(states, &shape, dtype)]
    });
    Mamba2Output { y: tensor(out, dtype), state, saved: saved.unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use elapid_tensor::NormGroup;

    use super::*;

    const SPEC: Mamba2Spec = Mamba2Spec {
        heads: 64,
        head_dim: 128,
        groups: 8,
        state: 128,
        conv_kernel: 4,
        chunk: 128,
        dt_limit: (0.0, f32::INFINITY),
        norm: NormGroup::PerGroup,
        norm_ranks: 1,
        norm_eps: 1e-5,
    };

    #[test]
    fn units_share_out_the_heads() {
        for (heads, groups) in [(1, 1), (8, 1), (13, 1), (24, 1), (49, 1), (64, 8), (80, 1), (128, 8)] {
            let dims = Dims::of(&Mamba2Spec { heads, groups, ..SPEC }, 2, 300);
            let mut seen = vec![0; heads];
            for unit in (0..dims.units()).map(|index| dims.unit(index)) {
                assert!(!unit.heads.is_empty() && unit.heads.len() <= HEAD_BLOCK);
                assert_eq!(unit.heads.start / (heads / groups), (unit.heads.end - 1) / (heads / groups));
                unit.heads.for_each(|head| seen[head] += 1);
            }
            assert!(seen.iter().all(|&times| times == 2 * dims.chunks), "{heads} heads: {seen:?}");
        }
    }

    #[test]
    fn two_threads_have_equal_shares_of_the_presets() {
        for heads in [24, 32, 48, 64, 80] {
            let dims = Dims::of(&Mamba2Spec { heads, groups: 1, ..SPEC }, 1, 2048);
            assert!(dims.in_one_pass(1) && dims.in_one_pass(2), "{heads} heads");
            assert!(!dims.in_one_pass(64));
        }
    }

    /// Places of states in a buffer `[B, chunks, H, P, N]` of more than 2³² elements, against exact arithmetic.
    #[test]
    fn t23_states_lie_beyond_32_bits() {
        let (batch, chunks) = (128, 64);
        let len = chunks * MAX_CHUNK;
        let dims = Dims::of(&SPEC, batch, len);
        let at = |b: u128, chunk: u128, head: u128| ((b * 64 + chunk) * 64 + head) * 128 * 128;
        assert!(at(127, 63, 63) > 1 << 32);
        for (b, chunk, head) in [(0, 0, 0), (31, 63, 63), (32, 0, 0), (127, 63, 63)] {
            assert_eq!(dims.state_at(b, chunk, head) as u128, at(b as u128, chunk as u128, head as u128));
        }
        let last = dims.unit(dims.units() - 1);
        assert_eq!((last.b, last.chunk, last.row, last.n), (127, 63, len - MAX_CHUNK, MAX_CHUNK));
        assert_eq!((last.group, last.heads), (7, 56..64));
        assert_eq!(dims.rows() as u128 * dims.proj as u128, 128 * 8192 * (2 * 8192 + 2 * 8 * 128 + 64));
    }
}
