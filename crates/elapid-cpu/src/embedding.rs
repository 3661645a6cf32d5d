//! `embedding`.

use elapid_tensor::{DType, Sink};

use crate::CpuBackend;
use crate::tensor::Tensor;

pub(crate) fn forward(backend: &CpuBackend, table: &Tensor, ids: &Tensor, out: DType) -> Tensor {
    let d = table.last();
    let mut shape = ids.shape().to_vec();
    shape.push(d);
    let ids = ids.i32();
    backend.build(&shape, out, 0, |row, out, _| table.floats().load(ids[row] as usize * d, out))
}

/// Rows are added in the order of positions; columns are what threads share out.
pub(crate) fn adjoint(backend: &CpuBackend, ids: &Tensor, dy: &Tensor, d_table: Sink<'_, CpuBackend>) {
    const COLUMNS: usize = 64;
    let d = dy.last();
    let ids = ids.i32();
    let dy = backend.cast_to(dy, DType::F32);
    let Sink { buffer, slot } = d_table;
    let table = crate::parallel::Shared::new(buffer.slot_mut(slot));
    backend.workers.each(d.div_ceil(COLUMNS), |piece| {
        let from = piece * COLUMNS;
        let width = COLUMNS.min(d - from);
        for (row, id) in ids.iter().enumerate() {
            // SAFETY: each column belongs to one piece.
            let to = unsafe { table.slice(*id as usize * d + from, width) };
            to.iter_mut().zip(&dy.f32()[row * d + from..]).for_each(|(t, g)| *t += g);
        }
    });
}
