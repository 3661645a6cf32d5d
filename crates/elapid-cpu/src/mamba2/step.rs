//! One position at a time, with constant state: decoding.
//!
//! A position costs a few microseconds a head, so everything that needs no other head happens where the state is updated:
//! convolution, Δt, the update itself, in place of the old state, and its output.

use elapid_tensor::{DType, Mamba2Inputs, Mamba2Output, Mamba2Weights, State};

use super::target::{self, Target};
use super::{Dims, Documents, conv, gate, scan};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::Tensor;

/// Heads of one piece, of one group. Fewer would be too little to be worth handing over.
const HEADS: usize = 4;

/// `mamba2` for L = 1.
pub(super) fn step(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: Mamba2Inputs<Tensor>,
    weights: &Mamba2Weights<Tensor>,
) -> Mamba2Output<Tensor> {
    let (heads, p, n_state, k) =
        (dims.spec.heads, dims.spec.head_dim, dims.spec.state, dims.spec.conv_kernel);
    let per_group = heads / dims.spec.groups;
    let blocks = per_group.div_ceil(HEADS);
    let Mamba2Inputs { projected, initial, .. } = inputs;
    let (conv_state, ssm) = initial.map(|State { conv, ssm }| (conv, ssm)).unzip();
    let (projected, conv_state) = (&projected, conv_state.as_ref());

    let count = dims.batch * heads * dims.state();
    let mut ssm = state(backend, dims, ssm);
    let mut y = backend.pool.take::<f32>(dims.batch * dims.e);
    let shared_ssm = Shared::new(ssm.as_mut_slice::<f32>(count));
    let shared_y = Shared::new(y.as_mut_slice::<f32>(dims.batch * dims.e));
    backend.workers.each(dims.batch * dims.spec.groups * blocks, |piece| {
        let (group, block) = (piece / blocks, piece % blocks);
        let (b, group) = (group / dims.spec.groups, group % dims.spec.groups);
        let first = group * per_group + block * HEADS;
        let count = HEADS.min(per_group - block * HEADS);
        let width = count * p;
        let size = width + 2 * n_state + (k + 1) * width.max(n_state) + 4 * count;
        let mut scratch = backend.pool.take::<f32>(size);
        let (x, rest) = scratch.as_mut_slice::<f32>(size).split_at_mut(width);
        let (b_row, rest) = rest.split_at_mut(n_state);
        let (c_row, rest) = rest.split_at_mut(n_state);
        let (of_heads, scratch) = rest.split_at_mut(4 * count);
        // SAFETY: each (sequence, head) belongs to one piece.
        let (states, y) = unsafe {
            let index = b * heads + first;
            (shared_ssm.slice(index * dims.state(), count * dims.state()), shared_y.slice(index * p, width))
        };
        vectorize!(backend.isa, || {
            let side = Side { dims, projected, conv_state, weights, b };
            let [from_b, from_c] = [dims.b_channel(group), dims.c_channel(group)];
            for (channel, out) in [(first * p, &mut *x), (from_b, &mut *b_row), (from_c, &mut *c_row)] {
                side.convolve(channel, scratch, out);
            }
            let (dt, rest) = of_heads.split_at_mut(count);
            let (decay, rest) = rest.split_at_mut(count);
            let (skip, spare) = rest.split_at_mut(count);
            side.steps(first, dt, decay, spare);
            weights.d.floats().load(first, skip);
            // Heads take turns, so that the states of all of them are fetched ahead.
            for i in 0..p {
                for head in 0..count {
                    let at = head * dims.state() + i * n_state;
                    let (s, x) = (&mut states[at..at + n_state], x[head * p + i]);
                    let (decay, weight) = (decay[head], dt[head] * x);
                    s.iter_mut().zip(&*b_row).for_each(|(s, b)| *s = decay * *s + weight * b);
                    y[head * p + i] = math::dot(s, c_row) + skip[head] * x;
                }
            }
        });
    });
    let dtype = projected.dtype();
    let mut out = target::take(backend, dtype, dims.rows() * dims.e);
    {
        let y = Shared::new(y.as_mut_slice::<f32>(dims.rows() * dims.e));
        let out = Target::new(&mut out, dtype, dims.rows() * dims.e);
        let z = projected.floats();
        gate::forward(backend, dims, z, weights.norm_weight.f32(), 0..dims.chunks, &y, &out);
    }
    let y = Tensor::new(out, &[dims.batch, dims.len, dims.e], dtype);
    let conv = conv::last_inputs(backend, dims, projected, conv_state, &Documents::new(dims, None));
    let ssm = Tensor::new(ssm, &[dims.batch, heads, p, n_state], DType::F32);
    Mamba2Output { y, state: State { conv, ssm }, saved: Vec::new() }
}

/// Memory for the states `[B, H, P, N]`, which holds the old ones, or zeros. It is theirs where nobody else holds them, so that no line is
/// fetched only to be overwritten; otherwise a copy.
fn state(backend: &CpuBackend, dims: &Dims, old: Option<Tensor>) -> Block {
    let Some(old) = old else { return scan::starting_states(backend, dims, None) };
    assert_eq!((old.dtype(), old.len()), (DType::F32, dims.batch * dims.e * dims.spec.state));
    old.into_block().unwrap_or_else(|old| scan::starting_states(backend, dims, Some(old.f32())))
}

/// The position of one sequence.
struct Side<'a> {
    dims: &'a Dims,
    projected: &'a Tensor,
    /// `[B, K − 1, C]`.
    conv_state: Option<&'a Tensor>,
    weights: &'a Mamba2Weights<Tensor>,
    b: usize,
}

impl Side<'_> {
    /// Convolution and SiLU of the channels from `channel` on; `scratch` holds K + 1 numbers a channel.
    #[inline(always)]
    fn convolve(&self, channel: usize, scratch: &mut [f32], out: &mut [f32]) {
        let Self { dims, projected, conv_state, weights, b } = *self;
        let (k, width) = (dims.spec.conv_kernel, out.len());
        let (taps, rest) = scratch.split_at_mut(k * width);
        // `[C, K]`, as the weight lies.
        weights.conv_weight.floats().load(channel * k, taps);
        match &weights.conv_bias {
            Some(bias) => bias.floats().load(channel, out),
            None => out.fill(0.0),
        }
        for tap in 0..k {
            let x = match conv_state {
                _ if tap + 1 == k => {
                    projected.floats().row(b * dims.proj + dims.e + channel, &mut rest[..width])
                }
                Some(state) => &state.f32()[(b * (k - 1) + tap) * dims.c + channel..][..width],
                None => continue,
            };
            for ((out, w), x) in out.iter_mut().zip(taps[tap..].iter().step_by(k)).zip(x) {
                *out += w * x;
            }
        }
        out.iter_mut().for_each(|out| *out = math::silu(*out));
    }

    /// Δt and e^(Δt·A) of the heads from `first` on.
    #[inline(always)]
    fn steps(&self, first: usize, dt: &mut [f32], decay: &mut [f32], spare: &mut [f32]) {
        let Self { dims, projected, weights, b, .. } = *self;
        projected.floats().load(b * dims.proj + dims.e + dims.c + first, dt);
        weights.a_log.floats().load(first, decay);
        weights.dt_bias.floats().load(first, spare);
        for ((dt, decay), bias) in dt.iter_mut().zip(decay).zip(spare) {
            *dt = conv::clamped(math::softplus(*dt + *bias), dims.spec.dt_limit);
            *decay = math::decay(*dt * -decay.exp());
        }
    }
}

#[cfg(test)]
mod tests {
    use elapid_tensor::{Mamba2Spec, NormGroup};

    use super::*;
    use crate::CpuOptions;

    #[test]
    fn the_only_holder_of_a_state_gives_its_memory_away() {
        let backend = CpuBackend::new(&CpuOptions::default()).unwrap();
        let spec = Mamba2Spec {
            heads: 1,
            head_dim: 2,
            groups: 1,
            state: 3,
            conv_kernel: 4,
            chunk: 16,
            dt_limit: (0.0, f32::INFINITY),
            norm: NormGroup::PerGroup,
            norm_ranks: 1,
            norm_eps: 1e-5,
        };
        let dims = Dims::of(&spec, 1, 1);
        let old = || {
            let mut block = backend.pool.take::<f32>(6);
            block.as_mut_slice::<f32>(6).fill(2.0);
            Tensor::new(block, &[1, 1, 2, 3], DType::F32)
        };
        let place = |block: &Block| block.as_slice::<f32>(6).as_ptr();
        let alone = old();
        let at = alone.f32().as_ptr();
        assert_eq!(place(&state(&backend, &dims, Some(alone))), at);
        let held = old();
        let copy = state(&backend, &dims, Some(held.clone()));
        assert_ne!(place(&copy), held.f32().as_ptr());
        assert_eq!(copy.as_slice::<f32>(6), held.f32());
        assert_eq!(state(&backend, &dims, None).as_slice::<f32>(6), [0.0; 6]);
    }
}
