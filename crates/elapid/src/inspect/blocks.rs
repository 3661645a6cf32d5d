//! What a pass through all blocks of a dataset tells, in memory that does not grow with it.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;

use foldhash::quality::RandomState;
use serde_json::{Value, json};

use super::{Fields, fields};
use crate::Error;
use crate::data::{Dataset, PAD_DOCUMENT, Tokenizer};
use crate::error::say;

/// Different blocks that are told apart; of more, a sample.
const BLOCKS: usize = 1 << 20;
/// Tokens from which on the pass takes long enough to be announced.
const LONG: usize = 200_000_000;

/// Lengths of documents, repeated blocks and unknown tokens. Where the dataset knows no documents, `eos` ends one, if
/// it does.
pub(super) fn scan(data: &Dataset, eos: Option<u32>, tokenizer: Option<&Tokenizer>) -> Result<Fields, Error> {
    if data.len() * data.seq_len() > LONG {
        say(format_args!("reading all {} blocks", data.len()));
    }
    let unknown = tokenizer.and_then(Tokenizer::unknown_id);
    let (mut lengths, mut blocks, mut unknowns) = (Lengths::default(), Distinct::default(), 0u64);
    let (mut document, mut length) = (PAD_DOCUMENT, 0);
    for index in 0..data.len() {
        let sample = data.sample(index)?;
        blocks.add(&sample.input_ids);
        if let Some(unknown) = unknown {
            unknowns += sample.input_ids.iter().filter(|&&id| id as u32 == unknown).count() as u64;
        }
        match (&sample.documents, eos) {
            (Some(documents), _) => {
                for run in documents.chunk_by(|a, b| a == b) {
                    if run[0] != document {
                        lengths.add(std::mem::take(&mut length));
                        document = run[0];
                    }
                    length += if document == PAD_DOCUMENT { 0 } else { run.len() as u64 };
                }
            }
            (None, Some(eos)) => {
                for run in sample.input_ids.split_inclusive(|&id| id as u32 == eos) {
                    length += run.len() as u64;
                    if run.last().is_some_and(|&id| id as u32 == eos) {
                        lengths.add(std::mem::take(&mut length));
                    }
                }
            }
            (None, None) => {}
        }
    }
    lengths.add(length);
    let tokens = (data.len() * data.seq_len()) as f64;
    let (duplicates, estimated) = blocks.duplicates();
    Ok(fields(json!({
        "document_lengths": lengths.describe(),
        "duplicate_blocks": duplicates,
        "duplicate_share": duplicates as f64 / data.len() as f64,
        "duplicates_estimated": estimated,
        "unknown_tokens": unknown.map(|_| unknowns),
        "unknown_share": unknown.map(|_| unknowns as f64 / tokens),
    })))
}

/// Lengths, counted by the first seven binary digits of each.
#[derive(Default)]
struct Lengths {
    documents: u64,
    tokens: u64,
    shortest: u64,
    longest: u64,
    counts: BTreeMap<u64, u64>,
}

impl Lengths {
    /// Bits of a number as f64 that are left out.
    const REST: u32 = f64::MANTISSA_DIGITS - 1 - 6;

    /// A document of this length; 0 is none.
    fn add(&mut self, length: u64) {
        if length == 0 {
            return;
        }
        self.shortest = if self.documents == 0 { length } else { self.shortest.min(length) };
        self.longest = self.longest.max(length);
        self.documents += 1;
        self.tokens += length;
        *self.counts.entry((length as f64).to_bits() >> Self::REST).or_default() += 1;
    }

    /// The lengths that are counted together start here.
    fn start(digits: u64) -> u64 {
        f64::from_bits(digits << Self::REST) as u64
    }

    /// A length, too low by a sixty-fourth at most, that this share of documents do not exceed.
    fn quantile(&self, share: f64) -> u64 {
        let (mut seen, wanted) = (0, (share * self.documents as f64).ceil() as u64);
        let found = self.counts.iter().find(|(_, count)| {
            seen += **count;
            seen >= wanted
        });
        found.map_or(0, |(digits, _)| Self::start(*digits).max(self.shortest))
    }

    fn describe(&self) -> Value {
        if self.documents == 0 {
            return Value::Null;
        }
        let mut powers: BTreeMap<u32, u64> = BTreeMap::new();
        for (digits, count) in &self.counts {
            *powers.entry(Self::start(*digits).ilog2()).or_default() += count;
        }
        let row = |(power, count): (&u32, &u64)| {
            let from = 1u64 << power;
            json!({ "from": from, "to": 2 * from - 1, "documents": count, "share": *count as f64 / self.documents as f64 })
        };
        json!({
            "documents": self.documents,
            "mean": self.tokens as f64 / self.documents as f64,
            "shortest": self.shortest,
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "longest": self.longest,
            "histogram": powers.iter().map(row).collect::<Vec<_>>(),
        })
    }
}

/// How many blocks there are, and how many different ones. Where these become too many, only blocks count whose hash
/// ends in some zeros.
#[derive(Default)]
struct Distinct {
    hasher: RandomState,
    zeros: u32,
    counts: HashMap<u64, u64>,
}

impl Distinct {
    fn add(&mut self, block: &[i32]) {
        let hash = self.hasher.hash_one(block);
        if hash.trailing_zeros() < self.zeros {
            return;
        }
        *self.counts.entry(hash).or_default() += 1;
        while self.counts.len() > BLOCKS {
            self.zeros += 1;
            self.counts.retain(|hash, _| hash.trailing_zeros() >= self.zeros);
        }
    }

    /// Blocks that equal an earlier one, and whether that is an estimate.
    fn duplicates(&self) -> (u64, bool) {
        let more: u64 = self.counts.values().map(|count| count - 1).sum();
        (more << self.zeros, self.zeros > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted() {
        let mut lengths = Lengths::default();
        assert_eq!(lengths.describe(), Value::Null);
        for length in [0, 1, 2, 3, 3, 100, 1000, 70_000] {
            lengths.add(length);
        }
        let found = lengths.describe();
        assert_eq!(
            (&found["documents"], &found["shortest"], &found["longest"], &found["median"]),
            (&json!(7), &json!(1), &json!(70_000), &json!(3))
        );
        assert_eq!(found["mean"], json!(71_109.0 / 7.0));
        let p95 = found["p95"].as_u64().unwrap();
        assert!((68_900..=70_000).contains(&p95), "{p95}");
        let rows: Vec<_> = found["histogram"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| (row["from"].as_u64(), row["documents"].as_u64()))
            .collect();
        let expected = [(1, 1), (2, 3), (64, 1), (512, 1), (65_536, 1)];
        assert_eq!(rows, expected.map(|(from, count)| (Some(from), Some(count))));
    }

    #[test]
    fn duplicates_are_counted_and_of_very_many_blocks_estimated() {
        let mut blocks = Distinct::default();
        for i in [1, 2, 1, 3, 1] {
            blocks.add(&[i, 7]);
        }
        assert_eq!(blocks.duplicates(), (2, false));

        let mut blocks = Distinct::default();
        let different = 3 * BLOCKS as i32;
        for i in (0..different).chain(0..different / 3) {
            blocks.add(&[i, 7]);
        }
        let (found, estimated) = blocks.duplicates();
        assert!(estimated && found.abs_diff(different as u64 / 3) < different as u64 / 60, "{found}");
        assert!(blocks.counts.len() <= BLOCKS);
    }
}
