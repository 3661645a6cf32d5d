//! Every rule of the lint finds what breaks it.
#![allow(missing_docs)]

use elapid_tensor::{Backend, DType, FlatShape, Group, Row, Sink, Slot};
use elapid_xla::proto::{HloInstructionProto, HloModuleProto, ReplicaGroup};
use elapid_xla::{Options, Result, XlaBackend, estimate, lint};

/// Product, norm, gradients added in place, and what two ranks make of a result together.
fn module() -> HloModuleProto {
    let backend = XlaBackend::new(Options { tp: 2, ..Options::default() }, None);
    let flat = FlatShape { layers: 1, row: 64, shared: 0 };
    let slot = |offset, shape: &[usize]| Slot { row: Row::Layer(0), offset, shape: shape.to_vec() };
    let (weight, scale) = (slot(0, &[6, 8]), slot(48, &[8]));
    let params = backend.buffer(flat, DType::F32);
    let mut grads = backend.buffer(flat, DType::F32);
    let [stack, _] = backend.arrays(&grads);
    let number = backend.input_number(&stack.unwrap(), "grads.layers");
    let [stack, _] = backend.arrays(&params);
    backend.input_number(&stack.unwrap(), "params.layers");
    let x = backend.declare(elapid_xla::Shape::new(elapid_xla::Type::F32, &[2, 3, 8]), "x");
    let norm = backend.view(&params, &scale);
    let normed = backend.rms_norm(&x, &norm, 1e-5, DType::F32);
    let y = backend.linear(&normed, &backend.view(&params, &weight), None);
    let sink = Sink { buffer: &mut grads, slot: &weight };
    let dx = backend.linear_adjoint(&normed, &backend.view(&params, &weight), &y, sink, None);
    let [sum, _] = backend.arrays(&grads);
    let dx = backend.all_gather(&backend.all_reduce(&dx, Group::Tp), 1, Group::Tp);
    let (dx, sum) = (Result { name: "dx".into(), tensor: &dx, replaces: None }, sum.unwrap());
    backend.module("step", &[Result { name: String::new(), tensor: &sum, replaces: number }, dx]).proto
}

#[test]
fn a_recorded_module_keeps_all_rules() {
    let module = module();
    assert_eq!(lint(&module), Vec::<String>::new());
    let needs = estimate(&module);
    // x, gradients and parameters; dx.
    assert_eq!((needs.arguments, needs.outputs), (4 * (48 + 64 + 64), 4 * 96));
    // A sum sends all of 48 numbers, a gather half of 96.
    assert_eq!((needs.work.collectives, needs.work.sent), (2, 4 * (48 + 48)));
    assert!(needs.work.flops > 0 && needs.temporaries_at_most >= needs.temporaries);
    assert!(needs.temporaries > 0 && needs.work.instructions > 0);
}

fn first<'m>(module: &'m mut HloModuleProto, opcode: &str) -> &'m mut HloInstructionProto {
    let all = module.computations.iter_mut().rev().flat_map(|c| c.instructions.iter_mut());
    all.into_iter().find(|i| i.opcode == opcode).expect("the module has one")
}

fn input_name(parameter: &HloInstructionProto) -> &str {
    &parameter.frontend_attributes.as_ref().unwrap().map["neff_input_names"]
}

#[test]
fn every_broken_rule_is_found() {
    type Break = fn(&mut HloModuleProto);
    let breaks: [(&str, Break); 40] = [
        ("opcode", |m| first(m, "dot").opcode = "sort".into()),
        ("element type", |m| first(m, "dot").shape.as_mut().unwrap().element_type = 12),
        ("element type", |m| first(m, "broadcast").shape.as_mut().unwrap().element_type = 5),
        ("row-major", |m| {
            first(m, "dot").shape.as_mut().unwrap().layout.as_mut().unwrap().minor_to_major.reverse()
        }),
        ("static", |m| first(m, "dot").shape.as_mut().unwrap().is_dynamic_dimension[0] = true),
        ("row-major", |m| {
            first(m, "dot")
                .shape
                .as_mut()
                .unwrap()
                .layout
                .as_mut()
                .unwrap()
                .tail_padding_alignment_in_elements = 0
        }),
        ("no shape", |m| first(m, "dot").shape = None),
        ("does not give f32", |m| first(m, "dot").shape.as_mut().unwrap().element_type = 16),
        ("root is no instruction", |m| m.computations[0].root_id = 1 << 20),
        ("no computation", |m| m.computations.clear()),
        ("not in order", |m| first(m, "parameter").parameter_number = 7),
        ("first value is no constant", |m| {
            let reduce = first(m, "reduce");
            reduce.operand_ids[1] = reduce.operand_ids[0];
        }),
        ("not dense", |m| first(m, "dot").id += 1 << 20),
        ("2³¹", |m| m.computations[0].id = 1 << 31),
        ("op_name", |m| first(m, "dot").metadata = None),
        ("not defined before", |m| first(m, "dot").operand_ids[0] = 1 << 20),
        ("before its caller", |m| m.computations.reverse()),
        ("entry is not the last", |m| m.entry_computation_name = "other".into()),
        ("host_program_shape", |m| m.host_program_shape = None),
        ("without names", |m| first(m, "parameter").frontend_attributes = None),
        ("output names", |m| {
            m.computations.last_mut().unwrap().instructions.last_mut().unwrap().frontend_attributes = None
        }),
        ("as it is", |m| {
            let parameter = first(m, "parameter").id;
            first(m, "tuple").operand_ids[1] = parameter;
        }),
        ("kind, name or shape", |m| m.input_output_alias.as_mut().unwrap().entries[0].kind = 1),
        ("named as aliased", |m| m.input_output_alias = None),
        ("dot of integers", |m| {
            let operand = first(m, "dot").operand_ids[0];
            let all = m.computations.last_mut().unwrap().instructions.iter_mut();
            all.into_iter().find(|i| i.id == operand).unwrap().shape.as_mut().unwrap().element_type = 4;
        }),
        ("constant of", |m| first(m, "constant").literal.as_mut().unwrap().f32s = vec![0.0; 300]),
        ("not finite", |m| {
            let all = m.computations.iter_mut().flat_map(|c| &mut c.instructions);
            let mut floats = all.filter_map(|i| i.literal.as_mut()).filter(|l| !l.f32s.is_empty());
            floats.next().unwrap().f32s = vec![f32::NEG_INFINITY];
        }),
        ("reduction of several", |m| m.computations[0].instructions[2].opcode = "and".into()),
        ("constant number of turns", |m| first(m, "dot").opcode = "while".into()),
        ("explicit groups", |m| first(m, "all-reduce").replica_groups.clear()),
        ("uneven", |m| first(m, "all-reduce").replica_groups[0].replica_ids.push(3)),
        ("every rank once", |m| first(m, "all-gather").replica_groups[0].replica_ids[1] = 0),
        ("other ranks than before", |m| first(m, "all-gather").replica_groups[0].replica_ids.push(2)),
        ("something else than + or max", |m| first(m, "all-reduce").called_computation_ids.clear()),
        ("adds integers", |m| first(m, "all-reduce").shape.as_mut().unwrap().element_type = 4),
        ("opcode replica-id", |m| first(m, "broadcast").opcode = "replica-id".into()),
        ("(layer.0/linear): opcode custom-call", |m| first(m, "dot").opcode = "custom-call".into()),
        ("not finite", |m| {
            let constant = first(m, "constant").literal.as_mut().unwrap();
            constant.bf16s = half::bf16::NEG_INFINITY.to_le_bytes().to_vec();
        }),
        ("after its new value is there", |m| {
            let all = m.computations.last().unwrap().instructions.iter();
            let mut parameters = all.filter(|i| i.opcode == "parameter");
            let old = parameters.find(|i| input_name(i).ends_with(".must_alias_input")).unwrap().id;
            first(m, "all-gather").operand_ids[0] = old;
        }),
        ("distinct sets of replica groups", |m| {
            let all = m.computations.last_mut().unwrap().instructions.iter_mut();
            for (n, i) in all.take(17).enumerate() {
                i.replica_groups = vec![ReplicaGroup { replica_ids: vec![n as i64] }];
            }
        }),
    ];
    for (what, break_it) in breaks {
        let mut module = module();
        break_it(&mut module);
        let found = lint(&module);
        assert!(found.iter().any(|line| line.contains(what)), "{what}: {found:?}");
    }
}
