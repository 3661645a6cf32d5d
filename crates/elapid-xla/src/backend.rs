//! The backend: recording of every op of the contract.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use elapid_tensor::{
    AdamW, Backend, Clipping, DType, Decayed, FlatShape, Group, LayerLoop, Mamba2Grads, Mamba2Inputs,
    Mamba2Output, Mamba2Sinks, Mamba2Spec, Mamba2Weights, Row, Sink, Slot, State,
};

use crate::buffer::{XlaBuffer, index, update};
use crate::evaluate::Executor;
use crate::hlo::graph::{Collective, Graph, Grid, Kind, Op, Place, Ranks, Value};
use crate::hlo::{Literal, Module, Output, Shape, Type, emit};
use crate::ops;
use crate::tensor::{Recorded, Source, XlaTensor};
use crate::trace::{AdjointLoop, Trace};

/// How layers are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopKind {
    /// One body, called once a layer: compilers inline it, and the layer's number is a constant then.
    Call,
    /// One body in a `while`, which a compiler unrolls by its constant number of turns.
    While,
    /// Every layer written out.
    Unrolled,
}

/// What a [`XlaBackend`] may be told.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How layers are recorded.
    pub layers: LoopKind,
    /// Logits and one-hot rows of one block hold at most this many numbers.
    pub block: usize,
    /// What is updated is written where it was; else beside it, under the same name.
    pub in_place: bool,
    /// Data-parallel ranks that run a module together.
    pub dp: usize,
    /// Tensor-parallel ranks, for each of them. Rank r of a run is number r / tp and r mod tp of the two.
    pub tp: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { layers: LoopKind::Call, block: 32 << 20, in_place: true, dp: 1, tp: 1 }
    }
}

/// An output of a module.
pub struct Result<'t> {
    /// Its name.
    pub name: String,
    /// What it gives.
    pub tensor: &'t XlaTensor,
    /// The input whose memory it takes over, by its number from [`XlaBackend::input_number`].
    pub replaces: Option<usize>,
}

/// Records ops.
pub struct XlaBackend {
    pub(crate) graph: Graph,
    pub(crate) options: Options,
    pub(crate) executor: Option<Box<dyn Executor>>,
    /// Tensors to compute when values are asked for; empty without an executor.
    live: Mutex<Vec<Weak<Recorded>>>,
    /// The layer that ops belong to, as far as their parameters tell.
    layer: Mutex<Option<usize>>,
    /// Names of the next tensors that come from the host.
    names: Mutex<VecDeque<&'static str>>,
    /// See [`Self::rank`].
    rank: OnceLock<XlaTensor>,
    /// The body of a layer loop that is recorded.
    pub(crate) trace: Mutex<Option<Trace>>,
    /// Loops whose adjoints are still to run.
    pub(crate) loops: Mutex<Vec<AdjointLoop>>,
}

impl XlaBackend {
    /// A backend that records. Without an executor, asking for values panics.
    pub fn new(options: Options, executor: Option<Box<dyn Executor>>) -> Self {
        let (live, layer, names, rank, trace, loops) = Default::default();
        let graph = Graph::new(Grid { dp: options.dp, tp: options.tp });
        Self { graph, options, executor, live, layer, names, rank, trace, loops }
    }

    /// A module named `name` that gives `results`.
    pub fn module(&self, name: &str, results: &[Result<'_>]) -> Module {
        let outputs: Vec<Output> = results
            .iter()
            .map(|r| Output { name: r.name.clone(), node: self.get(r.tensor).node, alias: r.replaces })
            .collect();
        emit(&self.graph, name, &outputs, self.options.in_place)
    }

    /// An input of modules that has no values yet.
    pub fn declare(&self, shape: Shape, name: &str) -> XlaTensor {
        self.input(shape, name, None)
    }

    /// The two arrays of a buffer, `[layers, row]` and `[shared]`, gradients added; None: it has no elements.
    pub fn arrays(&self, buffer: &XlaBuffer) -> [Option<XlaTensor>; 2] {
        buffer.arrays(self)
    }

    /// A buffer of some of the layers, and the whole shared region.
    pub fn of_layers(&self, buffer: &XlaBuffer, layers: Range<usize>) -> XlaBuffer {
        self.scope("of_layers", None);
        buffer.of_layers(self, layers)
    }

    /// Puts back what [`Self::of_layers`] gave, from layer `first` on.
    pub fn put_layers(&self, buffer: &mut XlaBuffer, first: usize, part: &XlaBuffer) {
        self.scope("put_layers", None);
        buffer.put_layers(self, first, part);
    }

    /// Names an input and gives its number; None: the tensor is no input.
    pub fn input_number(&self, tensor: &XlaTensor, name: &str) -> Option<usize> {
        let Source::Node(place) = tensor.0.source else { return None };
        let leaf = self.leaf_at(place)?;
        self.graph.lock().leaves[leaf].name = name.to_owned();
        Some(leaf)
    }

    /// Names the next tensors of integers that are made from host values, in order.
    pub fn name_next(&self, names: &[&'static str]) {
        locked(&self.names).extend(names);
    }

    /// The scalars of an update that are inputs of its module, with their names; `scale` is 1 / number of labels.
    pub fn step_inputs(hyper: &AdamW, scale: f32) -> [(&'static str, f32); 4] {
        let step = hyper.step as f64;
        let left = |beta: f32| 1.0 - f64::from(beta).powf(step);
        [
            ("scale", scale),
            ("lr", hyper.lr),
            ("bias_correction1", left(hyper.beta1) as f32),
            ("bias_correction2_root", left(hyper.beta2).sqrt() as f32),
        ]
    }

    /// The rows of `stack` `[n, ..]` as tensors of `shape`.
    pub fn rows(&self, stack: &XlaTensor, shape: &[usize]) -> Vec<XlaTensor> {
        let (of, stack) = (self.place(stack), stack.shape());
        let part = |row| {
            let source = Source::Part { of, row: Some(row), offset: 0 };
            XlaTensor::new(Shape::new(stack.ty, shape), source)
        };
        (0..stack.dims[0]).map(part).collect()
    }

    /// The reverse: `stack` `[n, len]` with its rows replaced.
    pub fn stack(&self, stack: &XlaTensor, rows: &[XlaTensor]) -> XlaTensor {
        let first = rows.first().map(|row| row.0.source);
        if let Some(Source::Part { of, row: Some(0), offset: 0 }) = first {
            let whole = |(i, row): (usize, &XlaTensor)| matches!(row.0.source, Source::Part { of: o, row: Some(r), offset: 0 } if o == of && r == i);
            if rows.iter().enumerate().all(whole) {
                return XlaTensor::new(stack.shape().clone(), Source::Node(of));
            }
        }
        let mut whole = self.get(stack);
        let len = stack.shape().dims[1];
        for (i, row) in rows.iter().enumerate() {
            let start = [index(&self.graph, i), index(&self.graph, 0)];
            whole = update(whole, self.get(row).reshape(&[1, len]), &start);
        }
        self.keep(whole)
    }

    /// `stack` `[n, B·len]`, each row of it the states of a batch, with zeros for the rows of the batch where `kept` `[B]`,
    /// s32, is 0.
    pub fn keep_rows(&self, stack: &XlaTensor, kept: &XlaTensor) -> XlaTensor {
        self.scope("keep_rows", None);
        let (stack, kept) = (self.get(stack), self.get(kept));
        let (shape, batch) = (stack.dims(), kept.dims()[0]);
        let parts = [shape[0], batch, shape[1] / batch];
        let kept = kept.compare_to("NE", 0.0).to(stack.ty()).expand(&parts, &[1]);
        self.keep((stack.reshape(&parts) * kept).reshape(&shape))
    }

    /// What was accumulated for an update, after it: zeros, unless `clip` says that nothing was updated.
    pub fn zero_where_finite(&self, tensor: &XlaTensor, clip: &XlaTensor) -> XlaTensor {
        self.scope("zero_buffer", None);
        let finite = self.get(clip).cut(2, &[]).compare_to("NE", 0.0);
        let (value, shape) = (self.get(tensor), tensor.shape());
        self.keep(finite.choose(self.graph.full(shape.ty, &shape.dims, 0.0), value))
    }

    /// The same elements in another shape.
    pub fn reshaped(&self, tensor: &XlaTensor, dims: &[usize]) -> XlaTensor {
        self.keep(self.get(tensor).reshape(dims))
    }

    pub(crate) fn input(&self, shape: Shape, name: &str, data: Option<Literal>) -> XlaTensor {
        let place = self.graph.leaf(shape.clone(), name, data);
        XlaTensor::new(shape, Source::Node(place))
    }

    /// Which rank runs the module, an input: s32 `[data-parallel rank, tensor-parallel rank]`.
    pub(crate) fn rank(&self) -> &XlaTensor {
        self.rank.get_or_init(|| self.input(Shape::new(Type::S32, &[2]), "rank", None))
    }

    /// A host scalar that changes from step to step: an input, not a constant.
    pub(crate) fn scalar_input(&self, name: &str, value: f32) -> XlaTensor {
        self.input(Shape::new(Type::F32, &[]), name, Some(Literal::F32(vec![value])))
    }

    pub(crate) fn live(&self) -> MutexGuard<'_, Vec<Weak<Recorded>>> {
        locked(&self.live)
    }

    /// Number of the input at `place`.
    pub(crate) fn leaf_at(&self, place: Place) -> Option<usize> {
        match self.graph.lock().computations[place.computation].nodes[place.node as usize].op {
            Op::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }

    pub(crate) fn is_input(&self, tensor: &XlaTensor) -> bool {
        matches!(tensor.0.source, Source::Node(place) if self.leaf_at(place).is_some())
    }

    /// The value of `tensor` in the current computation.
    pub(crate) fn get(&self, tensor: &XlaTensor) -> Value<'_> {
        if let Some((_, place)) = tensor.0.known.get() {
            return self.import(*place);
        }
        let dims = &tensor.shape().dims;
        match tensor.0.source {
            Source::Node(place) => self.import(place),
            Source::Part { of, row: None, offset } => self.import(of).cut(offset, dims),
            Source::Part { of, row: Some(row), offset } if self.in_body() => {
                assert_eq!(row, 0, "in the body of a loop layer 0 stands for all");
                self.captured_row(of).cut(offset, dims)
            }
            Source::Part { of, row: Some(row), offset } => {
                let len = dims.iter().product::<usize>();
                self.import(of).slices(&[(row, row + 1), (offset, offset + len)]).reshape(dims)
            }
        }
    }

    /// The value at `place` in the current computation.
    fn import(&self, place: Place) -> Value<'_> {
        let current = self.graph.lock().current;
        if place.computation == current { self.graph.value(place.node) } else { self.captured(place) }
    }

    /// Where the value of a tensor lies.
    pub(crate) fn place(&self, tensor: &XlaTensor) -> Place {
        match (tensor.0.known.get(), tensor.0.source) {
            (Some(&(_, place)), _) | (None, Source::Node(place)) => place,
            (None, Source::Part { .. }) => {
                let node = self.get(tensor).node;
                Place { computation: self.graph.lock().current, node }
            }
        }
    }

    /// A value as a tensor.
    pub(crate) fn keep(&self, value: Value<'_>) -> XlaTensor {
        let place = Place { computation: self.graph.lock().current, node: value.node };
        let tensor = XlaTensor::new(value.shape(), Source::Node(place));
        self.note(&tensor, place);
        tensor
    }

    /// Remembers a tensor made at `place`, to be computed with what is asked for next.
    fn note(&self, tensor: &XlaTensor, place: Place) {
        if self.executor.is_some() && place.computation == 0 {
            self.live().push(Arc::downgrade(&tensor.0));
        }
    }

    /// Adds a gradient, rounded to nothing and shaped as its slot.
    pub(crate) fn sink(&self, buffer: &mut XlaBuffer, slot: &Slot, gradient: Value<'_>) {
        buffer.add(slot, self.keep(gradient.to(Type::F32).reshape(&slot.shape)));
    }

    /// True while the body of a layer loop is recorded.
    fn in_body(&self) -> bool {
        self.graph.lock().current > 0
    }

    /// Instructions from now on belong to `op`, in the layer of `weight` or in the last one named.
    fn scope(&self, op: &str, weight: Option<&XlaTensor>) -> &Self {
        let mut layer = locked(&self.layer);
        if let Some(weight) = weight {
            *layer = weight.layer();
        }
        match *layer {
            Some(_) if self.in_body() => self.graph.name(&format!("layer.*/{op}")),
            Some(layer) => self.graph.name(&format!("layer.{layer}/{op}")),
            None => self.graph.name(op),
        }
        self
    }
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Backend for XlaBackend {
    type Tensor = XlaTensor;
    type Buffer = XlaBuffer;
    /// A row of a sum over one rank: [`Backend::finish_sum`] finds it where it was.
    type Pending = (Slot, XlaTensor);

    fn tensor(&self, values: &[f32], shape: &[usize], dtype: DType) -> XlaTensor {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values for {shape:?}");
        let shape = Shape::new(dtype.into(), shape);
        if values.iter().all(|&x| x.to_bits() == 0) && !values.is_empty() && self.executor.is_none() {
            return self.keep(self.graph.full(shape.ty, &shape.dims, 0.0));
        }
        let data = match dtype {
            DType::F32 => Literal::F32(values.to_vec()),
            DType::Bf16 => Literal::Bf16(values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect()),
            DType::I32 => panic!("integers are made by tensor_i32"),
        };
        self.input(shape, "tensor", Some(data))
    }

    fn tensor_i32(&self, values: &[i32], shape: &[usize]) -> XlaTensor {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values for {shape:?}");
        let name = locked(&self.names).pop_front().unwrap_or("tensor");
        self.input(Shape::new(Type::S32, shape), name, Some(Literal::S32(values.to_vec())))
    }

    fn values(&self, tensor: &XlaTensor) -> Vec<f32> {
        if tensor.shape().elements() == 0 {
            return Vec::new();
        }
        self.read(tensor).floats().to_vec()
    }

    fn shape(&self, tensor: &XlaTensor) -> Vec<usize> {
        tensor.shape().dims.clone()
    }

    fn dtype(&self, x: &XlaTensor) -> DType {
        match x.shape().ty {
            Type::F32 => DType::F32,
            Type::Bf16 => DType::Bf16,
            Type::S32 => DType::I32,
            Type::Pred => panic!("tensors are no truth values"),
        }
    }

    fn buffer(&self, shape: FlatShape, dtype: DType) -> XlaBuffer {
        XlaBuffer::new(shape, dtype)
    }

    fn write_slot(&self, buffer: &mut XlaBuffer, slot: &Slot, values: &[f32]) {
        buffer.write(self, slot, values);
    }

    fn view(&self, buffer: &XlaBuffer, slot: &Slot) -> XlaTensor {
        let view = buffer.view(self, slot);
        if let Source::Part { of, .. } = view.0.source {
            self.note(&view, of);
        }
        view
    }

    fn cast_buffer(&self, from: &XlaBuffer, to: &mut XlaBuffer) {
        assert_eq!(from.shape, to.shape, "buffers of one shape");
        self.scope("cast_buffer", None);
        let ty = to.dtype.into();
        let [layers, shared] = from.arrays(self).map(|a| a.map(|a| self.keep(self.get(&a).to(ty))));
        to.set(layers, shared);
    }

    fn zero_buffer(&self, buffer: &mut XlaBuffer) {
        *buffer = XlaBuffer::new(buffer.shape, buffer.dtype);
    }

    fn embedding(&self, table: &XlaTensor, ids: &XlaTensor, out: DType) -> XlaTensor {
        ops::embedding::forward(self.scope("embedding", Some(table)), table, ids, out)
    }

    fn embedding_adjoint(&self, ids: &XlaTensor, dy: &XlaTensor, d_table: Sink<'_, Self>) {
        *locked(&self.layer) = None;
        ops::embedding::adjoint(self.scope("embedding_adjoint", None), ids, dy, d_table);
    }

    fn rms_norm(&self, x: &XlaTensor, weight: &XlaTensor, eps: f32, out: DType) -> XlaTensor {
        ops::norm::forward(self.scope("rms_norm", Some(weight)), x, weight, eps, out)
    }

    fn rms_norm_adjoint(
        &self,
        x: &XlaTensor,
        weight: &XlaTensor,
        eps: f32,
        dy: &XlaTensor,
        d_weight: Sink<'_, Self>,
    ) -> XlaTensor {
        ops::norm::adjoint(self.scope("rms_norm_adjoint", Some(weight)), x, weight, eps, dy, d_weight)
    }

    fn linear(&self, x: &XlaTensor, weight: &XlaTensor, bias: Option<&XlaTensor>) -> XlaTensor {
        ops::linear::forward(self.scope("linear", Some(weight)), x, weight, bias)
    }

    fn linear_adjoint(
        &self,
        x: &XlaTensor,
        weight: &XlaTensor,
        dy: &XlaTensor,
        d_weight: Sink<'_, Self>,
        d_bias: Option<&Slot>,
    ) -> XlaTensor {
        ops::linear::adjoint(self.scope("linear_adjoint", Some(weight)), x, weight, dy, d_weight, d_bias)
    }

    fn add_bias(&self, x: &XlaTensor, bias: &XlaTensor) -> XlaTensor {
        ops::linear::add_bias(self.scope("add_bias", Some(bias)), x, bias)
    }

    fn add_bias_adjoint(&self, dy: &XlaTensor, d_bias: Sink<'_, Self>) {
        self.scope("add_bias_adjoint", None);
        let dy = self.get(dy);
        let rows: Vec<usize> = (0..dy.dims().len() - 1).collect();
        self.sink(d_bias.buffer, d_bias.slot, dy.to(Type::F32).sum(&rows));
    }

    fn resize(&self, x: &XlaTensor, len: usize) -> XlaTensor {
        self.scope("resize", None);
        let x = self.get(x);
        let old = x.dims()[1];
        self.keep(x.slice(1, 0, old.min(len)).pad(1, 0, len.saturating_sub(old)))
    }

    fn add(&self, a: &XlaTensor, b: &XlaTensor) -> XlaTensor {
        self.scope("add", None);
        let (a, b) = (self.get(a), self.get(b));
        self.keep((a.to(Type::F32) + b.to(Type::F32)).to(a.ty()))
    }

    fn cast(&self, x: &XlaTensor, dtype: DType) -> XlaTensor {
        if self.dtype(x) == dtype {
            return x.clone();
        }
        self.scope("cast", None);
        self.keep(self.get(x).to(dtype.into()))
    }

    fn mamba2(
        &self,
        spec: &Mamba2Spec,
        inputs: Mamba2Inputs<XlaTensor>,
        weights: &Mamba2Weights<XlaTensor>,
        save: bool,
    ) -> Mamba2Output<XlaTensor> {
        ops::mamba2::forward(self.scope("mamba2", Some(&weights.d)), spec, &inputs, weights, save)
    }

    fn mamba2_adjoint(
        &self,
        spec: &Mamba2Spec,
        inputs: &Mamba2Inputs<XlaTensor>,
        weights: &Mamba2Weights<XlaTensor>,
        saved: &[XlaTensor],
        dy: &XlaTensor,
        d_state: Option<&State<XlaTensor>>,
        grads: &mut XlaBuffer,
        sinks: &Mamba2Sinks<'_>,
    ) -> Mamba2Grads<XlaTensor> {
        let scope = self.scope("mamba2_adjoint", Some(&weights.d));
        ops::mamba2::adjoint(scope, spec, inputs, weights, saved, dy, d_state, grads, sinks)
    }

    fn head_loss(&self, x: &XlaTensor, weight: &XlaTensor, labels: &XlaTensor, vocab: usize) -> XlaTensor {
        ops::head::loss(self.scope("head_loss", Some(weight)), x, weight, labels, vocab, None).0
    }

    fn head_loss_adjoint(
        &self,
        x: &XlaTensor,
        weight: &XlaTensor,
        labels: &XlaTensor,
        vocab: usize,
        d_weight: Sink<'_, Self>,
    ) -> (XlaTensor, XlaTensor) {
        let scope = self.scope("head_loss_adjoint", Some(weight));
        let (loss, dx) = ops::head::loss(scope, x, weight, labels, vocab, Some(d_weight));
        (loss, dx.expect("asked for"))
    }

    fn logits(&self, x: &XlaTensor, weight: &XlaTensor) -> XlaTensor {
        self.scope("logits", Some(weight));
        self.keep(ops::linear::product(self.get(x), self.get(weight)))
    }

    fn group_size(&self, group: Group) -> usize {
        self.graph.grid.size(ops::ranks::of(self, group))
    }

    /// All ranks run one module, in which rank 0 stands for every one.
    fn group_rank(&self, _: Group) -> usize {
        0
    }

    fn all_reduce(&self, x: &XlaTensor, group: Group) -> XlaTensor {
        self.scope("all_reduce", None);
        ops::ranks::together(self, x, Collective::AllReduce("add"), group)
    }

    fn all_reduce_max(&self, x: &XlaTensor, group: Group) -> XlaTensor {
        self.scope("all_reduce_max", None);
        ops::ranks::together(self, x, Collective::AllReduce("maximum"), group)
    }

    fn all_gather(&self, x: &XlaTensor, axis: usize, group: Group) -> XlaTensor {
        self.scope("all_gather", None);
        ops::ranks::together(self, x, Collective::AllGather(axis), group)
    }

    fn reduce_scatter(&self, x: &XlaTensor, axis: usize, group: Group) -> XlaTensor {
        self.scope("reduce_scatter", None);
        ops::ranks::together(self, x, Collective::ReduceScatter(axis), group)
    }

    fn every_row(&self, flat: FlatShape) -> Vec<Row> {
        flat.rows().filter(|row| matches!(row, Row::Layer(0) | Row::Shared)).collect()
    }

    fn all_reduce_slot(&self, buffer: &mut XlaBuffer, slot: &Slot, group: Group) {
        self.scope("all_reduce_slot", None);
        ops::ranks::sum_slot(self, buffer, slot, ops::ranks::of(self, group));
    }

    fn sum_slot_over_neighbours(&self, buffer: &mut XlaBuffer, slot: &Slot, ranks: usize) {
        self.scope("sum_slot_over_neighbours", None);
        ops::ranks::sum_slot(self, buffer, slot, Ranks::Neighbours(ranks));
    }

    fn reduce_scatter_row(&self, whole: &mut XlaBuffer, row: Row, shard: &mut XlaBuffer, group: Group) {
        self.scope("reduce_scatter_row", None);
        ops::ranks::reduce_scatter_row(self, whole, row, shard, group);
    }

    fn start_sum(&self, buffer: &XlaBuffer, row: Row, _: bool, group: Group) -> (Slot, XlaTensor) {
        assert_eq!(self.group_size(group), 1, "ranks sum all rows together, in the update");
        let slot = buffer.shape.whole(row);
        let values = self.view(buffer, &slot);
        (slot, values)
    }

    fn finish_sum(&self, (slot, values): (Slot, XlaTensor), to: &mut XlaBuffer) {
        to.replace(self, &slot, &values);
    }

    fn all_gather_row(&self, shard: &XlaBuffer, row: Row, whole: &mut XlaBuffer, group: Group) {
        self.scope("all_gather_row", None);
        ops::ranks::all_gather_row(self, shard, row, whole, group);
    }

    fn layer_loop(&self) -> Option<&dyn LayerLoop<Self>> {
        (self.options.layers != LoopKind::Unrolled).then_some(self)
    }

    fn again(&self, x: &XlaTensor, dy: XlaTensor) -> (XlaTensor, XlaTensor) {
        self.scope("again", None);
        let both = [self.get(x), self.get(&dy)];
        let kind = Kind::Tuple(both.iter().map(Value::shape).collect());
        let tuple = self.graph.tuple(&both);
        let held = self.graph.push(Op::Plain("opt-barrier"), kind, vec![tuple]);
        (self.keep(self.graph.element(held, 0)), self.keep(self.graph.element(held, 1)))
    }

    fn clip(&self, grads: &XlaBuffer, loss: &XlaTensor, clipping: &Clipping<'_>) -> XlaTensor {
        ops::update::clip(self.scope("clip", None), grads, loss, clipping)
    }

    fn adamw(
        &self,
        hyper: &AdamW,
        decayed: Decayed,
        clip: &XlaTensor,
        grads: &mut XlaBuffer,
        params: &mut XlaBuffer,
        m: &mut XlaBuffer,
        v: &mut XlaBuffer,
        copy: Option<&mut XlaBuffer>,
    ) {
        ops::update::adamw(self.scope("adamw", None), hyper, decayed, clip, grads, params, m, v);
        if let Some(copy) = copy {
            self.cast_buffer(params, copy);
        }
    }
}
