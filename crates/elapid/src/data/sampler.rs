//! Which samples a batch holds.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The order of samples of a run. It depends on nothing but these numbers, so any step of any rank can be asked for
/// at any time: with n = dp·batch, step s and micro-step m (both from 0), rank r reads the global samples from
/// (s·accum + m)·n + r·batch on, and global sample i is sample i mod len of epoch i / len.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// Samples in the dataset.
    pub len: usize,
    /// Samples in a micro-step of one rank.
    pub batch: usize,
    /// Data-parallel ranks.
    pub dp: usize,
    /// This one.
    pub rank: usize,
    /// Micro-steps in a step.
    pub accum: usize,
    /// Seed of a random order, another one in every epoch; None: the order of the dataset.
    pub shuffle: Option<u64>,
}

impl Sampler {
    /// The samples of one micro-step, by their place in the dataset.
    pub fn indices(&self, step: u64, micro: usize) -> Vec<usize> {
        let n = (self.dp * self.batch) as u64;
        let first = (step * self.accum as u64 + micro as u64) * n + (self.rank * self.batch) as u64;
        let len = self.len as u64;
        (first..first + self.batch as u64)
            .map(|i| match self.shuffle {
                None => (i % len) as usize,
                Some(seed) => Permutation::new(self.len, seed, i / len).at((i % len) as usize),
            })
            .collect()
    }
}

/// A random permutation of 0 to len − 1 that needs no table: a four-round Feistel network over the smallest even
/// number of bits that holds len, applied again while the result lies outside (cycle walking; Black & Rogaway 2002).
struct Permutation {
    len: usize,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    fn new(len: usize, seed: u64, epoch: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        let bits = usize::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| rng.random()) }
    }

    fn at(&self, index: usize) -> usize {
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = index as u64;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            x = left << self.half_bits | right;
            if x < self.len as u64 {
                return x as usize;
            }
        }
    }
}

/// The finaliser of SplitMix64: every input bit reaches every output bit.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampler = Sampler { len: 10, batch: 2, dp: 1, rank: 0, accum: 3, shuffle: None };

    #[test]
    fn samples_come_in_order_and_wrap() {
        assert_eq!(PLAIN.indices(0, 0), [0, 1]);
        assert_eq!(PLAIN.indices(0, 2), [4, 5]);
        assert_eq!(PLAIN.indices(1, 2), [0, 1]);
    }

    /// T24: the global order is the same for every number of ranks.
    #[test]
    fn t24_order_does_not_depend_on_dp() {
        for shuffle in [None, Some(3)] {
            let global = |dp: usize, batch: usize| -> Vec<usize> {
                let rank = |rank| Sampler { batch, dp, rank, accum: 3, shuffle, ..PLAIN };
                let micro_steps = (0..5).flat_map(|step| (0..3).map(move |micro| (step, micro)));
                micro_steps
                    .flat_map(|(step, micro)| (0..dp).flat_map(move |r| rank(r).indices(step, micro)))
                    .collect()
            };
            assert_eq!(global(1, 4), global(2, 2));
            assert_eq!(global(1, 4), global(4, 1));
        }
    }

    #[test]
    fn an_epoch_holds_every_sample_once() {
        for len in [1, 2, 3, 7, 10, 64, 65, 1000, 4097] {
            let sampler = Sampler { len, batch: len, accum: 1, shuffle: Some(11), ..PLAIN };
            let mut epochs: Vec<Vec<usize>> = (0..3).map(|epoch| sampler.indices(epoch, 0)).collect();
            if len > 60 {
                assert_ne!(epochs[0], epochs[1]);
                assert_ne!(epochs[0], Sampler { shuffle: Some(12), ..sampler }.indices(0, 0));
            }
            for epoch in &mut epochs {
                epoch.sort_unstable();
                assert!(epoch.iter().copied().eq(0..len), "{len}");
            }
        }
    }

    /// Where a sample lands in the order should tell nothing about the sample: the mean of |place − sample| over a
    /// random permutation is len / 3.
    #[test]
    fn shuffling_moves_samples_far() {
        let len = 10_000;
        let order = Sampler { len, batch: len, accum: 1, shuffle: Some(5), ..PLAIN }.indices(0, 0);
        let distance: usize = order.iter().enumerate().map(|(i, &s)| i.abs_diff(s)).sum();
        let mean = distance as f64 / (len * len) as f64;
        assert!((mean - 1.0 / 3.0).abs() < 0.01, "{mean}");
    }
}
