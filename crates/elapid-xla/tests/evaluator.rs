//! The evaluator that stands in for a device computes what XLA computes, on every op of the suite.
#![allow(missing_docs)]

mod jaxlib;

use std::sync::Mutex;

use elapid_sim::{Alone, Array, evaluate};
use elapid_tensor::suite;
use elapid_xla::proto::{ShapeProto, primitive};
use elapid_xla::{Executor, Literal, Module, Options, XlaBackend};
use jaxlib::Jaxlib;

/// Runs on both, and compares every output.
struct Both {
    jaxlib: Jaxlib,
    /// Largest error of an output, relative to its largest element: of modules all in fp32, and of those with bf16 in them.
    worst: &'static Mutex<[f64; 2]>,
}

fn arrays(module: &Module, inputs: &[Literal]) -> Vec<Array> {
    let ports = module.inputs.iter().zip(inputs);
    ports.map(|(port, value)| Array::from_bytes(port.shape.clone(), &value.to_bytes())).collect()
}

impl Executor for Both {
    fn run(&self, module: &Module, inputs: &[Literal]) -> Result<Vec<Literal>, String> {
        let want = self.jaxlib.run(module, inputs)?;
        let got = evaluate(&module.proto, arrays(module, inputs), &mut Alone)?;
        let instructions = module.proto.computations.iter().flat_map(|computation| &computation.instructions);
        let is_narrow = |shape: &ShapeProto| shape.element_type == primitive::BF16;
        let kind = usize::from(instructions.filter_map(|i| i.shape.as_ref()).any(is_narrow));
        for (got, want) in got.iter().zip(&want) {
            let got = Literal::from_bytes(got.shape.ty, &got.to_bytes());
            let (got, want) = match (&got, want) {
                (Literal::S32(a), Literal::S32(b)) => {
                    assert_eq!(a, b);
                    continue;
                }
                (Literal::F32(a), Literal::F32(b)) | (Literal::Bf16(a), Literal::Bf16(b)) => (a, b),
                _ => return Err("outputs of other types".into()),
            };
            let extent = want.iter().filter(|x| x.is_finite()).fold(1e-30, |max: f32, x| max.max(x.abs()));
            for (a, b) in got.iter().zip(want) {
                assert_eq!(a.is_nan(), b.is_nan(), "{a} and {b} in {}", module.to_text());
                if a.is_finite() && b.is_finite() {
                    let error = f64::from((a - b).abs() / extent);
                    let worst = &mut self.worst.lock().unwrap()[kind];
                    *worst = worst.max(error);
                }
            }
        }
        Ok(want)
    }
}

#[test]
fn every_op_is_as_in_xla() {
    static WORST: Mutex<[f64; 2]> = Mutex::new([0.0; 2]);
    let Some(jaxlib) = Jaxlib::start() else { return };
    let backend = XlaBackend::new(Options::default(), Some(Box::new(Both { jaxlib, worst: &WORST })));
    let reports = suite::check_all(&backend);
    let [f32s, bf16s] = *WORST.lock().unwrap();
    println!("{} comparisons; largest differences: fp32 {f32s:.1e}, bf16 {bf16s:.1e}", reports.len());
    // Sums of bf16 operands in another order round to a neighbour now and then.
    assert!(f32s < 1e-4, "fp32 {f32s:.1e}");
    assert!(bf16s < 2e-2, "bf16 {bf16s:.1e}");
}
