//! A backend that hands every op on to the CPU and keeps account: calls, seconds, arithmetic, memory traffic.

use std::sync::Mutex;
use std::time::Instant;

use elapid_cpu::{Buffer, CpuBackend, Pending, Tensor};
use elapid_tensor::{
    AdamW, Backend, Clipping, DType, Decayed, FlatShape, Group, Mamba2Grads, Mamba2Inputs, Mamba2Output,
    Mamba2Sinks, Mamba2Spec, Mamba2Weights, Row, Sink, Slot, State,
};

/// What is between ranks and computes nothing: a collective that the rank takes part in, a row handed to the thread that
/// carries it, and waiting for that row.
pub(super) const BETWEEN_RANKS: [&str; 3] = [COLLECTIVE, SEND, AWAIT];
const COLLECTIVE: &str = "collective";
const SEND: &str = "send row";
/// Seconds in it are spent waiting for another thread's collective.
pub(super) const AWAIT: &str = "await row";

/// What an op has to do, whatever its kernel does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Arithmetic, a multiply-add counted as two. Products, convolution and scan as in
    /// [`ModelConfig::flops_per_token`](crate::config::ModelConfig::flops_per_token).
    pub flops: u64,
    /// Operands read and results written once each; gradients that are added to count as both.
    pub bytes: u64,
}

/// What the calls of one op came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Number of calls.
    pub calls: u64,
    /// Seconds in them.
    pub seconds: f64,
    /// Their work.
    pub work: Work,
}

/// See the module's text.
pub struct Timed {
    inner: CpuBackend,
    tallies: Mutex<Vec<(&'static str, Tally)>>,
}

impl Timed {
    /// Ops run on `inner`.
    pub fn new(inner: CpuBackend) -> Self {
        Self { inner, tallies: Mutex::new(Vec::new()) }
    }

    /// The backend that does the work.
    pub fn inner(&self) -> &CpuBackend {
        &self.inner
    }

    /// The account since the last call, op by op in the order of their first calls.
    pub fn take(&self) -> Vec<(&'static str, Tally)> {
        std::mem::take(&mut self.tallies.lock().expect("no op panics while it is booked"))
    }

    fn op<R>(&self, name: &'static str, flops: usize, bytes: usize, run: impl FnOnce(&CpuBackend) -> R) -> R {
        let start = Instant::now();
        let result = run(&self.inner);
        let seconds = start.elapsed().as_secs_f64();
        let mut tallies = self.tallies.lock().expect("no op panics while it is booked");
        let place = tallies.iter().position(|(of, _)| *of == name).unwrap_or_else(|| {
            tallies.push((name, Tally::default()));
            tallies.len() - 1
        });
        let tally = &mut tallies[place].1;
        tally.calls += 1;
        tally.seconds += seconds;
        tally.work.flops += flops as u64;
        tally.work.bytes += bytes as u64;
        result
    }
}

/// The two products of `linear`'s adjoint, by themselves.
impl Timed {
    /// See [`CpuBackend::linear_d_weight`].
    pub(super) fn linear_d_weight(&self, x: &Tensor, dy: &Tensor, d_weight: Sink<'_, Self>) {
        let sink = Sink { buffer: d_weight.buffer, slot: d_weight.slot };
        let (outputs, traffic) = (sink.slot.shape[0], bytes(x) + bytes(dy) + added(sink.slot.len()));
        self.op("linear d_weight", 2 * len(x) * outputs, traffic, |inner| inner.linear_d_weight(x, dy, sink));
    }

    /// See [`CpuBackend::linear_d_input`].
    pub(super) fn linear_d_input(&self, weight: &Tensor, dy: &Tensor) -> Tensor {
        let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
        let dx = len(dy) / outputs * inputs;
        let traffic = bytes(weight) + bytes(dy) + dx * size(dy.dtype());
        self.op("linear d_input", 2 * len(dy) * inputs, traffic, |inner| inner.linear_d_input(weight, dy))
    }
}

impl Timed {
    /// An op of several ranks; one alone does nothing.
    fn collective<R>(&self, group: Group, bytes: usize, run: impl FnOnce(&CpuBackend) -> R) -> R {
        if self.group_size(group) == 1 {
            return run(&self.inner);
        }
        self.op(COLLECTIVE, 0, bytes, run)
    }
}

fn size(dtype: DType) -> usize {
    if dtype == DType::Bf16 { 2 } else { 4 }
}

fn len(x: &Tensor) -> usize {
    x.shape().iter().product()
}

fn bytes(x: &Tensor) -> usize {
    len(x) * size(x.dtype())
}

/// An fp32 gradient of `len` elements is read, added to and written.
fn added(len: usize) -> usize {
    8 * len
}

/// FLOPs of `mamba2` a position: (forward, adjoint).
fn mamba2_flops(spec: &Mamba2Spec) -> (usize, usize) {
    let each = spec.conv_kernel * spec.conv_channels() + spec.inner();
    let state = spec.inner() * spec.state;
    (2 * each + 5 * state, 4 * each + 11 * state)
}

impl Backend for Timed {
    type Tensor = Tensor;
    type Buffer = Buffer;
    type Pending = Pending;

    fn tensor(&self, values: &[f32], shape: &[usize], dtype: DType) -> Tensor {
        self.inner.tensor(values, shape, dtype)
    }

    fn tensor_i32(&self, values: &[i32], shape: &[usize]) -> Tensor {
        self.inner.tensor_i32(values, shape)
    }

    fn values(&self, tensor: &Tensor) -> Vec<f32> {
        self.inner.values(tensor)
    }

    fn shape(&self, tensor: &Tensor) -> Vec<usize> {
        self.inner.shape(tensor)
    }

    fn buffer(&self, shape: FlatShape, dtype: DType) -> Buffer {
        self.inner.buffer(shape, dtype)
    }

    fn write_slot(&self, buffer: &mut Buffer, slot: &Slot, values: &[f32]) {
        self.inner.write_slot(buffer, slot, values);
    }

    fn view(&self, buffer: &Buffer, slot: &Slot) -> Tensor {
        self.inner.view(buffer, slot)
    }

    fn cast_buffer(&self, from: &Buffer, to: &mut Buffer) {
        let traffic = from.shape().len() * (size(from.dtype()) + size(to.dtype()));
        self.op("cast_buffer", 0, traffic, |inner| inner.cast_buffer(from, to));
    }

    fn zero_buffer(&self, buffer: &mut Buffer) {
        let traffic = buffer.shape().len() * size(buffer.dtype());
        self.op("zero_buffer", 0, traffic, |inner| inner.zero_buffer(buffer));
    }

    fn embedding(&self, table: &Tensor, ids: &Tensor, out: DType) -> Tensor {
        let elements = len(ids) * table.shape()[1];
        let traffic = elements * (size(table.dtype()) + size(out)) + bytes(ids);
        self.op("embedding", 0, traffic, |inner| inner.embedding(table, ids, out))
    }

    fn embedding_adjoint(&self, ids: &Tensor, dy: &Tensor, d_table: Sink<'_, Self>) {
        let sink = Sink { buffer: d_table.buffer, slot: d_table.slot };
        let traffic = bytes(ids) + bytes(dy) + added(len(dy));
        self.op("embedding adjoint", len(dy), traffic, |inner| inner.embedding_adjoint(ids, dy, sink));
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32, out: DType) -> Tensor {
        // Squares and their sum, scale and weight.
        let traffic = bytes(x) + bytes(weight) + len(x) * size(out);
        self.op("rms_norm", 4 * len(x), traffic, |inner| inner.rms_norm(x, weight, eps, out))
    }

    fn rms_norm_adjoint(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        dy: &Tensor,
        d_weight: Sink<'_, Self>,
    ) -> Tensor {
        let sink = Sink { buffer: d_weight.buffer, slot: d_weight.slot };
        // x̂, g, Σ x², Σ g·x̂, d_weight, and r·(g − x̂·mean).
        let traffic = 2 * bytes(x) + bytes(dy) + bytes(weight) + added(len(weight));
        self.op("rms_norm adjoint", 11 * len(x), traffic, |inner| {
            inner.rms_norm_adjoint(x, weight, eps, dy, sink)
        })
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
        let y = len(x) / inputs * outputs;
        let traffic = bytes(x) + bytes(weight) + bias.map_or(0, bytes) + y * size(x.dtype());
        self.op("linear", 2 * len(x) * outputs, traffic, |inner| inner.linear(x, weight, bias))
    }

    fn linear_adjoint(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        d_weight: Sink<'_, Self>,
        d_bias: Option<&Slot>,
    ) -> Tensor {
        let sink = Sink { buffer: d_weight.buffer, slot: d_weight.slot };
        let added = added(len(weight) + d_bias.map_or(0, Slot::len));
        let traffic = 2 * bytes(x) + bytes(weight) + bytes(dy) + added;
        self.op("linear adjoint", 4 * len(x) * weight.shape()[0], traffic, |inner| {
            inner.linear_adjoint(x, weight, dy, sink, d_bias)
        })
    }

    fn add_bias(&self, x: &Tensor, bias: &Tensor) -> Tensor {
        self.op("add_bias", len(x), 2 * bytes(x) + bytes(bias), |inner| inner.add_bias(x, bias))
    }

    fn add_bias_adjoint(&self, dy: &Tensor, d_bias: Sink<'_, Self>) {
        let sink = Sink { buffer: d_bias.buffer, slot: d_bias.slot };
        let traffic = bytes(dy) + added(sink.slot.len());
        self.op("add_bias adjoint", len(dy), traffic, |inner| inner.add_bias_adjoint(dy, sink));
    }

    fn resize(&self, x: &Tensor, length: usize) -> Tensor {
        let traffic = bytes(x) + bytes(x) / x.shape()[1] * length;
        self.op("resize", 0, traffic, |inner| inner.resize(x, length))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.op("add", len(a), 2 * bytes(a) + bytes(b), |inner| inner.add(a, b))
    }

    fn cast(&self, x: &Tensor, dtype: DType) -> Tensor {
        if x.dtype() == dtype {
            return self.inner.cast(x, dtype);
        }
        self.op("cast", 0, bytes(x) + len(x) * size(dtype), |inner| inner.cast(x, dtype))
    }

    fn dtype(&self, x: &Tensor) -> DType {
        self.inner.dtype(x)
    }

    fn mamba2(
        &self,
        spec: &Mamba2Spec,
        inputs: Mamba2Inputs<Tensor>,
        weights: &Mamba2Weights<Tensor>,
        save: bool,
    ) -> Mamba2Output<Tensor> {
        let x = &inputs.projected;
        let positions = len(x) / spec.projection();
        let y = positions * spec.inner() * size(x.dtype());
        let state = |state: &State<Tensor>| bytes(&state.conv) + bytes(&state.ssm);
        let traffic = bytes(x) + y + inputs.initial.as_ref().map_or(0, state);
        self.op("mamba2", positions * mamba2_flops(spec).0, traffic, |inner| {
            inner.mamba2(spec, inputs, weights, save)
        })
    }

    fn mamba2_adjoint(
        &self,
        spec: &Mamba2Spec,
        inputs: &Mamba2Inputs<Tensor>,
        weights: &Mamba2Weights<Tensor>,
        saved: &[Tensor],
        dy: &Tensor,
        d_state: Option<&State<Tensor>>,
        grads: &mut Buffer,
        sinks: &Mamba2Sinks<'_>,
    ) -> Mamba2Grads<Tensor> {
        let x = &inputs.projected;
        let positions = len(x) / spec.projection();
        self.op("mamba2 adjoint", positions * mamba2_flops(spec).1, 2 * bytes(x) + bytes(dy), |inner| {
            inner.mamba2_adjoint(spec, inputs, weights, saved, dy, d_state, grads, sinks)
        })
    }

    fn head_loss(&self, x: &Tensor, weight: &Tensor, labels: &Tensor, vocab: usize) -> Tensor {
        let traffic = bytes(x) + bytes(weight) + bytes(labels);
        self.op("head_loss", 2 * len(x) * weight.shape()[0], traffic, |inner| {
            inner.head_loss(x, weight, labels, vocab)
        })
    }

    fn head_loss_adjoint(
        &self,
        x: &Tensor,
        weight: &Tensor,
        labels: &Tensor,
        vocab: usize,
        d_weight: Sink<'_, Self>,
    ) -> (Tensor, Tensor) {
        let sink = Sink { buffer: d_weight.buffer, slot: d_weight.slot };
        let traffic = 2 * bytes(x) + bytes(weight) + bytes(labels) + added(len(weight));
        // Forward and adjoint are one pass.
        self.op("head_loss adjoint", 6 * len(x) * weight.shape()[0], traffic, |inner| {
            inner.head_loss_adjoint(x, weight, labels, vocab, sink)
        })
    }

    fn logits(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
        let traffic = bytes(x) + bytes(weight) + 4 * len(x) / inputs * outputs;
        self.op("logits", 2 * len(x) * outputs, traffic, |inner| inner.logits(x, weight))
    }

    fn group_size(&self, group: Group) -> usize {
        self.inner.group_size(group)
    }

    fn group_rank(&self, group: Group) -> usize {
        self.inner.group_rank(group)
    }

    fn all_reduce(&self, x: &Tensor, group: Group) -> Tensor {
        self.collective(group, bytes(x), |inner| inner.all_reduce(x, group))
    }

    fn all_reduce_max(&self, x: &Tensor, group: Group) -> Tensor {
        self.collective(group, bytes(x), |inner| inner.all_reduce_max(x, group))
    }

    fn all_gather(&self, x: &Tensor, axis: usize, group: Group) -> Tensor {
        let traffic = bytes(x) * self.group_size(group);
        self.collective(group, traffic, |inner| inner.all_gather(x, axis, group))
    }

    fn reduce_scatter(&self, x: &Tensor, axis: usize, group: Group) -> Tensor {
        self.collective(group, bytes(x), |inner| inner.reduce_scatter(x, axis, group))
    }

    fn all_reduce_slot(&self, buffer: &mut Buffer, slot: &Slot, group: Group) {
        let traffic = slot.len() * size(buffer.dtype());
        self.collective(group, traffic, |inner| inner.all_reduce_slot(buffer, slot, group));
    }

    fn sum_slot_over_neighbours(&self, buffer: &mut Buffer, slot: &Slot, ranks: usize) {
        let traffic = slot.len() * size(buffer.dtype());
        self.collective(Group::Tp, traffic, |inner| inner.sum_slot_over_neighbours(buffer, slot, ranks));
    }

    fn reduce_scatter_row(&self, whole: &mut Buffer, row: Row, shard: &mut Buffer, group: Group) {
        let traffic = 4 * whole.shape().whole(row).len();
        self.collective(group, traffic, |inner| inner.reduce_scatter_row(whole, row, shard, group));
    }

    fn start_sum(&self, buffer: &Buffer, row: Row, scatter: bool, group: Group) -> Pending {
        let traffic = 8 * buffer.shape().whole(row).len();
        self.op(SEND, 0, traffic, |inner| inner.start_sum(buffer, row, scatter, group))
    }

    fn finish_sum(&self, pending: Pending, to: &mut Buffer) {
        self.op(AWAIT, 0, 0, |inner| inner.finish_sum(pending, to));
    }

    fn all_gather_row(&self, shard: &Buffer, row: Row, whole: &mut Buffer, group: Group) {
        let traffic = whole.shape().whole(row).len() * size(whole.dtype());
        self.collective(group, traffic, |inner| inner.all_gather_row(shard, row, whole, group));
    }

    fn clip(&self, grads: &Buffer, loss: &Tensor, clipping: &Clipping<'_>) -> Tensor {
        let n = grads.shape().len();
        self.op("clip", 2 * n, 4 * n, |inner| inner.clip(grads, loss, clipping))
    }

    fn adamw(
        &self,
        hyper: &AdamW,
        decayed: Decayed,
        clip: &Tensor,
        grads: &mut Buffer,
        params: &mut Buffer,
        m: &mut Buffer,
        v: &mut Buffer,
        copy: Option<&mut Buffer>,
    ) {
        // g, m and v 1 + 3 + 4; m̂, v̂, root, + eps, quotient, decay 2, rate, difference 9. Reads four, writes them and the copy.
        let n = grads.shape().len();
        let traffic = n * (32 + copy.as_ref().map_or(0, |copy| size(copy.dtype())));
        self.op("adamw", 17 * n, traffic, |inner| {
            inner.adamw(hyper, decayed, clip, grads, params, m, v, copy)
        });
    }
}
