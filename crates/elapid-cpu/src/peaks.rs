//! What this machine can do at most, measured: the limits that kernels are held against.

use std::hint::black_box;
use std::time::Instant;

use elapid_tensor::DType;

use crate::CpuBackend;
use crate::isa::{Isa, vectorize};

/// Rates of a machine, with the threads and the instruction-set path of one backend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// fp32 multiply-adds that stay in registers, with the path's vectors, in FLOP/s.
    pub fma: f64,
    /// The same with the vectors that multiply matrices on this path: its own with AVX-512, elsewhere the widest of the
    /// machine, since there `gemm` does it and chooses for itself.
    pub matrix: f64,
    /// fp32 matrix products ([`CpuBackend::measure_peak`]), in FLOP/s.
    pub product: f64,
    /// The same of bf16 operands.
    pub bf16_product: f64,
    /// Dot products of bf16 pairs (`vdpbf16ps`) that stay in registers, in FLOP/s; None on a path without them.
    pub bf16: Option<f64>,
    /// Reading memory, in bytes a second.
    pub read: f64,
    /// `a = b + s·c` in memory, in bytes a second, counted as three streams.
    pub triad: f64,
}

impl Peaks {
    /// The most bytes a second that were seen.
    pub fn bandwidth(&self) -> f64 {
        self.read.max(self.triad)
    }

    /// This memory beside the arithmetic of the path of `backend`.
    pub fn on(self, backend: &CpuBackend) -> Self {
        let fma = backend.fma_rate(backend.isa);
        let matrix = match backend.isa.multiplies() {
            true => fma,
            // What was seen of the widest vectors before is theirs as well.
            false => fma.max(backend.fma_rate(Isa::best())).max(self.matrix),
        };
        let [product, bf16_product] = [DType::F32, DType::Bf16].map(|dtype| backend.measure_peak(dtype));
        Self { fma, matrix, product, bf16_product, bf16: backend.bf16_rate(), ..self }
    }
}

/// Independent sums, enough to hide the latency of a multiply-add and few enough for 16 registers.
const SUMS: usize = 12;
const REPETITIONS: usize = 6;

impl CpuBackend {
    /// Measures them. `buffer` bytes of memory are read and written for the bandwidths; they should be far more than the
    /// caches hold.
    pub fn measure_peaks(&self, buffer: usize) -> Peaks {
        let (read, triad) = self.bandwidths(buffer / size_of::<f32>() / 3);
        Peaks { fma: 0.0, matrix: 0.0, product: 0.0, bf16_product: 0.0, bf16: None, read, triad }.on(self)
    }

    fn fma_rate(&self, isa: Isa) -> f64 {
        #[cfg(target_arch = "x86_64")]
        {
            if isa.multiplies() && is_x86_feature_detected!("avx512f") {
                // SAFETY: the CPU has just been asked.
                return self.rate(16 * 2, |loops| unsafe { x86::fma_avx512(loops) });
            }
            if isa == Isa::Avx2 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the CPU has just been asked.
                return self.rate(8 * 2, |loops| unsafe { x86::fma_avx2(loops) });
            }
            if isa == Isa::Portable {
                // SAFETY: every x86-64 CPU has SSE2.
                return self.rate(4 * 2, |loops| unsafe { x86::multiply_add_sse2(loops) });
            }
        }
        self.rate(4 * 2, |loops| vectorize!(isa, || fma_portable(loops)))
    }

    fn bf16_rate(&self) -> Option<f64> {
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Avx512Bf16
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bf16")
        {
            // SAFETY: the CPU has just been asked.
            return Some(self.rate(16 * 4, |loops| unsafe { x86::dot_bf16(loops) }));
        }
        None
    }

    /// FLOP/s of `kernel(loops)`, which does `flops` in each of [`SUMS`] sums a loop.
    fn rate(&self, flops: usize, kernel: impl Fn(usize) -> f32 + Sync) -> f64 {
        const LOOPS: usize = 100_000;
        let pieces = 16 * self.threads();
        let seconds = self.best(1, || {
            self.workers.each(pieces, |_| {
                black_box(kernel(black_box(LOOPS)));
            })
        });
        (pieces * LOOPS * SUMS * flops) as f64 / seconds
    }

    /// (read, triad) over arrays of `len` numbers, an eighth at a time: a short stretch is seldom disturbed, and by the
    /// time it comes again caches hold another.
    fn bandwidths(&self, len: usize) -> (f64, f64) {
        const CHUNK: usize = 1 << 16;
        let mut data = vec![0.0f32; 3 * len];
        // The threads that will read a page write it first: it lies near them.
        self.workers.rows(&mut data, 1, CHUNK, |first, part| part.fill(first as f32));
        let stretch = (len / 8).max(1);
        let bytes = (3 * stretch * size_of::<f32>()) as f64;
        let mut stretches = data.chunks_exact(3 * stretch).cycle();
        let read = self.best(8, || {
            let data = stretches.next().expect("a cycle does not end");
            self.workers.each(data.len().div_ceil(CHUNK), |piece| {
                let part = &data[piece * CHUNK..data.len().min((piece + 1) * CHUNK)];
                black_box(vectorize!(self.isa, || sum_of_bits(part)));
            });
        });
        let (a, rest) = data.split_at_mut(len);
        let (b, c) = rest.split_at(len);
        let mut starts = (0..len / stretch).map(|i| i * stretch).cycle();
        let triad = self.best(8, || {
            let start = starts.next().expect("a cycle does not end");
            let (b, c) = (&b[start..], &c[start..]);
            self.workers.rows(&mut a[start..start + stretch], 1, CHUNK, |first, part| {
                vectorize!(self.isa, || {
                    for ((a, b), c) in part.iter_mut().zip(&b[first..]).zip(&c[first..]) {
                        *a = b + 3.0 * c;
                    }
                });
            });
        });
        black_box(&data);
        (bytes / read, bytes / triad)
    }

    /// Seconds of the fastest of some runs, `times` the usual number of them.
    fn best(&self, times: usize, mut run: impl FnMut()) -> f64 {
        let mut time = || {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        };
        (0..times * REPETITIONS).map(|_| time()).fold(f64::INFINITY, f64::min)
    }
}

/// Reads `x` as four streams at once, which is faster than one: each can be fetched ahead only to the end of its page.
/// Integers may be summed in any order, so that the compiler does it in vectors.
#[inline(always)]
fn sum_of_bits(x: &[f32]) -> u32 {
    let (a, b) = x.split_at(x.len() / 2);
    let ((a, b), (c, d)) = (a.split_at(a.len() / 2), b.split_at(b.len() / 2));
    let rows = a.iter().zip(b).zip(c).zip(d);
    rows.fold(0, |sum, (((a, b), c), d)| {
        [a, b, c, d].into_iter().fold(sum, |sum, x| sum.wrapping_add(x.to_bits()))
    })
}

/// Four lanes of multiply and add; one instruction where every CPU of the architecture has it.
#[inline(always)]
fn fma_portable(loops: usize) -> f32 {
    let (a, b) = (black_box(0.999f32), black_box(1e-3f32));
    let mut sums: [f32; 4 * SUMS] = std::array::from_fn(|i| black_box(i as f32));
    for _ in 0..loops {
        for x in &mut sums {
            *x = if cfg!(target_arch = "aarch64") { x.mul_add(a, b) } else { *x * a + b };
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::SUMS;

    /// Different starts, or the compiler would find the sums to be one.
    fn starts() -> [f32; SUMS] {
        std::array::from_fn(|i| black_box(i as f32))
    }

    /// What every CPU of the architecture has: two instructions.
    #[target_feature(enable = "sse2")]
    pub(super) fn multiply_add_sse2(loops: usize) -> f32 {
        let (a, b) = (_mm_set1_ps(black_box(0.999)), _mm_set1_ps(black_box(1e-3)));
        let mut sums = starts().map(|x| _mm_set1_ps(x));
        for _ in 0..loops {
            for x in &mut sums {
                *x = _mm_add_ps(_mm_mul_ps(*x, a), b);
            }
        }
        sums.iter().map(|x| _mm_cvtss_f32(*x)).sum()
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_avx512(loops: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut sums = starts().map(|x| _mm512_set1_ps(x));
        for _ in 0..loops {
            for x in &mut sums {
                *x = _mm512_fmadd_ps(*x, a, b);
            }
        }
        sums.iter().map(|x| _mm512_reduce_add_ps(*x)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_avx2(loops: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
        let mut sums = starts().map(|x| _mm256_set1_ps(x));
        for _ in 0..loops {
            for x in &mut sums {
                *x = _mm256_fmadd_ps(*x, a, b);
            }
        }
        sums.iter().map(|x| _mm256_cvtss_f32(*x)).sum()
    }

    /// Two products and two additions in each of 16 lanes.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn dot_bf16(loops: usize) -> f32 {
        let pair = |x| _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(x));
        let (a, b) = (pair(black_box(0.5)), pair(black_box(1e-3)));
        let mut sums = starts().map(|x| _mm512_set1_ps(x));
        for _ in 0..loops {
            for x in &mut sums {
                *x = _mm512_dpbf16_ps(*x, a, b);
            }
        }
        sums.iter().map(|x| _mm512_reduce_add_ps(*x)).sum()
    }
}

#[cfg(test)]
mod tests {
    use crate::{CpuBackend, CpuOptions, Isa};

    #[test]
    fn products_and_streams_stay_below_what_registers_and_caches_give() {
        for isa in Isa::available() {
            let options = CpuOptions { threads: Some(2), isa: Some(isa), ..CpuOptions::default() };
            let peaks = CpuBackend::new(&options).unwrap().measure_peaks(48 << 20);
            // The machine is shared: a rate may be halved while it is taken.
            assert!(peaks.product < 2.0 * peaks.matrix && peaks.fma <= peaks.matrix, "{isa:?}: {peaks:?}");
            for rate in [peaks.product, peaks.read, peaks.triad, peaks.bf16.unwrap_or(1e9)] {
                assert!(rate > 1e7 && rate < 1e15, "{isa:?}: {peaks:?}");
            }
        }
    }
}
