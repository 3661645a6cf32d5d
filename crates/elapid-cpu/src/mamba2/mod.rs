//! The `mamba2` op: conv + SiLU, Δt, chunked scan, D skip, gated norm, forward and adjoint.
//!
//! The scan runs in three phases, so that long sequences and many heads both feed many cores: states of single
//! chunks, the recurrence over chunks, outputs of chunks. A piece of work is one chunk of one sequence times one
//! block of heads of one group. Source of the chunked form: Dao & Gu 2024, "Transformers are SSMs", section 6.

mod adjoint;
mod conv;
mod gate;
mod scan;
mod step;

use std::ops::Range;

use elapid_tensor::{DType, Mamba2Inputs, Mamba2Output, Mamba2Spec, Mamba2Weights, State};

use adjoint::Projected;
pub(crate) use adjoint::adjoint;
use scan::Direction;

use crate::CpuBackend;
use crate::memory::Block;
use crate::tensor::Tensor;

/// Heads of one piece. More heads share one C·Bᵀ, fewer give more pieces.
const HEAD_BLOCK: usize = 8;

/// Longest chunk of this device, whatever the model's `chunk_size`: the result is the same, and beyond it the square
/// of the chunk costs more than its larger products gain (docs/lab.md).
const MAX_CHUNK: usize = 128;

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
}

/// One piece of the scan.
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
        Self {
            spec: *spec,
            batch,
            len,
            e: spec.inner(),
            c: spec.conv_channels(),
            proj: spec.projection(),
            q,
            chunks: len.div_ceil(q),
            blocks: (spec.heads / spec.groups).div_ceil(HEAD_BLOCK),
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

    fn units(&self) -> usize {
        self.batch * self.chunks * self.spec.groups * self.blocks
    }

    fn unit(&self, index: usize) -> Unit {
        let per_chunk = self.spec.groups * self.blocks;
        let (block, chunk) = (index % per_chunk, index / per_chunk);
        let (b, chunk) = (chunk / self.chunks, chunk % self.chunks);
        let group = block / self.blocks;
        let per_group = self.spec.heads / self.spec.groups;
        let first = block % self.blocks * HEAD_BLOCK;
        let heads = group * per_group + first..group * per_group + per_group.min(first + HEAD_BLOCK);
        let row = chunk * self.q;
        Unit { b, chunk, row, n: self.q.min(self.len - row), group, block, heads }
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
}

/// Parameters in fp32.
struct Params {
    /// `[K, C]`.
    conv_weight: Vec<f32>,
    /// `[C]`, zeros without a bias.
    conv_bias: Vec<f32>,
    /// `[H]`.
    dt_bias: Vec<f32>,
    /// `[H]`, −exp(A_log).
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
        let mut conv_weight = Vec::with_capacity(taps.len());
        (0..k).for_each(|tap| conv_weight.extend(taps[tap..].iter().step_by(k)));
        let conv_bias = weights.conv_bias.as_ref().map_or_else(|| vec![0.0; dims.c], load);
        let a = load(&weights.a_log).iter().map(|a| -a.exp()).collect();
        Self {
            conv_weight,
            conv_bias,
            dt_bias: load(&weights.dt_bias),
            a,
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

/// What both directions compute first.
struct Front {
    /// `[B·L, C]`, conv output after SiLU.
    act: Block,
    /// `[B, H, L]`, Δt.
    dt: Block,
    /// `[B, H, L]`, Σ Δt·A from the start of the chunk up to and including the position.
    cum: Block,
}

pub(crate) fn forward(
    backend: &CpuBackend,
    spec: &Mamba2Spec,
    inputs: &Mamba2Inputs<Tensor>,
    weights: &Mamba2Weights<Tensor>,
    save: bool,
) -> Mamba2Output<Tensor> {
    let dims = Dims::new(spec, &inputs.projected);
    if dims.len == 1 && !save {
        return step::step(backend, &dims, inputs, weights);
    }
    let params = Params::new(&dims, weights);
    let documents = Documents::new(&dims, inputs.documents.as_ref());
    let front = conv::front(backend, &dims, inputs, &params, &documents);
    let mut states = scan::local_states(backend, &dims, &front, &documents, 0..dims.chunks);
    let initial = inputs.initial.as_ref().map(|s| s.ssm.f32());
    let last =
        scan::pass_states(backend, &dims, &front, &documents, Direction::Forwards, initial, &mut states);
    let y = scan::outputs(backend, &dims, &front, &documents, &params, &states, initial.is_some());
    drop((front, states));
    let out = gate::forward(backend, &dims, inputs, &params.norm_weight, &y);
    let state = State {
        conv: conv::last_inputs(backend, &dims, inputs, &documents),
        ssm: Tensor::new(last, &[dims.batch, spec.heads, spec.head_dim, spec.state], DType::F32),
    };
    let saved =
        if save { vec![Tensor::new(y, &[dims.batch, dims.len, dims.e], DType::F32)] } else { Vec::new() };
    Mamba2Output { y: out, state, saved }
}

#[cfg(test)]
mod tests {
    use elapid_tensor::NormGroup;

    use super::*;

    /// Places of states in a buffer `[B, chunks, H, P, N]` of more than 2³² elements, against exact arithmetic.
    #[test]
    fn t23_states_lie_beyond_32_bits() {
        let spec = Mamba2Spec {
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
        let (batch, chunks) = (128, 64);
        let len = chunks * MAX_CHUNK;
        let dims = Dims::of(&spec, batch, len);
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
