//! What this machine can do, and whether every kernel does it right.

use elapid_cpu::{CpuBackend, CpuOptions, Isa, features};
use elapid_tensor::suite::{self, Finding};
use serde_json::{Map, Value, json};
use sysinfo::System;

use crate::Error;
use crate::error::say;
use crate::memory;

/// Describes the machine and checks every kernel against its f64 definition on every path that the machine can run:
/// the object that `elapid doctor --json` prints. Progress goes to stderr.
///
/// # Errors
/// Worker threads cannot be started.
pub fn examine() -> Result<Value, Error> {
    let mut checks = Vec::new();
    for isa in Isa::available() {
        say(format_args!("checking every kernel against its f64 definition: {isa:?}"));
        checks.extend(check(isa)?.iter().map(|finding| row(&format!("{isa:?}"), finding)));
    }
    let ok = checks.iter().all(|check| check["ok"] == true);
    Ok(json!({
        "machine": machine(),
        "instruction_sets": features().into_iter().map(|(name, has)| (name.into(), has.into())).collect::<Map<_, _>>(),
        "paths": {
            "elementwise": Isa::available().iter().map(|isa| format!("{isa:?}")).collect::<Vec<_>>(),
            "chosen": format!("{:?}", Isa::best()),
            "products": products(),
        },
        "checks": checks,
        "ok": ok,
    }))
}

/// Compares every kernel with the oracle on one path, in memory filled with NaN.
///
/// # Errors
/// Worker threads cannot be started, or the machine cannot run the path.
pub fn check(isa: Isa) -> Result<Vec<Finding>, Error> {
    let options = CpuOptions { isa: Some(isa), poison: true, ..CpuOptions::default() };
    let backend = CpuBackend::new(&options).map_err(|cause| {
        Error::new(cause.to_string()).with_hint("free some threads or memory on this machine")
    })?;
    Ok(suite::findings(&suite::check_all(&backend)))
}

/// A line of the table of checks, of what was computed on `path`.
pub(crate) fn row(path: &str, finding: &Finding) -> Value {
    let Finding { op, comparisons, failed, worst } = finding;
    // JSON has no infinity: that is null.
    json!({
        "path": path,
        "kernel": op,
        "ok": *failed == 0,
        "comparisons": comparisons,
        "failed": failed,
        "worst_error": worst.error,
        "tolerance": worst.tolerance,
        "worst": format!("{}, {}", worst.tensor, worst.case),
    })
}

/// What multiplies matrices on the best path: our own kernel with AVX-512, else that of `gemm`, which chooses for itself.
fn products() -> &'static str {
    let has = |name| features().contains(&(name, true));
    match () {
        () if has("avx512f") && has("avx512_bf16") => "avx512f, bf16 by avx512_bf16",
        () if has("avx512f") => "avx512f",
        () if has("fma") => "fma",
        () if has("neon") => "neon",
        () => "scalar",
    }
}

fn machine() -> Value {
    let mut system = System::new();
    system.refresh_memory();
    system.refresh_cpu_all();
    let cpu =
        system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).filter(|brand| !brand.is_empty());
    json!({
        "system": System::long_os_version(),
        "kernel": System::kernel_version(),
        "architecture": std::env::consts::ARCH,
        "cpu": cpu,
        "cores": System::physical_core_count(),
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
        "memory_bytes": system.total_memory(),
        "free_bytes": memory::available(),
    })
}
