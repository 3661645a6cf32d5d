//! From the recorded graph to a module.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use prost::Message;

use super::graph::{Collective, Computation, Graph, Grid, Inner, Kind, Leaf, Node, Op};
use super::proto::{
    AliasEntryProto, DotDimensionNumbers, FrontendAttributes, HloComputationProto, HloInputOutputAliasProto,
    HloInstructionProto, HloModuleProto, LiteralProto, OpMetadata, PaddingConfig, PaddingConfigDimension,
    ProgramShapeProto, ReplicaGroup, ShapeProto, SliceDimensions,
};
use super::shape::{Literal, Shape, Type, tuple_proto};

/// An input or output of a module.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// Its name. That of an input which becomes an output ends in `.must_alias_input`, and both have it.
    pub name: String,
    /// Its shape.
    pub shape: Shape,
}

/// A module that a compiler takes.
#[derive(Clone, Debug)]
pub struct Module {
    /// What is written into a file.
    pub proto: HloModuleProto,
    /// Parameters, in order.
    pub inputs: Vec<Port>,
    /// Outputs, in order.
    pub outputs: Vec<Port>,
    /// (input, output) that share memory.
    pub aliases: Vec<(usize, usize)>,
    /// What the inputs were recorded with; None: zeros.
    pub(crate) data: Vec<Option<Arc<Literal>>>,
}

impl Module {
    /// The serialized module.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.proto.encode_to_vec()
    }

    /// HLO text, for people.
    pub fn to_text(&self) -> String {
        super::text::text(&self.proto)
    }

    /// Number of instructions in all computations, each counted once.
    pub fn instructions(&self) -> usize {
        self.proto.computations.iter().map(|c| c.instructions.len()).sum()
    }

    /// The values that the inputs were recorded with.
    pub fn recorded_inputs(&self) -> Vec<Literal> {
        self.data
            .iter()
            .zip(&self.inputs)
            .map(|(data, port)| match data {
                Some(data) => (**data).clone(),
                None => zeros(&port.shape),
            })
            .collect()
    }
}

fn zeros(shape: &Shape) -> Literal {
    let n = shape.elements();
    match shape.ty {
        Type::F32 => Literal::F32(vec![0.0; n]),
        Type::Bf16 => Literal::Bf16(vec![0.0; n]),
        Type::S32 => Literal::S32(vec![0; n]),
        Type::Pred => panic!("truth values stay on the device"),
    }
}

/// An output to be.
pub(crate) struct Output {
    pub(crate) name: String,
    /// Of the entry computation.
    pub(crate) node: u32,
    /// The input, by leaf, whose memory it takes over.
    pub(crate) alias: Option<usize>,
}

/// Ends the names of an input and an output that share memory.
pub(crate) const ALIAS: &str = ".must_alias_input";

/// A module named `name` that gives `outputs`; `in_place`: those that take over an input lie in its memory.
pub(crate) fn emit(graph: &Graph, name: &str, outputs: &[Output], in_place: bool) -> Module {
    let (grid, graph) = (graph.grid, &*graph.lock());
    Emitter {
        graph,
        grid,
        in_place,
        ids: 0,
        computations: Vec::new(),
        reducers: BTreeMap::new(),
        called: HashMap::new(),
    }
    .module(name, outputs)
}

struct Emitter<'g> {
    graph: &'g Inner,
    grid: Grid,
    in_place: bool,
    /// Ids given out so far: instructions and computations count together, from 1.
    ids: i64,
    computations: Vec<HloComputationProto>,
    /// (how, type) → computation id.
    reducers: BTreeMap<(&'static str, i32), i64>,
    /// Computation of the graph → its id; with a trip count: its condition's.
    called: HashMap<(usize, Option<usize>), i64>,
}

/// Nodes that `roots` need.
fn needed(computation: &Computation, roots: impl IntoIterator<Item = u32>) -> Vec<bool> {
    let mut needed = vec![false; computation.nodes.len()];
    roots.into_iter().for_each(|root| needed[root as usize] = true);
    for node in (0..needed.len()).rev().filter(|&n| computation.nodes.len() > n) {
        if needed[node] {
            computation.nodes[node].operands.iter().for_each(|&o| needed[o as usize] = true);
        }
    }
    needed
}

impl Kind {
    fn proto(&self) -> ShapeProto {
        match self {
            Kind::Array(shape) => shape.proto(),
            Kind::Tuple(parts) => tuple_proto(parts),
        }
    }
}

/// The shape of what an instruction gives that gives one array.
fn array(kind: &Kind) -> &Shape {
    match kind {
        Kind::Array(shape) => shape,
        Kind::Tuple(_) => panic!("a tuple is no array"),
    }
}

fn whole(numbers: &[usize]) -> Vec<i64> {
    numbers.iter().map(|&n| n as i64).collect()
}

fn attribute(key: &str, value: String) -> Option<FrontendAttributes> {
    Some(FrontendAttributes { map: BTreeMap::from([(key.to_owned(), value)]) })
}

impl Emitter<'_> {
    fn module(mut self, name: &str, outputs: &[Output]) -> Module {
        let graph = self.graph;
        let entry = &graph.computations[0];
        let needed = needed(entry, outputs.iter().map(|o| o.node));
        // Every aliased input is a parameter, also where nothing reads it.
        let aliased: BTreeSet<usize> = outputs.iter().filter_map(|o| o.alias).collect();
        let mut leaves: Vec<usize> = Vec::new();
        for (node, _) in entry.nodes.iter().zip(&needed).filter(|(_, needed)| **needed) {
            if let Op::Leaf(leaf) = node.op {
                leaves.push(leaf);
            }
        }
        leaves.extend(aliased.iter().filter(|leaf| !leaves.contains(leaf)).copied().collect::<Vec<_>>());
        leaves.sort_unstable();
        let inputs: Vec<Port> = leaves
            .iter()
            .map(|&leaf| {
                let suffix = if self.in_place && aliased.contains(&leaf) { ALIAS } else { "" };
                let Leaf { name, shape, .. } = &graph.leaves[leaf];
                // Every name is there once, also where nobody gave one.
                let shared = leaves.iter().any(|&other| other != leaf && graph.leaves[other].name == *name);
                let number = if shared { format!(".{leaf}") } else { String::new() };
                Port { name: format!("{name}{number}{suffix}"), shape: shape.clone() }
            })
            .collect();

        let mut body = Body::default();
        for (number, port) in inputs.iter().enumerate() {
            let id = self.id();
            body.instructions.push(HloInstructionProto {
                name: format!("parameter.{id}"),
                opcode: "parameter".into(),
                shape: Some(port.shape.proto()),
                parameter_number: number as i64,
                metadata: metadata(&port.name),
                frontend_attributes: attribute("neff_input_names", port.name.clone()),
                id,
                ..HloInstructionProto::default()
            });
        }
        let ports: Vec<Port> = outputs
            .iter()
            .map(|output| {
                let shape = array(&entry.nodes[output.node as usize].kind);
                let name = match output.alias {
                    Some(leaf) if self.in_place => format!("{}{ALIAS}", graph.leaves[leaf].name),
                    Some(leaf) => graph.leaves[leaf].name.clone(),
                    None => output.name.clone(),
                };
                Port { name, shape: shape.clone() }
            })
            .collect();
        // A parameter is never an output itself. Its copy comes before anything is written in its place.
        let mut copies = HashMap::new();
        for (number, (output, port)) in outputs.iter().zip(&ports).enumerate() {
            if let Op::Leaf(leaf) = entry.nodes[output.node as usize].op {
                let parameter = leaves.binary_search(&leaf).expect("collected above");
                let parameter = body.instructions[parameter].id;
                let copy = self.plain("copy", port.shape.proto(), vec![parameter], &mut body, &port.name);
                copies.insert(number, copy);
            }
        }
        for (index, (node, _)) in entry.nodes.iter().zip(&needed).enumerate().filter(|(_, (_, n))| **n) {
            if let Op::Leaf(leaf) = node.op {
                let number = leaves.binary_search(&leaf).expect("collected above");
                body.ids.insert(index as u32, body.instructions[number].id);
            } else {
                self.instruction(node, index as u32, &mut body);
            }
        }
        let names: Vec<&str> = ports.iter().map(|p| p.name.as_str()).collect();
        let names = attribute("neff_output_names", names.join(","));
        let mut results = Vec::new();
        let mut taken = BTreeSet::new();
        for (number, (output, port)) in outputs.iter().zip(&ports).enumerate() {
            let mut id = copies.get(&number).copied().unwrap_or_else(|| body.ids[&output.node]);
            // One value is not two outputs, nor a single output's own root.
            if !taken.insert(id) || outputs.len() == 1 {
                id = self.plain("copy", port.shape.proto(), vec![id], &mut body, &port.name);
            }
            results.push(id);
        }
        let shapes: Vec<Shape> = ports.iter().map(|p| p.shape.clone()).collect();
        if results.len() > 1 {
            self.plain("tuple", tuple_proto(&shapes), results, &mut body, "outputs");
        }
        let root = body.instructions.last_mut().expect("a module has an output");
        root.frontend_attributes = names;
        let program = ProgramShapeProto {
            parameters: inputs.iter().map(|p| p.shape.proto()).collect(),
            result: root.shape.clone(),
            parameter_names: inputs.iter().map(|p| p.name.clone()).collect(),
        };
        let id = self.computation("main", body.instructions, program.clone());

        let position = |leaf| leaves.binary_search(&leaf).expect("aliased inputs are parameters");
        let aliases: Vec<(usize, usize)> = outputs
            .iter()
            .enumerate()
            .filter_map(|(index, output)| output.alias.map(|leaf| (position(leaf), index)))
            .filter(|_| self.in_place)
            .collect();
        let entries = aliases.iter().map(|&(input, output)| AliasEntryProto {
            output_shape_index: if outputs.len() > 1 { vec![output as i64] } else { Vec::new() },
            parameter_number: input as i64,
            parameter_shape_index: Vec::new(),
            kind: 2,
        });
        let entries: Vec<_> = entries.collect();
        let proto = HloModuleProto {
            name: name.to_owned(),
            entry_computation_name: "main".into(),
            entry_computation_id: id,
            computations: self.computations,
            host_program_shape: Some(program),
            id: 1,
            input_output_alias: (!entries.is_empty()).then_some(HloInputOutputAliasProto { entries }),
            frontend_attributes: None,
        };
        let data = leaves.iter().map(|&leaf| graph.leaves[leaf].data.clone()).collect();
        Module { proto, inputs, outputs: ports, aliases, data }
    }

    fn id(&mut self) -> i64 {
        self.ids += 1;
        self.ids
    }

    fn computation(
        &mut self,
        name: &str,
        instructions: Vec<HloInstructionProto>,
        program: ProgramShapeProto,
    ) -> i64 {
        let id = self.id();
        let root_id = instructions.last().expect("a computation has instructions").id;
        self.computations.push(HloComputationProto {
            name: name.to_owned(),
            instructions,
            program_shape: Some(program),
            id,
            root_id,
        });
        id
    }

    fn plain(
        &mut self,
        opcode: &str,
        shape: ShapeProto,
        operands: Vec<i64>,
        body: &mut Body,
        what: &str,
    ) -> i64 {
        let id = self.id();
        body.instructions.push(HloInstructionProto {
            name: format!("{opcode}.{id}"),
            opcode: opcode.to_owned(),
            shape: Some(shape),
            metadata: metadata(what),
            operand_ids: operands,
            id,
            ..HloInstructionProto::default()
        });
        id
    }

    /// A scalar `(a, b) → how(a, b)`.
    fn reducer(&mut self, how: &'static str, ty: Type) -> i64 {
        if let Some(&id) = self.reducers.get(&(how, ty.primitive())) {
            return id;
        }
        let scalar = Shape::new(ty, &[]).proto();
        let mut body = Body::default();
        let operands: Vec<i64> = (0..2)
            .map(|number| {
                let id = self.plain("parameter", scalar.clone(), Vec::new(), &mut body, how);
                body.instructions.last_mut().expect("just pushed").parameter_number = number;
                id
            })
            .collect();
        self.plain(how, scalar.clone(), operands, &mut body, how);
        let program = ProgramShapeProto {
            parameters: vec![scalar.clone(), scalar.clone()],
            result: Some(scalar),
            parameter_names: vec!["a".into(), "b".into()],
        };
        let id = self.computation(&format!("{how}_{ty:?}").to_lowercase(), body.instructions, program);
        self.reducers.insert((how, ty.primitive()), id);
        id
    }

    /// A computation on the state tuple.
    fn callee(&mut self, index: usize) -> i64 {
        if let Some(&id) = self.called.get(&(index, None)) {
            return id;
        }
        let computation = &self.graph.computations[index];
        let root = computation.root.expect("a called computation is complete");
        let mut body = Body::default();
        let needed = needed(computation, [0, root]);
        for (node, _) in (0..).zip(&needed).filter(|(_, needed)| **needed) {
            self.instruction(&computation.nodes[node as usize], node, &mut body);
        }
        let id = self.computation(
            &format!("body.{index}"),
            body.instructions,
            state_program(&computation.nodes[0].kind, computation.nodes[root as usize].kind.proto()),
        );
        self.called.insert((index, None), id);
        id
    }

    /// Whether the first element of the state tuple is below `count`.
    fn condition(&mut self, index: usize, count: usize) -> i64 {
        if let Some(&id) = self.called.get(&(index, Some(count))) {
            return id;
        }
        let state = &self.graph.computations[index].nodes[0].kind;
        let (scalar, truth) = (Shape::new(Type::S32, &[]), Shape::new(Type::Pred, &[]).proto());
        let mut body = Body::default();
        let tuple = self.plain("parameter", state.proto(), Vec::new(), &mut body, "layers");
        let i = self.plain("get-tuple-element", scalar.proto(), vec![tuple], &mut body, "layers");
        let n = self.plain("constant", scalar.proto(), Vec::new(), &mut body, "layers");
        body.instructions.last_mut().expect("just pushed").literal = Some(literal(&scalar, count as f64));
        self.plain("compare", truth.clone(), vec![i, n], &mut body, "layers");
        body.instructions.last_mut().expect("just pushed").comparison_direction = "LT".into();
        let id =
            self.computation(&format!("condition.{index}"), body.instructions, state_program(state, truth));
        self.called.insert((index, Some(count)), id);
        id
    }

    fn instruction(&mut self, node: &Node, index: u32, body: &mut Body) {
        let called = match &node.op {
            Op::Reduce(how, _) | Op::Collective(Collective::AllReduce(how), _) => {
                vec![self.reducer(how, array(&node.kind).ty)]
            }
            Op::Collective(Collective::ReduceScatter(_), _) => {
                vec![self.reducer("add", array(&node.kind).ty)]
            }
            Op::Call(callee) => vec![self.callee(*callee)],
            // XLA's order: body, condition.
            Op::While(callee, count) => vec![self.callee(*callee), self.condition(*callee, *count)],
            _ => Vec::new(),
        };
        let id = self.id();
        let mut out = HloInstructionProto {
            opcode: opcode(&node.op).to_owned(),
            shape: Some(node.kind.proto()),
            metadata: metadata(&self.graph.names[node.name as usize]),
            operand_ids: node.operands.iter().map(|o| body.ids[o]).collect(),
            called_computation_ids: called,
            id,
            ..HloInstructionProto::default()
        };
        out.name = format!("{}.{id}", out.opcode);
        match &node.op {
            Op::Element(index) => out.tuple_index = *index as i64,
            Op::Constant(value) => {
                out.literal = Some(literal(array(&node.kind), *value));
            }
            Op::Iota(axis) | Op::Concatenate(axis) => out.dimensions = vec![*axis as i64],
            Op::Broadcast(axes) | Op::Transpose(axes) | Op::Reduce(_, axes) => out.dimensions = whole(axes),
            Op::Slice(ranges) => {
                let slice = |&(start, limit): &(usize, usize)| SliceDimensions {
                    start: start as i64,
                    limit: limit as i64,
                    stride: 1,
                };
                out.slice_dimensions = ranges.iter().map(slice).collect();
            }
            Op::DynamicSlice => {
                out.dynamic_slice_sizes = whole(&array(&node.kind).dims);
            }
            Op::Pad(padding) => {
                let pad = |&(low, high): &(usize, usize)| PaddingConfigDimension {
                    edge_padding_low: low as i64,
                    edge_padding_high: high as i64,
                    interior_padding: 0,
                };
                out.padding_config = Some(PaddingConfig { dimensions: padding.iter().map(pad).collect() });
            }
            Op::Dot(axes) => {
                out.dot_dimension_numbers = Some(DotDimensionNumbers {
                    lhs_contracting_dimensions: whole(&axes.contract[0]),
                    rhs_contracting_dimensions: whole(&axes.contract[1]),
                    lhs_batch_dimensions: whole(&axes.batch[0]),
                    rhs_batch_dimensions: whole(&axes.batch[1]),
                });
            }
            Op::Collective(what, ranks) => {
                if let Collective::AllGather(axis) | Collective::ReduceScatter(axis) = what {
                    out.dimensions = vec![*axis as i64];
                }
                let groups = self.grid.groups(*ranks).into_iter();
                out.replica_groups = groups.map(|g| ReplicaGroup { replica_ids: whole(&g) }).collect();
            }
            Op::Compare(direction) => out.comparison_direction = (*direction).to_owned(),
            _ => {}
        }
        body.ids.insert(index, id);
        body.instructions.push(out);
    }
}

/// Instructions of a computation as they come.
#[derive(Default)]
struct Body {
    instructions: Vec<HloInstructionProto>,
    /// Node → id.
    ids: HashMap<u32, i64>,
}

fn opcode(op: &Op) -> &'static str {
    match op {
        Op::Leaf(_) | Op::State => "parameter",
        Op::Element(_) => "get-tuple-element",
        Op::Constant(_) => "constant",
        Op::Iota(_) => "iota",
        Op::Broadcast(_) => "broadcast",
        Op::Reshape => "reshape",
        Op::Transpose(_) => "transpose",
        Op::Slice(_) => "slice",
        Op::DynamicSlice => "dynamic-slice",
        Op::DynamicUpdateSlice => "dynamic-update-slice",
        Op::Concatenate(_) => "concatenate",
        Op::Pad(_) => "pad",
        Op::Dot(_) => "dot",
        Op::Plain(opcode) => opcode,
        Op::Compare(_) => "compare",
        Op::Reduce(..) => "reduce",
        Op::Collective(Collective::AllReduce(_), _) => "all-reduce",
        Op::Collective(Collective::AllGather(_), _) => "all-gather",
        Op::Collective(Collective::ReduceScatter(_), _) => "reduce-scatter",
        Op::Tuple => "tuple",
        Op::Call(_) => "call",
        Op::While(..) => "while",
    }
}

fn metadata(name: &str) -> Option<OpMetadata> {
    let op_type = name.rsplit('/').next().unwrap_or_default().to_owned();
    Some(OpMetadata { op_type, op_name: name.to_owned() })
}

fn literal(shape: &Shape, value: f64) -> LiteralProto {
    let mut out = LiteralProto { shape: Some(shape.proto()), ..LiteralProto::default() };
    match shape.ty {
        Type::F32 => out.f32s = vec![value as f32],
        Type::Bf16 => out.bf16s = half::bf16::from_f64(value).to_le_bytes().to_vec(),
        Type::S32 => out.s32s = vec![value as i32],
        Type::Pred => out.preds = vec![value != 0.0],
    }
    out
}

fn state_program(state: &Kind, result: ShapeProto) -> ProgramShapeProto {
    ProgramShapeProto {
        parameters: vec![state.proto()],
        result: Some(result),
        parameter_names: vec!["state".into()],
    }
}
