//! Which instruction set the kernels use, decided at run time.
//!
//! Elementwise kernels are plain Rust that the compiler vectorises. [`vectorize!`] compiles the closure it is given
//! once for each instruction set and calls the one chosen. They use no fused multiply-add, so their results are
//! the same bits on every path; only matrix products differ.

/// An instruction-set path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every CPU of the target architecture has.
    Portable,
    /// AVX2: 8 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL: 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same with products of bf16 pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// Every path this machine can run, the best one last.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut paths = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                paths.push(Isa::Avx2);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                paths.push(Isa::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    paths.push(Isa::Avx512Bf16);
                }
            }
        }
        paths
    }

    /// Whether matrix products have a kernel of their own on this path. Elsewhere `gemm` does them, with the widest vectors of
    /// the machine.
    pub(crate) fn multiplies(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if matches!(self, Isa::Avx512 | Isa::Avx512Bf16) {
            return true;
        }
        false
    }

    /// The best path this machine can run.
    pub fn best() -> Isa {
        *Self::available().last().expect("the portable path is always there")
    }
}

/// Runs a closure compiled for a path: `vectorize!(isa, || …)`.
///
/// Each path has a closure of its own, which is called in one place. So the compiler inlines it, whatever its size, into the function
/// that has the instructions. (A closure that three paths share is inlined only while it is small, and is otherwise compiled once, for the
/// portable path.) What the closure calls must be inlined too: mark it `#[inline(always)]`.
macro_rules! vectorize {
    ($isa:expr, || $body:expr) => {
        match $isa {
            $crate::isa::Isa::Portable => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Isa::Avx2 => {
                let f = || $body;
                // SAFETY: `CpuBackend::new` lets no path in that `Isa::available` has not asked the CPU for: AVX2.
                unsafe { $crate::isa::avx2(f) }
            }
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Isa::Avx512 | $crate::isa::Isa::Avx512Bf16 => {
                let f = || $body;
                // SAFETY: as above: these four features, which imply AVX2.
                unsafe { $crate::isa::avx512(f) }
            }
        }
    };
}
pub(crate) use vectorize;

/// # Safety
/// The CPU must have AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(crate) fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// # Safety
/// The CPU must have these instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub(crate) fn avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// The instruction sets that kernels use or could use, and whether this machine has them; by the names of Linux's
/// `/proc/cpuinfo`. Those of AMX are what the CPU says, whatever the system permits.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        let amx = amx();
        vec![
            ("fma", is_x86_feature_detected!("fma")),
            ("avx2", is_x86_feature_detected!("avx2")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512dq", is_x86_feature_detected!("avx512dq")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
            ("avx512_vnni", is_x86_feature_detected!("avx512vnni")),
            ("amx_tile", amx[0]),
            ("amx_bf16", amx[1]),
            ("amx_int8", amx[2]),
        ]
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec![("neon", std::arch::is_aarch64_feature_detected!("neon"))]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

/// AMX tiles, bf16 and int8, which `std` does not detect yet: bits 24, 22 and 25 of edx in leaf 7 of `cpuid`.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // Safe to call from Rust 1.93 on.
fn amx() -> [bool; 3] {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // SAFETY: every x86-64 CPU has the instruction, and leaf 0 names the last leaf.
    let edx = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
    [24, 22, 25].map(|bit| edx >> bit & 1 == 1)
}
