//! Clipping and AdamW. Everything is elementwise over whole buffers, so that a compiler can work in place.

use elapid_tensor::{AdamW, Clipping, Copies, Decayed, Group};

use super::ranks;
use crate::backend::XlaBackend;
use crate::buffer::XlaBuffer;
use crate::hlo::Type;
use crate::hlo::graph::Value;
use crate::tensor::XlaTensor;

/// Truth: |x| is a finite number.
fn is_finite(x: Value<'_>) -> Value<'_> {
    x.unary("abs").compare_to("LE", f64::from(f32::MAX))
}

/// `[norm, factor, finite]`; see the contract. The gradients are divided by their largest before they are squared.
pub(crate) fn clip(
    backend: &XlaBackend,
    grads: &XlaBuffer,
    loss: &XlaTensor,
    clipping: &Clipping<'_>,
) -> XlaTensor {
    let Clipping { scale, max_norm, copies, over } = *clipping;
    let dealt = over.contains(&Group::Dp);
    let graph = &backend.graph;
    let scale = backend.get(&backend.scalar_input("scale", scale));
    let arrays = grads.arrays(backend).map(|array| array.map(|array| backend.get(&array)));
    let arrays: Vec<(Value<'_>, &[Copies])> =
        arrays.into_iter().zip([copies.0, copies.1]).filter_map(|(a, copies)| Some((a?, copies))).collect();
    let largest = arrays
        .iter()
        .map(|(a, _)| {
            let axes: Vec<usize> = (0..a.dims().len()).collect();
            a.unary("abs").max(&axes)
        })
        .reduce(|a, b| a.binary("maximum", b))
        .unwrap_or_else(|| graph.scalar(0.0));
    let largest = over.iter().fold(largest, |largest, &group| largest.max_over(ranks::of(backend, group)));
    let inverse = graph.scalar(1.0) / largest.at_least(1e-30);
    let squares = arrays.iter().map(|(a, copies)| {
        let dims = a.dims();
        let part = *a * inverse.expand(&dims, &[]);
        let square = part * part;
        let counted = counted(backend, copies, dims[dims.len() - 1], dealt);
        counted.map_or(square, |counted| square * counted.expand(&dims, &[dims.len() - 1])).sum_all()
    });
    let squares = squares.reduce(|a, b| a + b).unwrap_or_else(|| graph.scalar(0.0));
    let squares = over.iter().fold(squares, |sum, &group| sum.sum_over(ranks::of(backend, group)));
    let norm = squares.unary("sqrt") * largest * scale;
    let shrink = if max_norm > 0.0 {
        (graph.scalar(max_norm) / (norm + 1e-6)).at_most(1.0)
    } else {
        graph.scalar(1.0)
    };
    let loss = backend.get(loss).reshape(&[]);
    let finite = is_finite(norm).binary("and", is_finite(loss)).to(Type::F32);
    let parts = [norm, scale * shrink, finite].map(|x| x.reshape(&[1]));
    backend.keep(graph.concatenate(&parts, 0))
}

/// 1 at the elements of a row, or of this rank's part of it, that this rank counts, 0 at those of which a rank before it
/// has a copy (trap T21); None: it counts all.
fn counted<'g>(backend: &'g XlaBackend, copies: &[Copies], len: usize, dealt: bool) -> Option<Value<'g>> {
    let places = ranks::places(backend, len, dealt);
    let at = |direction, place: usize| places.compare_to(direction, place as f64);
    let not_counted = copies.iter().map(|Copies { range, ranks }| {
        let later = ranks::is_first(backend, *ranks).unary("not").expand(&[len], &[]);
        at("GE", range.start).binary("and", at("LT", range.end)).binary("and", later)
    });
    let none = not_counted.reduce(|a, b| a.binary("or", b))?;
    Some(none.unary("not").to(Type::F32))
}

pub(crate) fn adamw(
    backend: &XlaBackend,
    hyper: &AdamW,
    decayed: Decayed,
    clip: &XlaTensor,
    grads: &mut XlaBuffer,
    params: &mut XlaBuffer,
    m: &mut XlaBuffer,
    v: &mut XlaBuffer,
) {
    let [_, rates @ ..] = XlaBackend::step_inputs(hyper, 1.0);
    let [lr, bias1, bias2_root] = rates.map(|(name, value)| backend.get(&backend.scalar_input(name, value)));
    let clip = backend.get(clip);
    let factor = clip.cut(1, &[]);
    let finite = clip.cut(2, &[]).compare_to("NE", 0.0);
    let keep = lr * -hyper.weight_decay + 1.0;

    let sides = [&*grads, &*params, &*m, &*v].map(|b| b.arrays(backend));
    let mut results: [Vec<Option<XlaTensor>>; 4] = Default::default();
    for (part, end) in [decayed.layer, decayed.shared].into_iter().enumerate() {
        let [Some(g), Some(p), Some(m), Some(v)] = sides.each_ref().map(|side| side[part].as_ref()) else {
            results.iter_mut().for_each(|r| r.push(None));
            continue;
        };
        let [g, p, m, v] = [g, p, m, v].map(|t| backend.get(t));
        let dims = p.dims();
        let all = |x: Value<'_>| backend.graph.value(x.expand(&dims, &[]).node);
        let zeros = backend.graph.full(Type::F32, &dims, 0.0);
        let (grads, g) = (g, g * all(factor));
        let new_m = m * hyper.beta1 + g * (1.0 - hyper.beta1);
        let new_v = v * hyper.beta2 + g * g * (1.0 - hyper.beta2);
        let root = new_v.unary("sqrt") / all(bias2_root) + hyper.eps;
        let step = all(lr) * (new_m / all(bias1)) / root;
        let kept = p * decay(backend, keep, end, decayed.dealt, &dims);
        let updated = [(zeros, grads), (kept - step, p), (new_m, m), (new_v, v)];
        for (result, (new, old)) in results.iter_mut().zip(updated) {
            result.push(Some(backend.keep(finite.choose(new, old))));
        }
    }
    for (buffer, result) in [grads, params, m, v].into_iter().zip(results) {
        let [layers, shared] = <[_; 2]>::try_from(result).expect("two arrays a buffer");
        buffer.set(layers, shared);
    }
}

/// `keep` at the first `decayed` elements of each whole row, 1 at the others.
fn decay<'g>(
    backend: &'g XlaBackend,
    keep: Value<'g>,
    decayed: usize,
    dealt: bool,
    dims: &[usize],
) -> Value<'g> {
    let row = [dims[dims.len() - 1]];
    let is_decayed = ranks::places(backend, row[0], dealt).compare_to("LT", decayed as f64);
    let rates = is_decayed.select(keep.expand(&row, &[]), keep.graph.full(Type::F32, &row, 1.0));
    rates.expand(dims, &[dims.len() - 1])
}
