//! One optimizer step: micro-steps that accumulate gradients, and an update.

use std::collections::VecDeque;

use elapid_tensor::{
    AdamW, Backend, Checkpointing, Clipping, DType, Decayed, Group, Row, Slot, State, Tape, Watch,
};

use super::Batch;
use crate::model::{Layout, Mamba2ForCausalLM};

/// What an optimizer step came to.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Mean token loss of the whole batch, before the update.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// False: loss or gradient was not finite, and nothing was updated.
    pub finite: bool,
}

impl StepReport {
    fn read<B: Backend>(backend: &B, loss: &B::Tensor, clip: &B::Tensor, valid: usize) -> Self {
        let outcome = backend.values(clip);
        Self {
            loss: f64::from(backend.values(loss)[0]) / valid as f64,
            grad_norm: f64::from(outcome[0]),
            finite: outcome[2] != 0.0,
        }
    }
}

/// So many rows travel at once: each is a copy.
pub(super) const UNDER_WAY: usize = 2;

/// A model in training: parameters, accumulated gradients, AdamW's moments.
pub struct Trainer<'b, B: Backend> {
    backend: &'b B,
    model: Mamba2ForCausalLM<B>,
    grads: B::Buffer,
    /// With ZeRO-1: this rank's shard of the sum of all ranks' gradients.
    shard: Option<B::Buffer>,
    /// Rows of gradients that have been summed over the ranks already.
    summed: Vec<Row>,
    m: B::Buffer,
    v: B::Buffer,
    /// Sum of token losses since the last update; None before the first micro-step.
    loss: Option<B::Tensor>,
    checkpointing: Checkpointing,
    /// With states carried: those after the last micro-step, by layer; empty before the first.
    states: Option<Vec<State<B::Tensor>>>,
}

impl<'b, B: Backend> Trainer<'b, B> {
    /// Starts with zero gradients and moments.
    pub fn new(backend: &'b B, model: Mamba2ForCausalLM<B>, checkpointing: Checkpointing) -> Self {
        let flat = model.layout().flat;
        let zeros = |flat| backend.buffer(flat, DType::F32);
        let own = flat.shard(model.part(backend).0);
        Self {
            backend,
            grads: zeros(flat),
            summed: Vec::new(),
            shard: model.zero1().then(|| zeros(own)),
            m: zeros(own),
            v: zeros(own),
            model,
            loss: None,
            checkpointing,
            states: None,
        }
    }

    /// Carries the state of each batch row from micro-step to micro-step, as far as [`Batch::continued`] says:
    /// truncated back-propagation through time, with no gradient from one batch into the one before.
    pub fn with_carried_states(self) -> Self {
        Self { states: Some(Vec::new()), ..self }
    }

    /// The carried states by layer, batch rows as in the micro-steps; None where none are carried. Together with
    /// parameters, moments and the number of the step they are all that a run is.
    pub fn states(&self) -> Option<&[State<B::Tensor>]> {
        self.states.as_deref()
    }

    /// Puts back what [`Self::states`] gave.
    pub fn set_states(&mut self, states: Vec<State<B::Tensor>>) {
        self.states = Some(states);
    }

    /// The model as it is now.
    pub fn model(&self) -> &Mamba2ForCausalLM<B> {
        &self.model
    }

    /// The accumulated gradients of the *sum* of token losses.
    pub fn grads(&self) -> &B::Buffer {
        &self.grads
    }

    /// What an optimizer step changes: the fp32 masters and AdamW's first and second moments.
    pub fn state(&self) -> [&B::Buffer; 3] {
        [self.model.masters(), &self.m, &self.v]
    }

    /// Replaces [`Self::state`] by what `read` gives of each of the three: of every parameter what this rank holds, with its
    /// place. `read` is told the layout and which part of how many of each row that is (number of parts, part). Brings the
    /// model up to date; all ranks call this together.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn replace_state<E>(
        &mut self,
        mut read: impl FnMut(usize, &Layout, (usize, usize), &mut dyn FnMut(&Slot, &[f32])) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { backend, model, m, v, .. } = self;
        let layout = model.layout().clone();
        let part = model.part(backend);
        for (which, buffer) in [model.masters_mut(), m, v].into_iter().enumerate() {
            read(which, &layout, part, &mut |slot, values| backend.write_slot(buffer, slot, values))?;
        }
        model.refresh(backend);
        Ok(())
    }

    /// Replaces [`Self::state`] by `rows(which, row, len)`, the elements of each row of each of the three on this rank.
    /// Before the model computes again [`Self::refresh`] is due.
    pub fn replace_rows<'v>(&mut self, rows: impl Fn(usize, Row, usize) -> &'v [f32]) {
        let Self { backend, model, m, v, .. } = self;
        let flat = model.layout().flat.shard(model.part(backend).0);
        for (which, buffer) in [model.masters_mut(), m, v].into_iter().enumerate() {
            for row in flat.rows() {
                let slot = flat.whole(row);
                if !slot.is_empty() {
                    backend.write_slot(buffer, &slot, rows(which, row, slot.len()));
                }
            }
        }
    }

    /// Replaces [`Self::grads`], which are not summed over ranks, by `rows(row, len)`.
    pub fn replace_gradients<'v>(&mut self, rows: impl Fn(Row, usize) -> &'v [f32]) {
        let flat = self.model.layout().flat;
        for row in flat.rows() {
            let slot = flat.whole(row);
            if !slot.is_empty() {
                self.backend.write_slot(&mut self.grads, &slot, rows(row, slot.len()));
            }
        }
        self.summed.clear();
    }

    /// Brings what the model computes with up to date; all ranks call this together.
    pub fn refresh(&mut self) {
        self.model.refresh(self.backend);
    }

    /// Forgets the micro-steps since the last update; `states` are the carried ones before them.
    pub fn restart(&mut self, states: Option<Vec<State<B::Tensor>>>) {
        self.backend.zero_buffer(&mut self.grads);
        self.loss = None;
        self.states = states;
    }

    /// Forward and adjoints of one batch; adds to loss and gradients. Reads nothing back.
    pub fn micro_step(&mut self, batch: &Batch) {
        self.watched_micro_step(batch, None);
    }

    /// [`Self::micro_step`], each of its tensors shown to `watch`.
    pub fn watched_micro_step(&mut self, batch: &Batch, watch: Option<&Watch<'_, B::Tensor>>) {
        self.run_micro_step(batch, watch, false);
    }

    /// [`Self::micro_step`] where an update follows. Each layer's gradients travel to the other data-parallel ranks as
    /// soon as they are complete, while the adjoints of the layers below run.
    pub fn last_micro_step(&mut self, batch: &Batch) {
        self.run_micro_step(batch, None, self.backend.group_size(Group::Dp) > 1);
    }

    fn run_micro_step(&mut self, batch: &Batch, watch: Option<&Watch<'_, B::Tensor>>, send: bool) {
        let Self { backend, model, grads, shard, summed, .. } = self;
        let (backend, scatter) = (*backend, shard.is_some());
        let mut under_way = VecDeque::new();
        let mut done = |backend: &B, grads: &mut B::Buffer, row| {
            model.sum_replicas(backend, grads, row);
            if under_way.len() == UNDER_WAY
                && let Some(first) = under_way.pop_front()
            {
                backend.finish_sum(first, shard.as_mut().unwrap_or(grads));
            }
            under_way.push_back(backend.start_sum(grads, row, scatter, Group::Dp));
            summed.push(row);
        };
        let mut tape = Tape::training(backend, grads).watched(watch).telling(send.then_some(&mut done));
        let loss = batch.loss(&mut tape, model, self.states.as_mut(), self.checkpointing);
        tape.backward(&[], &[]);
        for pending in under_way {
            backend.finish_sum(pending, shard.as_mut().unwrap_or(grads));
        }
        self.loss = Some(match self.loss.take() {
            None => loss,
            Some(sum) => backend.add(&sum, &loss),
        });
    }

    /// Sums the gradients over the ranks, scales them by 1 / `valid`, the number of all ranks' labels since the last
    /// update, clips them to `max_norm` (≤ 0: not at all) and applies AdamW. Where loss or gradient is not finite
    /// nothing changes and the gradients stay for inspection, summed. All ranks call this together and report the same.
    ///
    /// # Panics
    /// Without a micro-step since the last update.
    pub fn update(&mut self, hyper: &AdamW, max_norm: f32, valid: usize) -> StepReport {
        let [clip, loss] = self.enqueue_update(hyper, max_norm, valid);
        // The step is enqueued; only now does the host look.
        let report = StepReport::read(self.backend, &loss, &clip, valid);
        // With ZeRO-1 the update has made zeros of the shard alone.
        if report.finite && self.shard.is_some() {
            self.backend.zero_buffer(&mut self.grads);
        }
        report
    }

    /// Sums the gradients over the ranks, as far as [`Self::last_micro_step`] has not done it: the first thing that an update
    /// does. All ranks call this together.
    pub fn sum_gradients(&mut self) {
        let Self { backend, model, grads, shard, summed, .. } = self;
        let flat = model.layout().flat;
        for row in backend.every_row(flat) {
            if summed.contains(&row) {
                continue;
            }
            model.sum_replicas(backend, grads, row);
            match shard {
                Some(shard) => backend.reduce_scatter_row(grads, row, shard, Group::Dp),
                None => backend.all_reduce_slot(grads, &flat.whole(row), Group::Dp),
            }
            summed.push(row);
        }
    }

    /// The gradients after [`Self::sum_gradients`]: whole rows, or with ZeRO-1 this rank's shards of them.
    pub fn summed_gradients(&self) -> &B::Buffer {
        self.shard.as_ref().unwrap_or(&self.grads)
    }

    /// The part of [`Self::update`] that runs on the device: gives [`Backend::clip`]'s outcome and the sum of token
    /// losses. Where that is finite the gradients are zeros afterwards, with ZeRO-1 of the shard only. Reads nothing back.
    ///
    /// # Panics
    /// As [`Self::update`].
    pub fn enqueue_update(&mut self, hyper: &AdamW, max_norm: f32, valid: usize) -> [B::Tensor; 2] {
        let loss = self.loss.take().expect("an update follows a micro-step");
        let loss = self.backend.all_reduce(&loss, Group::Dp);
        self.sum_gradients();
        let Self { backend, model, grads, shard, summed, m, v, .. } = self;
        let (dealt, copies, (layer, shared)) =
            (shard.is_some(), model.layout().copies(), model.layout().decayed);
        let over: &[_] = if dealt { &[Group::Tp, Group::Dp] } else { &[Group::Tp] };
        let copies = (&copies.0[..], &copies.1[..]);
        let clipping = Clipping { scale: 1.0 / valid as f32, max_norm, copies, over };
        let total = shard.as_mut().unwrap_or(grads);
        let clip = backend.clip(total, &loss, &clipping);
        let decayed = Decayed { layer, shared, dealt };
        let (masters, copy) = model.updated();
        backend.adamw(hyper, decayed, &clip, total, masters, m, v, copy);
        if dealt {
            model.refresh(backend);
        }
        summed.clear();
        [clip, loss]
    }

    /// Sum of token losses since the last update; None before the first micro-step.
    pub fn loss(&self) -> Option<&B::Tensor> {
        self.loss.as_ref()
    }

    /// Goes on from micro-steps that were taken elsewhere, whose losses come to `loss`.
    pub fn set_loss(&mut self, loss: B::Tensor) {
        self.loss = Some(loss);
    }

    /// What [`Self::update`] would report; nothing is updated.
    ///
    /// # Panics
    /// Without a micro-step since the last update.
    pub fn report(&self, valid: usize) -> StepReport {
        let loss = self.loss.as_ref().expect("a report follows a micro-step");
        let clip = self.backend.clip(&self.grads, loss, &Clipping::alone(1.0 / valid as f32, 0.0));
        StepReport::read(self.backend, loss, &clip, valid)
    }

    /// Gives the model back.
    pub fn into_model(self) -> Mamba2ForCausalLM<B> {
        self.model
    }
}
