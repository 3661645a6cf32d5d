//! `embedding`.

use elapid_tensor::{DType, Sink};

use crate::CpuBackend;
use crate::isa::vectorize;
use crate::tensor::Tensor;

pub(crate) fn forward(backend: &CpuBackend, table: &Tensor, ids: &Tensor, out: DType) -> Tensor {
    let d = table.last();
    let mut shape = ids.shape().to_vec();
    shape.push(d);
    let (ids, rows) = (ids.i32(), table.shape()[0]);
    backend.build(&shape, out, 0, |at, out, _| match local_row(backend, rows, ids[at]) {
        Some(row) => vectorize!(backend.isa, || table.floats().load(row * d, out)),
        None => out.fill(0.0),
    })
}

/// The row of token `id` among the `rows` of this rank; None where another tensor-parallel rank has it.
fn local_row(backend: &CpuBackend, rows: usize, id: i32) -> Option<usize> {
    let (rank, id) = (backend.groups.tp.rank(), id as usize);
    assert!(id < rows * backend.groups.tp.size(), "token {id} is not in the vocabulary");
    (id / rows == rank).then_some(id % rows)
}

/// Rows are added in the order of positions; columns are what threads share out.
pub(crate) fn adjoint(backend: &CpuBackend, ids: &Tensor, dy: &Tensor, d_table: Sink<'_, CpuBackend>) {
    const COLUMNS: usize = 64;
    let d = dy.last();
    let dy = backend.cast_to(dy, DType::F32);
    let Sink { buffer, slot } = d_table;
    let ids = ids.i32().iter().map(|id| local_row(backend, slot.shape[0], *id)).collect::<Vec<_>>();
    let table = crate::parallel::Shared::new(buffer.slot_mut(slot));
    backend.workers.each(d.div_ceil(COLUMNS), |piece| {
        let from = piece * COLUMNS;
        let width = COLUMNS.min(d - from);
        for (row, id) in ids.iter().enumerate() {
            let Some(id) = id else { continue };
            // SAFETY: each column belongs to one piece.
            let to = unsafe { table.slice(id * d + from, width) };
            to.iter_mut().zip(&dy.f32()[row * d + from..]).for_each(|(t, g)| *t += g);
        }
    });
}
