//! What a rank holds of the logical tensors of a checkpoint, as rectangular blocks.

use std::ops::Range;

use elapid_tensor::{Backend, Group, Slot};

use super::PREFIXES;
use super::rectangle::{Rectangle, meet, rectangles, runs};
use crate::data::Tokenizer;
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
    /// What the data was tokenized with.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// Elements that are read from a buffer at a time.
pub(super) const STRETCH: usize = 1 << 18;

/// A block of a logical tensor that this rank writes.
pub(super) struct Held<B: Backend> {
    /// The logical tensor.
    pub(super) tensor: String,
    /// Its extents.
    pub(super) logical: Vec<usize>,
    /// Where in it the block begins, by axis.
    pub(super) offset: Vec<usize>,
    /// Extents of the block.
    pub(super) shape: Vec<usize>,
    source: Source<B>,
    /// Elements of the source, by runs that lie together.
    runs: Vec<Range<usize>>,
}

enum Source<B: Backend> {
    /// Which of the three buffers, and where the runs begin in it.
    Buffer(usize, Slot),
    Tensor(B::Tensor),
}

impl<B: Backend> Held<B> {
    /// Gives its values to `sink`, row-major, a stretch at a time.
    pub(super) fn each<E>(
        &self,
        backend: &B,
        buffers: [&B::Buffer; 3],
        mut sink: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        match &self.source {
            Source::Tensor(tensor) => {
                let values = backend.values(tensor);
                self.runs.iter().try_for_each(|run| sink(&values[run.clone()]))
            }
            Source::Buffer(which, slot) => self.runs.iter().try_for_each(|run| {
                run.clone().step_by(STRETCH).try_for_each(|first| {
                    let len = STRETCH.min(run.end - first);
                    let part = Slot { offset: slot.offset + first, shape: vec![len], ..*slot };
                    sink(&backend.values(&backend.view(buffers[*which], &part)))
                })
            }),
        }
    }
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

impl<B: Backend> State<'_, B> {
    /// Everything that this rank writes.
    pub(super) fn held(&self, backend: &B) -> Vec<Held<B>> {
        let layout = self.model.layout();
        let mut held = Vec::new();
        for (which, prefix) in PREFIXES.iter().enumerate() {
            for (name, slot, info) in layout.iter() {
                held.extend(self.of_parameter(backend, format!("{prefix}.{name}"), which, &slot, info));
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
        which: usize,
        slot: &Slot,
        info: &ParamInfo,
    ) -> Vec<Held<B>> {
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
            runs.iter_mut().for_each(|run| *run = run.start - start..run.end - start);
            let source = Slot { row: slot.row, offset: at, shape: Vec::new() };
            Held {
                tensor: tensor.clone(),
                logical: info.shape.clone(),
                offset,
                shape: local.1,
                source: Source::Buffer(which, source),
                runs,
            }
        });
        held.collect()
    }

    fn of_carried(&self, backend: &B, tensor: String, values: &B::Tensor, cuts: &Cuts) -> Vec<Held<B>> {
        let local_shape = backend.shape(values);
        let (rows, dp) = (local_shape[0], backend.group_rank(Group::Dp));
        let mut logical = cuts.logical().to_vec();
        logical[0] *= backend.group_size(Group::Dp);
        let held = owned(cuts, self.model.layout(), 0..local_shape.iter().product()).into_iter();
        let held = held.map(|(mut offset, local)| {
            offset[0] += dp * rows;
            let runs = runs(&local_shape, &local);
            let (tensor, logical) = (tensor.clone(), logical.clone());
            let source = Source::Tensor(values.clone());
            Held { tensor, logical, offset, shape: local.1, source, runs }
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
