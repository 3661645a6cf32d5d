//! HLO text, as XLA prints it, so that its tools read it too.

use std::collections::HashMap;
use std::fmt::Write;

use super::proto::{
    HloComputationProto, HloInstructionProto, HloModuleProto, LiteralProto, ShapeProto, primitive,
};

pub(super) fn text(module: &HloModuleProto) -> String {
    let computations: HashMap<i64, &str> =
        module.computations.iter().map(|c| (c.id, c.name.as_str())).collect();
    let mut out = format!("HloModule {}", module.name);
    if let Some(alias) = &module.input_output_alias {
        let entry = |e: &super::proto::AliasEntryProto| {
            let kind = if e.kind == 2 { ", must-alias" } else { "" };
            format!("{{{}}}: ({}, {{}}{kind})", list(&e.output_shape_index), e.parameter_number)
        };
        let entries: Vec<_> = alias.entries.iter().map(entry).collect();
        let _ = write!(out, ", input_output_alias={{ {} }}", entries.join(", "));
    }
    out.push('\n');
    for computation in &module.computations {
        out.push('\n');
        if computation.id == module.entry_computation_id {
            out.push_str("ENTRY ");
        }
        let _ = writeln!(out, "%{} {{", computation.name);
        let names: HashMap<i64, &HloInstructionProto> =
            computation.instructions.iter().map(|i| (i.id, i)).collect();
        for instruction in &computation.instructions {
            line(&mut out, computation, instruction, &names, &computations);
        }
        out.push_str("}\n");
    }
    out
}

fn list(numbers: &[i64]) -> String {
    numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(",")
}

fn groups(i: &HloInstructionProto) -> String {
    let groups: Vec<_> =
        i.replica_groups.iter().map(|group| format!("{{{}}}", list(&group.replica_ids))).collect();
    format!("{{{}}}", groups.join(","))
}

fn shape(shape: &ShapeProto) -> String {
    if shape.element_type == primitive::TUPLE {
        let parts: Vec<_> = shape.tuple_shapes.iter().map(self::shape).collect();
        return format!("({})", parts.join(", "));
    }
    let ty = match shape.element_type {
        primitive::PRED => "pred",
        primitive::S32 => "s32",
        primitive::BF16 => "bf16",
        _ => "f32",
    };
    let layout = match &shape.layout {
        Some(layout) if !shape.dimensions.is_empty() => format!("{{{}}}", list(&layout.minor_to_major)),
        _ => String::new(),
    };
    format!("{ty}[{}]{layout}", list(&shape.dimensions))
}

fn value(literal: &LiteralProto) -> String {
    if let Some(x) = literal.f32s.first() {
        format!("{x:e}")
    } else if let Some(x) = literal.s32s.first() {
        x.to_string()
    } else if let Some(x) = literal.preds.first() {
        x.to_string()
    } else if let [a, b] = literal.bf16s[..] {
        format!("{:e}", half::bf16::from_le_bytes([a, b]).to_f32())
    } else {
        String::new()
    }
}

fn line(
    out: &mut String,
    computation: &HloComputationProto,
    i: &HloInstructionProto,
    names: &HashMap<i64, &HloInstructionProto>,
    computations: &HashMap<i64, &str>,
) {
    let root = if i.id == computation.root_id { "ROOT " } else { "" };
    let result = i.shape.as_ref().map(shape).unwrap_or_default();
    let inside = match i.opcode.as_str() {
        "parameter" => i.parameter_number.to_string(),
        "constant" => i.literal.as_ref().map(value).unwrap_or_default(),
        _ => i.operand_ids.iter().map(|id| format!("%{}", names[id].name)).collect::<Vec<_>>().join(", "),
    };
    let _ = write!(out, "  {root}%{} = {result} {}({inside})", i.name, i.opcode);
    let called: Vec<&str> = i.called_computation_ids.iter().map(|id| computations[id]).collect();
    match (i.opcode.as_str(), &called[..]) {
        ("get-tuple-element", _) => {
            let _ = write!(out, ", index={}", i.tuple_index);
        }
        ("iota", _) => {
            let _ = write!(out, ", iota_dimension={}", list(&i.dimensions));
        }
        ("broadcast" | "transpose" | "concatenate", _) => {
            let _ = write!(out, ", dimensions={{{}}}", list(&i.dimensions));
        }
        ("reduce", [how]) => {
            let _ = write!(out, ", dimensions={{{}}}, to_apply=%{how}", list(&i.dimensions));
        }
        ("all-reduce", [how]) => {
            let _ = write!(out, ", replica_groups={}, to_apply=%{how}", groups(i));
        }
        ("all-gather", _) => {
            let _ = write!(out, ", replica_groups={}, dimensions={{{}}}", groups(i), list(&i.dimensions));
        }
        ("reduce-scatter", [how]) => {
            let _ = write!(
                out,
                ", replica_groups={}, dimensions={{{}}}, to_apply=%{how}",
                groups(i),
                list(&i.dimensions)
            );
        }
        ("call", [callee]) => {
            let _ = write!(out, ", to_apply=%{callee}");
        }
        ("while", [body, condition]) => {
            let _ = write!(out, ", condition=%{condition}, body=%{body}");
        }
        ("slice", _) => {
            let ranges: Vec<_> =
                i.slice_dimensions.iter().map(|s| format!("[{}:{}]", s.start, s.limit)).collect();
            let _ = write!(out, ", slice={{{}}}", ranges.join(", "));
        }
        ("dynamic-slice", _) => {
            let _ = write!(out, ", dynamic_slice_sizes={{{}}}", list(&i.dynamic_slice_sizes));
        }
        ("compare", _) => {
            let _ = write!(out, ", direction={}", i.comparison_direction);
        }
        ("pad", _) => {
            let pads: Vec<_> = i
                .padding_config
                .iter()
                .flat_map(|p| &p.dimensions)
                .map(|d| format!("{}_{}", d.edge_padding_low, d.edge_padding_high))
                .collect();
            let _ = write!(out, ", padding={}", pads.join("x"));
        }
        ("dot", _) => {
            if let Some(d) = &i.dot_dimension_numbers {
                for (name, axes) in [
                    ("lhs_batch_dims", &d.lhs_batch_dimensions),
                    ("lhs_contracting_dims", &d.lhs_contracting_dimensions),
                    ("rhs_batch_dims", &d.rhs_batch_dimensions),
                    ("rhs_contracting_dims", &d.rhs_contracting_dimensions),
                ] {
                    if !axes.is_empty() {
                        let _ = write!(out, ", {name}={{{}}}", list(axes));
                    }
                }
            }
        }
        _ => {}
    }
    if let Some(attributes) = &i.frontend_attributes {
        let pairs: Vec<_> = attributes.map.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let _ = write!(out, ", frontend_attributes={{{}}}", pairs.join(","));
    }
    if let Some(meta) = i.metadata.as_ref().filter(|meta| !meta.op_name.is_empty()) {
        let _ = write!(out, ", metadata={{op_type=\"{}\" op_name=\"{}\"}}", meta.op_type, meta.op_name);
    }
    out.push('\n');
}
