//! Clipping and AdamW. Everything is elementwise over whole buffers, so that a compiler can work in place.

use elapid_tensor::{AdamW, Clipping};

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
    let Clipping { scale, max_norm, uncounted, .. } = *clipping;
    assert!(uncounted.is_empty(), "a rank alone counts everything");
    let graph = &backend.graph;
    let scale = backend.get(&backend.scalar_input("scale", scale));
    let arrays: Vec<Value<'_>> = grads.arrays(backend).iter().flatten().map(|a| backend.get(a)).collect();
    let largest = arrays
        .iter()
        .map(|a| {
            let axes: Vec<usize> = (0..a.dims().len()).collect();
            a.unary("abs").max(&axes)
        })
        .reduce(|a, b| a.binary("maximum", b))
        .unwrap_or_else(|| graph.scalar(0.0));
    let inverse = graph.scalar(1.0) / largest.at_least(1e-30);
    let squares = arrays.iter().map(|a| {
        let part = *a * inverse.expand(&a.dims(), &[]);
        (part * part).sum_all()
    });
    let squares = squares.reduce(|a, b| a + b).unwrap_or_else(|| graph.scalar(0.0));
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

pub(crate) fn adamw(
    backend: &XlaBackend,
    hyper: &AdamW,
    decayed: (usize, usize),
    clip: &XlaTensor,
    grads: &XlaBuffer,
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

    let sides = [grads, &*params, &*m, &*v].map(|b| b.arrays(backend));
    let mut results: [Vec<Option<XlaTensor>>; 3] = Default::default();
    for (part, decayed) in [decayed.0, decayed.1].into_iter().enumerate() {
        let [Some(g), Some(p), Some(m), Some(v)] = sides.each_ref().map(|side| side[part].as_ref()) else {
            results.iter_mut().for_each(|r| r.push(None));
            continue;
        };
        let [g, p, m, v] = [g, p, m, v].map(|t| backend.get(t));
        let dims = p.dims();
        let all = |x: Value<'_>| backend.graph.value(x.expand(&dims, &[]).node);
        let g = g * all(factor);
        let new_m = m * hyper.beta1 + g * (1.0 - hyper.beta1);
        let new_v = v * hyper.beta2 + g * g * (1.0 - hyper.beta2);
        let root = new_v.unary("sqrt") / all(bias2_root) + hyper.eps;
        let step = all(lr) * (new_m / all(bias1)) / root;
        let kept = p * decay(keep, decayed, &dims);
        for (result, (new, old)) in results.iter_mut().zip([(kept - step, p), (new_m, m), (new_v, v)]) {
            result.push(Some(backend.keep(finite.choose(new, old))));
        }
    }
    for (buffer, result) in [params, m, v].into_iter().zip(results) {
        let [layers, shared] = <[_; 2]>::try_from(result).expect("two arrays a buffer");
        buffer.set(layers, shared);
    }
}

/// `keep` at the first `decayed` elements of each row, 1 at the others.
fn decay<'g>(keep: Value<'g>, decayed: usize, dims: &[usize]) -> Value<'g> {
    let row = [dims[dims.len() - 1]];
    let is_decayed = keep.graph.iota(&row, 0).compare_to("LT", decayed as f64);
    let rates = is_decayed.select(keep.expand(&row, &[]), keep.graph.full(Type::F32, &row, 1.0));
    rates.expand(dims, &[dims.len() - 1])
}
