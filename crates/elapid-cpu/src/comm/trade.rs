//! Sums and gathers of ranks that are processes: from rank to rank, so that it is known who is waited for. Sums are made
//! here, in rank order: each rank is sent its piece by all others.

use half::bf16;

use super::{Communicator, FloatsMut, Number, Reduce, bytes, bytes_mut, piece, reduce};

/// What an engine has to do for that.
pub(super) trait Trade: Communicator {
    /// Sends every other rank the bytes that `out` has for it and fills those of `into` with what it sends: as many. Both are
    /// by rank, with nothing for this one.
    fn trade(&self, what: &'static str, out: &[&[u8]], into: Vec<&mut [u8]>);
}

pub(super) fn all_reduce(comm: &impl Trade, data: FloatsMut<'_>, how: Reduce) {
    match data {
        FloatsMut::F32(data) => all_reduce_of::<f32>(comm, data, how),
        FloatsMut::Bf16(data) => all_reduce_of::<bf16>(comm, data, how),
    }
}

pub(super) fn reduce_scatter(comm: &impl Trade, data: FloatsMut<'_>) {
    assert!(data.len().is_multiple_of(comm.size()), "equal pieces");
    match data {
        FloatsMut::F32(data) => reduce_mine::<f32>(comm, "reduce_scatter", data, Reduce::Sum),
        FloatsMut::Bf16(data) => reduce_mine::<bf16>(comm, "reduce_scatter", data, Reduce::Sum),
    }
}

pub(super) fn all_gather(comm: &impl Trade, data: &mut [u8]) {
    assert!(data.len().is_multiple_of(comm.size()), "equal pieces");
    gather(comm, "all_gather", data);
}

/// Sends `data[piece of rank]` to every other rank and gets what they have for this one, one after the other.
fn exchange<T: Number>(comm: &impl Trade, what: &'static str, data: &[T]) -> Vec<T> {
    let (rank, size) = (comm.rank(), comm.size());
    let mine = piece(data.len(), size, rank).len();
    let mut incoming = vec![data[0]; mine * (size - 1)];
    let theirs = |peer| if peer == rank { &[] } else { bytes(&data[piece(data.len(), size, peer)]) };
    let out: Vec<_> = (0..size).map(theirs).collect();
    let mut into = pieces(bytes_mut(&mut incoming), size - 1);
    into.insert(rank, &mut []);
    comm.trade(what, &out, into);
    incoming
}

/// `data` in so many equal pieces.
fn pieces(data: &mut [u8], count: usize) -> Vec<&mut [u8]> {
    let (each, mut rest) = (data.len() / count, data);
    let next = |_| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(each);
        rest = others;
        piece
    };
    (0..count).map(next).collect()
}

/// Reduces the piece of this rank.
fn reduce_mine<T: Number>(comm: &impl Trade, what: &'static str, data: &mut [T], how: Reduce) {
    if data.is_empty() {
        return;
    }
    let (own_rank, size) = (comm.rank(), comm.size());
    let incoming = exchange(comm, what, data);
    let mine = piece(data.len(), size, own_rank);
    let n = mine.len();
    let own = data[mine.clone()].to_vec();
    let source = |rank: usize, place: usize, count: usize| match rank.cmp(&own_rank) {
        std::cmp::Ordering::Equal => &own[place..place + count],
        std::cmp::Ordering::Less => &incoming[rank * n + place..][..count],
        std::cmp::Ordering::Greater => &incoming[(rank - 1) * n + place..][..count],
    };
    let out = &mut data[mine];
    reduce(size, n, how, source, |place, sum| T::narrow(sum, &mut out[place..place + sum.len()]));
}

fn all_reduce_of<T: Number>(comm: &impl Trade, data: &mut [T], how: Reduce) {
    reduce_mine(comm, "all_reduce", data, how);
    // Equal pieces, as a gather needs them: the last ones are padded.
    let each = data.len().div_ceil(comm.size());
    if each * comm.size() == data.len() {
        return gather(comm, "all_reduce", bytes_mut(data));
    }
    let mut padded = data.to_vec();
    padded.resize(each * comm.size(), data[0]);
    gather(comm, "all_reduce", bytes_mut(&mut padded));
    data.copy_from_slice(&padded[..data.len()]);
}

fn gather(comm: &impl Trade, what: &'static str, data: &mut [u8]) {
    let mut into = pieces(data, comm.size());
    let own: &mut [u8] = std::mem::take(&mut into[comm.rank()]);
    let own: &[u8] = own;
    let out: Vec<_> = (0..comm.size()).map(|peer| if peer == comm.rank() { &[] } else { own }).collect();
    comm.trade(what, &out, into);
}
