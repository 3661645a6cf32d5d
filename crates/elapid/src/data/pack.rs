//! One stream of tokens → blocks of equal length.

use serde::{Deserialize, Serialize};

use super::pipeline::Encoded;
use super::units::About;
use super::writer::ShardWriter;
use crate::Error;

/// What has been packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    /// Documents.
    pub(super) documents: u64,
    /// Bytes of their text.
    pub(super) bytes: u64,
    /// Bytes of input that they were read from.
    pub(super) input_bytes: u64,
}

/// A place in the stream of tokens, at the end of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// The unit that the block ends in, and how many of its tokens stand before the place.
    pub(super) unit: About,
    pub(super) tokens: usize,
    /// What stands before that unit.
    pub(super) counts: Counts,
}

impl Place {
    /// Whether all of a unit stands before the place.
    pub(super) fn is_after(&self, unit: &About) -> bool {
        (unit.document, unit.piece) < (self.unit.document, self.unit.piece)
    }
}

/// Packs documents, end to end, into blocks of L ids. The document of a token is a running number from 0, modulo 2³¹.
pub(super) struct Packer<'a> {
    seq_len: usize,
    out: &'a mut ShardWriter,
    /// Where it began.
    from: Place,
    counts: Counts,
    /// The tokens after the last block, and their documents.
    rest: Vec<u32>,
    numbers: Vec<i32>,
}

impl<'a> Packer<'a> {
    /// Goes on from a place.
    pub(super) fn new(seq_len: usize, out: &'a mut ShardWriter, from: Place) -> Self {
        Self { seq_len, out, counts: from.counts, from, rest: Vec::new(), numbers: Vec::new() }
    }

    /// Packs units. `note` is told of a place where a shard is on disk.
    ///
    /// # Errors
    /// Those of the writer and of `note`.
    pub(super) fn add(
        &mut self,
        encoded: &Encoded,
        mut note: impl FnMut(&ShardWriter, Place) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut start = 0;
        for &(unit, bytes, end) in &encoded.units {
            let ids = &encoded.ids[start..end];
            start = end;
            let same = (unit.document, unit.piece) == (self.from.unit.document, self.from.unit.piece);
            let mut done = if same { self.from.tokens } else { 0 };
            let number = (self.counts.documents & i32::MAX as u64) as i32;
            while done < ids.len() {
                let n = (self.seq_len - self.rest.len()).min(ids.len() - done);
                self.rest.extend_from_slice(&ids[done..done + n]);
                self.numbers.resize(self.rest.len(), number);
                done += n;
                if self.rest.len() == self.seq_len {
                    if self.out.push(&self.rest, &self.numbers)? {
                        note(self.out, Place { unit, tokens: done, counts: self.counts })?;
                    }
                    self.rest.clear();
                    self.numbers.clear();
                }
            }
            self.counts.documents += u64::from(unit.last);
            self.counts.bytes += bytes as u64;
            self.counts.input_bytes += unit.input_bytes;
        }
        Ok(())
    }

    /// What has been packed.
    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Tokens in blocks.
    pub(super) fn tokens(&self) -> u64 {
        self.out.shards().rows * self.seq_len as u64
    }

    /// Tokens after the last block.
    pub(super) fn rest(&self) -> u64 {
        self.rest.len() as u64
    }
}
