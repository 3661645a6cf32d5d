//! What a rank holds of the logical tensors of a checkpoint, as rectangular blocks.

use std::ops::Range;

use elapid_tensor::{Backend, Group, Slot};

use super::PREFIXES;
use crate::model::layout::conv_segments;
use crate::model::shard::Cuts;
use crate::model::{Layout, Mamba2ForCausalLM, ParamInfo, Segment};

/// The state of a run on one rank.
pub struct State<'a, B: Backend> {
    /// The model, of which every rank has a part.
    pub model: &'a Mamba2ForCausalLM<B>,
    /// Masters and AdamW's moments, in the order of [`PREFIXES`].
    pub buffers: [&'a B::Buffer; 3],
    /// With carried states: those of each layer.
    pub carried: Option<&'a [elapid_tensor::State<B::Tensor>]>,
}

/// A block of a logical tensor that this rank writes.
pub(super) struct Held<'a, B: Backend> {
    /// The logical tensor.
    pub(super) tensor: String,
    /// Its extents.
    pub(super) logical: Vec<usize>,
    /// Where in it the block begins, by axis.
    pub(super) offset: Vec<usize>,
    /// Extents of the block.
    pub(super) shape: Vec<usize>,
    source: Source<'a, B>,
    /// Elements of the source, by runs that lie together.
    runs: Vec<Range<usize>>,
}

enum Source<'a, B: Backend> {
    Buffer(&'a B::Buffer, Slot),
    Tensor(&'a B::Tensor),
}

impl<B: Backend> Held<'_, B> {
    /// Its values, row-major.
    pub(super) fn values(&self, backend: &B) -> Vec<f32> {
        let values = match &self.source {
            Source::Buffer(buffer, slot) => backend.values(&backend.view(buffer, slot)),
            Source::Tensor(tensor) => backend.values(tensor),
        };
        match self.runs[..] {
            [Range { start: 0, end }] if end == values.len() => values,
            _ => self.runs.iter().flat_map(|run| &values[run.clone()]).copied().collect(),
        }
    }
}

/// A rectangle: first element and extents, by axis.
type Rectangle = (Vec<usize>, Vec<usize>);

/// The elements `range` of a row-major tensor as rectangles: at most 2·axes − 1.
fn rectangles(shape: &[usize], range: Range<usize>) -> Vec<Rectangle> {
    let Some((&extent, inner)) = shape.split_first() else { return vec![(vec![], vec![])] };
    let stride: usize = inner.iter().product();
    if range.is_empty() {
        return Vec::new();
    }
    let within = |row: usize, range: Range<usize>| {
        let rows = rectangles(inner, range).into_iter();
        rows.map(move |(offset, shape)| ([vec![row], offset].concat(), [vec![1], shape].concat()))
    };
    let (first, last) = (range.start.div_ceil(stride), range.end / stride);
    debug_assert!(last <= extent);
    if first > last {
        return within(last, range.start - last * stride..range.end - last * stride).collect();
    }
    let whole = (last > first).then(|| {
        let mut offset = vec![0; shape.len()];
        offset[0] = first;
        (offset, [&[last - first], inner].concat())
    });
    let head = (first * stride > range.start)
        .then(|| within(first - 1, stride - (first * stride - range.start)..stride));
    let tail = (range.end > last * stride).then(|| within(last, 0..range.end - last * stride));
    head.into_iter().flatten().chain(whole).chain(tail.into_iter().flatten()).collect()
}

/// Where two rectangles meet.
fn meet(a: &Rectangle, b: &Rectangle) -> Option<Rectangle> {
    let axes = a.0.iter().zip(&a.1).zip(b.0.iter().zip(&b.1));
    let ranges = axes.map(|((a, a_len), (b, b_len))| (*a.max(b), (a + a_len).min(b + b_len)));
    ranges
        .map(|(from, to)| (from < to).then(|| (from, to - from)))
        .collect::<Option<Vec<_>>>()
        .map(|x| x.into_iter().unzip())
}

/// A rectangle of a row-major tensor as runs of elements that lie together.
fn runs(shape: &[usize], (offset, extents): &Rectangle) -> Vec<Range<usize>> {
    let mut runs = Vec::<Range<usize>>::new();
    let (Some(width), rows) = (extents.last(), extents.iter().rev().skip(1).product::<usize>()) else {
        return std::iter::once(0..1).collect();
    };
    for row in 0..rows {
        let (mut rest, mut start, mut stride) = (row * width, 0, 1);
        for axis in (0..shape.len()).rev() {
            start += (offset[axis] + rest % extents[axis]) * stride;
            rest /= extents[axis];
            stride *= shape[axis];
        }
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += width,
            _ => runs.push(start..start + width),
        }
    }
    runs
}

/// The blocks of `cuts` that this rank writes, of the elements `range` of its part: (in the logical tensor, on the rank).
/// What several ranks hold is written by the first of them.
fn owned(cuts: &Cuts, layout: &Layout, range: Range<usize>) -> Vec<(Vec<usize>, Rectangle)> {
    let mut found = Vec::new();
    for rectangle in rectangles(&cuts.shape(), range) {
        for block in cuts.blocks().filter(|block| layout.share.rank.is_multiple_of(block.copies)) {
            let Some((start, extents)) = meet(&rectangle, &(block.local.clone(), block.shape)) else {
                continue;
            };
            let shifts = start.iter().zip(&block.local).zip(&block.logical);
            found.push((
                shifts.map(|((start, local), logical)| start - local + logical).collect(),
                (start, extents),
            ));
        }
    }
    found
}

impl<'a, B: Backend> State<'a, B> {
    /// Everything that this rank writes.
    pub(super) fn held(&self, backend: &B) -> Vec<Held<'a, B>> {
        let layout = self.model.layout();
        let mut held = Vec::new();
        for (prefix, &buffer) in PREFIXES.iter().zip(&self.buffers) {
            for (name, slot, info) in layout.iter() {
                held.extend(self.of_parameter(backend, format!("{prefix}.{name}"), buffer, &slot, info));
            }
        }
        for (layer, state) in self.carried.unwrap_or_default().iter().enumerate() {
            let [conv, ssm] = carried_cuts(self.model, backend, state);
            held.extend(self.of_carried(backend, carried_name("conv", layer), &state.conv, &conv));
            held.extend(self.of_carried(backend, carried_name("ssm", layer), &state.ssm, &ssm));
        }
        held
    }

    fn of_parameter(
        &self,
        backend: &B,
        tensor: String,
        buffer: &'a B::Buffer,
        slot: &Slot,
        info: &ParamInfo,
    ) -> Vec<Held<'a, B>> {
        let layout = self.model.layout();
        let (parts, part) = self.model.part(backend);
        let (range, at) = layout.within_part(slot, parts, part);
        // Where all data-parallel ranks hold the same, the first one writes.
        if range.is_empty() || parts == 1 && backend.group_rank(Group::Dp) > 0 {
            return Vec::new();
        }
        let start = range.start;
        let cuts = info.cuts(layout.share);
        let local_shape = cuts.shape();
        let held = owned(&cuts, layout, range).into_iter().map(|(offset, local)| {
            let mut runs = runs(&local_shape, &local);
            let (first, end) = (runs[0].start, runs[runs.len() - 1].end);
            runs.iter_mut().for_each(|run| *run = run.start - first..run.end - first);
            let source = Slot { row: slot.row, offset: at + first - start, shape: vec![end - first] };
            Held {
                tensor: tensor.clone(),
                logical: info.shape.clone(),
                offset,
                shape: local.1,
                source: Source::Buffer(buffer, source),
                runs,
            }
        });
        held.collect()
    }

    fn of_carried(
        &self,
        backend: &B,
        tensor: String,
        values: &'a B::Tensor,
        cuts: &Cuts,
    ) -> Vec<Held<'a, B>> {
        let local_shape = backend.shape(values);
        let (rows, dp) = (local_shape[0], backend.group_rank(Group::Dp));
        let mut logical = cuts.logical().to_vec();
        logical[0] *= backend.group_size(Group::Dp);
        let held = owned(cuts, self.model.layout(), 0..local_shape.iter().product()).into_iter();
        let held = held.map(|(mut offset, local)| {
            offset[0] += dp * rows;
            let runs = runs(&local_shape, &local);
            let (tensor, logical) = (tensor.clone(), logical.clone());
            Held { tensor, logical, offset, shape: local.1, source: Source::Tensor(values), runs }
        });
        held.collect()
    }
}

/// How the carried states of a layer, `[B, K − 1, C]` and `[B, H, P, N]`, are cut over the tensor-parallel ranks.
pub(crate) fn carried_cuts<B: Backend>(
    model: &Mamba2ForCausalLM<B>,
    backend: &B,
    state: &elapid_tensor::State<B::Tensor>,
) -> [Cuts; 2] {
    let spec = model.config().spec();
    let rows = backend.shape(&state.conv)[0];
    carried_cuts_of(model.layout(), &spec, rows)
}

/// The same for states of `rows` sequences.
pub(crate) fn carried_cuts_of(layout: &Layout, spec: &elapid_tensor::Mamba2Spec, rows: usize) -> [Cuts; 2] {
    let heads = [Segment { name: "h", units: spec.heads, width: 1 }];
    let conv = [rows, spec.conv_kernel - 1, spec.conv_channels()];
    let ssm = [rows, spec.heads, spec.head_dim, spec.state];
    [Cuts::along(&conv, 2, &conv_segments(spec), layout.share), Cuts::along(&ssm, 1, &heads, layout.share)]
}

/// A carried state's name in a checkpoint.
pub(crate) fn carried_name(part: &str, layer: usize) -> String {
    format!("carried.{part}.{layer}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rectangles of a range are that range, in order, and few.
    #[test]
    fn a_range_is_a_few_rectangles() {
        let shape = [3, 4, 5];
        for start in 0..60 {
            for end in start..=60 {
                let found = rectangles(&shape, start..end);
                assert!(found.len() <= 5);
                let elements: Vec<_> = found.iter().flat_map(|block| runs(&shape, block)).flatten().collect();
                assert!(elements.into_iter().eq(start..end), "{start}..{end}: {found:?}");
            }
        }
    }

    #[test]
    fn runs_follow_the_rows() {
        assert_eq!(runs(&[3, 4, 5], &(vec![0, 1, 0], vec![2, 2, 5])), [5..15, 25..35]);
        assert_eq!(runs(&[3, 4], &(vec![1, 1], vec![2, 2])), [5..7, 9..11]);
        assert_eq!(runs(&[7], &(vec![2], vec![3]))[0], 2..5);
    }
}
