//! A module that ranks run together.

use std::collections::BTreeMap;

use elapid_tensor::Backend;
use elapid_xla::proto::{FrontendAttributes, HloComputationProto, HloInstructionProto, ReplicaGroup};
use elapid_xla::{Module, Options, Result as Named, Shape, Type, XlaBackend};

/// A module that gives `name`, the sum of 2·`x` over the ranks.
pub(crate) fn sum_over(ranks: usize, name: &str) -> Module {
    let backend = XlaBackend::new(Options::default(), None);
    let x = backend.declare(Shape::new(Type::F32, &[4]), "x");
    let y = backend.add(&x, &x);
    let mut module = backend.module("sum", &[Named { name: name.into(), tensor: &y, replaces: None }]);
    // An instruction of its own in the place of the addition's copy.
    let scalar = Shape::new(Type::F32, &[]).proto();
    let plain = |opcode: &str, id, operand_ids: Vec<i64>| HloInstructionProto {
        name: format!("{opcode}.{id}"),
        opcode: opcode.into(),
        shape: Some(scalar.clone()),
        operand_ids,
        id,
        ..HloInstructionProto::default()
    };
    let second = HloInstructionProto { parameter_number: 1, ..plain("parameter", 102, vec![]) };
    let adder = HloComputationProto {
        name: "adder".into(),
        instructions: vec![plain("parameter", 101, vec![]), second, plain("add", 103, vec![101, 102])],
        program_shape: None,
        id: 100,
        root_id: 103,
    };
    let entry = module.proto.computations.last_mut().unwrap();
    let root = entry.instructions.last_mut().unwrap();
    assert_eq!(root.opcode, "copy");
    root.opcode = "all-reduce".into();
    root.called_computation_ids = vec![100];
    root.replica_groups = vec![ReplicaGroup { replica_ids: (0..ranks as i64).collect() }];
    let names = BTreeMap::from([("neff_output_names".to_owned(), name.to_owned())]);
    root.frontend_attributes = Some(FrontendAttributes { map: names });
    module.proto.computations.insert(0, adder);
    module
}
