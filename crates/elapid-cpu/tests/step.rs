//! A single position, whose state may take the place of the one before.

use elapid_cpu::{CpuBackend, CpuOptions, Isa, Tensor};
use elapid_tensor::{Backend, DType, Mamba2Inputs, Mamba2Spec, Mamba2Weights, NormGroup, State};

const SPEC: Mamba2Spec = Mamba2Spec {
    heads: 6,
    head_dim: 5,
    groups: 2,
    state: 19,
    conv_kernel: 4,
    chunk: 16,
    dt_limit: (0.0, f32::INFINITY),
    norm: NormGroup::PerGroup,
    norm_ranks: 1,
    norm_eps: 1e-5,
};

fn numbers(backend: &CpuBackend, seed: usize, shape: &[usize]) -> Tensor {
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0).collect();
    backend.tensor(&values, shape, DType::F32)
}

#[test]
fn a_state_is_replaced_where_it_lies_only_if_nobody_else_holds_it() {
    let (inner, channels) = (SPEC.inner(), SPEC.conv_channels());
    for isa in Isa::available() {
        let backend = CpuBackend::new(&CpuOptions { isa: Some(isa), ..CpuOptions::default() }).unwrap();
        let weights = Mamba2Weights {
            conv_weight: numbers(&backend, 1, &[channels, 1, 4]),
            conv_bias: None,
            dt_bias: numbers(&backend, 2, &[SPEC.heads]),
            a_log: numbers(&backend, 3, &[SPEC.heads]),
            d: numbers(&backend, 4, &[SPEC.heads]),
            norm_weight: numbers(&backend, 5, &[inner]),
        };
        let inputs = || Mamba2Inputs {
            projected: numbers(&backend, 6, &[2, 1, SPEC.projection()]),
            documents: None,
            initial: Some(State {
                conv: numbers(&backend, 7, &[2, 3, channels]),
                ssm: numbers(&backend, 8, &[2, SPEC.heads, SPEC.head_dim, SPEC.state]),
            }),
        };
        let held = inputs();
        let before = backend.values(&held.initial.as_ref().unwrap().ssm);
        let with_a_copy = backend.mamba2(&SPEC, held.clone(), &weights, false);
        assert_eq!(backend.values(&held.initial.as_ref().unwrap().ssm), before, "{isa:?}");
        let in_place = backend.mamba2(&SPEC, inputs(), &weights, false);
        for (one, other) in [(&with_a_copy.y, &in_place.y), (&with_a_copy.state.ssm, &in_place.state.ssm)] {
            assert_eq!(backend.values(one), backend.values(other), "{isa:?}");
        }
        assert_ne!(backend.values(&in_place.state.ssm), before, "{isa:?}");
    }
}
