//! `head_loss`: vocabulary projection and cross entropy in blocks of positions.

use elapid_tensor::{Group, Sink};

use super::linear::{outer, product};
use super::ranks::{first_token, of, own_tokens};
use crate::backend::XlaBackend;
use crate::hlo::Type;
use crate::hlo::graph::{DotAxes, Value};
use crate::tensor::XlaTensor;

/// A logit that no softmax notices, and finite.
const MASKED: f64 = -30000.0;

/// Even blocks (from, to) of `rows` positions, so that a block times the vocabulary keeps to the backend's limit.
pub(super) fn blocks(
    backend: &XlaBackend,
    rows: usize,
    vocab: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let most = (backend.options.block / vocab).max(16);
    let size = rows.div_ceil(rows.div_ceil(most).max(1));
    (0..rows).step_by(size).map(move |from| (from, rows.min(from + size)))
}

/// `[rows, V]` truth values: 1 where the column is the row's id.
pub(super) fn one_hot(ids: Value<'_>, vocab: usize) -> Value<'_> {
    let dims = [ids.dims()[0], vocab];
    ids.expand(&dims, &[0]).compare("EQ", ids.graph.iota(&dims, 1))
}

pub(crate) fn loss(
    backend: &XlaBackend,
    x: &XlaTensor,
    weight: &XlaTensor,
    labels: &XlaTensor,
    vocab: usize,
    d_weight: Option<Sink<'_, XlaBackend>>,
) -> (XlaTensor, Option<XlaTensor>) {
    let (x, weight, labels) = (backend.get(x), backend.get(weight), backend.get(labels));
    let (shape, columns) = (x.dims(), weight.dims()[0]);
    let rows = labels.shape().elements();
    let (flat, labels) = (x.reshape(&[rows, shape[shape.len() - 1]]), labels.reshape(&[rows]));
    let tp = of(backend, Group::Tp);
    let (mut losses, mut d_rows, mut d_sum) = (Vec::new(), Vec::new(), None::<Value<'_>>);
    for (from, to) in blocks(backend, rows, columns) {
        let (x, labels) = (flat.slice(0, from, to), labels.slice(0, from, to));
        let dims = [to - from, columns];
        let mut logits = product(x, weight); // [rows, V]
        if vocab < columns * backend.graph.grid.tp {
            // T11: what lies beyond the vocabulary is padding.
            let own = backend.graph.iota(&dims, 1);
            let token = first_token(backend, columns, &dims).map_or(own, |first| own + first);
            let is_token = token.compare_to("LT", vocab as f64);
            logits = is_token.select(logits, backend.graph.full(Type::F32, &dims, MASKED));
        }
        let hot = one_hot(own_tokens(backend, labels, columns), columns);
        // An ignored label is negative and lights no column.
        let counts = labels.compare_to("GE", 0.0).to(Type::F32);
        let top = logits.max(&[1]).max_over(tp);
        let e = (logits - top.expand(&dims, &[0])).exp();
        let sum = e.sum(&[1]);
        let picked = hot.select(logits, backend.graph.full(Type::F32, &dims, 0.0)).sum(&[1]);
        let (sum, picked) = (sum.sum_over(tp), picked.sum_over(tp));
        losses.push((counts * (top + sum.unary("log")) - picked).sum(&[0]));
        if d_weight.is_some() {
            let share = (counts / sum).expand(&dims, &[0]);
            let d_logits = (e * share - hot.to(Type::F32)).to(x.ty());
            d_rows.push(d_logits.dot(weight, DotAxes { contract: [vec![1], vec![0]], ..DotAxes::default() }));
            let dw = outer(d_logits, x);
            d_sum = Some(d_sum.map_or(dw, |sum| sum + dw));
        }
    }
    let total = losses.into_iter().reduce(|a, b| a + b).expect("a batch has positions");
    let dx = d_weight.zip(d_sum).map(|(sink, dw)| {
        backend.sink(sink.buffer, sink.slot, dw);
        backend.keep(backend.graph.concatenate(&d_rows, 0).reshape(&shape).to(x.ty()))
    });
    (backend.keep(total), dx)
}
