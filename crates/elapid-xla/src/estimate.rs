//! What a module will need on a device, estimated from its text.

use std::collections::{HashMap, HashSet};

use crate::hlo::proto::{HloComputationProto, HloInstructionProto, HloModuleProto, ShapeProto, primitive};

/// What a module needs. An estimate: the compiler decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of all inputs.
    pub arguments: u64,
    /// Bytes of the outputs that take over no input.
    pub outputs: u64,
    /// Bytes of intermediate values at the worst moment, in the order of the text. Elementwise chains count as fused
    /// where nothing but elementwise work and reductions reads them; updates of slices and loop states are in place.
    pub temporaries: u64,
    /// The same where nothing is fused and every value is stored: an upper bound for a compiler that keeps to the order of
    /// the text.
    pub temporaries_at_most: u64,
    /// The same where no memory is used twice, which no order needs more than; but what is called stands once for each call,
    /// and a loop's body, whose turns follow each other, once in all.
    pub temporaries_in_any_order: u64,
    /// What there is to do.
    pub work: Work,
}

/// What a module has to do when every layer is written out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Instructions of a NeuronCore, in tiles of 128 partitions and 512 columns.
    pub instructions: u64,
    /// Multiplications and additions of products.
    pub flops: u64,
    /// Collectives.
    pub collectives: u64,
    /// Bytes that a rank sends in them to its neighbours in a ring: of n bytes a sum over r ranks sends 2·n·(r − 1)/r, a
    /// gather or a scattered sum that comes to or from n bytes n·(r − 1)/r.
    pub sent: u64,
}

/// What one computation needs.
#[derive(Clone, Copy, Debug, Default)]
struct Costs {
    /// Bytes of intermediate values, fused and not, and of all together.
    fused: u64,
    most: u64,
    all: u64,
    work: Work,
}

impl Work {
    fn add(&mut self, other: Self, times: u64) {
        self.instructions += times * other.instructions;
        self.flops += times * other.flops;
        self.collectives += times * other.collectives;
        self.sent += times * other.sent;
    }
}

impl Estimate {
    /// Bytes in all.
    pub fn memory(&self) -> u64 {
        self.arguments + self.outputs + self.temporaries
    }
}

fn elements(shape: &ShapeProto) -> u64 {
    shape.dimensions.iter().map(|&d| d as u64).product()
}

fn bytes(shape: &ShapeProto) -> u64 {
    if shape.element_type == primitive::TUPLE {
        return shape.tuple_shapes.iter().map(bytes).sum();
    }
    let size = match shape.element_type {
        primitive::PRED => 1,
        primitive::BF16 => 2,
        _ => 4,
    };
    elements(shape) * size
}

/// Estimates `module`.
pub fn estimate(module: &HloModuleProto) -> Estimate {
    let mut costs: HashMap<i64, Costs> = HashMap::new();
    let mut turns: HashMap<i64, u64> = HashMap::new();
    for computation in &module.computations {
        if let Some(count) = trip_count(computation) {
            turns.insert(computation.id, count);
        }
        let aliased = if computation.id == module.entry_computation_id {
            aliased_outputs(module)
        } else {
            HashSet::new()
        };
        let (fused, _) = temporaries(computation, &costs, &aliased, true);
        let (most, all) = temporaries(computation, &costs, &aliased, false);
        costs.insert(computation.id, Costs { fused, most, all, work: work(computation, &costs, &turns) });
    }
    let shape = module.host_program_shape.clone().unwrap_or_default();
    let aliased = aliased_outputs(module);
    let results = match shape.result {
        Some(result) if result.element_type == primitive::TUPLE => result.tuple_shapes,
        other => other.into_iter().collect(),
    };
    let outputs =
        results.iter().enumerate().filter(|(i, _)| !aliased.contains(i)).map(|(_, s)| bytes(s)).sum();
    let Costs { fused: temporaries, most: temporaries_at_most, all: temporaries_in_any_order, work } =
        costs.get(&module.entry_computation_id).copied().unwrap_or_default();
    Estimate {
        arguments: shape.parameters.iter().map(bytes).sum(),
        outputs,
        temporaries,
        temporaries_at_most,
        temporaries_in_any_order,
        work,
    }
}

fn aliased_outputs(module: &HloModuleProto) -> HashSet<usize> {
    let entries = module.input_output_alias.iter().flat_map(|a| &a.entries);
    entries.map(|e| e.output_shape_index.first().copied().unwrap_or(0) as usize).collect()
}

/// The number that the condition of a loop compares with.
fn trip_count(computation: &HloComputationProto) -> Option<u64> {
    let root = computation.instructions.iter().find(|i| i.id == computation.root_id)?;
    let bound = root.operand_ids.get(1).filter(|_| root.opcode == "compare")?;
    let constant = computation.instructions.iter().find(|i| i.id == *bound)?;
    constant.literal.as_ref()?.s32s.first().map(|&n| n as u64)
}

/// What a compiler makes on the way instead of storing it.
fn is_elementwise(opcode: &str) -> bool {
    let moves = [
        "dot",
        "reduce",
        "transpose",
        "concatenate",
        "slice",
        "pad",
        "copy",
        "dynamic-slice",
        "dynamic-update-slice",
        "tuple",
        "call",
        "while",
        "parameter",
        "get-tuple-element",
        "opt-barrier",
        "all-gather",
        "all-reduce",
        "reduce-scatter",
    ];
    !moves.contains(&opcode)
}

/// Peak of live intermediate bytes of a computation, and their sum; what comes from outside is not counted.
fn temporaries(
    computation: &HloComputationProto,
    costs: &HashMap<i64, Costs>,
    aliased: &HashSet<usize>,
    fuse: bool,
) -> (u64, u64) {
    let all = &computation.instructions;
    let position: HashMap<i64, usize> = all.iter().enumerate().map(|(at, i)| (i.id, at)).collect();
    let mut stored = vec![!fuse; all.len()]; // read by more than elementwise work and reductions
    for (at, i) in all.iter().enumerate().rev() {
        let is_view = i.opcode == "reshape" || i.opcode == "opt-barrier";
        if if is_view { stored[at] } else { !is_elementwise(&i.opcode) && i.opcode != "reduce" } {
            i.operand_ids.iter().for_each(|id| stored[position[id]] = true);
        }
    }
    // Buffers of each instruction, by number; their sizes and last uses.
    let mut buffers: Vec<Vec<usize>> = Vec::with_capacity(all.len());
    let (mut size, mut last) = (Vec::<u64>::new(), Vec::<usize>::new());
    let mut born: Vec<Vec<usize>> = vec![Vec::new(); all.len()];
    for (at, i) in all.iter().enumerate() {
        let operand = |n: usize| buffers[position[&i.operand_ids[n]]].clone();
        let parts = |i: &HloInstructionProto| match &i.shape {
            Some(shape) if shape.element_type == primitive::TUPLE => shape.tuple_shapes.clone(),
            shape => shape.iter().cloned().collect(),
        };
        let mine: Vec<usize> = match i.opcode.as_str() {
            "reshape" | "opt-barrier" | "call" | "while" | "dynamic-update-slice" => operand(0),
            "get-tuple-element" => vec![operand(0)[i.tuple_index as usize]],
            "tuple" => (0..i.operand_ids.len()).flat_map(operand).collect(),
            opcode => {
                let free =
                    ["parameter", "constant"].contains(&opcode) || (is_elementwise(opcode) && !stored[at]);
                let made = parts(i);
                made.iter()
                    .map(|shape| {
                        size.push(if free { 0 } else { bytes(shape) });
                        last.push(at);
                        born[at].push(size.len() - 1);
                        size.len() - 1
                    })
                    .collect()
            }
        };
        for id in &i.operand_ids {
            buffers[position[id]].iter().for_each(|&b| last[b] = at);
        }
        buffers.push(mine);
    }
    if let Some(&root) = position.get(&computation.root_id) {
        for (output, &buffer) in buffers[root].iter().enumerate() {
            last[buffer] = all.len();
            // An output that takes over an input is written there.
            if aliased.contains(&output) {
                size[buffer] = 0;
            }
        }
    }
    let (mut live, mut peak) = (0, 0);
    let mut sum = size.iter().sum();
    let mut dying: Vec<Vec<usize>> = vec![Vec::new(); all.len() + 1];
    last.iter().enumerate().for_each(|(buffer, &at)| dying[at].push(buffer));
    for (at, i) in all.iter().enumerate() {
        live += born[at].iter().map(|&b| size[b]).sum::<u64>();
        let called = i.called_computation_ids.iter().filter_map(|id| costs.get(id));
        sum += called.clone().map(|c| c.all).sum::<u64>();
        let inside = called.map(|c| if fuse { c.fused } else { c.most }).max();
        peak = peak.max(live + inside.unwrap_or(0));
        live -= dying[at].iter().map(|&b| size[b]).sum::<u64>();
    }
    (peak, sum)
}

const PARTITIONS: u64 = 128;
const COLUMNS: u64 = 512;

fn work(computation: &HloComputationProto, costs: &HashMap<i64, Costs>, turns: &HashMap<i64, u64>) -> Work {
    let shapes: HashMap<i64, &ShapeProto> =
        computation.instructions.iter().filter_map(|i| Some((i.id, i.shape.as_ref()?))).collect();
    let mut all = Work::default();
    for i in &computation.instructions {
        let Some(shape) = &i.shape else { continue };
        let operand =
            |n: usize| i.operand_ids.get(n).and_then(|id| shapes.get(id)).map_or(0, |s| elements(s));
        match i.opcode.as_str() {
            "parameter" | "constant" | "tuple" | "get-tuple-element" | "reshape" | "broadcast"
            | "opt-barrier" => {}
            "call" | "while" => {
                let times = i.called_computation_ids.iter().filter_map(|id| turns.get(id)).max();
                for inside in i.called_computation_ids.iter().filter_map(|id| costs.get(id)) {
                    all.add(inside.work, *times.unwrap_or(&1));
                }
            }
            "dot" => {
                let (instructions, flops) = product(i, &shapes);
                all.add(Work { instructions, flops, ..Work::default() }, 1);
            }
            "reduce" => all.instructions += tiles(operand(0)),
            // In place: the size of what is written.
            "dynamic-update-slice" => all.instructions += tiles(operand(1)),
            opcode if opcode.starts_with("all-") || opcode == "reduce-scatter" => {
                let ranks = i.replica_groups.first().map_or(1, |group| group.replica_ids.len() as u64);
                let size = bytes(shape) / elements(shape).max(1);
                let most = size * elements(shape).max(operand(0));
                let twice = if opcode == "all-reduce" { 2 } else { 1 };
                let sent = twice * most * (ranks - 1) / ranks;
                let instructions = tiles(operand(0));
                all.add(Work { instructions, collectives: 1, sent, ..Work::default() }, 1);
            }
            _ => all.instructions += tiles(elements(shape)),
        }
    }
    all
}

fn tiles(elements: u64) -> u64 {
    elements.div_ceil(PARTITIONS * COLUMNS)
}

/// Tiles of a product, contraction and stationary side in 128s, moving side in 512s; multiplications and additions.
fn product(i: &HloInstructionProto, shapes: &HashMap<i64, &ShapeProto>) -> (u64, u64) {
    let (Some(axes), [left, right]) = (&i.dot_dimension_numbers, &i.operand_ids[..]) else { return (0, 0) };
    let (Some(left), Some(right)) = (shapes.get(left), shapes.get(right)) else { return (0, 0) };
    let over = |shape: &ShapeProto, axes: &[i64]| -> u64 {
        axes.iter().map(|&a| shape.dimensions[a as usize] as u64).product()
    };
    let batch = over(left, &axes.lhs_batch_dimensions);
    let depth = over(left, &axes.lhs_contracting_dimensions);
    let (m, n) = (elements(left) / (batch * depth), elements(right) / (batch * depth));
    let count = |m: u64, n: u64| m.div_ceil(PARTITIONS) * n.div_ceil(COLUMNS);
    let tiles = batch * depth.div_ceil(PARTITIONS) * count(m, n).min(count(n, m));
    (tiles, 2 * batch * depth * m * n)
}
