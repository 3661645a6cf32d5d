//! Speed beside the limits of the machine.
//!
//! The limits are measured first ([`Peaks`]). A kernel's share of the roofline is the time that the machine would need at
//! least, max(FLOPs / peak, bytes / bandwidth), over the time that it took. No figure is given of a kernel that does not
//! compute what it should.

mod comm;
mod data;
mod decode;
mod kernels;
mod metered;
mod timed;
mod train;

use elapid_cpu::{CpuBackend, Peaks};
use elapid_tensor::DType;
use elapid_tensor::suite::Finding;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

pub use comm::comm;
pub use data::{Text, data};
pub use decode::decode;
pub use kernels::{KERNELS, kernels};
pub use timed::{Tally, Timed, Work};
pub use train::train;

use crate::config::ModelConfig;
use crate::config::run::Dtype;
use crate::error::say;
use crate::model::Layout;
use crate::{Error, doctor, memory};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What `--model` said.
    pub model: String,
    /// The model.
    pub config: ModelConfig,
    /// B.
    pub batch: usize,
    /// L.
    pub seq_len: usize,
    /// Compute dtype.
    pub dtype: Dtype,
    /// Worker threads; None: one a core.
    pub threads: Option<usize>,
}

impl Setup {
    fn backend(&self) -> Result<Timed, Error> {
        crate::train::cpu(self.threads).map(Timed::new)
    }

    fn compute(&self) -> DType {
        self.dtype.compute()
    }

    /// Random token ids `[B, L]`.
    fn ids(&self, length: usize) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let vocab_size = self.config.vocab_size as u32;
        (0..self.batch * length).map(|_| rng.random_range(0..vocab_size)).collect()
    }

    /// The object that a benchmark prints: setup, limits, and its own `figures`.
    fn report(&self, bench: &str, backend: &CpuBackend, limits: &Limits, figures: Value) -> Value {
        let mut object = Map::new();
        let head = json!({
            "bench": bench,
            "model": self.model,
            "parameters": Layout::new(&self.config).parameter_count(),
            "batch": self.batch,
            "seq_len": self.seq_len,
            "dtype": self.dtype,
            "threads": backend.threads(),
            "path": format!("{:?}", backend.isa()),
            "peaks": limits.rates_at_most(),
        });
        for part in [head, figures] {
            object.extend(part.as_object().cloned().unwrap_or_default());
        }
        object.into()
    }
}

/// What the machine can do at most.
#[derive(Clone, Copy)]
struct Limits {
    peaks: Peaks,
    dtype: DType,
}

impl Limits {
    /// Measures them, on one of so many `ranks` of this process that do it side by side. Comes after what needs the peak of
    /// this process's memory.
    fn measure(backend: &CpuBackend, dtype: DType, ranks: usize) -> Self {
        // Far more than caches hold, and no danger to a small machine.
        const BUFFER: u64 = 768 << 20;
        say("measuring the limits of this machine");
        let buffer = memory::available().map_or(BUFFER, |free| BUFFER.min(free / 4)) / ranks as u64;
        Self { peaks: backend.measure_peaks(buffer as usize), dtype }
    }

    /// Those of the path of `backend`, in the same memory.
    fn on(&self, backend: &CpuBackend) -> Self {
        Self { peaks: self.peaks.on(backend), dtype: self.dtype }
    }

    /// Rate of matrix products in the compute dtype, in FLOP/s.
    fn product(&self) -> f64 {
        if self.dtype == DType::Bf16 { self.peaks.bf16_product } else { self.peaks.product }
    }

    /// What a benchmark prints of them.
    fn rates_at_most(&self) -> Value {
        let Peaks { fma, matrix, product, bf16_product, bf16, read, triad } = self.peaks;
        let giga = |rate: f64| rate / 1e9;
        json!({
            "fp32_fma_gflops": giga(fma),
            "fp32_matrix_gflops": giga(matrix),
            "fp32_product_gflops": giga(product),
            "bf16_product_gflops": giga(bf16_product),
            "bf16_dot_gflops": bf16.map(giga),
            "read_gb_per_s": giga(read),
            "triad_gb_per_s": giga(triad),
        })
    }

    /// The least seconds for some work, and what limits them.
    fn least(&self, op: &str, work: Work) -> (f64, &'static str) {
        // Products of bf16 numbers are what bf16 instructions are for; everything else is fp32 in any case.
        let peak = match (kernel_of(op), self.peaks.bf16) {
            ("linear" | "head_loss", Some(bf16)) if self.dtype == DType::Bf16 => bf16.max(self.peaks.matrix),
            ("linear" | "head_loss" | "mamba2", _) => self.peaks.matrix,
            _ => self.peaks.fma,
        };
        let compute = work.flops as f64 / peak;
        let memory = work.bytes as f64 / self.peaks.bandwidth();
        if compute > memory { (compute, "arithmetic") } else { (memory, "memory") }
    }

    /// Rates of `work` done in `seconds`.
    fn rates(&self, op: &str, seconds: f64, work: Work) -> Map<String, Value> {
        let (least, bound) = self.least(op, work);
        let rates = [
            ("gflops", json!(work.flops as f64 / seconds / 1e9)),
            ("gb_per_s", json!(work.bytes as f64 / seconds / 1e9)),
            ("roofline_share", json!(least / seconds)),
            ("bound", json!(bound)),
        ];
        rates.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }

    /// A row an op, the slowest first, and one for what is left of `seconds`: together they are all of it.
    fn breakdown(&self, mut ops: Vec<(&'static str, Tally)>, seconds: f64) -> Vec<Value> {
        ops.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        let row = |name: &str, calls: Option<u64>, total: f64| {
            let row = json!({ "op": name, "calls": calls, "total_s": total, "share": total / seconds });
            row.as_object().cloned().unwrap_or_default()
        };
        let in_ops: f64 = ops.iter().map(|(_, tally)| tally.seconds).sum();
        let rows = ops.iter().map(|(name, tally)| {
            let mut row = row(name, Some(tally.calls), tally.seconds);
            row.extend(self.rates(name, tally.seconds, tally.work));
            Value::from(row)
        });
        rows.chain([row("between ops", None, seconds - in_ops).into()]).collect()
    }
}

/// The kernel, by the suite's name, that an op and its adjoint belong to.
fn kernel_of(op: &str) -> &str {
    match op.split(' ').next().unwrap_or(op) {
        "logits" => "head_loss",
        "cast_buffer" | "zero_buffer" => "flat buffer",
        kernel => kernel,
    }
}

/// Checks every kernel on the backend's path.
fn check(backend: &CpuBackend) -> Result<Vec<Finding>, Error> {
    say("checking every kernel against its f64 definition");
    doctor::check(backend.isa())
}

/// Why there is no figure for `op`; None where its kernel has been checked and found right.
fn refusal(op: &str, checks: &[Finding]) -> Option<String> {
    match checks.iter().find(|check| check.op == kernel_of(op)) {
        None => Some("refused: no oracle check".into()),
        Some(check) if check.failed > 0 => Some(format!("refused: oracle check failed ({})", check.worst)),
        Some(_) => None,
    }
}

/// Refuses a figure that is made of many ops where one of them does not compute what it should.
fn refuse<'a>(ops: impl IntoIterator<Item = &'a str>, checks: &[Finding]) -> Result<(), Error> {
    let mut computed = ops.into_iter().filter(|op| !timed::BETWEEN_RANKS.contains(op));
    match computed.find_map(|op| refusal(op, checks)) {
        None => Ok(()),
        Some(why) => Err(Error::new(why).with_hint("`elapid doctor` shows every check")),
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use elapid_tensor::suite::Report;

    fn finding(op: &'static str, failed: usize) -> Finding {
        let (case, tensor, error) = ("B1".to_owned(), "y".to_owned(), 1e-6);
        let worst = Report { op, case, tensor, error: if failed > 0 { 1.0 } else { error }, tolerance: 1e-5 };
        Finding { op, comparisons: 3, failed, worst }
    }

    #[test]
    fn what_is_red_or_unchecked_has_no_figure() {
        let checks = [finding("linear", 1), finding("rms_norm", 0)];
        assert_eq!(refusal("rms_norm adjoint", &checks), None);
        assert!(refusal("linear adjoint", &checks).unwrap().contains("oracle check failed"));
        assert!(refusal("adamw", &checks).unwrap().contains("no oracle check"));
        assert!(refuse(["rms_norm", "rms_norm adjoint"], &checks).is_ok());
        let error = refuse(["rms_norm", "linear"], &checks).unwrap_err();
        assert!(error.to_string().contains("oracle check failed"), "{error}");
    }

    fn limits(dtype: DType) -> Limits {
        let peaks = Peaks {
            fma: 50.0,
            matrix: 100.0,
            product: 80.0,
            bf16_product: 150.0,
            bf16: Some(200.0),
            read: 10.0,
            triad: 8.0,
        };
        Limits { peaks, dtype }
    }

    #[test]
    fn the_roofline_by_hand() {
        let (much, little) = (Work { flops: 1000, bytes: 50 }, Work { flops: 100, bytes: 50 });
        assert_eq!(limits(DType::F32).least("linear", much), (10.0, "arithmetic"));
        assert_eq!(limits(DType::Bf16).least("linear adjoint", much), (5.0, "memory"));
        assert_eq!(limits(DType::Bf16).least("mamba2", much), (10.0, "arithmetic"));
        assert_eq!(limits(DType::F32).least("rms_norm adjoint", much), (20.0, "arithmetic"));
        assert_eq!(limits(DType::F32).least("linear", little), (5.0, "memory"));
        let rates = limits(DType::F32).rates("linear", 20.0, much);
        assert_eq!(rates["roofline_share"], 0.5);
    }

    #[test]
    fn a_breakdown_adds_up() {
        let tally = |seconds| Tally { calls: 2, seconds, work: Work { flops: 10, bytes: 10 } };
        let rows = limits(DType::F32).breakdown(vec![("clip", tally(1.0)), ("linear", tally(2.0))], 4.0);
        let names: Vec<_> = rows.iter().map(|row| row["op"].as_str().unwrap()).collect();
        assert_eq!(names, ["linear", "clip", "between ops"]);
        assert_eq!(rows.iter().map(|row| row["total_s"].as_f64().unwrap()).sum::<f64>(), 4.0);
    }
}
