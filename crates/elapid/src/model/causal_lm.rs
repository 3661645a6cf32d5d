//! The language model, written once, forward only, for every device.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use elapid_tensor::{
    Backend, Checkpointing, DType, FlatShape, Group, Mamba2Weights, Row, Slot, State, Tape, Var, Weight,
};

use super::init::{Init, initialise};
use super::layout::{Layout, Replica};
use super::pretrained::{self, FileDType};
use super::shard::{self, Share};
use crate::Error;
use crate::config::ModelConfig;
use crate::memory;

/// A Mamba-2 language model and its parameters on a device.
///
/// The masters are fp32, always. A model that computes in bf16 also holds a bf16 copy of them, from which the large
/// parameters are read; what the layout declares fp32 is read from the masters.
pub struct Mamba2ForCausalLM<B: Backend> {
    config: ModelConfig,
    layout: Layout,
    dtype: DType,
    masters: B::Buffer,
    /// The copy in compute dtype; None where the masters are that.
    compute: Option<B::Buffer>,
    zero1: Option<Zero1<B>>,
    sequence_parallel: bool,
}

/// What [`Mamba2ForCausalLM::with_zero1`] adds: the masters are this rank's shard of every row.
struct Zero1<B: Backend> {
    /// Whole rows' ends, from where weight decay ends: there lie the parameters that are fp32 even in a model that
    /// computes in bf16. None where the compute copy is fp32 itself.
    ends: Option<B::Buffer>,
}

/// Weights of one block.
struct Block<T> {
    norm: Weight<T>,
    in_proj: Weight<T>,
    in_proj_bias: Option<Weight<T>>,
    mixer: Mamba2Weights<Weight<T>>,
    out_proj: Weight<T>,
    out_proj_bias: Option<Weight<T>>,
}

/// Where the residual stream lies between the blocks: whole on every tensor-parallel rank, or with sequence parallelism
/// each rank's part of the positions. On a single rank both ways are nothing.
#[derive(Clone, Copy)]
struct Span {
    sequence_parallel: bool,
    /// L.
    length: usize,
}

impl Span {
    /// From the residual stream to where the ranks work apart, each with weights of its own.
    fn enter<B: Backend>(self, tape: &mut Tape<'_, B>, x: &Var<B::Tensor>) -> Var<B::Tensor> {
        if self.sequence_parallel { tape.gather_sequence(x, self.length) } else { tape.copy_to_tp(x) }
    }

    /// From there back, where the sum of what the ranks found counts.
    fn leave<B: Backend>(self, tape: &mut Tape<'_, B>, x: &Var<B::Tensor>) -> Var<B::Tensor> {
        if self.sequence_parallel { tape.reduce_scatter_sequence(x) } else { tape.reduce_from_tp(x) }
    }
}

/// A rank's part of a row.
fn shard_of(row: &Slot, ranks: usize, rank: usize) -> Slot {
    let len = row.len() / ranks;
    Slot { row: row.row, offset: rank * len, shape: vec![len] }
}

impl<B: Backend> Mamba2ForCausalLM<B> {
    /// A model of zeros, to be [loaded](Self::load): this rank's part of it, where the backend has tensor-parallel
    /// neighbours ([`check_ranks`](super::shard::check_ranks) says how many a model can have).
    pub fn empty(backend: &B, config: &ModelConfig, dtype: DType) -> Self {
        let share = Share { ranks: backend.group_size(Group::Tp), rank: backend.group_rank(Group::Tp) };
        let layout = Layout::sharded(config, share).dealt_to(backend.group_size(Group::Dp));
        let masters = backend.buffer(layout.flat, DType::F32);
        let compute = (dtype != DType::F32).then(|| backend.buffer(layout.flat, dtype));
        Self {
            config: config.clone(),
            layout,
            dtype,
            masters,
            compute,
            zero1: None,
            sequence_parallel: false,
        }
    }

    /// The same model with the residual stream cut along the sequence, between the tensor-parallel ranks
    /// (`--sequence-parallel-enabled`). On a single rank it changes nothing.
    pub fn with_sequence_parallel(self, sequence_parallel: bool) -> Self {
        Self { sequence_parallel, ..self }
    }

    /// Whether the residual stream is cut along the sequence.
    pub fn sequence_parallel(&self) -> bool {
        self.sequence_parallel
    }

    /// A model with fresh parameters, computing in `dtype` (F32 or Bf16).
    pub fn new(backend: &B, config: &ModelConfig, dtype: DType, scheme: Init, seed: u64) -> Self {
        let mut model = Self::empty(backend, config, dtype);
        let Self { config, layout, masters, .. } = &mut model;
        initialise(config, layout, scheme, seed, |slot, values| backend.write_slot(masters, slot, values));
        model.refresh(backend);
        model
    }

    /// A model from a Hugging Face folder.
    ///
    /// # Errors
    /// When files are missing, damaged, or do not fit each other; when the model cannot be cut over so many ranks.
    pub fn from_pretrained(backend: &B, dir: &Path, dtype: DType) -> Result<Self, Error> {
        let config = ModelConfig::load(dir)?;
        shard::check_ranks(&config, backend.group_size(Group::Tp))?;
        let bytes = if dtype == DType::F32 { 4.0 } else { 6.0 };
        memory::check(
            Layout::new(&config).parameter_count() as f64 * bytes,
            &format!("the parameters that {} describes", dir.join("config.json").display()),
            "is the config.json the right one? Then a larger machine is needed",
        )?;
        let mut model = Self::empty(backend, &config, dtype);
        model.load(backend, dir)?;
        Ok(model)
    }

    /// Replaces all parameters by those of a Hugging Face folder.
    ///
    /// # Errors
    /// As [`Self::from_pretrained`].
    pub fn load(&mut self, backend: &B, dir: &Path) -> Result<(), Error> {
        let Self { layout, masters, .. } = self;
        pretrained::load_weights(dir, layout, |slot, values| backend.write_slot(masters, slot, values))?;
        self.refresh(backend);
        Ok(())
    }

    /// Writes a Hugging Face folder: `config.json`, `generation_config.json` and `model.safetensors`, in several files
    /// and an index above 5 GB. No second copy of the model is made. All tensor-parallel ranks call this together; the
    /// first one writes, and gathers one tensor at a time.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save_pretrained(&self, backend: &B, dir: &Path, disk: FileDType) -> Result<(), Error> {
        let places: BTreeMap<_, _> =
            self.layout.iter().map(|(name, slot, info)| (name, (slot, info))).collect();
        let Share { ranks, rank } = self.layout.share;
        if rank > 0 {
            // In the order in which the first rank asks.
            for (slot, _) in places.values() {
                shard::gather_parts(backend, &self.masters, slot, |_, _| ());
            }
            return Ok(());
        }
        let mut gathered = (String::new(), Vec::new());
        let source = |name: &str, first: usize, count: usize| {
            let (slot, info) = &places[name];
            if ranks == 1 {
                let offset = slot.offset + first;
                return self.parameter(backend, &Slot { row: slot.row, offset, shape: vec![count] });
            }
            if gathered.0 != name {
                // One tensor at a time: the last one goes first.
                gathered = (name.to_owned(), Vec::new());
                gathered.1 = shard::gather(backend, &self.masters, &self.layout, slot, info);
            }
            gathered.1[first..first + count].to_vec()
        };
        pretrained::save(dir, &self.config, &self.layout, disk, pretrained::MAX_SHARD_SIZE, source)
    }

    /// Brings the compute copy up to date with the masters; with ZeRO-1, from all data-parallel ranks, which call this
    /// together.
    pub fn refresh(&mut self, backend: &B) {
        let Some(compute) = &mut self.compute else { return };
        let Some(Zero1 { ends }) = &mut self.zero1 else {
            return backend.cast_buffer(&self.masters, compute);
        };
        for row in backend.every_row(self.layout.flat) {
            backend.all_gather_row(&self.masters, row, compute, Group::Dp);
            if let Some(ends) = ends {
                backend.all_gather_row(&self.masters, row, ends, Group::Dp);
            }
        }
    }

    /// The same model of which this rank keeps its shard of the masters only, one of as many as there are data-parallel
    /// ranks, beside all parameters in compute dtype (ZeRO stage 1). A rank alone keeps everything.
    pub fn with_zero1(self, backend: &B) -> Self {
        let flat = self.layout.flat;
        let (ranks, rank) = (backend.group_size(Group::Dp), backend.group_rank(Group::Dp));
        if ranks == 1 {
            return self;
        }
        let mut shard = backend.buffer(flat.shard(ranks), DType::F32);
        for row in flat.rows() {
            let whole = shard_of(&flat.whole(row), ranks, rank);
            let values = self.parameter(backend, &whole);
            backend.write_slot(&mut shard, &Slot { offset: 0, ..whole }, &values);
        }
        let mut model = self.keeping(backend, shard);
        model.refresh(backend);
        model
    }

    /// [`Self::with_zero1`] of a model whose parameters are still to come: nothing is read or gathered.
    pub fn with_empty_zero1(self, backend: &B) -> Self {
        let ranks = backend.group_size(Group::Dp);
        if ranks == 1 {
            return self;
        }
        let shard = backend.buffer(self.layout.flat.shard(ranks), DType::F32);
        self.keeping(backend, shard)
    }

    /// The same model with `shard` for its masters; what it had becomes the compute copy where there is none.
    fn keeping(mut self, backend: &B, shard: B::Buffer) -> Self {
        let flat = self.layout.flat;
        let whole = std::mem::replace(&mut self.masters, shard);
        let ends = self.compute.is_some().then(|| {
            let (row, shared) = self.layout.decayed;
            let ends = FlatShape { row: flat.row - row, shared: flat.shared - shared, ..flat };
            backend.buffer(ends, DType::F32)
        });
        self.compute.get_or_insert(whole);
        self.zero1 = Some(Zero1 { ends });
        self
    }

    /// The same model with whole masters on every rank; all data-parallel ranks call this together.
    pub fn without_zero1(mut self, backend: &B) -> Self {
        if self.zero1.take().is_some() {
            let mut whole = backend.buffer(self.layout.flat, DType::F32);
            for row in self.layout.flat.rows() {
                backend.all_gather_row(&self.masters, row, &mut whole, Group::Dp);
            }
            self.masters = whole;
            self.compute = self.compute.filter(|_| self.dtype != DType::F32);
        }
        self
    }

    /// Whether this rank keeps its shard of the masters only.
    pub fn zero1(&self) -> bool {
        self.zero1.is_some()
    }

    /// Which part of every row the masters are: one of so many, and which.
    pub fn part(&self, backend: &B) -> (usize, usize) {
        match self.zero1 {
            Some(_) => (backend.group_size(Group::Dp), backend.group_rank(Group::Dp)),
            None => (1, 0),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layout of the flat buffers.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Compute dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The fp32 masters: whole rows, or this rank's shards of them.
    pub fn masters(&self) -> &B::Buffer {
        &self.masters
    }

    /// The copy in compute dtype; None where whole fp32 masters are that.
    pub fn compute(&self) -> Option<&B::Buffer> {
        self.compute.as_ref()
    }

    /// With ZeRO-1, in a model that computes in bf16: whole rows' ends, fp32.
    pub fn ends(&self) -> Option<&B::Buffer> {
        self.zero1.as_ref()?.ends.as_ref()
    }

    /// Masters, compute copy and [`Self::ends`], as far as they are there.
    pub fn buffers_mut(&mut self) -> [Option<&mut B::Buffer>; 3] {
        let ends = self.zero1.as_mut().and_then(|zero1| zero1.ends.as_mut());
        [Some(&mut self.masters), self.compute.as_mut(), ends]
    }

    /// The fp32 masters. After a change, [`Self::refresh`] is due.
    pub fn masters_mut(&mut self) -> &mut B::Buffer {
        &mut self.masters
    }

    /// What [`Backend::adamw`] changes: the masters, and where they are whole the copy in compute dtype. With ZeRO-1
    /// [`Self::refresh`] is due afterwards.
    pub fn updated(&mut self) -> (&mut B::Buffer, Option<&mut B::Buffer>) {
        let copy = self.compute.as_mut().filter(|_| self.zero1.is_none());
        (&mut self.masters, copy)
    }

    /// One parameter, or a stretch of one, fp32, on the host: this rank's part.
    pub fn parameter(&self, backend: &B, slot: &Slot) -> Vec<f32> {
        backend.values(&backend.view(&self.masters, slot))
    }

    /// Completes the gradients of a row of which each tensor-parallel rank has a part: those of weights that several
    /// ranks hold, but use for heads, or with sequence parallelism for positions, of their own (trap T12). Due once,
    /// after the last micro-step; all ranks call this together.
    pub fn sum_replicas(&self, backend: &B, grads: &mut B::Buffer, row: Row) {
        for Replica { range, copies, partial } in self.layout.replicas(row, self.sequence_parallel) {
            if partial {
                let slot = Slot { row, offset: range.start, shape: vec![range.len()] };
                backend.sum_slot_over_neighbours(grads, &slot, copies);
            }
        }
    }

    fn fp32(&self, backend: &B, slot: Slot) -> Weight<B::Tensor> {
        let value = match &self.zero1 {
            None => backend.view(&self.masters, &slot),
            Some(Zero1 { ends: None }) => return self.weight(backend, slot),
            Some(Zero1 { ends: Some(ends) }) => {
                let (row, shared) = self.layout.decayed;
                let start = if slot.row == Row::Shared { shared } else { row };
                backend.view(ends, &Slot { offset: slot.offset - start, ..slot.clone() })
            }
        };
        Weight { value, slot }
    }

    fn weight(&self, backend: &B, slot: Slot) -> Weight<B::Tensor> {
        Weight { value: backend.view(self.compute.as_ref().unwrap_or(&self.masters), &slot), slot }
    }

    fn block(&self, backend: &B, layer: usize) -> Block<B::Tensor> {
        let slots = self.layout.layer(layer);
        let weight = |slot| self.weight(backend, slot);
        let fp32 = |slot| self.fp32(backend, slot);
        Block {
            norm: fp32(slots.norm),
            in_proj: weight(slots.in_proj),
            in_proj_bias: slots.in_proj_bias.map(weight),
            mixer: Mamba2Weights {
                conv_weight: weight(slots.conv_weight),
                conv_bias: slots.conv_bias.map(weight),
                dt_bias: fp32(slots.dt_bias),
                a_log: fp32(slots.a_log),
                d: fp32(slots.d),
                norm_weight: fp32(slots.norm_weight),
            },
            out_proj: weight(slots.out_proj),
            out_proj_bias: slots.out_proj_bias.map(weight),
        }
    }

    /// Head weight: the embedding table where the two are tied (trap T14).
    fn head(&self, backend: &B) -> Weight<B::Tensor> {
        let shared = self.layout.shared();
        self.weight(backend, shared.head.unwrap_or(shared.embedding))
    }

    /// Element type of the residual stream.
    pub fn residual(&self) -> DType {
        if self.config.residual_in_fp32 { DType::F32 } else { self.dtype }
    }

    fn span(&self, length: usize) -> Span {
        Span { sequence_parallel: self.sequence_parallel, length }
    }

    /// Token ids `[B, L]` → the residual stream before the first block, as far as it is this rank's: `[B, L, D]`, or with
    /// sequence parallelism `[B, ⌈L / tp⌉, D]`.
    pub fn embed(&self, tape: &mut Tape<'_, B>, ids: &B::Tensor) -> Var<B::Tensor> {
        let backend = tape.backend();
        let table = self.weight(backend, self.layout.shared().embedding);
        let x = tape.embedding(&table, ids, self.residual());
        self.span(backend.shape(ids)[1]).leave(tape, &x)
    }

    /// The residual stream of L = `length` positions after all blocks; `documents` and `states` as in [`Self::hidden`].
    pub fn blocks<'a>(
        &self,
        tape: &mut Tape<'a, B>,
        x: Var<B::Tensor>,
        length: usize,
        documents: Option<&B::Tensor>,
        states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
    ) -> Var<B::Tensor> {
        let backend = tape.backend();
        let (eps, compute) = (self.config.layer_norm_epsilon as f32, self.dtype);
        let layers = self.layout.flat.layers;
        let blocks: Vec<_> = (0..layers).map(|layer| self.block(backend, layer)).collect();
        let (spec, span) = (self.layout.spec, self.span(length));
        let documents = documents.cloned();
        tape.layers(
            layers,
            x,
            states,
            checkpointing,
            Rc::new(move |tape, layer, x, before| {
                let block = &blocks[layer];
                let normed = tape.rms_norm(&x, &block.norm, eps, compute); // [B, L, D]
                let normed = span.enter(tape, &normed);
                let projected = tape.linear(&normed, &block.in_proj, block.in_proj_bias.as_ref()); // [B, L, E+C+H]
                let before = before
                    .map(|state| State { conv: Var::constant(state.conv), ssm: Var::constant(state.ssm) });
                let (y, after) = tape.mamba2(&spec, &projected, documents.as_ref(), before, &block.mixer); // [B, L, E]
                let out = tape.linear(&y, &block.out_proj, None); // [B, L, D]
                let out = span.leave(tape, &out);
                let mut out = tape.add(&x, &out);
                if let Some(bias) = &block.out_proj_bias {
                    out = tape.add_bias(&out, bias);
                }
                (out, State { conv: after.conv.value, ssm: after.ssm.value })
            }),
        )
    }

    /// The residual stream of L = `length` positions → hidden states after the final norm `[B, L, D]`.
    fn normed(&self, tape: &mut Tape<'_, B>, x: &Var<B::Tensor>, length: usize) -> Var<B::Tensor> {
        let norm = self.fp32(tape.backend(), self.layout.shared().norm_f);
        let x = tape.rms_norm(x, &norm, self.config.layer_norm_epsilon as f32, self.dtype);
        self.span(length).enter(tape, &x)
    }

    /// Token ids `[B, L]` → hidden states after the final norm `[B, L, D]`. `documents` `[B, L]` marks documents (see
    /// [`elapid_tensor::Mamba2Inputs`]); `states` carries each layer's state from call to call (empty: from the start),
    /// without a gradient.
    pub fn hidden(
        &self,
        tape: &mut Tape<'_, B>,
        ids: &B::Tensor,
        documents: Option<&B::Tensor>,
        states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
    ) -> Var<B::Tensor> {
        let length = tape.backend().shape(ids)[1];
        let x = self.embed(tape, ids);
        let x = self.blocks(tape, x, length, documents, states, checkpointing);
        self.normed(tape, &x, length)
    }

    /// Sum of token losses from the residual stream after all blocks, as [`Self::loss`].
    pub fn stream_loss(&self, tape: &mut Tape<'_, B>, x: &Var<B::Tensor>, labels: &B::Tensor) -> B::Tensor {
        let hidden = self.normed(tape, x, tape.backend().shape(labels)[1]);
        let head = self.head(tape.backend());
        tape.head_loss(&hidden, &head, labels, self.config.vocab_size)
    }

    /// Sum of token losses of `ids` `[B, L]` against `labels` `[B, L]`, where the label of a position is the token
    /// after it, or [`elapid_tensor::IGNORE_LABEL`]. fp32, shape `[]`. `documents` and `states` as in
    /// [`Self::hidden`].
    pub fn loss(
        &self,
        tape: &mut Tape<'_, B>,
        ids: &B::Tensor,
        labels: &B::Tensor,
        documents: Option<&B::Tensor>,
        states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
    ) -> B::Tensor {
        let hidden = self.hidden(tape, ids, documents, states, checkpointing);
        let head = self.head(tape.backend());
        tape.head_loss(&hidden, &head, labels, self.config.vocab_size)
    }

    /// fp32 logits `[B, L, V]` of all positions, on the host. For checks; generation asks for one position.
    pub fn logits(&self, backend: &B, ids: &B::Tensor) -> Vec<f32> {
        self.read_logits(backend, &self.device_logits(backend, ids, None))
    }

    /// fp32 logits `[B, L, V]` of all positions, on the device, where the vocabulary may be padded; `states` as in
    /// [`Self::hidden`].
    pub fn device_logits(
        &self,
        backend: &B,
        ids: &B::Tensor,
        states: Option<&mut Vec<State<B::Tensor>>>,
    ) -> B::Tensor {
        let mut tape = Tape::inference(backend);
        let hidden = self.hidden(&mut tape, ids, None, states, Checkpointing::None);
        self.project(backend, &hidden.value)
    }

    /// fp32 logits `[.., V]` of `hidden` `[.., D]` from the vocabulary of all tensor-parallel ranks, the padding of the
    /// last one with it.
    fn project(&self, backend: &B, hidden: &B::Tensor) -> B::Tensor {
        let own = backend.logits(hidden, &self.head(backend).value);
        backend.all_gather(&own, backend.shape(&own).len() - 1, Group::Tp)
    }

    /// Logits on the host, without padding.
    fn read_logits(&self, backend: &B, logits: &B::Tensor) -> Vec<f32> {
        let (vocab, width) = (self.config.vocab_size, *backend.shape(logits).last().expect("not a scalar"));
        let values = backend.values(logits);
        if width == vocab {
            return values;
        }
        values.chunks_exact(width).flat_map(|row| &row[..vocab]).copied().collect()
    }

    /// Reads `ids` `[B, L]` on from `states` (empty: from the start), leaves the new states there, and gives the fp32
    /// logits `[B, V]` after the last position. `documents` as in [`Self::hidden`].
    pub fn next_logits(
        &self,
        backend: &B,
        ids: &B::Tensor,
        documents: Option<&B::Tensor>,
        states: &mut Vec<State<B::Tensor>>,
    ) -> Vec<f32> {
        let shape = backend.shape(ids);
        let mut tape = Tape::inference(backend);
        let hidden = self.hidden(&mut tape, ids, documents, Some(states), Checkpointing::None);
        // Only the last positions meet the vocabulary.
        let d = self.config.hidden_size;
        let rows = backend.values(&hidden.value);
        let last: Vec<f32> =
            rows.chunks_exact(shape[1] * d).flat_map(|row| &row[row.len() - d..]).copied().collect();
        let last = backend.tensor(&last, &[shape[0], d], self.dtype);
        self.read_logits(backend, &self.project(backend, &last))
    }
}
