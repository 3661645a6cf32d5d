//! What ranks do together. All run one module; which of them it is comes in as the input `rank`, s32
//! `[data-parallel rank, tensor-parallel rank]`. Sums are in fp32.

use elapid_tensor::{FlatShape, Group, Row, Slot};

use crate::backend::XlaBackend;
use crate::buffer::{XlaBuffer, index, update};
use crate::hlo::Type;
use crate::hlo::graph::{Collective, Ranks, Value};
use crate::tensor::XlaTensor;

/// The ranks of a group.
pub(crate) fn of(backend: &XlaBackend, group: Group) -> Ranks {
    match group {
        Group::Tp => Ranks::Neighbours(backend.graph.grid.tp),
        Group::Dp => Ranks::Dp,
    }
}

/// This rank's number in its group, s32 `[]`; None: a rank alone.
pub(crate) fn number(backend: &XlaBackend, group: Group) -> Option<Value<'_>> {
    if backend.graph.grid.size(of(backend, group)) == 1 {
        return None;
    }
    let at = if group == Group::Dp { 0 } else { 1 };
    Some(backend.get(backend.rank()).cut(at, &[]))
}

/// The first of this tensor-parallel rank's `count` rows of the vocabulary, repeated to `dims`; None: 0.
pub(crate) fn first_token<'g>(backend: &'g XlaBackend, count: usize, dims: &[usize]) -> Option<Value<'g>> {
    let tp = number(backend, Group::Tp)?;
    Some((tp * index(&backend.graph, count)).expand(dims, &[]))
}

/// `ids` as this rank counts them, whose rows of the vocabulary are `count`.
pub(crate) fn own_tokens<'g>(backend: &'g XlaBackend, ids: Value<'g>, count: usize) -> Value<'g> {
    first_token(backend, count, &ids.dims()).map_or(ids, |first| ids - first)
}

/// The place in the whole row of each element of this rank's part of `len`, s32 `[len]`, where rows are `dealt` to the
/// data-parallel ranks; else of each element of the row.
pub(crate) fn places(backend: &XlaBackend, len: usize, dealt: bool) -> Value<'_> {
    let own = backend.graph.iota(&[len], 0);
    match number(backend, Group::Dp).filter(|_| dealt) {
        Some(dp) => own + (dp * index(&backend.graph, len)).expand(&[len], &[]),
        None => own,
    }
}

/// Truth: this rank is the first of `ranks` tensor-parallel neighbours. Without an integer division, which a device
/// may not have: ⌊(r + ½) / ranks⌋ · ranks = r.
pub(crate) fn is_first(backend: &XlaBackend, ranks: usize) -> Value<'_> {
    let tp = number(backend, Group::Tp).unwrap_or_else(|| index(&backend.graph, 0)).to(Type::F32);
    let block = ((tp + 0.5) * (1.0 / ranks as f32)).unary("floor");
    (block * ranks as f32).compare("EQ", tp)
}

/// What the ranks make of `x` together, in its dtype.
pub(crate) fn together(backend: &XlaBackend, x: &XlaTensor, what: Collective, group: Group) -> XlaTensor {
    let ranks = of(backend, group);
    if backend.graph.grid.size(ranks) == 1 {
        return x.clone();
    }
    let x = backend.get(x);
    let moved = matches!(what, Collective::AllGather(_));
    let sent = if moved { x } else { x.to(Type::F32) };
    backend.keep(sent.over(what, ranks).to(x.ty()))
}

/// The array in which a row lies: layer 0 stands for all of them.
fn array<'g>(backend: &'g XlaBackend, buffer: &XlaBuffer, row: Row) -> Value<'g> {
    let [layers, shared] = buffer.arrays(backend);
    let array = match row {
        Row::Layer(0) => layers,
        Row::Layer(layer) => panic!("layer {layer} by itself: layer 0 stands for all"),
        Row::Shared => shared,
    };
    backend.get(&array.expect("a row with elements"))
}

fn set(backend: &XlaBackend, buffer: &mut XlaBuffer, row: Row, array: Value<'_>) {
    buffer.flush(backend);
    let array = Some(backend.keep(array));
    match row {
        Row::Layer(_) => buffer.set(array, None),
        Row::Shared => buffer.set(None, array),
    }
}

/// Replaces what lies at `slot`, in every layer if it is one of layer 0, by its sum over `ranks`.
pub(crate) fn sum_slot(backend: &XlaBackend, buffer: &mut XlaBuffer, slot: &Slot, ranks: Ranks) {
    if backend.graph.grid.size(ranks) == 1 {
        return;
    }
    let old = array(backend, buffer, slot.row);
    let axis = old.dims().len() - 1;
    let sum = old.slice(axis, slot.offset, slot.offset + slot.len()).to(Type::F32).sum_over(ranks);
    let sum = sum.to(old.ty());
    let new = if sum.dims() == old.dims() {
        sum
    } else {
        let mut start = vec![index(&backend.graph, 0); axis];
        start.push(index(&backend.graph, slot.offset));
        update(old, sum, &start)
    };
    set(backend, buffer, slot.row, new);
}

pub(crate) fn reduce_scatter_row(
    backend: &XlaBackend,
    whole: &XlaBuffer,
    row: Row,
    shard: &mut XlaBuffer,
    group: Group,
) {
    let all = array(backend, whole, row);
    let what = Collective::ReduceScatter(all.dims().len() - 1);
    set(backend, shard, row, all.over(what, of(backend, group)));
}

/// Only as much is sent as `whole` takes, where that lies in the last rank's part.
pub(crate) fn all_gather_row(
    backend: &XlaBackend,
    shard: &XlaBuffer,
    row: Row,
    whole: &mut XlaBuffer,
    group: Group,
) {
    let len = |shape: FlatShape| shape.whole(row).len();
    let (part, wanted, ranks) = (len(shard.shape), len(whole.shape), of(backend, group));
    let sent = part.min(wanted);
    let ty: Type = whole.dtype.into();
    let own = array(backend, shard, row);
    let axis = own.dims().len() - 1;
    let all = own.slice(axis, part - sent, part).to(ty).over(Collective::AllGather(axis), ranks);
    let gathered = all.dims()[axis];
    set(backend, whole, row, all.slice(axis, gathered - wanted, gathered));
}
