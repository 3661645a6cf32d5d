use elapid_cpu::*;
use elapid_tensor::*;
use std::time::Instant;
fn time(name: &str, flops: f64, mut f: impl FnMut()) {
    f();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    println!("{name:28} {:8.2} ms {:8.1} GFLOP/s", best * 1e3, flops / best / 1e9);
}
fn main() {
    let be = CpuBackend::new(&CpuOptions::default()).unwrap();
    println!("{:?} {}", be.isa(), be.threads());
    let (l, d, e, h, p, n, v) = (512usize, 768usize, 1536usize, 24usize, 64usize, 128usize, 50288usize);
    let q: usize = std::env::args().nth(1).map_or(128, |s| s.parse().unwrap());
    let spec = Mamba2Spec {
        heads: h,
        head_dim: p,
        groups: 1,
        state: n,
        conv_kernel: 4,
        chunk: q,
        dt_limit: (0.0, f32::INFINITY),
        norm: NormGroup::PerGroup,
        norm_eps: 1e-5,
    };
    let proj = spec.projection();
    let r =
        |n: usize| -> Vec<f32> { (0..n).map(|i| ((i * 7919 + 13) % 1000) as f32 / 1000.0 - 0.5).collect() };
    let t = |s: &[usize]| be.tensor(&r(s.iter().product()), s, DType::F32);
    let x = t(&[1, l, d]);
    let w = t(&[proj, d]);
    let wo = t(&[d, e]);
    let xe = t(&[1, l, e]);
    let flat = FlatShape { layers: 0, row: 0, shared: v * d + proj * d };
    let mut g = be.buffer(flat, DType::F32);
    let slot = Slot { row: Row::Shared, offset: 0, shape: vec![proj, d] };
    time("in_proj fwd", 2.0 * (l * d * proj) as f64, || {
        be.linear(&x, &w, None);
    });
    let dy = t(&[1, l, proj]);
    time("in_proj adj", 4.0 * (l * d * proj) as f64, || {
        be.linear_adjoint(&x, &w, &dy, Sink { buffer: &mut g, slot: &slot }, None);
    });
    time("out_proj fwd", 2.0 * (l * d * e) as f64, || {
        be.linear(&xe, &wo, None);
    });
    let slot2 = Slot { row: Row::Shared, offset: 0, shape: vec![d, e] };
    time("out_proj adj", 4.0 * (l * d * e) as f64, || {
        be.linear_adjoint(&xe, &wo, &x, Sink { buffer: &mut g, slot: &slot2 }, None);
    });
    let wt = Mamba2Weights {
        conv_weight: t(&[spec.conv_channels(), 1, 4]),
        conv_bias: Some(t(&[spec.conv_channels()])),
        dt_bias: t(&[h]),
        a_log: t(&[h]),
        d: t(&[h]),
        norm_weight: t(&[e]),
    };
    let inp = Mamba2Inputs { projected: dy.clone(), documents: None, initial: None };
    time("mamba2 fwd", 0.0, || {
        be.mamba2(&spec, &inp, &wt, true);
    });
    let out = be.mamba2(&spec, &inp, &wt, true);
    let c = spec.conv_channels();
    let mut off = 0;
    let mut sl = |s: &[usize]| {
        let o = Slot { row: Row::Shared, offset: off, shape: s.to_vec() };
        off += o.len();
        o
    };
    let s = [sl(&[c, 1, 4]), sl(&[c]), sl(&[h]), sl(&[h]), sl(&[h]), sl(&[e])];
    let sinks = Mamba2Weights {
        conv_weight: &s[0],
        conv_bias: Some(&s[1]),
        dt_bias: &s[2],
        a_log: &s[3],
        d: &s[4],
        norm_weight: &s[5],
    };
    time("mamba2 adj", 0.0, || {
        be.mamba2_adjoint(&spec, &inp, &wt, &out.saved, &xe, None, &mut g, &sinks);
    });
    let nw = t(&[d]);
    let sn = Slot { row: Row::Shared, offset: 0, shape: vec![d] };
    time("rms fwd", 0.0, || {
        be.rms_norm(&x, &nw, 1e-5, DType::F32);
    });
    time("rms adj", 0.0, || {
        be.rms_norm_adjoint(&x, &nw, 1e-5, &x, Sink { buffer: &mut g, slot: &sn });
    });
    let wh = t(&[v, d]);
    let labels = be.tensor_i32(&(0..l as i32).collect::<Vec<_>>(), &[1, l]);
    let sh = Slot { row: Row::Shared, offset: 0, shape: vec![v, d] };
    time("head fwd", 2.0 * (l * d * v) as f64, || {
        be.head_loss(&x, &wh, &labels);
    });
    time("head fwd+adj", 6.0 * (l * d * v) as f64, || {
        be.head_loss_adjoint(&x, &wh, &labels, Sink { buffer: &mut g, slot: &sh });
    });
    let flat = FlatShape { layers: 24, row: 3770000, shared: v * d };
    let grads = be.buffer(flat, DType::F32);
    let (mut a, mut b, mut cc) =
        (be.buffer(flat, DType::F32), be.buffer(flat, DType::F32), be.buffer(flat, DType::F32));
    let loss = be.tensor(&[1.0], &[], DType::F32);
    time("clip", 0.0, || {
        be.clip(&grads, &loss, 1.0, 1.0);
    });
    let cl = be.clip(&grads, &loss, 1.0, 1.0);
    time("adamw", 0.0, || {
        be.adamw(
            &AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 },
            (3000000, v * d),
            &cl,
            &grads,
            &mut a,
            &mut b,
            &mut cc,
        )
    });
}
