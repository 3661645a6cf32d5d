//! Which samples a batch holds.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// In which order samples are read; n = dp·batch is the number of rows of a global micro-step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// That of the dataset: micro-step t, counted over all steps, reads the samples from t·n on.
    Dataset,
    /// A random one of this seed, another one in every epoch.
    Shuffled(u64),
    /// That in which states are carried: row i of n reads a stretch of its own, the samples from ⌊i·len/n⌋ up to
    /// ⌊(i+1)·len/n⌋, one a micro-step, over and over. Rows that read one sample less begin again earlier.
    Stretches,
}

/// What one row of a batch reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sample's place in the dataset.
    pub index: usize,
    /// How often the dataset, or the row's stretch of it, has been read before.
    pub epoch: u64,
    /// The row read sample `index` − 1 just before.
    pub follows: bool,
}

/// The order of samples of a run. It depends on nothing but these numbers, so any step of any rank can be asked for
/// at any time: of the n = dp·batch rows of step s and micro-step m (both from 0), rank r reads those from r·batch on. What a
/// row reads depends on n, not on dp.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// Samples in the dataset; with [`Order::Stretches`] at least n.
    pub len: usize,
    /// Samples in a micro-step of one rank.
    pub batch: usize,
    /// Data-parallel ranks.
    pub dp: usize,
    /// This one.
    pub rank: usize,
    /// Micro-steps in a step.
    pub accum: usize,
    /// Which way through the dataset.
    pub order: Order,
    /// A step s₀ and the sample a, counted over epochs, that its first row reads: row i of step s and micro-step m reads sample
    /// a + ((s − s₀)·accum + m)·n + i. Earlier steps have read other data, or other numbers of samples. (0, 0), and with
    /// [`Order::Stretches`] without a meaning, where there are none.
    pub from: (u64, u64),
}

impl Sampler {
    /// The samples of one micro-step, by their place in the dataset.
    pub fn indices(&self, step: u64, micro: usize) -> Vec<usize> {
        self.places(step, micro).iter().map(|place| place.index).collect()
    }

    /// What the rows of one micro-step read.
    pub fn places(&self, step: u64, micro: usize) -> Vec<Place> {
        let first = self.rank * self.batch;
        (first..first + self.batch).map(|row| self.place(step, micro, row)).collect()
    }

    /// Samples that have been read before `step`.
    pub fn read_before(&self, step: u64) -> u64 {
        let (from, sample) = self.from;
        sample + (step - from) * (self.dp * self.batch * self.accum) as u64
    }

    fn place(&self, step: u64, micro: usize, row: usize) -> Place {
        let (rows, len) = (self.dp * self.batch, self.len as u64);
        let global = self.read_before(step) + (micro * rows + row) as u64;
        let (epoch, index) = (global / len, (global % len) as usize);
        match self.order {
            Order::Dataset => Place { index, epoch, follows: false },
            Order::Shuffled(seed) => {
                Place { index: Permutation::new(self.len, seed, epoch).at(index), epoch, follows: false }
            }
            Order::Stretches => {
                let (start, end) = (row * self.len / rows, (row + 1) * self.len / rows);
                let size = (end - start) as u64;
                let micro_step = step * self.accum as u64 + micro as u64;
                let index = start + (micro_step % size) as usize;
                Place { index, epoch: micro_step / size, follows: index > start }
            }
        }
    }
}

/// A random permutation of 0 to len − 1 that needs no table: a four-round Feistel network over the smallest even
/// number of bits that holds len, applied again while the result lies outside (cycle walking; Black & Rogaway 2002).
pub(super) struct Permutation {
    len: usize,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    pub(super) fn new(len: usize, seed: u64, epoch: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        let bits = usize::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| rng.random()) }
    }

    pub(super) fn at(&self, index: usize) -> usize {
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
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampler =
        Sampler { len: 10, batch: 2, dp: 1, rank: 0, accum: 3, order: Order::Dataset, from: (0, 0) };

    #[test]
    fn samples_come_in_order_and_wrap() {
        assert_eq!(PLAIN.indices(0, 0), [0, 1]);
        assert_eq!(PLAIN.indices(0, 2), [4, 5]);
        assert_eq!(PLAIN.indices(1, 2), [0, 1]);
    }

    #[test]
    fn t24_another_batch_goes_on_where_the_last_one_ended() {
        let sampler = Sampler { len: 100, batch: 4, accum: 1, ..PLAIN };
        assert_eq!((sampler.indices(4, 0), sampler.read_before(5)), (vec![16, 17, 18, 19], 20));
        let sampler = Sampler { batch: 3, accum: 2, from: (5, 20), ..sampler };
        assert_eq!([sampler.indices(5, 0), sampler.indices(5, 1)], [[20, 21, 22], [23, 24, 25]]);
        assert_eq!((sampler.indices(6, 0), sampler.read_before(6)), (vec![26, 27, 28], 26));
    }

    /// T24: the global order is the same for every number of ranks.
    #[test]
    fn t24_order_does_not_depend_on_dp() {
        for order in [Order::Dataset, Order::Shuffled(3), Order::Stretches] {
            let global = |dp: usize, batch: usize| -> Vec<usize> {
                let rank = |rank| Sampler { batch, dp, rank, accum: 3, order, ..PLAIN };
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
    fn rows_read_stretches_of_their_own() {
        let sampler = Sampler { len: 7, batch: 3, accum: 1, order: Order::Stretches, ..PLAIN };
        let rows: Vec<Vec<usize>> = (0..4).map(|step| sampler.indices(step, 0)).collect();
        assert_eq!(rows, [[0, 2, 4], [1, 3, 5], [0, 2, 6], [1, 3, 4]]);
        let places = sampler.places(2, 0);
        assert_eq!(places.iter().map(|p| p.follows).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(places.iter().map(|p| p.epoch).collect::<Vec<_>>(), [1, 1, 0]);
        // One block a row: nothing ever follows.
        let sampler = Sampler { len: 3, ..sampler };
        assert_eq!(sampler.indices(1, 0), [0, 1, 2]);
        assert!(sampler.places(1, 0).iter().all(|place| !place.follows));
    }

    #[test]
    fn an_epoch_holds_every_sample_once() {
        for len in [1, 2, 3, 7, 10, 64, 65, 1000, 4097] {
            let sampler = Sampler { len, batch: len, accum: 1, order: Order::Shuffled(11), ..PLAIN };
            let mut epochs: Vec<Vec<usize>> = (0..3).map(|epoch| sampler.indices(epoch, 0)).collect();
            if len > 60 {
                assert_ne!(epochs[0], epochs[1]);
                assert_ne!(epochs[0], Sampler { order: Order::Shuffled(12), ..sampler }.indices(0, 0));
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
        let order = Sampler { len, batch: len, accum: 1, order: Order::Shuffled(5), ..PLAIN }.indices(0, 0);
        let distance: usize = order.iter().enumerate().map(|(i, &s)| i.abs_diff(s)).sum();
        let mean = distance as f64 / (len * len) as f64;
        assert!((mean - 1.0 / 3.0).abs() < 0.01, "{mean}");
    }
}
