//! Layers as a loop over one traced body.
//!
//! A body is a computation from a state tuple to the next one: counter, residual stream (or its cotangent), then
//! whatever is found to be needed: arrays from outside, which stay as they are, and stacks `[n, ..]` with one row a
//! layer, of which the body reads or replaces its own. What the adjoint uses of the forward body is kept in such a
//! stack. The loop is then n calls of the body one after the other, or one `while`: the text is the same for any n.

use std::collections::HashMap;

use elapid_tensor::{LayerLoop, Looped, State, Traced};

use crate::backend::{LoopKind, XlaBackend, locked};
use crate::buffer::{XlaBuffer, index, update};
use crate::hlo::graph::{Kind, Op, Place, Value};
use crate::hlo::{Shape, Type};
use crate::tensor::{Source, XlaTensor};

/// Where an element of the state tuple comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Origin {
    /// Layers done, s32.
    Counter,
    /// The residual stream, or its cotangent.
    Stream,
    /// An array from outside.
    Outer(Place),
    /// What the forward bodies kept: number in [`Trace::kept`].
    Kept(usize),
    /// A stack whose rows this body replaces: of what it keeps, of states, or of gradients.
    Rows,
}

/// A body under construction.
pub(crate) struct Trace {
    n: usize,
    computation: usize,
    /// The adjoint runs from the last layer to the first.
    backwards: bool,
    elements: Vec<(Shape, Origin)>,
    /// Element of a stack → its row.
    rows: HashMap<usize, u32>,
    /// While the adjoint is traced: the forward body.
    forward: Option<Box<Trace>>,
    /// Values of the forward body that the adjoint uses.
    kept: Vec<u32>,
    /// The input of the first layer; stacks of the states before (conv, SSM).
    x: Place,
    states: [Option<(usize, Place)>; 2],
    state_shapes: Option<[Shape; 2]>,
}

/// The adjoint of a loop, to be run when its cotangent is known.
#[derive(Clone)]
pub(crate) struct AdjointLoop {
    n: usize,
    computation: usize,
    elements: Vec<(Shape, Origin)>,
    /// Stacks of what the forward bodies kept.
    kept: Vec<Place>,
}

fn row_len(shape: &Shape) -> usize {
    shape.elements()
}

impl XlaBackend {
    /// Opens a computation with the elements that every body has.
    fn open(&self, n: usize, stream: Shape, x: Place, forward: Option<Box<Trace>>) -> Trace {
        let mut graph = self.graph.lock();
        graph.computations.push(Default::default());
        graph.current = graph.computations.len() - 1;
        graph.push(Op::State, Kind::Tuple(Vec::new()), Vec::new());
        Trace {
            n,
            computation: graph.current,
            backwards: forward.is_some(),
            elements: vec![(Shape::new(Type::S32, &[]), Origin::Counter), (stream, Origin::Stream)],
            rows: HashMap::new(),
            forward,
            kept: Vec::new(),
            x,
            states: [None; 2],
            state_shapes: None,
        }
    }

    fn enter(&self, computation: usize) {
        self.graph.lock().current = computation;
    }

    /// Element `index` of the state.
    fn element(&self, trace: &Trace, index: usize) -> Value<'_> {
        let kind = Kind::Array(trace.elements[index].0.clone());
        self.graph.value(self.graph.push(Op::Element(index), kind, vec![0]))
    }

    /// The number of the layer that runs.
    fn layer_index(&self, trace: &Trace) -> Value<'_> {
        let counter = self.element(trace, 0);
        if trace.backwards { index(&self.graph, trace.n - 1) - counter } else { counter }
    }

    /// This layer's row of the stack that is element `element`: `[len]`.
    fn row(&self, trace: &mut Trace, element: usize) -> Value<'_> {
        if let Some(&node) = trace.rows.get(&element) {
            return self.graph.value(node);
        }
        let stack = self.element(trace, element);
        let (shape, start) = (stack.shape(), [self.layer_index(trace), index(&self.graph, 0)]);
        let kind = Kind::Array(Shape::new(shape.ty, &[1, shape.dims[1]]));
        let operands = vec![stack.node, start[0].node, start[1].node];
        let row =
            self.graph.value(self.graph.push(Op::DynamicSlice, kind, operands)).reshape(&[shape.dims[1]]);
        trace.rows.insert(element, row.node);
        row
    }

    /// `stack`, element `element`, with this layer's row replaced.
    fn replaced<'g>(&'g self, trace: &Trace, element: usize, row: Value<'g>) -> Value<'g> {
        let stack = self.element(trace, element);
        let row = row.reshape(&[1, stack.dims()[1]]);
        update(stack, row, &[self.layer_index(trace), index(&self.graph, 0)])
    }

    /// The value at `place`, which lies outside of the body that is traced.
    pub(crate) fn captured(&self, place: Place) -> Value<'_> {
        let mut guard = locked(&self.trace);
        let trace = guard.as_mut().expect("values of another computation are used in a body only");
        self.capture(trace, place)
    }

    fn capture(&self, trace: &mut Trace, place: Place) -> Value<'_> {
        if place.computation == 0 {
            let element = self.outer(trace, place);
            return self.element(trace, element);
        }
        let forward = trace.forward.as_ref().expect("only the adjoint looks into another body");
        assert_eq!(place.computation, forward.computation, "the body's own forward run");
        let node = self.graph.lock().computations[place.computation].nodes[place.node as usize].clone();
        match node.op {
            Op::Element(index) if let (_, Origin::Outer(place)) = forward.elements[index] => {
                self.capture(trace, place)
            }
            Op::Constant(_) => self.graph.value(self.graph.push(node.op, node.kind, Vec::new())),
            Op::Broadcast(_) if node.operands.len() == 1 && self.is_constant(place, node.operands[0]) => {
                let scalar = self.capture(trace, Place { node: node.operands[0], ..place });
                self.graph.value(self.graph.push(node.op, node.kind, vec![scalar.node]))
            }
            _ => {
                let Kind::Array(shape) = node.kind else { panic!("tuples stay inside") };
                let number = trace.kept.iter().position(|&k| k == place.node).unwrap_or_else(|| {
                    trace.kept.push(place.node);
                    trace.kept.len() - 1
                });
                let stack = Shape::new(shape.ty, &[trace.n, row_len(&shape)]);
                let element = find(trace, stack, Origin::Kept(number));
                self.row(trace, element).reshape(&shape.dims)
            }
        }
    }

    fn is_constant(&self, place: Place, node: u32) -> bool {
        let graph = self.graph.lock();
        matches!(graph.computations[place.computation].nodes[node as usize].op, Op::Constant(_))
    }

    /// The element that brings in the array at `place`.
    fn outer(&self, trace: &mut Trace, place: Place) -> usize {
        let Kind::Array(shape) = self.graph.lock().computations[0].nodes[place.node as usize].kind.clone()
        else {
            panic!("tuples stay inside")
        };
        find(trace, shape, Origin::Outer(place))
    }

    /// The row that stands for the layer's own, of a stack outside.
    pub(crate) fn captured_row(&self, of: Place) -> Value<'_> {
        let mut guard = locked(&self.trace);
        let trace = guard.as_mut().expect("rows are captured in a body only");
        let element = self.outer(trace, of);
        self.row(trace, element)
    }

    /// Ends the body: `changed` are the elements that are not handed on as they came.
    fn close(&self, trace: &Trace, changed: &HashMap<usize, u32>) {
        let next = self.element(trace, 0) + self.graph.full(Type::S32, &[], 1.0);
        let parts: Vec<Value<'_>> = (0..trace.elements.len())
            .map(|index| match (index, changed.get(&index)) {
                (0, _) => next,
                (_, Some(&node)) => self.graph.value(node),
                (_, None) => self.element(trace, index),
            })
            .collect();
        let root = self.graph.tuple(&parts);
        let mut graph = self.graph.lock();
        let computation = graph.current;
        let shapes = trace.elements.iter().map(|(shape, _)| shape.clone()).collect();
        graph.computations[computation].nodes[0].kind = Kind::Tuple(shapes);
        graph.computations[computation].root = Some(root);
    }

    /// Runs a body `n` times from `first`; the last state tuple.
    fn run(&self, n: usize, computation: usize, first: &[Value<'_>]) -> u32 {
        let kind = Kind::Tuple(first.iter().map(Value::shape).collect());
        let mut state = self.graph.tuple(first);
        match self.options.layers {
            LoopKind::While => self.graph.push(Op::While(computation, n), kind, vec![state]),
            _ => {
                for _ in 0..n {
                    state = self.graph.push(Op::Call(computation), kind.clone(), vec![state]);
                }
                state
            }
        }
    }
}

/// The element of that origin, made if there is none.
fn find(trace: &mut Trace, shape: Shape, origin: Origin) -> usize {
    trace.elements.iter().position(|(_, o)| *o == origin).unwrap_or_else(|| {
        trace.elements.push((shape, origin));
        trace.elements.len() - 1
    })
}

impl LayerLoop<XlaBackend> for XlaBackend {
    fn begin(
        &self,
        n: usize,
        x: &XlaTensor,
        states: Option<&[State<XlaTensor>]>,
    ) -> (XlaTensor, Option<State<XlaTensor>>) {
        // States enter as stacks.
        let stacks = states.map(|states| {
            let stacked = |part: fn(&State<XlaTensor>) -> &XlaTensor| {
                let rows: Vec<XlaTensor> = states.iter().map(|s| part(s).clone()).collect();
                let shape = rows[0].shape().clone();
                let stack = Shape::new(shape.ty, &[rows.len(), shape.elements()]);
                let zeros = self.graph.full(stack.ty, &stack.dims, 0.0);
                (self.place(&self.stack(&self.keep(zeros), &rows)), shape)
            };
            [stacked(|s| &s.conv), stacked(|s| &s.ssm)]
        });
        let mut trace = self.open(n, x.shape().clone(), self.place(x), None);
        let mut before = Vec::new();
        for (slot, (place, shape)) in stacks.iter().flatten().enumerate() {
            if shape.elements() == 0 {
                before.push(self.keep(self.graph.full(shape.ty, &shape.dims, 0.0)));
                continue;
            }
            trace.elements.push((Shape::new(shape.ty, &[n, shape.elements()]), Origin::Rows));
            let element = trace.elements.len() - 1;
            trace.states[slot] = Some((element, *place));
            before.push(self.keep(self.row(&mut trace, element).reshape(&shape.dims)));
        }
        trace.state_shapes = stacks.map(|stacks| stacks.map(|(_, shape)| shape));
        let input = self.keep(self.element(&trace, 1));
        *locked(&self.trace) = Some(trace);
        let before = <[XlaTensor; 2]>::try_from(before).ok().map(|[conv, ssm]| State { conv, ssm });
        (input, before)
    }

    fn turn(&self, out: &XlaTensor) -> XlaTensor {
        let forward = locked(&self.trace).take().expect("a body has begun");
        let (n, x) = (forward.n, forward.x);
        let trace = self.open(n, out.shape().clone(), x, Some(Box::new(forward)));
        let dy = self.keep(self.element(&trace, 1));
        *locked(&self.trace) = Some(trace);
        dy
    }

    fn end(&self, traced: Traced<XlaTensor>, grads: Option<&mut XlaBuffer>) -> Looped<XlaTensor> {
        let mut adjoint = None;
        if let (Some(dx), Some(grads)) = (&traced.dx, grads) {
            let dx = self.get(dx).node;
            let row = grads.take_row(self);
            let mut trace = locked(&self.trace).take().expect("an adjoint has begun");
            let stack = Shape::new(Type::F32, &[trace.n, grads.shape.row]);
            trace.elements.push((stack, Origin::Rows));
            let element = trace.elements.len() - 1;
            let sum = self.row(&mut trace, element) + row;
            let sum = self.replaced(&trace, element, sum).node;
            self.close(&trace, &HashMap::from([(1, dx), (element, sum)]));
            let forward = trace.forward.take().expect("the adjoint of a body");
            self.enter(forward.computation);
            *locked(&self.trace) = Some(*forward);
            adjoint = Some(trace);
        }

        let mut changed = HashMap::from([(1, self.get(&traced.out).node)]);
        let mut after = Vec::new();
        for tensor in traced.after.iter().flat_map(|s| [&s.conv, &s.ssm]) {
            after.push((
                tensor.shape().clone(),
                (tensor.shape().elements() > 0).then(|| self.get(tensor).node),
            ));
        }
        let mut trace = locked(&self.trace).take().expect("a body has begun");
        let n = trace.n;
        let kept = adjoint.as_ref().map_or(&[][..], |a| &a.kept);
        // Rows of what the adjoint needs and of states, in stacks.
        let mut stacks = Vec::new();
        for &node in kept {
            stacks.push((node, None));
        }
        let mut state_stacks = Vec::new();
        for (slot, (_, node)) in after.iter().enumerate() {
            if let Some(node) = node {
                state_stacks.push(stacks.len());
                stacks.push((*node, trace.states[slot]));
            }
        }
        let mut elements = Vec::new();
        for (node, existing) in stacks {
            let value = self.graph.value(node);
            let element = existing.map_or_else(
                || {
                    let shape = value.shape();
                    trace.elements.push((Shape::new(shape.ty, &[n, row_len(&shape)]), Origin::Rows));
                    trace.elements.len() - 1
                },
                |(element, _)| element,
            );
            changed.insert(element, self.replaced(&trace, element, value).node);
            elements.push(element);
        }
        self.close(&trace, &changed);

        self.enter(0);
        let first: Vec<Value<'_>> = trace
            .elements
            .iter()
            .enumerate()
            .map(|(index, (shape, origin))| match origin {
                Origin::Counter => self.graph.full(Type::S32, &[], 0.0),
                Origin::Stream => self.graph.value(trace.x.node),
                Origin::Outer(place) => self.graph.value(place.node),
                Origin::Kept(_) => panic!("only an adjoint uses what was kept"),
                Origin::Rows => match trace.states.iter().flatten().find(|(element, _)| *element == index) {
                    Some((_, place)) => self.graph.value(place.node),
                    None => self.graph.full(shape.ty, &shape.dims, 0.0),
                },
            })
            .collect();
        let last = self.run(n, trace.computation, &first);
        let out = self.keep(self.graph.element(last, 1));
        let places: Vec<Place> = elements
            .iter()
            .map(|&element| Place { computation: 0, node: self.graph.element(last, element).node })
            .collect();
        let mut loops = locked(&self.loops);
        if let Some(adjoint) = &adjoint {
            loops.push(AdjointLoop {
                n,
                computation: adjoint.computation,
                elements: adjoint.elements.clone(),
                kept: places[..adjoint.kept.len()].to_vec(),
            });
        }
        let id = loops.len().saturating_sub(1);
        let mut state_stacks = state_stacks.into_iter().map(|stack| places[stack]);
        let mut parts: Vec<Vec<XlaTensor>> = Vec::new();
        for (shape, node) in &after {
            let part: Vec<XlaTensor> = match node.and_then(|_| state_stacks.next()) {
                Some(of) => (0..n)
                    .map(|row| XlaTensor::new(shape.clone(), Source::Part { of, row: Some(row), offset: 0 }))
                    .collect(),
                None => vec![self.keep(self.graph.full(shape.ty, &shape.dims, 0.0)); n],
            };
            parts.push(part);
        }
        let states = match <[Vec<XlaTensor>; 2]>::try_from(parts) {
            Ok([conv, ssm]) => conv.into_iter().zip(ssm).map(|(conv, ssm)| State { conv, ssm }).collect(),
            Err(_) => Vec::new(),
        };
        Looped { out, states, id }
    }

    fn adjoint(&self, id: usize, dy: &XlaTensor, grads: &mut XlaBuffer) -> XlaTensor {
        let looped = locked(&self.loops)[id].clone();
        grads.flush(self);
        let [layers, _] = grads.arrays(self);
        let layers = self.get(&layers.expect("layers have parameters"));
        let dy = self.get(dy);
        let first: Vec<Value<'_>> = looped
            .elements
            .iter()
            .map(|(_, origin)| match origin {
                Origin::Counter => self.graph.full(Type::S32, &[], 0.0),
                Origin::Stream => dy,
                Origin::Outer(place) => self.graph.value(place.node),
                Origin::Kept(number) => self.graph.value(looped.kept[*number].node),
                Origin::Rows => layers,
            })
            .collect();
        let last = self.run(looped.n, looped.computation, &first);
        let element = looped.elements.iter().position(|(_, o)| *o == Origin::Rows).expect("gradients");
        let sum = self.keep(self.graph.element(last, element));
        grads.set(Some(sum), None);
        self.keep(self.graph.element(last, 1))
    }
}
