//! The Mamba-2 mixer.

use std::fmt;

use super::Report;
use super::check::{Check, Data, Gradient};
use crate::backend::{Backend, DType, Mamba2Inputs, Mamba2Spec, Mamba2Weights, NormGroup, State};
use crate::oracle;

use DType::{Bf16, F32};

/// Sizes and options of one check.
#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    len: usize,
    spec: Mamba2Spec,
    conv_bias: bool,
    documents: bool,
    initial: bool,
    /// The final state has a cotangent.
    d_state: bool,
    /// Some dt lie where softplus is linear and where a naive one overflows.
    large_dt: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.spec;
        write!(f, "B{} L{} H{} P{} G{}", self.batch, self.len, s.heads, s.head_dim, s.groups)?;
        write!(f, " N{} K{} Q{} {:?}", s.state, s.conv_kernel, s.chunk, s.norm)?;
        if s.dt_limit != (0.0, f32::INFINITY) {
            write!(f, " dt in {:?}", s.dt_limit)?;
        }
        for (is, name) in [
            (!self.conv_bias, "no conv bias"),
            (self.documents, "documents"),
            (self.initial, "initial state"),
            (self.d_state, "state cotangent"),
            (self.large_dt, "large dt"),
        ] {
            if is {
                write!(f, ", {name}")?;
            }
        }
        Ok(())
    }
}

const SPEC: Mamba2Spec = Mamba2Spec {
    heads: 4,
    head_dim: 8,
    groups: 2,
    state: 16,
    conv_kernel: 4,
    chunk: 64,
    dt_limit: (0.0, f32::INFINITY),
    norm: NormGroup::PerGroup,
    norm_ranks: 1,
    norm_eps: 1e-5,
};

const PLAIN: Case = Case {
    batch: 1,
    len: 64,
    spec: SPEC,
    conv_bias: true,
    documents: false,
    initial: false,
    d_state: false,
    large_dt: false,
};

/// Everything at once: what two features break together, either breaks here.
const FULL: Case = Case { batch: 2, documents: true, initial: true, d_state: true, ..PLAIN };

const LONG: Case = Case { len: 255, ..PLAIN };

/// Nothing but ones, and chunks of one position.
const SMALLEST: Mamba2Spec = Mamba2Spec { heads: 1, head_dim: 1, groups: 1, state: 1, chunk: 1, ..SPEC };

/// A case or two for each feature.
fn core() -> Vec<Case> {
    let small = Mamba2Spec { chunk: 16, ..SPEC };
    let across = Mamba2Spec { heads: 6, groups: 1, norm: NormGroup::Across, ..small };
    // More heads a group than a backend may take at once, and extents that divide nothing.
    let odd = Mamba2Spec { heads: 20, groups: 2, head_dim: 5, state: 7, chunk: 8, ..SPEC };
    vec![
        PLAIN,
        Case { len: 257, ..FULL },
        Case { len: 63, spec: across, ..PLAIN },
        Case { len: 37, batch: 3, spec: odd, ..FULL },
        Case { len: 63, conv_bias: false, spec: Mamba2Spec { conv_kernel: 1, ..small }, ..FULL },
        Case { len: 5, spec: SMALLEST, ..FULL },
        // One position after another state: decoding.
        Case { batch: 3, len: 1, initial: true, ..PLAIN },
        // Shorter than the convolution's memory.
        Case { len: 2, ..FULL },
        Case { spec: Mamba2Spec { dt_limit: (0.01, 0.1), ..small }, ..FULL },
        Case { large_dt: true, ..LONG },
    ]
}

fn cases() -> Vec<Case> {
    let mut cases = core();
    cases.extend([1, 63, 255, 257].map(|len| Case { len, ..PLAIN }));
    cases.extend([1, 63, 64, 255].map(|len| Case { len, ..FULL }));
    // Each feature alone, over several chunks.
    cases.extend([
        Case { documents: true, ..LONG },
        Case { initial: true, ..LONG },
        Case { d_state: true, ..LONG },
        Case { initial: true, d_state: true, ..LONG },
    ]);
    for chunk in [16, 100, 256] {
        cases.push(Case { len: 257, spec: Mamba2Spec { chunk, ..SPEC }, ..FULL });
    }
    for (heads, groups) in [(6, 1), (6, 3), (6, 6), (8, 2)] {
        let spec = Mamba2Spec { heads, groups, chunk: 16, ..SPEC };
        cases.push(Case { len: 63, spec, ..FULL });
        if groups > 1 {
            cases.push(Case { len: 63, spec: Mamba2Spec { norm: NormGroup::Across, ..spec }, ..PLAIN });
        }
    }
    for (head_dim, state) in [(16, 64), (32, 128), (64, 16)] {
        cases.push(Case { len: 63, spec: Mamba2Spec { head_dim, state, chunk: 16, ..SPEC }, ..FULL });
    }
    let real = Mamba2Spec { heads: 2, head_dim: 64, groups: 1, state: 128, ..SPEC };
    cases.push(Case { len: 257, batch: 1, spec: real, ..FULL });
    for conv_kernel in [2, 3] {
        let spec = Mamba2Spec { conv_kernel, chunk: 16, ..SPEC };
        cases.push(Case { len: 63, conv_bias: conv_kernel == 2, spec, ..FULL });
    }
    for (heads, groups, head_dim, state) in [(20, 2, 5, 7), (9, 1, 8, 16), (17, 1, 1, 3), (3, 3, 3, 1)] {
        let spec = Mamba2Spec { heads, groups, head_dim, state, chunk: 8, ..SPEC };
        let long = (heads != 20).then_some(Case { len: 37, batch: 3, spec, ..FULL });
        cases.extend(long.into_iter().chain([Case { len: 1, batch: 3, spec, ..FULL }]));
    }
    cases.push(Case { len: 1, spec: SMALLEST, ..PLAIN });
    cases.push(Case { len: 17, batch: 3, spec: Mamba2Spec { chunk: 1, ..SPEC }, ..FULL });
    for batch in [1, 3] {
        let case = Case { batch, len: 1, initial: true, ..PLAIN };
        cases.push(Case { spec: Mamba2Spec { groups: 1, ..SPEC }, ..case });
    }
    cases.push(Case { len: 1, initial: true, ..PLAIN });
    cases.push(Case { len: 2, documents: false, ..FULL });
    let limited = Mamba2Spec { dt_limit: (0.01, 0.1), chunk: 16, ..SPEC };
    cases.push(Case { spec: limited, len: 255, ..PLAIN });
    // T6: the step of decoding clamps as the scan does.
    cases.push(Case { spec: limited, len: 1, ..FULL });
    cases.push(Case { conv_bias: false, ..LONG });
    cases
}

/// [`Backend::mamba2`] and its adjoint.
pub fn mamba2<B: Backend>(backend: &B) -> Vec<Report> {
    run_all(backend, &cases())
}

/// [`mamba2`] with a case or two for each feature instead of their combinations: for devices on which a case costs seconds
/// or minutes of a compiler.
pub fn mamba2_core<B: Backend>(backend: &B) -> Vec<Report> {
    run_all(backend, &core())
}

fn run_all<B: Backend>(backend: &B, cases: &[Case]) -> Vec<Report> {
    let of_dtype = |dtype| cases.iter().flat_map(move |&case| run(backend, case, dtype));
    [F32, Bf16].into_iter().flat_map(of_dtype).collect()
}

/// The segments of the projection; each is compared by itself, lest a small one hides behind a large one.
fn segments(spec: &Mamba2Spec) -> [(&'static str, usize); 5] {
    let bc = spec.groups * spec.state;
    [("z", spec.inner()), ("x", spec.inner()), ("B", bc), ("C", bc), ("dt", spec.heads)]
}

/// The largest error that passes.
fn tolerance(tensor: &str, case: &Case, dtype: DType) -> f64 {
    let through_decay = ["dt", "dt_bias", "a_log"].contains(&tensor);
    match dtype {
        // A copy of inputs.
        _ if tensor == "conv state" => 0.0,
        // y and cotangents are stored in bf16, and matrix products inside may round their operands to it. What
        // reaches dt and A sums such terms of both signs.
        Bf16 => {
            if through_decay {
                2e-2
            } else {
                1e-2
            }
        }
        // Decays are exponentials of differences of fp32 cumulative sums; where these reach some thousands, as with
        // Δt of tens, the differences are off by 2⁻²⁴ of that.
        _ if case.large_dt => 1e-3,
        // The gradients of dt and A sum terms of both signs that contain those exponentials.
        _ if through_decay => 1e-4,
        _ => 2e-5,
    }
}

/// `[B, L]`: runs of random length with few different ids, so that an id comes back after another document. The
/// last sequence also changes at 1, at the second chunk and at its last position.
fn documents<B: Backend>(check: &mut Check<'_, B>, case: &Case) -> Vec<i32> {
    let (rate, len) = (if case.len > 100 { 0.03 } else { 0.2 }, case.len);
    let chance = check.uniform(case.batch * len, 0.0, 1.0);
    let step = check.whole(case.batch * len, 1, 3);
    let mut ids = Vec::new();
    for b in 0..case.batch {
        let mut id = 0;
        for t in 0..len {
            let forced = b == case.batch - 1 && [1, case.spec.chunk, len - 1].contains(&t);
            if t > 0 && (forced || chance[b * len + t] < rate) {
                id = (id + step[b * len + t]) % 3;
            }
            ids.push(id);
        }
    }
    ids
}

/// `[B, L, E + C + H]`.
fn projection<B: Backend>(check: &mut Check<'_, B>, case: &Case) -> Vec<f32> {
    let spec = &case.spec;
    let mut values = Vec::new();
    for position in 0..case.batch * case.len {
        for (name, width) in segments(spec) {
            let scale = if name == "dt" { 1.0 } else { 2.0 };
            values.extend(check.uniform(width, -scale, scale));
        }
        if case.large_dt && position % 23 == 5 {
            let last = values.len() - 1;
            values[last] = if position % 2 == 0 { 25.0 } else { 100.0 };
        }
    }
    values
}

/// Parameters of sizes that leave the scan, not D·x, most of y: long and short memories, a small D.
fn parameters<B: Backend>(
    check: &mut Check<'_, B>,
    case: &Case,
    dtype: DType,
) -> Mamba2Weights<Data<B::Tensor>> {
    let Mamba2Spec { heads, conv_kernel, .. } = case.spec;
    let (inner, channels) = (case.spec.inner(), case.spec.conv_channels());
    let log_dt = check.uniform(heads, 1e-3f32.ln(), 1e-1f32.ln());
    let dt_bias: Vec<f32> = log_dt.iter().map(|log| log.exp().exp_m1().ln()).collect();
    let a_log = check.uniform(heads, -3.0, 16f32.ln());
    let norm_weight = check.uniform(inner, 0.5, 1.5);
    Mamba2Weights {
        conv_weight: check.random_parameter(&[channels, 1, conv_kernel], dtype, 1.0),
        conv_bias: case.conv_bias.then(|| check.random_parameter(&[channels], dtype, 0.5)),
        dt_bias: check.parameter(&dt_bias, &[heads], F32),
        a_log: check.parameter(&a_log, &[heads], F32),
        d: check.random_parameter(&[heads], F32, 0.1),
        norm_weight: check.parameter(&norm_weight, &[inner], F32),
    }
}

fn run<B: Backend>(backend: &B, case: Case, dtype: DType) -> Vec<Report> {
    let mut check = Check::new(backend, "mamba2", format!("{dtype:?} {case}"));
    let (spec, batch, len) = (&case.spec, case.batch, case.len);
    let (inner, width) = (spec.inner(), spec.projection());
    let conv_shape = [batch, spec.conv_kernel - 1, spec.conv_channels()];
    let ssm_shape = [batch, spec.heads, spec.head_dim, spec.state];

    let values = projection(&mut check, &case);
    let projected = check.activation(&values, &[batch, len, width], dtype);
    let ids = case.documents.then(|| documents(&mut check, &case));
    let host_ids: Option<Vec<f64>> = ids.as_ref().map(|ids| ids.iter().copied().map(f64::from).collect());
    let mut state = |scale| State {
        conv: check.random(&conv_shape, F32, scale),
        ssm: check.random(&ssm_shape, F32, scale),
    };
    let initial = case.initial.then(|| state(1.0));
    let d_state = case.d_state.then(|| state(0.5));
    let weights = parameters(&mut check, &case, dtype);
    let dy = check.random(&[batch, len, inner], dtype, 1.0);

    let inputs = Mamba2Inputs {
        projected: projected.device,
        documents: ids.map(|ids| backend.tensor_i32(&ids, &[batch, len])),
        initial: initial.as_ref().map(device_state),
    };
    let host_inputs = Mamba2Inputs {
        projected: &projected.host[..],
        documents: host_ids.as_deref(),
        initial: initial.as_ref().map(host_state),
    };
    let device = weights.as_ref().map(|w| w.device.clone());
    let host = weights.as_ref().map(|w| &w.host[..]);

    let (y, last) = oracle::mamba2(spec, batch, &host_inputs, &host);
    let out = backend.mamba2(spec, inputs.clone(), &device, true);
    let inference = backend.mamba2(spec, inputs.clone(), &device, false);
    check.holds("nothing saved unless asked for", inference.saved.is_empty());
    for (when, out) in [("", &out), (" without saving", &inference)] {
        let mut compare = |name: &str, got, want, shape: &[usize], kind| {
            check.compare(&format!("{name}{when}"), got, want, shape, kind, tolerance(name, &case, dtype));
        };
        compare("y", &out.y, &y, &[batch, len, inner], dtype);
        compare("conv state", &out.state.conv, &last.conv, &conv_shape, F32);
        compare("ssm state", &out.state.ssm, &last.ssm, &ssm_shape, F32);
    }

    let host_d_state = d_state.as_ref().map(host_state);
    let want = oracle::mamba2_adjoint(spec, batch, &host_inputs, &host, &dy.host, host_d_state.as_ref());
    let conv_weight = [spec.conv_channels(), 1, spec.conv_kernel];
    let (heads, channels, inner_shape) = ([spec.heads], [spec.conv_channels()], [inner]);
    let gradient =
        |name, shape, want| Gradient { name, shape, want, tolerance: tolerance(name, &case, dtype) };
    let mut wanted = vec![
        gradient("conv_weight", &conv_weight[..], &want.weights.conv_weight[..]),
        gradient("dt_bias", &heads, &want.weights.dt_bias),
        gradient("a_log", &heads, &want.weights.a_log),
        gradient("d", &heads, &want.weights.d),
        gradient("norm_weight", &inner_shape, &want.weights.norm_weight),
    ];
    wanted.extend(want.weights.conv_bias.as_ref().map(|b| gradient("conv_bias", &channels, b)));
    let got = check.gradients(&wanted, |buffer, slots| {
        let sinks = Mamba2Weights {
            conv_weight: &slots[0],
            conv_bias: slots.get(5),
            dt_bias: &slots[1],
            a_log: &slots[2],
            d: &slots[3],
            norm_weight: &slots[4],
        };
        let d_state = d_state.as_ref().map(device_state);
        backend.mamba2_adjoint(
            spec,
            &inputs,
            &device,
            &out.saved,
            &dy.device,
            d_state.as_ref(),
            buffer,
            &sinks,
        )
    });

    let shape = backend.shape(&got.projected);
    let kind = backend.dtype(&got.projected);
    check.holds(
        "shape and dtype of the projection's cotangent",
        shape == [batch, len, width] && kind == dtype,
    );
    let found: Vec<f64> = backend.values(&got.projected).into_iter().map(f64::from).collect();
    let mut first = 0;
    for (name, size) in segments(spec) {
        let cut =
            |x: &[f64]| x.chunks(width).flat_map(|row| row[first..first + size].to_vec()).collect::<Vec<_>>();
        let limit = tolerance(name, &case, dtype);
        check.compare_values(&format!("cotangent of {name}"), &cut(&found), &cut(&want.projected), limit);
        first += size;
    }
    check.holds("cotangent of the initial state given with one", got.initial.is_some() == case.initial);
    if let (Some(got), true) = (&got.initial, case.initial) {
        let limit = tolerance("initial", &case, dtype);
        check.compare("cotangent of initial conv", &got.conv, &want.initial.conv, &conv_shape, F32, limit);
        check.compare("cotangent of initial ssm", &got.ssm, &want.initial.ssm, &ssm_shape, F32, limit);
    }
    check.finish()
}

fn device_state<T: Clone>(state: &State<Data<T>>) -> State<T> {
    State { conv: state.conv.device.clone(), ssm: state.ssm.device.clone() }
}

fn host_state<T>(state: &State<Data<T>>) -> State<&[f64]> {
    State { conv: &state.conv.host, ssm: &state.ssm.host }
}
