//! How a logical tensor lies on the tensor-parallel ranks.
//!
//! A tensor is cut along one axis. [`Cuts`] lists which stretch of that axis lies where on one rank; initialisation,
//! loading, export, checkpoints and gathers all go through it, in one direction or the other.

use std::borrow::Cow;
use std::ops::Range;

use elapid_tensor::{Backend, Group, Slot};

use super::layout::{Layout, ParamInfo, Segment, Shard};
use crate::Error;
use crate::config::ModelConfig;

/// One of the ranks that share a model's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Number of tensor-parallel ranks.
    pub ranks: usize,
    /// This one of them, counted from 0.
    pub rank: usize,
}

impl Share {
    /// All of the model on one rank.
    pub const WHOLE: Self = Self { ranks: 1, rank: 0 };

    /// Every rank of as many.
    pub fn all(ranks: usize) -> impl Iterator<Item = Self> {
        (0..ranks).map(move |rank| Self { ranks, rank })
    }
}

/// The numbers of tensor-parallel ranks over which this model can be cut: those that divide the heads, and of which
/// none gets a part of a group beside a part of another.
pub fn possible_ranks(config: &ModelConfig) -> impl Iterator<Item = usize> {
    let (heads, groups) = (config.num_heads, config.n_groups);
    (1..=heads).filter(move |ranks| {
        heads.is_multiple_of(*ranks) && (groups.is_multiple_of(*ranks) || ranks.is_multiple_of(groups))
    })
}

/// Checks that the model can be cut over so many ranks.
///
/// # Errors
/// It cannot; the hint lists numbers that can.
pub fn check_ranks(config: &ModelConfig, ranks: usize) -> Result<(), Error> {
    if possible_ranks(config).any(|possible| possible == ranks) {
        return Ok(());
    }
    let possible: Vec<String> = possible_ranks(config).map(|ranks| ranks.to_string()).collect();
    Err(Error::new(format!(
        "--tp is {ranks}, but num_heads = {} and n_groups = {} cannot be shared out evenly to {ranks} ranks",
        config.num_heads, config.n_groups
    ))
    .with_hint(format!(
        "each rank takes whole groups or heads of one group; --tp may be {}",
        possible.join(", ")
    )))
}

/// A stretch of the axis along which a tensor is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Where it begins in the logical tensor.
    pub logical: usize,
    /// Where it begins on this rank.
    pub local: usize,
    /// Elements along the axis.
    pub len: usize,
    /// So many neighbouring ranks hold this stretch, the first of them at a multiple of that number.
    pub copies: usize,
}

/// The part of one tensor that lies on one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cuts {
    /// Logical extents.
    logical: Vec<usize>,
    /// Along which the tensor is cut.
    axis: usize,
    /// Elements along the axis on this rank. What no cut covers is padding: zeros, without a logical element.
    len: usize,
    cuts: Vec<Cut>,
}

/// A rectangular block of a logical tensor and where it lies on a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// First element in the logical tensor, by axis.
    pub logical: Vec<usize>,
    /// First element on the rank, by axis.
    pub local: Vec<usize>,
    /// Extents.
    pub shape: Vec<usize>,
    /// As of [`Cut::copies`].
    pub copies: usize,
}

impl Cuts {
    /// A tensor of extents `logical` cut along `axis` by segment.
    pub(crate) fn along(logical: &[usize], axis: usize, segments: &[Segment], share: Share) -> Self {
        let cuts = of_segments(segments, share);
        let len = cuts.iter().map(|cut| cut.local + cut.len).fold(0, usize::max);
        Self { logical: logical.to_vec(), axis, len, cuts }
    }

    /// Extents of the whole tensor.
    pub(crate) fn logical(&self) -> &[usize] {
        &self.logical
    }

    pub(super) fn new(info: &ParamInfo, share: Share) -> Self {
        let Share { ranks, rank } = share;
        let (axis, len, cuts) = match &info.shard {
            Shard::Replicated => {
                let len = info.shape[0];
                (0, len, vec![Cut { logical: 0, local: 0, len, copies: ranks }])
            }
            Shard::Vocabulary => {
                let vocab = info.shape[0];
                let len = vocab.div_ceil(ranks);
                let logical = (rank * len).min(vocab);
                (0, len, vec![Cut { logical, local: 0, len: len.min(vocab - logical), copies: 1 }])
            }
            Shard::Column(segments) => (0, 0, of_segments(segments, share)),
            Shard::Row(segments) => (1, 0, of_segments(segments, share)),
        };
        let len = cuts.iter().map(|cut| cut.local + cut.len).fold(len, usize::max);
        Self { logical: info.shape.clone(), axis, len, cuts }
    }

    /// Extents on this rank.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.logical.clone();
        shape[self.axis] = self.len;
        shape
    }

    /// This rank's blocks.
    pub fn blocks(&self) -> impl Iterator<Item = Block> {
        let at = |start| {
            let mut first = vec![0; self.logical.len()];
            first[self.axis] = start;
            first
        };
        self.cuts.iter().filter(|cut| cut.len > 0).map(move |cut| {
            let mut shape = self.logical.clone();
            shape[self.axis] = cut.len;
            Block { logical: at(cut.logical), local: at(cut.local), shape, copies: cut.copies }
        })
    }

    /// This rank's part of the values of the logical tensor.
    pub fn slice<'a>(&self, values: &'a [f32]) -> Cow<'a, [f32]> {
        if self.is_whole() {
            return Cow::Borrowed(values);
        }
        let mut part = vec![0.0; self.shape().iter().product()];
        for (logical, local) in self.stretches() {
            part[local].copy_from_slice(&values[logical]);
        }
        Cow::Owned(part)
    }

    /// Puts the elements of this rank's part from `first` on into the logical tensor `values`.
    pub fn put(&self, first: usize, part: &[f32], values: &mut [f32]) {
        for (logical, local) in self.stretches() {
            let (from, to) = (local.start.max(first), local.end.min(first + part.len()));
            if from < to {
                let at = logical.start + from - local.start;
                values[at..at + to - from].copy_from_slice(&part[from - first..to - first]);
            }
        }
    }

    /// Elements on the rank, as offsets into its part, of which several ranks hold a copy.
    pub(super) fn replicated(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let inner: usize = self.logical[self.axis + 1..].iter().product();
        // Whatever is in copies is cut along axis 0, so each stretch is one range.
        let replicated = self.cuts.iter().filter(|cut| cut.copies > 1);
        debug_assert!(self.axis == 0 || replicated.clone().next().is_none());
        replicated.map(move |cut| (cut.local * inner..(cut.local + cut.len) * inner, cut.copies))
    }

    fn is_whole(&self) -> bool {
        matches!(self.cuts[..], [Cut { logical: 0, local: 0, len, .. }] if len == self.len && len == self.logical[self.axis])
    }

    /// Ranges of elements that lie together in both: (in the logical tensor, on the rank).
    fn stretches(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let outer: usize = self.logical[..self.axis].iter().product();
        let inner: usize = self.logical[self.axis + 1..].iter().product();
        let (logical, local) = (self.logical[self.axis], self.len);
        (0..outer).flat_map(move |o| {
            self.cuts.iter().map(move |cut| {
                let from = |axis, start| (o * axis + start) * inner;
                let (there, here) = (from(logical, cut.logical), from(local, cut.local));
                (there..there + cut.len * inner, here..here + cut.len * inner)
            })
        })
    }
}

/// The stretches of a fused axis that fall to a rank: whole units of each segment, or one unit that it shares with
/// its neighbours. Stretches that lie together in both places are one.
fn of_segments(segments: &[Segment], Share { ranks, rank }: Share) -> Vec<Cut> {
    let (mut cuts, mut start, mut local) = (Vec::<Cut>::new(), 0, 0);
    for segment in segments {
        let copies = (ranks / segment.units).max(1);
        let units = (segment.units / ranks).max(1);
        let first = rank / copies * units;
        let cut = Cut { logical: start + first * segment.width, local, len: units * segment.width, copies };
        start += segment.len();
        local += cut.len;
        match cuts.last_mut() {
            Some(last) if last.copies == copies && last.logical + last.len == cut.logical => {
                last.len += cut.len
            }
            _ => cuts.push(cut),
        }
    }
    cuts
}

/// Elements that are gathered at a time, of all ranks together: every rank of a process holds so many.
const STRETCH: usize = 1 << 18;

/// The values of one parameter of `buffer` from all tensor-parallel ranks, which call this together; `slot` and `info`
/// are of `layout`. Row-major, fp32, on the host.
pub fn gather<B: Backend>(
    backend: &B,
    buffer: &B::Buffer,
    layout: &Layout,
    slot: &Slot,
    info: &ParamInfo,
) -> Vec<f32> {
    let mut whole = vec![0.0; info.elements()];
    let ranks = layout.share.ranks;
    gather_parts(backend, buffer, slot, |first, parts| {
        for (share, part) in Share::all(ranks).zip(parts.chunks_exact(parts.len() / ranks)) {
            info.cuts(share).put(first, part, &mut whole);
        }
    });
    whole
}

/// Hands the elements of all ranks' parts of a parameter to `sink`, a stretch at a time: (first element in each part, the
/// ranks' stretches one after the other).
pub(super) fn gather_parts<B: Backend>(
    backend: &B,
    buffer: &B::Buffer,
    slot: &Slot,
    mut sink: impl FnMut(usize, &[f32]),
) {
    let stretch = (STRETCH / backend.group_size(Group::Tp)).max(1);
    for first in (0..slot.len()).step_by(stretch) {
        let shape = vec![stretch.min(slot.len() - first)];
        let part = backend.view(buffer, &Slot { row: slot.row, offset: slot.offset + first, shape });
        sink(first, &backend.values(&backend.all_gather(&part, 0, Group::Tp)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, groups: usize) -> ModelConfig {
        ModelConfig {
            num_heads: heads,
            head_dim: 4,
            hidden_size: 2 * heads,
            expand: 2,
            n_groups: groups,
            state_size: 3,
            vocab_size: 37,
            num_hidden_layers: 1,
            use_bias: true,
            tie_word_embeddings: false,
            ..ModelConfig::preset("tiny").unwrap()
        }
    }

    #[test]
    fn ranks_get_whole_groups_or_heads_of_one_group() {
        let possible = |heads, groups| possible_ranks(&config(heads, groups)).collect::<Vec<_>>();
        assert_eq!(possible(6, 3), [1, 3, 6]);
        assert_eq!(possible(8, 2), [1, 2, 4, 8]);
        assert_eq!(possible(24, 8), [1, 2, 4, 8, 24]);
        assert_eq!(possible(5, 1), [1, 5]);
        let error = check_ranks(&config(6, 3), 2).unwrap_err();
        assert!(
            error.to_string().contains("--tp is 2") && error.to_string().contains("n_groups = 3"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("1, 3, 6"));
        assert!(check_ranks(&config(6, 3), 0).is_err() && check_ranks(&config(6, 3), 12).is_err());
    }

    /// Cut up and put together again, every tensor is what it was; the first copies alone hold each element once.
    #[test]
    fn parts_make_up_the_whole() {
        for (heads, groups) in [(6, 1), (6, 3), (8, 2), (8, 8), (12, 4)] {
            let config = config(heads, groups);
            for ranks in possible_ranks(&config) {
                for (name, _, info) in Layout::new(&config).iter() {
                    let values: Vec<f32> = (0..info.elements()).map(|i| i as f32).collect();
                    let mut whole = vec![f32::NAN; values.len()];
                    let mut owned = 0;
                    for share in Share::all(ranks) {
                        let cuts = info.cuts(share);
                        let part = cuts.slice(&values);
                        assert_eq!(part.len(), cuts.shape().iter().product::<usize>(), "{name}");
                        let (head, tail) = part.split_at(part.len() / 3);
                        cuts.put(0, head, &mut whole);
                        cuts.put(head.len(), tail, &mut whole);
                        for block in cuts.blocks() {
                            let size: usize = block.shape.iter().product();
                            owned += if share.rank.is_multiple_of(block.copies) { size } else { 0 };
                        }
                    }
                    assert_eq!(whole, values, "{name} over {ranks}");
                    assert_eq!(owned, values.len(), "{name} over {ranks}");
                }
            }
        }
    }

    #[test]
    fn t11_fused_weights_are_cut_by_segment() {
        // H 8, P 4, G 2, N 3: z 32 | x 32 | B 6 | C 6 | dt 8.
        let layout = Layout::new(&config(8, 2));
        let in_proj = layout.iter().find(|(name, _, _)| name.ends_with("in_proj.bias")).unwrap().2;
        let cut = |logical, local, len, copies| Cut { logical, local, len, copies };
        let cuts = |ranks, rank| in_proj.cuts(Share { ranks, rank }).cuts;
        assert_eq!(cuts(1, 0), [cut(0, 0, 84, 1)]);
        let second =
            [cut(16, 0, 16, 1), cut(48, 16, 16, 1), cut(67, 32, 3, 1), cut(73, 35, 3, 1), cut(80, 38, 4, 1)];
        assert_eq!(cuts(2, 1), second);
        // Ranks 2 and 3 of 4 share the second group.
        let third =
            [cut(16, 0, 8, 1), cut(48, 8, 8, 1), cut(67, 16, 3, 2), cut(73, 19, 3, 2), cut(80, 22, 2, 1)];
        assert_eq!(cuts(4, 2), third);
        let copies: Vec<_> = in_proj.cuts(Share { ranks: 4, rank: 2 }).replicated().collect();
        assert_eq!(copies, [(16..19, 2), (19..22, 2)]);
    }

    #[test]
    fn t11_the_vocabulary_is_padded() {
        let layout = Layout::new(&config(8, 2));
        let table = layout.iter().find(|(name, _, _)| name.ends_with("embeddings.weight")).unwrap().2;
        let values = vec![1.0; table.elements()];
        let rows = |rank| {
            let cuts = table.cuts(Share { ranks: 8, rank });
            assert_eq!(cuts.shape(), [5, 16]);
            cuts.slice(&values).iter().sum::<f32>() / 16.0
        };
        assert_eq!([0, 6, 7].map(rows), [5.0, 5.0, 2.0]);
    }
}
