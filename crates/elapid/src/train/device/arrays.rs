//! What the host gives to a device.

use elapid_cpu::{Buffer, CpuBackend};
use elapid_tensor::{Backend, IGNORE_LABEL, Row};
use elapid_xla::driver::{Driver, Fault};
use elapid_xla::{Literal, Shape, Type};

use crate::train::Batch;

/// One of the two arrays of a flat buffer: the rows of all layers, or `shared`.
pub(crate) fn rows(backend: &CpuBackend, buffer: &Buffer, part: &str, ty: Type) -> Literal {
    let flat = buffer.shape();
    let rows = flat.rows().filter(|row| (*row == Row::Shared) == (part == "shared"));
    let values = rows.flat_map(|row| backend.values(&backend.view(buffer, &flat.whole(row)))).collect();
    literal(ty, values)
}

pub(crate) fn literal(ty: Type, values: Vec<f32>) -> Literal {
    match ty {
        Type::Bf16 => Literal::Bf16(values),
        _ => Literal::F32(values),
    }
}

/// Writes a batch as a module takes it, `[B, L]`; what a smaller one leaves free has no label that counts.
pub(crate) fn write_batch(
    driver: &mut dyn Driver,
    batch: &Batch,
    extents: [usize; 2],
    documents: bool,
) -> Result<(), Fault> {
    let shape = Shape::new(Type::S32, &extents);
    let mut put = |name: &str, values: &[i32], filler: i32| {
        let mut values = values.to_vec();
        values.resize(shape.elements(), filler);
        driver.write(name, &shape, &Literal::S32(values))
    };
    put("ids", &batch.ids, 0)?;
    put("labels", &batch.labels, IGNORE_LABEL)?;
    if documents {
        put("documents", batch.documents.as_deref().unwrap_or_default(), 0)?;
    }
    Ok(())
}
