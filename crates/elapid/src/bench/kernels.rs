//! Each kernel by itself, at the dimensions of a model, on every instruction-set path.

use std::time::Instant;

use elapid_cpu::Isa;
use elapid_tensor::suite::Finding;
use elapid_tensor::{
    AdamW, Backend, Checkpointing, Clipping, DType, Decayed, Mamba2Inputs, Mamba2Sinks, Mamba2Weights, Sink,
    Slot,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::{Limits, Setup, Tally, Timed, Work, check, median, refusal};
use crate::Error;
use crate::config::ModelConfig;
use crate::error::say;
use crate::memory;
use crate::model::init::Init;
use crate::model::{Layout, Mamba2ForCausalLM};
use crate::train::cpu_on;
use crate::train::memory::{Demand, Memory};

/// What can be measured: the first words of the rows' names.
pub const KERNELS: [&str; 11] = [
    "embedding",
    "rms_norm",
    "linear",
    "mamba2",
    "head_loss",
    "add",
    "cast",
    "clip",
    "adamw",
    "cast_buffer",
    "zero_buffer",
];

/// Measures the kernels of `only`, all where it is empty, forward and adjoint, on each of `paths`: the object that
/// `elapid bench kernels --json` prints. The last path and its limits stand at its head.
///
/// # Errors
/// The dimensions need more memory than there is; threads cannot be started; the machine cannot run a path.
pub fn kernels(setup: &Setup, paths: &[Isa], only: &[String]) -> Result<Value, Error> {
    // Layers are alike: one is enough.
    let one = ModelConfig { num_hidden_layers: 1, ..setup.config.clone() };
    let head = cpu_on(setup.threads, paths.last().copied().unwrap_or_else(Isa::best))?;
    let memory = Memory::predict(&Demand::alone(
        &one,
        (setup.batch, setup.seq_len),
        setup.compute(),
        Checkpointing::None,
        head.threads(),
    ));
    memory::check(
        // The bf16 copy that `cast_buffer` makes comes on top.
        memory.total() as f64 + 2.0 * Layout::new(&one).flat.len() as f64,
        "the kernels at these dimensions",
        "give a smaller --batch, --seq-len or --model",
    )?;
    let limits_of_head = Limits::measure(&head, setup.compute(), 1);
    let (mut kernels, mut of_paths) = (Vec::new(), Vec::new());
    for &path in paths {
        say(format_args!("path {path:?}"));
        let timed = Timed::new(cpu_on(setup.threads, path)?);
        let checks = check(timed.inner())?;
        let limits = if path == head.isa() { limits_of_head } else { limits_of_head.on(timed.inner()) };
        let mut row = Map::from_iter([("path".to_owned(), format!("{path:?}").into())]);
        row.extend(limits.rates_at_most().as_object().cloned().unwrap_or_default());
        of_paths.push(Value::from(row));
        let mut rows = Rows { timed: &timed, limits: &limits, checks: &checks, only, rows: Vec::new() };
        layer(setup, &one, &mut rows);
        update(&Layout::new(&one), &mut rows);
        kernels.append(&mut rows.rows);
    }
    Ok(setup.report("kernels", &head, &limits_of_head, json!({ "paths": of_paths, "kernels": kernels })))
}

/// The kernels of a forward and backward pass.
fn layer(setup: &Setup, one: &ModelConfig, rows: &mut Rows<'_>) {
    let (timed, compute) = (rows.timed, setup.compute());
    let residual = if one.residual_in_fp32 { DType::F32 } else { compute };
    let model = Mamba2ForCausalLM::new(timed, one, compute, Init::StateSpaces, 0);
    let (slots, shared) = (model.layout().layer(0), model.layout().shared());
    let fp32 = |slot: &Slot| timed.view(model.masters(), slot);
    let weight = |slot: &Slot| timed.cast(&fp32(slot), compute);
    let mut grads = timed.buffer(model.layout().flat, DType::F32);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (b, l, d, v) = (setup.batch, setup.seq_len, one.hidden_size, one.vocab_size);
    let mut random = |width: usize, dtype| {
        let values: Vec<f32> = (0..b * l * width).map(|_| rng.random_range(-1.0..1.0)).collect();
        timed.tensor(&values, &[b, l, width], dtype)
    };
    let ids: Vec<i32> = setup.ids(l).into_iter().map(|id| id as i32).collect();
    let ids = timed.tensor_i32(&ids, &[b, l]);
    let eps = one.layer_norm_epsilon as f32;
    let spec = one.spec();

    let (x, wide, dx) = (random(d, residual), random(d, DType::F32), random(d, compute));
    let table = weight(&shared.embedding);
    let shape = format!("V {v}, D {d}");
    rows.run("embedding", &shape, || drop(timed.embedding(&table, &ids, residual)));
    rows.run("embedding adjoint", &shape, || {
        timed.embedding_adjoint(&ids, &x, Sink { buffer: &mut grads, slot: &shared.embedding });
    });

    let norm = fp32(&slots.norm);
    let shape = format!("D {d}");
    rows.run("add", &shape, || drop(timed.add(&x, &x)));
    rows.run("cast", &format!("D {d}, to bf16"), || drop(timed.cast(&wide, DType::Bf16)));
    rows.run("rms_norm", &shape, || drop(timed.rms_norm(&x, &norm, eps, compute)));
    rows.run("rms_norm adjoint", &shape, || {
        let sink = Sink { buffer: &mut grads, slot: &slots.norm };
        timed.rms_norm_adjoint(&x, &norm, eps, &dx, sink);
    });

    for (what, slot) in [("in_proj", &slots.in_proj), ("out_proj", &slots.out_proj)] {
        let (outputs, inputs) = (slot.shape[0], slot.shape[1]);
        let (weight, x, dy) = (weight(slot), random(inputs, compute), random(outputs, compute));
        let shape = format!("{what}, {inputs} → {outputs}");
        rows.run("linear", &shape, || drop(timed.linear(&x, &weight, None)));
        rows.run("linear adjoint", &shape, || {
            timed.linear_adjoint(&x, &weight, &dy, Sink { buffer: &mut grads, slot }, None);
        });
        rows.run("linear d_input", &shape, || drop(timed.linear_d_input(&weight, &dy)));
        rows.run("linear d_weight", &shape, || {
            timed.linear_d_weight(&x, &dy, Sink { buffer: &mut grads, slot });
        });
    }

    let inputs =
        Mamba2Inputs { projected: random(spec.projection(), compute), documents: None, initial: None };
    let weights = Mamba2Weights {
        conv_weight: weight(&slots.conv_weight),
        conv_bias: slots.conv_bias.as_ref().map(&weight),
        dt_bias: fp32(&slots.dt_bias),
        a_log: fp32(&slots.a_log),
        d: fp32(&slots.d),
        norm_weight: fp32(&slots.norm_weight),
    };
    let sinks: Mamba2Sinks<'_> = Mamba2Weights {
        conv_weight: &slots.conv_weight,
        conv_bias: slots.conv_bias.as_ref(),
        dt_bias: &slots.dt_bias,
        a_log: &slots.a_log,
        d: &slots.d,
        norm_weight: &slots.norm_weight,
    };
    let shape = format!("H {}, P {}, G {}, N {}", spec.heads, spec.head_dim, spec.groups, spec.state);
    rows.run("mamba2", &shape, || drop(timed.mamba2(&spec, inputs.clone(), &weights, true)));
    if rows.asked("mamba2 adjoint") {
        let saved = timed.mamba2(&spec, inputs.clone(), &weights, true).saved;
        let dy = random(spec.inner(), compute);
        rows.run("mamba2 adjoint", &shape, || {
            timed.mamba2_adjoint(&spec, &inputs, &weights, &saved, &dy, None, &mut grads, &sinks);
        });
    }

    let head = shared.head.as_ref().unwrap_or(&shared.embedding);
    let (table, x) = (weight(head), random(d, compute));
    let shape = format!("V {v}, D {d}");
    rows.run("head_loss", &shape, || drop(timed.head_loss(&x, &table, &ids, v)));
    rows.run("head_loss adjoint", &shape, || {
        timed.head_loss_adjoint(&x, &table, &ids, v, Sink { buffer: &mut grads, slot: head });
    });
}

/// The kernels of an update and those around it, over the parameters of one layer, embedding and head.
fn update(layout: &Layout, rows: &mut Rows<'_>) {
    let timed = rows.timed;
    let zeros = || {
        let mut buffer = timed.buffer(layout.flat, DType::F32);
        // A new buffer may be no memory yet, but a promise of zeros.
        timed.zero_buffer(&mut buffer);
        buffer
    };
    let (mut grads, mut params, mut m, mut v) = (zeros(), zeros(), zeros(), zeros());
    let compute = rows.limits.dtype;
    let mut copy = (compute != DType::F32).then(|| timed.buffer(layout.flat, compute));
    let shape = format!("{} elements", layout.flat.len());
    let loss = timed.tensor(&[1.0], &[], DType::F32);
    rows.run("clip", &shape, || drop(timed.clip(&grads, &loss, &Clipping::alone(1.0, 1.0))));
    let hyper = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };
    let clip = timed.clip(&grads, &loss, &Clipping::alone(1.0, 1.0));
    rows.run("adamw", &shape, || {
        let (layer, shared) = layout.decayed;
        let decayed = Decayed { layer, shared, dealt: false };
        timed.adamw(&hyper, decayed, &clip, &mut grads, &mut params, &mut m, &mut v, copy.as_mut());
    });
    rows.run("zero_buffer", &shape, || timed.zero_buffer(&mut m));
    let mut half = timed.buffer(layout.flat, DType::Bf16);
    rows.run("cast_buffer", &format!("{shape}, to bf16"), || timed.cast_buffer(&params, &mut half));
}

/// The table as it grows.
struct Rows<'a> {
    timed: &'a Timed,
    limits: &'a Limits,
    checks: &'a [Finding],
    /// First words of the rows that are asked for; all where it is empty.
    only: &'a [String],
    rows: Vec<Value>,
}

impl Rows<'_> {
    fn asked(&self, kernel: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| kernel.split(' ').next() == Some(name))
    }

    /// Measures `run`, which calls the op `kernel` once, unless nobody asked or the kernel is found wrong.
    fn run(&mut self, kernel: &str, shape: &str, run: impl FnMut()) {
        if !self.asked(kernel) {
            return;
        }
        let refused = refusal(kernel, self.checks);
        let mut row = Map::new();
        row.insert("path".into(), format!("{:?}", self.timed.inner().isa()).into());
        row.insert("kernel".into(), kernel.into());
        row.insert("shape".into(), shape.into());
        if refused.is_none() {
            say(format_args!("{kernel}  {shape}"));
            row.extend(self.figures(kernel, run));
        }
        row.insert("refused".into(), refused.into());
        self.rows.push(row.into());
    }

    fn figures(&self, kernel: &str, mut run: impl FnMut()) -> Map<String, Value> {
        // Three times at least, unless that takes too long.
        const SECONDS: f64 = 0.3;
        const LONG: f64 = 2.0;
        const MOST: usize = 20;
        // The first call finds its memory and fills caches.
        run();
        let (start, mut seconds, mut work) = (Instant::now(), Vec::new(), Work::default());
        let again = |count: usize, elapsed: f64| match count {
            0 => true,
            1..3 => elapsed < LONG,
            _ => count < MOST && elapsed < SECONDS,
        };
        while again(seconds.len(), start.elapsed().as_secs_f64()) {
            self.timed.take();
            run();
            let booked = self.timed.take();
            let Tally { seconds: last, work: of_one, .. } =
                booked.iter().find(|(op, _)| *op == kernel).map_or_else(Tally::default, |found| found.1);
            seconds.push(last);
            work = of_one;
        }
        let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let times = [
            ("repetitions", json!(seconds.len())),
            ("best_s", json!(best)),
            ("median_s", json!(median(seconds))),
        ];
        let times = times.map(|(name, value)| (name.to_owned(), value));
        times.into_iter().chain(self.limits.rates(kernel, best, work)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elapid_cpu::Peaks;
    use elapid_tensor::suite::Report;

    #[test]
    fn a_kernel_whose_check_is_red_is_not_even_run() {
        let timed = Timed::new(crate::train::cpu(Some(1)).unwrap());
        let peaks = Peaks {
            fma: 1e9,
            matrix: 1e9,
            product: 1e9,
            bf16_product: 1e9,
            bf16: None,
            read: 1e9,
            triad: 1e9,
        };
        let limits = Limits { peaks, dtype: DType::F32 };
        let finding = |error| {
            let (op, case, tensor) = ("add", "B1".to_owned(), "sum".to_owned());
            let worst = Report { op, case, tensor, error, tolerance: 1e-5 };
            Finding { op, comparisons: 2, failed: usize::from(!worst.passes()), worst }
        };
        let row = |check: Finding, run: &mut dyn FnMut()| {
            let mut rows =
                Rows { timed: &timed, limits: &limits, checks: &[check], only: &[], rows: Vec::new() };
            rows.run("add", "2", run);
            rows.rows.remove(0)
        };
        let x = timed.tensor(&[1.0, 2.0], &[2], DType::F32);
        let green = row(finding(1e-6), &mut || drop(timed.add(&x, &x)));
        assert!(green["refused"].is_null() && green["gflops"].as_f64().unwrap() > 0.0, "{green}");
        let red = row(finding(f64::NAN), &mut || panic!("run all the same"));
        assert!(red["refused"].as_str().unwrap().starts_with("refused: oracle check failed"), "{red}");
        assert!(red.get("gflops").is_none() && red.get("best_s").is_none(), "{red}");
    }
}
