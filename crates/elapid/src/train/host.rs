//! The CPU of a run: its backend, and how fast it is.

use std::collections::BTreeMap;
use std::sync::Mutex;

use elapid_cpu::{CpuBackend, CpuOptions, Isa};
use elapid_tensor::{Checkpointing, DType};

use crate::Error;
use crate::config::run::{ActivationCheckpointing, Dtype, check_threads};
use crate::parallel::Rank;

impl Dtype {
    /// The dtype of activations.
    pub fn compute(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::Bfloat16 => DType::Bf16,
        }
    }
}

impl From<ActivationCheckpointing> for Checkpointing {
    fn from(choice: ActivationCheckpointing) -> Self {
        match choice {
            ActivationCheckpointing::None => Self::None,
            ActivationCheckpointing::Block => Self::Block,
        }
    }
}

/// A CPU backend with `threads` workers (None: one a core).
///
/// # Errors
/// 0 threads, more than any machine has use for, or they cannot be started.
pub fn cpu(threads: Option<usize>) -> Result<CpuBackend, Error> {
    cpu_on(threads, Isa::best())
}

/// The same on one instruction-set path.
///
/// # Errors
/// As of [`cpu`]; the machine cannot run the path.
pub(crate) fn cpu_on(threads: Option<usize>, isa: Isa) -> Result<CpuBackend, Error> {
    check_threads("--threads", threads.unwrap_or(1))?;
    CpuBackend::new(&CpuOptions { threads, isa: Some(isa), ..CpuOptions::default() }).map_err(|cause| {
        Error::new(cause.to_string()).with_hint("give fewer --threads, or free some on this machine")
    })
}

/// FLOP/s of this rank in products of `dtype`. One that has the machine for itself measures once in a process for each number of threads;
/// those that share it measure side by side.
pub(super) fn peak(rank: &Rank, backend: &CpuBackend, dtype: DType) -> f64 {
    if rank.ranks_here() > 1 {
        return backend.measure_peak(dtype);
    }
    static MEASURED: Mutex<BTreeMap<(usize, bool), f64>> = Mutex::new(BTreeMap::new());
    let mut measured = MEASURED.lock().expect("measuring does not panic");
    let key = (backend.threads(), dtype == DType::Bf16);
    *measured.entry(key).or_insert_with(|| backend.measure_peak(dtype))
}
