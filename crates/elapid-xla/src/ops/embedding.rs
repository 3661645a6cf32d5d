//! `embedding`: products with one-hot rows, in blocks of positions. A product with one 1 and zeros is exact, and a token
//! of another rank's vocabulary lights no column.

use elapid_tensor::{DType, Sink};

use super::head::{blocks, one_hot};
use super::linear::outer;
use super::ranks::own_tokens;
use crate::backend::XlaBackend;
use crate::hlo::Type;
use crate::hlo::graph::DotAxes;
use crate::tensor::XlaTensor;

pub(crate) fn forward(backend: &XlaBackend, table: &XlaTensor, ids: &XlaTensor, out: DType) -> XlaTensor {
    let (table, ids) = (backend.get(table), backend.get(ids));
    let (shape, [vocab, width]) = (ids.dims(), [table.dims()[0], table.dims()[1]]);
    let rows: usize = shape.iter().product();
    let ids = own_tokens(backend, ids.reshape(&[rows]), vocab);
    let parts: Vec<_> = blocks(backend, rows, vocab)
        .map(|(from, to)| {
            let hot = one_hot(ids.slice(0, from, to), vocab).to(table.ty());
            hot.dot(table, DotAxes { contract: [vec![1], vec![0]], ..DotAxes::default() })
        })
        .collect();
    let y = backend.graph.concatenate(&parts, 0).reshape(&[&shape[..], &[width]].concat());
    backend.keep(y.to(out.into()))
}

/// The cotangent comes in the dtype of the residual stream, which may be wider than the parameters: it stays so.
pub(crate) fn adjoint(backend: &XlaBackend, ids: &XlaTensor, dy: &XlaTensor, d_table: Sink<'_, XlaBackend>) {
    let (ids, dy) = (backend.get(ids), backend.get(dy));
    let (vocab, width) = (d_table.slot.shape[0], d_table.slot.shape[1]);
    let rows = ids.shape().elements();
    let (ids, dy) = (own_tokens(backend, ids.reshape(&[rows]), vocab), dy.reshape(&[rows, width]));
    let sum = blocks(backend, rows, vocab)
        .map(|(from, to)| {
            let hot = one_hot(ids.slice(0, from, to), vocab).to(dy.ty());
            outer(hot, dy.slice(0, from, to))
        })
        .reduce(|a, b| a + b);
    if let Some(sum) = sum {
        backend.sink(d_table.buffer, d_table.slot, sum.to(Type::F32));
    }
}
