//! The recorded graph: computations of typed instructions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::shape::{Literal, Shape, Type};

/// Axes of a `dot`: each batch axis of one side belongs to that of the other, in order; so does each contracted one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct DotAxes {
    /// Batch axes of both sides.
    pub(crate) batch: [Vec<usize>; 2],
    /// Axes that are summed over.
    pub(crate) contract: [Vec<usize>; 2],
}

/// What an instruction does.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Op {
    /// An input of the module, known by its number in [`Inner::leaves`].
    Leaf(usize),
    /// The only parameter of a loop's body: the state tuple.
    State,
    /// Element of a tuple.
    Element(usize),
    /// A scalar.
    Constant(f64),
    Iota(usize),
    /// Operand axis → axis of the result.
    Broadcast(Vec<usize>),
    Reshape,
    Transpose(Vec<usize>),
    /// (start, limit) by axis.
    Slice(Vec<(usize, usize)>),
    /// Operands: array, then a start index by axis.
    DynamicSlice,
    /// Operands: array, update, then a start index by axis.
    DynamicUpdateSlice,
    Concatenate(usize),
    /// (low, high) by axis.
    Pad(Vec<(usize, usize)>),
    Dot(DotAxes),
    /// `exp`, `add`, `select`, `convert`, `copy`, …: nothing to say beside the opcode.
    Plain(&'static str),
    /// `LT`, `LE`, `EQ`, ….
    Compare(&'static str),
    /// `add` or `maximum` over axes; operands: array, first value.
    Reduce(&'static str, Vec<usize>),
    /// What ranks do together.
    Collective(Collective, Ranks),
    Tuple,
    /// Runs a computation on a tuple.
    Call(usize),
    /// Runs a computation on a tuple as long as its first element is below the number.
    While(usize, usize),
}

/// What ranks do together with an array of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Collective {
    /// `add` or `maximum` over the ranks.
    AllReduce(&'static str),
    /// One after the other along an axis.
    AllGather(usize),
    /// An equal part along an axis of their sum.
    ReduceScatter(usize),
}

/// Which ranks work together. Rank r of a grid is number r mod tp of the tensor-parallel ranks that share its samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ranks {
    /// So many tensor-parallel neighbours, the first of them at a multiple of that number.
    Neighbours(usize),
    /// Data-parallel ranks.
    Dp,
}

/// The grid of ranks that run a module together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) dp: usize,
    pub(crate) tp: usize,
}

impl Grid {
    /// How many ranks work together.
    pub(crate) fn size(self, ranks: Ranks) -> usize {
        match ranks {
            Ranks::Neighbours(count) => count,
            Ranks::Dp => self.dp,
        }
    }

    /// Every group of such ranks, in rank order.
    pub(crate) fn groups(self, ranks: Ranks) -> Vec<Vec<usize>> {
        let all = self.dp * self.tp;
        match ranks {
            Ranks::Neighbours(count) => {
                (0..all).step_by(count).map(|first| (first..first + count).collect()).collect()
            }
            Ranks::Dp => (0..self.tp).map(|tp| (tp..all).step_by(self.tp).collect()).collect(),
        }
    }
}

/// Shape of what an instruction gives.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Array(Shape),
    Tuple(Vec<Shape>),
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) op: Op,
    pub(crate) kind: Kind,
    pub(crate) operands: Vec<u32>,
    /// Index into [`Inner::names`].
    pub(crate) name: u32,
}

/// Where a captured value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) computation: usize,
    pub(crate) node: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Computation {
    pub(crate) nodes: Vec<Node>,
    /// Small instructions without state that are worth finding again.
    shared: HashMap<String, u32>,
    pub(crate) root: Option<u32>,
}

/// An input of modules.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) shape: Shape,
    pub(crate) name: String,
    /// None: zeros.
    pub(crate) data: Option<Arc<Literal>>,
}

#[derive(Default)]
pub(crate) struct Inner {
    /// The first is the entry.
    pub(crate) computations: Vec<Computation>,
    pub(crate) current: usize,
    pub(crate) leaves: Vec<Leaf>,
    pub(crate) names: Vec<String>,
    name: u32,
}

/// The graph under construction.
pub(crate) struct Graph {
    inner: Mutex<Inner>,
    pub(crate) grid: Grid,
}

impl Graph {
    pub(crate) fn new(grid: Grid) -> Self {
        let inner = Inner {
            computations: vec![Computation::default()],
            names: vec![String::new()],
            ..Inner::default()
        };
        Self { inner: Mutex::new(inner), grid }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Instructions from now on carry this name in their metadata.
    pub(crate) fn name(&self, name: &str) {
        let mut inner = self.lock();
        inner.name = match inner.names.iter().rposition(|n| n == name) {
            Some(index) => index as u32,
            None => {
                inner.names.push(name.to_owned());
                inner.names.len() as u32 - 1
            }
        };
    }

    /// Adds an instruction to the current computation.
    pub(crate) fn push(&self, op: Op, kind: Kind, operands: Vec<u32>) -> u32 {
        self.lock().push(op, kind, operands)
    }

    pub(crate) fn shape(&self, node: u32) -> Shape {
        let inner = self.lock();
        match &inner.computations[inner.current].nodes[node as usize].kind {
            Kind::Array(shape) => shape.clone(),
            Kind::Tuple(_) => panic!("a tuple has no array shape"),
        }
    }

    /// A value of the current computation.
    pub(crate) fn value(&self, node: u32) -> Value<'_> {
        Value { graph: self, node }
    }

    /// A new input of modules, in the entry computation.
    pub(crate) fn leaf(&self, shape: Shape, name: &str, data: Option<Literal>) -> Place {
        let mut inner = self.lock();
        inner.leaves.push(Leaf { shape: shape.clone(), name: name.to_owned(), data: data.map(Arc::new) });
        let leaf = inner.leaves.len() - 1;
        let current = std::mem::replace(&mut inner.current, 0);
        let node = inner.push(Op::Leaf(leaf), Kind::Array(shape), Vec::new());
        inner.current = current;
        Place { computation: 0, node }
    }

    fn scalar_of(&self, ty: Type, value: f64) -> Value<'_> {
        self.value(self.push(Op::Constant(value), Kind::Array(Shape::new(ty, &[])), Vec::new()))
    }

    /// An fp32 scalar.
    pub(crate) fn scalar(&self, value: f32) -> Value<'_> {
        self.scalar_of(Type::F32, f64::from(value))
    }

    /// An array of one number.
    pub(crate) fn full(&self, ty: Type, dims: &[usize], value: f64) -> Value<'_> {
        self.scalar_of(ty, value).expand(dims, &[])
    }

    /// The index along `axis`, s32.
    pub(crate) fn iota(&self, dims: &[usize], axis: usize) -> Value<'_> {
        let kind = Kind::Array(Shape::new(Type::S32, dims));
        self.value(self.push(Op::Iota(axis), kind, Vec::new()))
    }

    /// `[n, n]` with 1 where row ≥ column, fp32: a product with it is a cumulative sum.
    pub(crate) fn triangle(&self, n: usize) -> Value<'_> {
        self.iota(&[n, n], 0).compare("GE", self.iota(&[n, n], 1)).to(Type::F32)
    }

    /// Arrays one after the other along `axis`.
    pub(crate) fn concatenate(&self, parts: &[Value<'_>], axis: usize) -> Value<'_> {
        if let [one] = parts {
            return self.value(one.node);
        }
        let mut shape = parts[0].shape();
        shape.dims[axis] = parts.iter().map(|p| p.dims()[axis]).sum();
        let operands = parts.iter().map(|p| p.node).collect();
        self.value(self.push(Op::Concatenate(axis), Kind::Array(shape), operands))
    }

    pub(crate) fn tuple(&self, parts: &[Value<'_>]) -> u32 {
        let kind = Kind::Tuple(parts.iter().map(Value::shape).collect());
        self.push(Op::Tuple, kind, parts.iter().map(|p| p.node).collect())
    }

    /// Element `index` of the tuple `node`.
    pub(crate) fn element(&self, node: u32, index: usize) -> Value<'_> {
        let shape = {
            let inner = self.lock();
            let Kind::Tuple(parts) = &inner.computations[inner.current].nodes[node as usize].kind else {
                panic!("only tuples have elements")
            };
            parts[index].clone()
        };
        self.value(self.push(Op::Element(index), Kind::Array(shape), vec![node]))
    }
}

impl Inner {
    pub(crate) fn push(&mut self, op: Op, kind: Kind, operands: Vec<u32>) -> u32 {
        // Scalars, index ramps and what is made of them alone. Activations are never merged: a layer that is run
        // again must stay a second run.
        let name = self.name;
        let computation = &mut self.computations[self.current];
        let pure = match &op {
            Op::Constant(_) | Op::Iota(_) | Op::Element(_) => true,
            Op::Leaf(_) | Op::State => false,
            _ => operands.iter().all(|&o| computation.is_ramp(o)) && !operands.is_empty(),
        };
        let key = pure.then(|| format!("{op:?} {kind:?} {operands:?}"));
        if let Some(&found) = key.as_ref().and_then(|key| computation.shared.get(key)) {
            return found;
        }
        computation.nodes.push(Node { op, kind, operands, name });
        let node = computation.nodes.len() as u32 - 1;
        if let Some(key) = key {
            computation.shared.insert(key, node);
        }
        node
    }
}

impl Computation {
    /// Made of constants and ramps alone, directly or by one step.
    fn is_ramp(&self, node: u32) -> bool {
        match &self.nodes[node as usize] {
            Node { op: Op::Constant(_) | Op::Iota(_), .. } => true,
            Node { op: Op::Compare(_) | Op::Broadcast(_) | Op::Plain("convert"), operands, .. } => {
                operands.iter().all(|&o| self.is_ramp(o))
            }
            _ => false,
        }
    }
}

/// An array of the current computation: what recorded code calculates with.
#[derive(Clone, Copy)]
pub(crate) struct Value<'g> {
    pub(crate) graph: &'g Graph,
    pub(crate) node: u32,
}

impl<'g> Value<'g> {
    pub(crate) fn shape(&self) -> Shape {
        self.graph.shape(self.node)
    }

    pub(crate) fn dims(&self) -> Vec<usize> {
        self.shape().dims
    }

    pub(crate) fn ty(&self) -> Type {
        self.shape().ty
    }

    fn array(self, op: Op, ty: Type, dims: &[usize], operands: Vec<u32>) -> Value<'g> {
        self.graph.value(self.graph.push(op, Kind::Array(Shape::new(ty, dims)), operands))
    }

    pub(crate) fn to(self, ty: Type) -> Self {
        let shape = self.shape();
        if shape.ty == ty { self } else { self.array(Op::Plain("convert"), ty, &shape.dims, vec![self.node]) }
    }

    pub(crate) fn reshape(self, dims: &[usize]) -> Self {
        let shape = self.shape();
        if shape.dims == dims {
            return self;
        }
        assert_eq!(shape.elements(), dims.iter().product::<usize>(), "{:?} as {dims:?}", shape.dims);
        self.array(Op::Reshape, shape.ty, dims, vec![self.node])
    }

    pub(crate) fn transpose(self, axes: &[usize]) -> Self {
        let shape = self.shape();
        let dims: Vec<usize> = axes.iter().map(|&a| shape.dims[a]).collect();
        self.array(Op::Transpose(axes.to_vec()), shape.ty, &dims, vec![self.node])
    }

    /// Repeats to `dims`; axis i of this array is axis `axes[i]` of the result.
    pub(crate) fn expand(self, dims: &[usize], axes: &[usize]) -> Self {
        let shape = self.shape();
        if shape.dims == dims {
            return self;
        }
        let kept: Vec<usize> = axes.iter().map(|&a| dims[a]).collect();
        assert_eq!(kept, shape.dims, "axes {axes:?} of {dims:?}");
        self.array(Op::Broadcast(axes.to_vec()), shape.ty, dims, vec![self.node])
    }

    /// Elements `start..limit` along `axis`.
    pub(crate) fn slice(self, axis: usize, start: usize, limit: usize) -> Self {
        let shape = self.shape();
        if (start, limit) == (0, shape.dims[axis]) {
            return self;
        }
        let mut ranges: Vec<_> = shape.dims.iter().map(|&d| (0, d)).collect();
        ranges[axis] = (start, limit);
        self.slices(&ranges)
    }

    /// (start, limit) by axis.
    pub(crate) fn slices(self, ranges: &[(usize, usize)]) -> Self {
        let shape = self.shape();
        let dims: Vec<usize> = ranges.iter().map(|(from, to)| to - from).collect();
        if dims == shape.dims {
            return self;
        }
        self.array(Op::Slice(ranges.to_vec()), shape.ty, &dims, vec![self.node])
    }

    /// Zeros before and after along `axis`.
    pub(crate) fn pad(self, axis: usize, low: usize, high: usize) -> Self {
        let shape = self.shape();
        if (low, high) == (0, 0) {
            return self;
        }
        let mut padding = vec![(0, 0); shape.dims.len()];
        padding[axis] = (low, high);
        let mut dims = shape.dims;
        dims[axis] += low + high;
        let zero = self.graph.scalar_of(shape.ty, 0.0);
        self.array(Op::Pad(padding), shape.ty, &dims, vec![self.node, zero.node])
    }

    /// Σ over the contracted axes, fp32: result axes are batch, the left side's others, the right side's others.
    pub(crate) fn dot(self, right: Self, axes: DotAxes) -> Self {
        let (a, b) = (self.shape(), right.shape());
        assert_eq!(a.ty, b.ty, "both sides of a dot");
        assert!(a.ty != Type::S32, "integers are never multiplied as matrices");
        let pick = |dims: &[usize], axes: &[usize]| axes.iter().map(|&i| dims[i]).collect::<Vec<_>>();
        assert_eq!(pick(&a.dims, &axes.batch[0]), pick(&b.dims, &axes.batch[1]), "batch axes");
        assert_eq!(pick(&a.dims, &axes.contract[0]), pick(&b.dims, &axes.contract[1]), "contracted axes");
        let mut dims = pick(&a.dims, &axes.batch[0]);
        for (side, shape) in [&a, &b].into_iter().enumerate() {
            let used = |i: &usize| axes.batch[side].contains(i) || axes.contract[side].contains(i);
            dims.extend((0..shape.dims.len()).filter(|i| !used(i)).map(|i| shape.dims[i]));
        }
        self.array(Op::Dot(axes), Type::F32, &dims, vec![self.node, right.node])
    }

    /// [`Self::dot`] with the first `batch` axes of both sides as batch axes.
    pub(crate) fn batch_dot(self, right: Self, batch: usize, left: usize, other: usize) -> Self {
        let all: Vec<usize> = (0..batch).collect();
        self.dot(right, DotAxes { batch: [all.clone(), all], contract: [vec![left], vec![other]] })
    }

    fn reduce(self, how: &'static str, first: f64, axes: &[usize]) -> Self {
        let shape = self.shape();
        if axes.is_empty() {
            return self;
        }
        let dims: Vec<usize> =
            (0..shape.dims.len()).filter(|i| !axes.contains(i)).map(|i| shape.dims[i]).collect();
        let first = self.graph.scalar_of(shape.ty, first);
        self.array(Op::Reduce(how, axes.to_vec()), shape.ty, &dims, vec![self.node, first.node])
    }

    pub(crate) fn sum(self, axes: &[usize]) -> Self {
        self.reduce("add", 0.0, axes)
    }

    /// The largest value, and at least the lowest finite number.
    pub(crate) fn max(self, axes: &[usize]) -> Self {
        self.reduce("maximum", f64::from(f32::MIN), axes)
    }

    /// Σ of all elements, in parts short enough that fp32 keeps its digits.
    pub(crate) fn sum_all(self) -> Self {
        const PART: usize = 2048;
        let len = self.shape().elements();
        let flat = self.reshape(&[len]);
        if len <= PART {
            return flat.sum(&[0]);
        }
        let whole = len / PART * PART;
        let parts = flat.slice(0, 0, whole).reshape(&[len / PART, PART]).sum(&[1]).sum_all();
        if whole == len { parts } else { parts + flat.slice(0, whole, len).sum(&[0]) }
    }

    /// What `ranks` make of their arrays together; a rank alone has its own.
    pub(crate) fn over(self, what: Collective, ranks: Ranks) -> Self {
        let (mut shape, size) = (self.shape(), self.graph.grid.size(ranks));
        if size == 1 {
            return self;
        }
        match what {
            Collective::AllReduce(_) => assert!(shape.ty == Type::F32, "sums are in fp32"),
            Collective::AllGather(axis) => shape.dims[axis] *= size,
            Collective::ReduceScatter(axis) => {
                assert!(shape.ty == Type::F32, "sums are in fp32");
                assert!(shape.dims[axis].is_multiple_of(size), "axis {axis} of {shape:?} over {size} ranks");
                shape.dims[axis] /= size;
            }
        }
        self.array(Op::Collective(what, ranks), shape.ty, &shape.dims, vec![self.node])
    }

    /// Σ over `ranks`.
    pub(crate) fn sum_over(self, ranks: Ranks) -> Self {
        self.over(Collective::AllReduce("add"), ranks)
    }

    /// The largest of `ranks`.
    pub(crate) fn max_over(self, ranks: Ranks) -> Self {
        self.over(Collective::AllReduce("maximum"), ranks)
    }

    pub(crate) fn unary(self, opcode: &'static str) -> Self {
        let shape = self.shape();
        self.array(Op::Plain(opcode), shape.ty, &shape.dims, vec![self.node])
    }

    pub(crate) fn exp(self) -> Self {
        self.unary("exponential")
    }

    pub(crate) fn binary(self, opcode: &'static str, right: Self) -> Self {
        let shape = self.shape();
        assert_eq!(shape, right.shape(), "both sides of {opcode}");
        self.array(Op::Plain(opcode), shape.ty, &shape.dims, vec![self.node, right.node])
    }

    /// The same number for each element.
    fn like(self, value: f64) -> Self {
        let shape = self.shape();
        self.graph.full(shape.ty, &shape.dims, value)
    }

    pub(crate) fn at_most(self, value: f32) -> Self {
        self.binary("minimum", self.like(f64::from(value)))
    }

    pub(crate) fn at_least(self, value: f32) -> Self {
        self.binary("maximum", self.like(f64::from(value)))
    }

    pub(crate) fn compare(self, direction: &'static str, right: Self) -> Self {
        let shape = self.shape();
        assert_eq!(shape, right.shape(), "both sides of a comparison");
        self.array(Op::Compare(direction), Type::Pred, &shape.dims, vec![self.node, right.node])
    }

    pub(crate) fn compare_to(self, direction: &'static str, value: f64) -> Self {
        self.compare(direction, self.like(value))
    }

    /// This array of truth values decides between the elements of two others.
    pub(crate) fn select(self, yes: Self, no: Self) -> Self {
        let shape = yes.shape();
        assert_eq!(shape, no.shape(), "both choices");
        assert_eq!(self.dims(), shape.dims, "choices and what decides");
        self.array(Op::Plain("select"), shape.ty, &shape.dims, vec![self.node, yes.node, no.node])
    }

    /// [`Self::select`] by one truth value for all elements.
    pub(crate) fn choose(self, yes: Self, no: Self) -> Self {
        self.expand(&yes.dims(), &[]).select(yes, no)
    }

    /// 1 / (1 + e^−x), by the hyperbolic tangent: no infinity on the way.
    pub(crate) fn sigmoid(self) -> Self {
        (self * 0.5).unary("tanh") * 0.5 + 0.5
    }

    pub(crate) fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// Derivative of [`Self::silu`].
    pub(crate) fn silu_slope(self) -> Self {
        let s = self.sigmoid();
        s * (self * (s * -1.0 + 1.0) + 1.0)
    }

    /// log(1 + eˣ) = max(x, 0) + log(1 + e), e = e^−|x| ≤ 1, and log(1 + e) = 2·artanh(e / (2 + e)) by its series:
    /// nothing overflows, small values keep their digits, and no compiler knows a shortcut for it.
    pub(crate) fn softplus(self) -> Self {
        let e = (self.unary("abs") * -1.0).exp();
        let s = e / (e + 2.0);
        let square = s * s;
        let series = [13.0, 11.0, 9.0, 7.0, 5.0, 3.0]
            .iter()
            .fold(self.like(1.0 / 15.0), |sum, n| sum * square + 1.0 / n);
        self.at_least(0.0) + s * (series * square + 1.0) * 2.0
    }

    /// `[len]` of `row` from `offset` on, as `dims`.
    pub(crate) fn cut(self, offset: usize, dims: &[usize]) -> Self {
        self.slice(0, offset, offset + dims.iter().product::<usize>()).reshape(dims)
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $opcode:literal) => {
        impl<'g> std::ops::$trait for Value<'g> {
            type Output = Value<'g>;
            fn $method(self, right: Self) -> Self {
                self.binary($opcode, right)
            }
        }
        impl<'g> std::ops::$trait<f32> for Value<'g> {
            type Output = Value<'g>;
            fn $method(self, right: f32) -> Self {
                self.binary($opcode, self.like(f64::from(right)))
            }
        }
    };
}

operator!(Add, add, "add");
operator!(Sub, sub, "subtract");
operator!(Mul, mul, "multiply");
operator!(Div, div, "divide");
