//! One position at a time, with constant state: decoding.

use elapid_tensor::{DType, Mamba2Inputs, Mamba2Output, State};

use super::{Dims, Documents, Params, conv, gate};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::parallel::Shared;
use crate::tensor::Tensor;

/// `mamba2` for L = 1.
pub(super) fn step(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    params: &Params,
) -> Mamba2Output<Tensor> {
    let (heads, p, n_state) = (dims.spec.heads, dims.spec.head_dim, dims.spec.state);
    let documents = Documents::new(dims, None);
    let front = conv::front(backend, dims, inputs, params, &documents);
    let act = front.act.as_slice::<f32>(dims.batch * dims.c);
    let (dt, cum) =
        (front.dt.as_slice::<f32>(dims.batch * heads), front.cum.as_slice::<f32>(dims.batch * heads));

    let count = dims.batch * heads * dims.state();
    let mut ssm = backend.pool.take::<f32>(count);
    let initial = inputs.initial.as_ref().map(|initial| initial.ssm.f32());
    let mut y = backend.pool.take::<f32>(dims.batch * dims.e);
    let shared_y = Shared::new(y.as_mut_slice::<f32>(dims.batch * dims.e));
    // A few heads a piece: one alone is too little to be worth handing over.
    backend.workers.rows(ssm.as_mut_slice::<f32>(count), dims.state(), 4, |first, states| {
        vectorize!(backend.isa, || {
            match initial {
                Some(initial) => states.copy_from_slice(&initial[first * dims.state()..][..states.len()]),
                None => states.fill(0.0),
            }
            for (index, state) in (first..).zip(states.chunks_exact_mut(dims.state())) {
                let (b, head) = (index / heads, index % heads);
                let group = head / (heads / dims.spec.groups);
                let row = &act[b * dims.c..][..dims.c];
                let (b_row, c_row) =
                    (&row[dims.b_channel(group)..][..n_state], &row[dims.c_channel(group)..][..n_state]);
                let decay = math::decay(cum[index]);
                // SAFETY: each (sequence, head) belongs to one piece.
                let y = unsafe { shared_y.slice(index * p, p) };
                let (dt, skip) = (dt[index], params.d[head]);
                for ((y, x), s) in y.iter_mut().zip(&row[head * p..]).zip(state.chunks_exact_mut(n_state)) {
                    let weight = dt * x;
                    for (s, b) in s.iter_mut().zip(b_row) {
                        *s = decay * *s + weight * b;
                    }
                    *y = math::dot(s, c_row) + skip * x;
                }
            }
        });
    });
    let y = gate::forward(backend, dims, inputs, params, &y);
    let conv = conv::last_inputs(backend, dims, inputs, &documents);
    let ssm = Tensor::new(ssm, &[dims.batch, heads, p, n_state], DType::F32);
    Mamba2Output { y, state: State { conv, ssm }, saved: Vec::new() }
}
