//! Tensors and buffers over several ranks.

use elapid_tensor::{DType, Group, Row, Slot};
use half::bf16;

use crate::CpuBackend;
use crate::comm::{Communicator, FloatsMut, Reduce, bytes_mut};
use crate::isa::vectorize;
use crate::memory::{Block, Plain};
use crate::tensor::{Buffer, Tensor, narrow};

/// The numbers of a block, to be reduced.
fn floats_mut(block: &mut Block, len: usize, dtype: DType) -> FloatsMut<'_> {
    match dtype {
        DType::F32 => FloatsMut::F32(block.as_mut_slice(len)),
        DType::Bf16 => FloatsMut::Bf16(block.as_mut_slice(len)),
        DType::I32 => panic!("integers are never reduced"),
    }
}

pub(crate) fn all_reduce(backend: &CpuBackend, x: &Tensor, reduce: Reduce, group: Group) -> Tensor {
    let comm = backend.group(group);
    if comm.size() == 1 {
        return x.clone();
    }
    let mut block = match x.dtype() {
        DType::F32 => copied(backend, x.slice::<f32>()),
        _ => copied(backend, x.slice::<bf16>()),
    };
    comm.all_reduce(floats_mut(&mut block, x.len(), x.dtype()), reduce);
    Tensor::new(block, x.shape(), x.dtype())
}

fn copied<T: Plain>(backend: &CpuBackend, values: &[T]) -> Block {
    let mut block = backend.pool.take::<T>(values.len());
    block.as_mut_slice(values.len()).copy_from_slice(values);
    block
}

/// Extents before `axis` and from `axis` on, multiplied.
fn around(shape: &[usize], axis: usize) -> (usize, usize) {
    (shape[..axis].iter().product(), shape[axis..].iter().product())
}

pub(crate) fn all_gather(backend: &CpuBackend, x: &Tensor, axis: usize, group: Group) -> Tensor {
    let comm = &**backend.group(group);
    if comm.size() == 1 {
        return x.clone();
    }
    let mut shape = x.shape().to_vec();
    shape[axis] *= comm.size();
    let (outer, inner) = around(x.shape(), axis);
    let block = match x.dtype() {
        DType::F32 => gathered(backend, comm, x.slice::<f32>(), outer, inner),
        DType::Bf16 => gathered(backend, comm, x.slice::<bf16>(), outer, inner),
        DType::I32 => gathered(backend, comm, x.slice::<i32>(), outer, inner),
    };
    Tensor::new(block, &shape, x.dtype())
}

/// `[outer, inner]` of each rank → `[outer, ranks, inner]`.
fn gathered<T: Plain>(
    backend: &CpuBackend,
    comm: &dyn Communicator,
    x: &[T],
    outer: usize,
    inner: usize,
) -> Block {
    let (size, rank, len) = (comm.size(), comm.rank(), x.len());
    let mut block = backend.pool.take::<T>(size * len);
    let all = block.as_mut_slice::<T>(size * len);
    all[rank * len..][..len].copy_from_slice(x);
    comm.all_gather(bytes_mut(all));
    if outer == 1 {
        return block;
    }
    let mut turned = backend.pool.take::<T>(size * len);
    swap(block.as_slice::<T>(size * len), turned.as_mut_slice(size * len), [size, outer, inner]);
    turned
}

/// `[a, b, inner]` → `[b, a, inner]`.
fn swap<T: Plain>(from: &[T], to: &mut [T], [a, b, inner]: [usize; 3]) {
    for i in 0..a {
        for j in 0..b {
            to[(j * a + i) * inner..][..inner].copy_from_slice(&from[(i * b + j) * inner..][..inner]);
        }
    }
}

pub(crate) fn reduce_scatter(backend: &CpuBackend, x: &Tensor, axis: usize, group: Group) -> Tensor {
    let comm = &**backend.group(group);
    if comm.size() == 1 {
        return x.clone();
    }
    let mut shape = x.shape().to_vec();
    assert!(shape[axis].is_multiple_of(comm.size()), "axis {axis} of {shape:?} over {} ranks", comm.size());
    shape[axis] /= comm.size();
    let (outer, inner) = around(&shape, axis);
    let block = match x.dtype() {
        DType::F32 => scattered(backend, comm, x.slice::<f32>(), x.dtype(), outer, inner),
        _ => scattered(backend, comm, x.slice::<bf16>(), x.dtype(), outer, inner),
    };
    Tensor::new(block, &shape, x.dtype())
}

/// This rank's `[outer, inner]` of the sum of `[outer, ranks, inner]`.
fn scattered<T: Plain>(
    backend: &CpuBackend,
    comm: &dyn Communicator,
    x: &[T],
    dtype: DType,
    outer: usize,
    inner: usize,
) -> Block {
    let mut all = backend.pool.take::<T>(x.len());
    swap(x, all.as_mut_slice(x.len()), [outer, comm.size(), inner]);
    comm.reduce_scatter(floats_mut(&mut all, x.len(), dtype));
    let len = outer * inner;
    copied(backend, &all.as_slice::<T>(x.len())[comm.rank() * len..][..len])
}

pub(crate) fn all_reduce_slot(backend: &CpuBackend, buffer: &mut Buffer, slot: &Slot, group: Group) {
    let range = buffer.shape().range(slot);
    let data = match buffer.dtype() {
        DType::F32 => FloatsMut::F32(&mut buffer.f32_mut()[range]),
        _ => FloatsMut::Bf16(&mut buffer.slice_mut()[range]),
    };
    backend.group(group).all_reduce(data, Reduce::Sum);
}

pub(crate) fn reduce_scatter_row(
    backend: &CpuBackend,
    whole: &mut Buffer,
    row: Row,
    shard: &mut Buffer,
    group: Group,
) {
    let comm = backend.group(group);
    let (from, to) = (whole.shape().whole(row), shard.shape().whole(row));
    assert_eq!(from.len(), to.len() * comm.size());
    let row = whole.slot_mut(&from);
    comm.reduce_scatter(FloatsMut::F32(row));
    shard.slot_mut(&to).copy_from_slice(&row[comm.rank() * to.len()..][..to.len()]);
}

pub(crate) fn all_gather_row(
    backend: &CpuBackend,
    shard: &Buffer,
    row: Row,
    whole: &mut Buffer,
    group: Group,
) {
    let comm = backend.group(group);
    let (from, to) = (shard.shape().whole(row), whole.shape().whole(row));
    let mine = &shard.f32()[shard.shape().range(&from)];
    let (len, start) = (mine.len(), comm.rank() * mine.len());
    let cut = len * comm.size() - to.len();
    let range = whole.shape().range(&to);
    if cut > 0 {
        // What is not this rank's is zero, and adding zeros changes nothing.
        let end = whole.slot_mut(&to);
        end.fill(0.0);
        if start + len > cut {
            let first = start.max(cut);
            end[first - cut..start + len - cut].copy_from_slice(&mine[first - start..]);
        }
        comm.all_reduce(FloatsMut::F32(end), Reduce::Sum);
    } else if whole.dtype() == DType::F32 {
        let row = &mut whole.f32_mut()[range];
        row[start..start + len].copy_from_slice(mine);
        comm.all_gather(bytes_mut(row));
    } else {
        let row = &mut whole.slice_mut::<bf16>()[range];
        vectorize!(backend.isa, || narrow(mine, &mut row[start..start + len]));
        comm.all_gather(bytes_mut(row));
    }
}
