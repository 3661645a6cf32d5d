//! The rules of modules, checked: what XLA itself lets pass and a compiler for Trainium does not take.

use std::collections::{BTreeSet, HashMap};

use crate::hlo::proto::{HloComputationProto, HloInstructionProto, HloModuleProto, ShapeProto, primitive};

/// Opcodes of recorded modules. All but `call`, `while`, `dynamic-slice`, `opt-barrier` and the collectives' variants
/// stand in the list of operators that Neuron's documentation has published.
const OPCODES: [&str; 44] = [
    "abs",
    "add",
    "all-gather",
    "all-reduce",
    "and",
    "broadcast",
    "call",
    "compare",
    "concatenate",
    "constant",
    "convert",
    "copy",
    "divide",
    "dot",
    "dynamic-slice",
    "dynamic-update-slice",
    "exponential",
    "get-tuple-element",
    "iota",
    "log",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "not",
    "opt-barrier",
    "or",
    "pad",
    "parameter",
    "power",
    "reduce",
    "reduce-scatter",
    "reshape",
    "rsqrt",
    "select",
    "sign",
    "slice",
    "sqrt",
    "subtract",
    "tanh",
    "transpose",
    "tuple",
    "while",
    "floor",
];

/// Collectives: they need explicit groups and never add integers.
const COLLECTIVES: [&str; 3] = ["all-gather", "all-reduce", "reduce-scatter"];

/// Distinct sets of replica groups in one module.
const MAX_GROUPS: usize = 16;

/// Bytes of one constant. Larger tables belong into inputs.
const MAX_CONSTANT: usize = 1024;

/// What in `module` breaks a rule, one line each; empty: nothing.
pub fn lint(module: &HloModuleProto) -> Vec<String> {
    let mut found = Vec::new();
    ids(module, &mut found);
    structure(module, &mut found);
    let (mut groups, mut ranks) = (BTreeSet::new(), None);
    let mut done: HashMap<i64, &HloComputationProto> = HashMap::new();
    for computation in &module.computations {
        let mut known: HashMap<i64, &HloInstructionProto> = HashMap::new();
        for instruction in &computation.instructions {
            for what in rules(instruction, &known, &done) {
                found.push(format!("{}: {what}", place(instruction)));
            }
            if !instruction.replica_groups.is_empty() {
                groups.insert(
                    instruction.replica_groups.iter().map(|g| g.replica_ids.clone()).collect::<Vec<_>>(),
                );
            }
            let here: usize = instruction.replica_groups.iter().map(|g| g.replica_ids.len()).sum();
            if here > 0 && *ranks.get_or_insert(here) != here {
                found.push(format!("{}: groups of other ranks than before", place(instruction)));
            }
            known.insert(instruction.id, instruction);
        }
        if !known.contains_key(&computation.root_id) {
            found.push(format!("{}: the root is no instruction of it", computation.name));
        }
        done.insert(computation.id, computation);
    }
    if groups.len() > MAX_GROUPS {
        found.push(format!("{} distinct sets of replica groups, at most {MAX_GROUPS}", groups.len()));
    }
    found
}

/// An instruction's name and the op that it comes from.
fn place(i: &HloInstructionProto) -> String {
    match i.metadata.as_ref().map(|m| m.op_name.as_str()) {
        Some(op) if !op.is_empty() => format!("{} ({op})", i.name),
        _ => i.name.clone(),
    }
}

/// Ids of instructions and computations together are 1, 2, 3, ….
fn ids(module: &HloModuleProto, found: &mut Vec<String>) {
    let mut ids: Vec<i64> = module.computations.iter().map(|c| c.id).collect();
    ids.extend(module.computations.iter().flat_map(|c| c.instructions.iter().map(|i| i.id)));
    ids.sort_unstable();
    if let Some((want, id)) = (1..).zip(&ids).find(|(want, id)| want != *id) {
        found.push(format!("ids are not dense: {id} where {want} is due"));
    }
    if ids.last().is_some_and(|&id| id >= 1 << 31) {
        found.push("an id is 2³¹ or more".into());
    }
}

/// The entry: last, named, with names of inputs and outputs, and state that is updated in place.
fn structure(module: &HloModuleProto, found: &mut Vec<String>) {
    let Some(entry) = module.computations.last() else {
        found.push("no computation".into());
        return;
    };
    if entry.id != module.entry_computation_id || entry.name != module.entry_computation_name {
        found.push("the entry is not the last computation, or has another name".into());
    }
    if module.host_program_shape.is_none() || module.host_program_shape != entry.program_shape {
        found.push("host_program_shape is not the entry's".into());
    }
    let attribute = |i: &HloInstructionProto, key: &str| {
        i.frontend_attributes.as_ref().and_then(|a| a.map.get(key).cloned())
    };
    let parameters: Vec<&HloInstructionProto> =
        entry.instructions.iter().filter(|i| i.opcode == "parameter").collect();
    let names: Vec<Option<String>> = parameters.iter().map(|p| attribute(p, "neff_input_names")).collect();
    if names.iter().any(Option::is_none) || names.iter().collect::<BTreeSet<_>>().len() < names.len() {
        found.push("inputs without names, or two with the same".into());
    }
    if (0..).zip(&parameters).any(|(number, p)| p.parameter_number != number) {
        found.push("parameters are not in order".into());
    }
    let Some(root) = entry.instructions.iter().find(|i| i.id == entry.root_id) else { return };
    let outputs: Vec<String> = attribute(root, "neff_output_names")
        .map_or(Vec::new(), |n| n.split(',').map(str::to_owned).collect());
    let count = if root.opcode == "tuple" { root.operand_ids.len() } else { 1 };
    if !["tuple", "copy"].contains(&root.opcode.as_str()) || outputs.len() != count {
        found.push(format!("root {} with {} output names for {count} outputs", root.opcode, outputs.len()));
    }
    if root.operand_ids.iter().any(|id| root.opcode == "tuple" && parameters.iter().any(|p| p.id == *id)) {
        found.push("a parameter is an output as it is".into());
    }
    let entries = module.input_output_alias.iter().flat_map(|a| &a.entries);
    let (mut aliased, mut pairs) = (BTreeSet::new(), Vec::new());
    for entry in entries {
        let output = entry.output_shape_index.first().copied().unwrap_or(0) as usize;
        let input = entry.parameter_number as usize;
        let name = names.get(input).cloned().flatten().unwrap_or_default();
        let shape = match root.shape.as_ref() {
            Some(shape) if root.opcode == "tuple" => shape.tuple_shapes.get(output),
            shape => shape,
        };
        let same = outputs.get(output) == Some(&name)
            && name.ends_with(".must_alias_input")
            && parameters.get(input).and_then(|p| p.shape.as_ref()) == shape;
        pairs.push((input, output));
        if entry.kind != 2 || !same || !aliased.insert(input) {
            found.push(format!(
                "alias of input {input} {name:?} with output {output}: kind, name or shape differ"
            ));
        }
    }
    for (input, output) in pairs {
        let old = parameters.get(input).map(|p| p.id);
        if let Some(late) = read_after(entry, root, old, output) {
            found.push(format!("{}: reads input {input} after its new value is there", place(late)));
        }
    }
    let named = names.iter().flatten().filter(|n| n.ends_with(".must_alias_input")).count();
    if named != aliased.len() {
        found.push(format!("{named} inputs are named as aliased, {} are", aliased.len()));
    }
}

/// An instruction that reads the parameter `old`, or the same memory in another shape, after the value of output number
/// `output` has been computed, which lies there.
fn read_after<'m>(
    entry: &'m HloComputationProto,
    root: &HloInstructionProto,
    old: Option<i64>,
    output: usize,
) -> Option<&'m HloInstructionProto> {
    let new = if root.opcode == "tuple" { *root.operand_ids.get(output)? } else { root.id };
    let mut views = BTreeSet::from([old?]);
    let mut there = false;
    for i in entry.instructions.iter().filter(|i| i.id != root.id) {
        let reads = i.operand_ids.iter().any(|id| views.contains(id));
        if there && reads {
            return Some(i);
        }
        if reads && i.opcode == "reshape" {
            views.insert(i.id);
        }
        there |= i.id == new;
    }
    None
}

fn shape_rules(shape: &ShapeProto, found: &mut Vec<String>) {
    if shape.element_type == primitive::TUPLE {
        shape.tuple_shapes.iter().for_each(|s| shape_rules(s, found));
        return;
    }
    let types = [primitive::PRED, primitive::S32, primitive::F32, primitive::BF16];
    if !types.contains(&shape.element_type) {
        found.push(format!("element type {} is none of pred, s32, f32, bf16", shape.element_type));
    }
    let order: Vec<i64> = (0..shape.dimensions.len() as i64).rev().collect();
    if !shape
        .layout
        .as_ref()
        .is_some_and(|l| l.minor_to_major == order && l.tail_padding_alignment_in_elements == 1)
    {
        found.push("the layout is not row-major and unpadded".into());
    }
    if shape.is_dynamic_dimension.contains(&true) || shape.dimensions.iter().any(|&d| d <= 0) {
        found.push("an extent is not static, or zero".into());
    }
}

fn rules(
    i: &HloInstructionProto,
    known: &HashMap<i64, &HloInstructionProto>,
    done: &HashMap<i64, &HloComputationProto>,
) -> Vec<String> {
    let mut found = Vec::new();
    if !OPCODES.contains(&i.opcode.as_str()) {
        found.push(format!("opcode {} is not one of ours", i.opcode));
    }
    match &i.shape {
        Some(shape) => shape_rules(shape, &mut found),
        None => found.push("no shape".into()),
    }
    if i.metadata.as_ref().is_none_or(|m| m.op_name.is_empty()) {
        found.push("no op_name".into());
    }
    let operands: Vec<&HloInstructionProto> =
        i.operand_ids.iter().filter_map(|id| known.get(id).copied()).collect();
    if operands.len() != i.operand_ids.len() {
        found.push("an operand is not defined before".into());
        return found;
    }
    let callees: Vec<&HloComputationProto> =
        i.called_computation_ids.iter().filter_map(|id| done.get(id).copied()).collect();
    if callees.len() != i.called_computation_ids.len() {
        found.push("a called computation does not stand before its caller".into());
        return found;
    }
    let ty = |i: &HloInstructionProto| i.shape.as_ref().map_or(0, |s| s.element_type);
    let root = |c: &HloComputationProto| c.instructions.iter().find(|i| i.id == c.root_id).cloned();
    match i.opcode.as_str() {
        "dot" if operands.iter().any(|o| ty(o) == primitive::S32) => found.push("a dot of integers".into()),
        "dot" if ty(i) != primitive::F32 => found.push("a dot does not give f32".into()),
        "constant" => {
            let literal = i.literal.clone().unwrap_or_default();
            let bytes =
                4 * (literal.f32s.len() + literal.s32s.len()) + literal.bf16s.len() + literal.preds.len();
            if bytes == 0 || bytes > MAX_CONSTANT {
                found.push(format!("a constant of {bytes} bytes"));
            }
            let narrow =
                literal.bf16s.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
            if literal.f32s.iter().copied().chain(narrow).any(|x| !x.is_finite()) {
                found.push("a constant that is not finite".into());
            }
        }
        "reduce" => {
            let how = callees.first().and_then(|c| root(c)).map(|r| r.opcode).unwrap_or_default();
            if operands.len() != 2 || !["add", "maximum", "minimum", "multiply"].contains(&how.as_str()) {
                found.push("a reduction of several arrays, or by something else than +, ×, min, max".into());
            }
            if operands.get(1).is_none_or(|first| first.opcode != "constant") {
                found.push("a reduction whose first value is no constant".into());
            }
        }
        "while" => {
            let bounded = callees.get(1).is_some_and(|condition| {
                let constant =
                    |id: &i64| condition.instructions.iter().any(|i| i.id == *id && i.opcode == "constant");
                root(condition).is_some_and(|r| {
                    r.comparison_direction == "LT" && r.operand_ids.get(1).is_some_and(constant)
                })
            });
            if !bounded {
                found.push("a loop without a constant number of turns".into());
            }
        }
        opcode if COLLECTIVES.contains(&opcode) => {
            if i.replica_groups.is_empty() {
                found.push("a collective without explicit groups".into());
            }
            let mut all: Vec<i64> = i.replica_groups.iter().flat_map(|g| g.replica_ids.clone()).collect();
            all.sort_unstable();
            let size = i.replica_groups.first().map_or(0, |g| g.replica_ids.len());
            let uneven = i.replica_groups.iter().any(|g| g.replica_ids.len() != size);
            if uneven || (0..).zip(&all).any(|(rank, id)| rank != *id) {
                found.push("groups that are uneven, or do not hold every rank once".into());
            }
            let how = callees.first().and_then(|c| root(c)).map(|r| r.opcode).unwrap_or_default();
            let reduces = match opcode {
                "all-reduce" => ["add", "maximum"].contains(&how.as_str()),
                "reduce-scatter" => how == "add",
                _ => callees.is_empty(),
            };
            if !reduces {
                found.push("a collective that reduces by something else than + or max".into());
            }
            if opcode != "all-gather" && ty(i) == primitive::S32 {
                found.push("a collective that adds integers".into());
            }
        }
        _ => {}
    }
    found
}
