//! Flat buffers: one array `[layers, row]` and one `[shared]`, with the gradients still to be added.

use std::ops::Range;
use std::sync::OnceLock;

use elapid_tensor::{DType, FlatShape, Row, Slot};

use crate::backend::XlaBackend;
use crate::hlo::graph::{Graph, Kind, Op, Value};
use crate::hlo::{Literal, Shape, Type};
use crate::tensor::{Source, XlaTensor};

/// A flat buffer.
pub struct XlaBuffer {
    pub(crate) shape: FlatShape,
    pub(crate) dtype: DType,
    /// Absent where the model has no layers.
    pub(crate) layers: Option<Part>,
    /// Absent where the shared region is empty.
    pub(crate) shared: Option<Part>,
    /// Gradients that adjoints have given and that are added before somebody reads.
    pending: Vec<(Slot, XlaTensor)>,
}

/// One of the two arrays.
pub(crate) struct Part {
    dims: Vec<usize>,
    /// While the host is the only one who has written: its values; None: zeros.
    host: Option<Vec<f32>>,
    tensor: OnceLock<XlaTensor>,
}

impl Part {
    fn new(dims: &[usize]) -> Option<Self> {
        let empty = dims.iter().product::<usize>() == 0;
        (!empty).then(|| Self { dims: dims.to_vec(), host: None, tensor: OnceLock::new() })
    }

    fn tensor(&self, backend: &XlaBackend, dtype: DType) -> &XlaTensor {
        self.tensor.get_or_init(|| {
            let data = self.host.clone().map(|values| match dtype {
                DType::Bf16 => Literal::Bf16(values),
                _ => Literal::F32(values),
            });
            backend.input(Shape::new(dtype.into(), &self.dims), "buffer", data)
        })
    }

    fn set(&mut self, tensor: XlaTensor) {
        *self = Self { dims: self.dims.clone(), host: None, tensor: OnceLock::from(tensor) };
    }
}

impl XlaBuffer {
    pub(crate) fn new(shape: FlatShape, dtype: DType) -> Self {
        assert!(dtype != DType::I32, "flat buffers hold floats");
        let layers = Part::new(&[shape.layers, shape.row]);
        let shared = Part::new(&[shape.shared]);
        Self { shape, dtype, layers, shared, pending: Vec::new() }
    }

    fn part(&self, row: Row) -> &Part {
        let part = match row {
            Row::Layer(_) => &self.layers,
            Row::Shared => &self.shared,
        };
        part.as_ref().expect("a slot lies in a row that has elements")
    }

    fn part_mut(&mut self, row: Row) -> &mut Part {
        let part = match row {
            Row::Layer(_) => &mut self.layers,
            Row::Shared => &mut self.shared,
        };
        part.as_mut().expect("a slot lies in a row that has elements")
    }

    /// The arrays as they are with all gradients added: `[layers, row]`, `[shared]`.
    pub(crate) fn arrays(&self, backend: &XlaBackend) -> [Option<XlaTensor>; 2] {
        [(Row::Layer(0), &self.layers), (Row::Shared, &self.shared)].map(|(row, part)| {
            let part = part.as_ref()?;
            let tensor = part.tensor(backend, self.dtype);
            let mut all: Vec<_> = self.pending.iter().filter(|(slot, _)| same_kind(slot.row, row)).collect();
            if all.is_empty() {
                return Some(tensor.clone());
            }
            all.sort_by_key(|(slot, _)| (self.shape.start(slot.row), slot.offset));
            let mut sum = backend.get(tensor);
            for (slot, piece) in all {
                sum = add_at(sum, slot, backend.get(piece));
            }
            Some(backend.keep(sum))
        })
    }

    /// Adds what is pending, so that the buffer is its two arrays and nothing else.
    pub(crate) fn flush(&mut self, backend: &XlaBackend) {
        if !self.pending.is_empty() {
            let [layers, shared] = self.arrays(backend);
            self.set(layers, shared);
        }
    }

    pub(crate) fn set(&mut self, layers: Option<XlaTensor>, shared: Option<XlaTensor>) {
        self.pending.clear();
        for (part, tensor) in [(&mut self.layers, layers), (&mut self.shared, shared)] {
            if let (Some(part), Some(tensor)) = (part, tensor) {
                part.set(tensor);
            }
        }
    }

    /// Adds a gradient to the place `slot`.
    pub(crate) fn add(&mut self, slot: &Slot, gradient: XlaTensor) {
        assert_eq!(gradient.shape().dims, slot.shape, "gradient of {slot:?}");
        self.pending.push((slot.clone(), gradient));
    }

    pub(crate) fn view(&self, backend: &XlaBackend, slot: &Slot) -> XlaTensor {
        assert!(self.shape.range(slot).end <= self.shape.len(), "{slot:?} in {:?}", self.shape);
        let [layers, shared] = self.arrays(backend);
        let (array, row) = match slot.row {
            Row::Layer(layer) => (layers, Some(layer)),
            Row::Shared => (shared, None),
        };
        let array = array.expect("a slot lies in a row that has elements");
        let shape = Shape::new(self.dtype.into(), &slot.shape);
        XlaTensor::new(shape, Source::Part { of: backend.place(&array), row, offset: slot.offset })
    }

    /// Replaces what lies at `slot`, which must not lie in the body of a loop, by `values`, rounded.
    pub(crate) fn replace(&mut self, backend: &XlaBackend, slot: &Slot, values: &XlaTensor) {
        self.flush(backend);
        let array = backend.get(self.part(slot.row).tensor(backend, self.dtype));
        let (old, start) = at(array, slot);
        let new = update(array, backend.get(values).to(array.ty()).reshape(&old.dims()), &start);
        let new = backend.keep(new);
        self.part_mut(slot.row).set(new);
    }

    /// Replaces the values at `slot`.
    pub(crate) fn write(&mut self, backend: &XlaBackend, slot: &Slot, values: &[f32]) {
        assert_eq!(values.len(), slot.len(), "values for {slot:?}");
        self.flush(backend);
        let (dtype, shape) = (self.dtype, self.shape);
        let part = self.part(slot.row);
        let mut host = match (&part.host, part.tensor.get()) {
            (Some(host), _) => host.clone(),
            (None, Some(tensor)) if !backend.is_input(tensor) => backend.read(tensor).floats().to_vec(),
            _ => vec![0.0; part.dims.iter().product()],
        };
        let start = slot.offset + if slot.row == Row::Shared { 0 } else { shape.start(slot.row) };
        let rounded = |x: f32| if dtype == DType::Bf16 { half::bf16::from_f32(x).to_f32() } else { x };
        host[start..start + slot.len()].iter_mut().zip(values).for_each(|(to, &x)| *to = rounded(x));
        let part = self.part_mut(slot.row);
        *part = Part { dims: part.dims.clone(), host: Some(host), tensor: OnceLock::new() };
    }

    /// A buffer of some of the layers, and the whole shared region.
    pub(crate) fn of_layers(&self, backend: &XlaBackend, layers: Range<usize>) -> Self {
        let mut part = Self::new(FlatShape { layers: layers.len(), ..self.shape }, self.dtype);
        let [rows, shared] = self.arrays(backend);
        let rows = rows.map(|rows| backend.keep(backend.get(&rows).slice(0, layers.start, layers.end)));
        part.set(rows, shared);
        part
    }

    /// Puts back what [`Self::of_layers`] gave, from layer `first` on.
    pub(crate) fn put_layers(&mut self, backend: &XlaBackend, first: usize, part: &Self) {
        self.flush(backend);
        let [rows, _] = self.arrays(backend);
        let [new, shared] = part.arrays(backend);
        let rows = rows.zip(new).map(|(rows, new)| {
            let start = [index(&backend.graph, first), index(&backend.graph, 0)];
            backend.keep(update(backend.get(&rows), backend.get(&new), &start))
        });
        self.set(rows, shared);
    }

    /// The gradients of the row of layer 0 that were added since the last flush, as one row; none are left pending.
    pub(crate) fn take_row<'g>(&mut self, backend: &'g XlaBackend) -> Value<'g> {
        let (mut taken, rest): (Vec<_>, Vec<_>) =
            self.pending.drain(..).partition(|(slot, _)| slot.row == Row::Layer(0));
        self.pending = rest;
        taken.sort_by_key(|(slot, _)| slot.offset);
        let zeros = |len| backend.graph.full(Type::F32, &[len], 0.0);
        let (mut pieces, mut end) = (Vec::new(), 0);
        for (slot, piece) in &taken {
            assert!(slot.offset >= end, "one gradient a parameter and layer");
            if slot.offset > end {
                pieces.push(zeros(slot.offset - end));
            }
            pieces.push(backend.get(piece).reshape(&[slot.len()]));
            end = slot.offset + slot.len();
        }
        if end < self.shape.row {
            pieces.push(zeros(self.shape.row - end));
        }
        backend.graph.concatenate(&pieces, 0)
    }
}

fn same_kind(a: Row, b: Row) -> bool {
    (a == Row::Shared) == (b == Row::Shared)
}

/// What lies at `slot` of an array, and where that begins.
fn at<'g>(array: Value<'g>, slot: &Slot) -> (Value<'g>, Vec<Value<'g>>) {
    let (from, to) = (slot.offset, slot.offset + slot.len());
    let (ranges, start) = match slot.row {
        Row::Layer(layer) => (vec![(layer, layer + 1), (from, to)], vec![layer, from]),
        Row::Shared => (vec![(from, to)], vec![from]),
    };
    (array.slices(&ranges), start.into_iter().map(|i| index(array.graph, i)).collect())
}

/// `array` with `piece` added at `slot`: read, add, write back in place.
fn add_at<'g>(array: Value<'g>, slot: &Slot, piece: Value<'g>) -> Value<'g> {
    let (old, start) = at(array, slot);
    update(array, old + piece.reshape(&old.dims()), &start)
}

/// An s32 scalar.
pub(crate) fn index(graph: &Graph, i: usize) -> Value<'_> {
    graph.full(Type::S32, &[], i as f64)
}

/// `array` with `new` written from `start` on.
pub(crate) fn update<'g>(array: Value<'g>, new: Value<'g>, start: &[Value<'g>]) -> Value<'g> {
    let operands = [array.node, new.node].into_iter().chain(start.iter().map(|i| i.node)).collect();
    let node = array.graph.push(Op::DynamicUpdateSlice, Kind::Array(array.shape()), operands);
    array.graph.value(node)
}
