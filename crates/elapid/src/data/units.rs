//! Parts of documents → units of work: documents chosen, counted, perhaps shuffled, and long ones cut.

use std::collections::VecDeque;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Tokenizer;
use super::sampler::mix;
use super::sources::Part;
use super::tokenizer::PIECE;
use crate::Error;

/// Documents and bytes of text that are shuffled among each other at a time.
const SHUFFLED_DOCUMENTS: usize = 10_000;
const SHUFFLED_BYTES: usize = 64 << 20;

/// A document, or a piece of a long one, that is tokenized at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) text: String,
    pub(super) about: About,
}

/// Where a unit stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct About {
    /// Its document, counted from 0 over the whole source.
    pub(super) document: u64,
    /// Its number in the document.
    pub(super) piece: u64,
    /// The document ends with it.
    pub(super) last: bool,
    /// Bytes of input that were read for it.
    pub(super) input_bytes: u64,
    /// Its file, and the first document that was read from there.
    pub(super) file: usize,
    pub(super) first: u64,
}

/// Which documents belong to a split. It depends on their place in the source alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Choice {
    All,
    /// About this fraction of them, by a seed.
    Validation(f64, u64),
    /// The others.
    Training(f64, u64),
}

impl Choice {
    fn holds(self, document: u64) -> bool {
        let drawn = |fraction: f64, seed: u64| {
            let number = mix(mix(seed).wrapping_add(document.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            ((number >> 11) as f64) < fraction * (1u64 << 53) as f64
        };
        match self {
            Self::All => true,
            Self::Validation(fraction, seed) => drawn(fraction, seed),
            Self::Training(fraction, seed) => !drawn(fraction, seed),
        }
    }
}

/// Cuts parts of documents into units. A cut is made only where it changes no token.
pub(super) struct Units<'a, P> {
    parts: P,
    tokenizer: &'a Tokenizer,
    choice: Choice,
    /// Documents to read at most.
    limit: u64,
    /// Of the document at hand: where it stands, and its text from `start` on, not yet handed out.
    about: About,
    text: String,
    start: usize,
    /// Bytes from `start` on where no cut was found.
    from: usize,
    /// No part of the document at hand has been read.
    fresh: bool,
    ready: VecDeque<Unit>,
}

impl<'a, P: Iterator<Item = Result<Part, Error>>> Units<'a, P> {
    /// Units of `parts`, whose first document is number `first`; the documents up to `limit` count.
    pub(super) fn new(parts: P, tokenizer: &'a Tokenizer, choice: Choice, first: u64, limit: u64) -> Self {
        Self {
            parts,
            tokenizer,
            choice,
            limit,
            about: About { document: first, file: usize::MAX, first, ..About::default() },
            text: String::new(),
            start: 0,
            from: PIECE,
            fresh: true,
            ready: VecDeque::new(),
        }
    }

    fn add(&mut self, part: Part) {
        let about = &mut self.about;
        about.input_bytes += part.input_bytes;
        if self.fresh && about.file != part.file {
            (about.file, about.first) = (part.file, about.document);
        }
        self.fresh = false;
        let chosen = self.choice.holds(about.document);
        if chosen {
            if self.text.is_empty() {
                self.text = part.text
            } else {
                self.text.push_str(&part.text)
            }
            self.cut(part.last);
        }
        if part.last {
            if chosen {
                let start = std::mem::take(&mut self.start);
                let mut text = std::mem::take(&mut self.text);
                if start > 0 {
                    text = text[start..].to_owned();
                }
                self.hand_out(text, true);
            }
            self.about.document += 1;
            self.about.piece = 0;
            self.from = PIECE;
            self.fresh = true;
        }
    }

    /// Hands out pieces while there is text enough to try cuts in; with `whole` no more will come.
    fn cut(&mut self, whole: bool) {
        loop {
            let text = &self.text[self.start..];
            if text.len() <= if whole { self.from } else { self.from + 2 * PIECE } {
                break;
            }
            match self.tokenizer.find_cut(text, self.from) {
                Some(cut) => {
                    let piece = text[..cut].to_owned();
                    (self.start, self.from) = (self.start + cut, PIECE);
                    self.hand_out(piece, false);
                }
                None => self.from += PIECE,
            }
        }
        if self.start > self.text.len() / 2 {
            self.text.drain(..self.start);
            self.start = 0;
        }
    }

    fn hand_out(&mut self, text: String, last: bool) {
        self.ready.push_back(Unit { text, about: About { last, ..self.about } });
        self.about.input_bytes = 0;
        self.about.piece += 1;
    }
}

impl<P: Iterator<Item = Result<Part, Error>>> Iterator for Units<'_, P> {
    type Item = Result<Unit, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(unit) = self.ready.pop_front() {
                return Some(Ok(unit));
            }
            if self.about.document >= self.limit {
                return None;
            }
            match self.parts.next()? {
                Ok(part) => self.add(part),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Parts with their documents in a random order, as far as a buffer of them reaches; a document of several parts passes
/// it by.
pub(super) struct Shuffled<P> {
    parts: P,
    rng: ChaCha8Rng,
    buffer: Vec<Part>,
    bytes: usize,
    /// In the middle of a document that passes by.
    passing: bool,
    ended: bool,
}

impl<P> Shuffled<P> {
    pub(super) fn new(parts: P, seed: u64) -> Self {
        Self {
            parts,
            rng: ChaCha8Rng::seed_from_u64(seed),
            buffer: Vec::new(),
            bytes: 0,
            passing: false,
            ended: false,
        }
    }
}

impl<P: Iterator<Item = Result<Part, Error>>> Iterator for Shuffled<P> {
    type Item = Result<Part, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended && self.buffer.len() < SHUFFLED_DOCUMENTS && self.bytes < SHUFFLED_BYTES {
            match self.parts.next() {
                Some(Ok(part)) if self.passing || !part.last => {
                    self.passing = !part.last;
                    return Some(Ok(part));
                }
                Some(Ok(part)) => {
                    self.bytes += part.text.len();
                    self.buffer.push(part);
                }
                Some(Err(error)) => return Some(Err(error)),
                None => self.ended = true,
            }
        }
        if self.buffer.is_empty() {
            return None;
        }
        let drawn = self.rng.random_range(0..self.buffer.len());
        let part = self.buffer.swap_remove(drawn);
        self.bytes -= part.text.len();
        Some(Ok(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(text: &str, last: bool, file: usize) -> Result<Part, Error> {
        Ok(Part { text: text.to_owned(), last, input_bytes: text.len() as u64, file })
    }

    fn bytes() -> Tokenizer {
        Tokenizer::load("bytes").unwrap()
    }

    #[test]
    fn documents_are_counted_over_files() {
        let parts = [
            part("a", true, 0),
            part("", true, 0),
            part("b", false, 1),
            part("c", true, 1),
            part("d", true, 3),
        ];
        let tokenizer = bytes();
        let units: Vec<Unit> = Units::new(parts.into_iter(), &tokenizer, Choice::All, 10, u64::MAX)
            .map(Result::unwrap)
            .collect();
        let about: Vec<_> =
            units.iter().map(|u| (&u.text[..], u.about.document, u.about.file, u.about.first)).collect();
        assert_eq!(about, [("a", 10, 0, 10), ("", 11, 0, 10), ("bc", 12, 1, 12), ("d", 13, 3, 13)]);
        assert!(units.iter().all(|unit| unit.about.last && unit.about.piece == 0));
        assert_eq!(units[2].about.input_bytes, 2);
    }

    /// Pieces do not depend on the parts that a document comes in, and are small.
    #[test]
    fn long_documents_are_cut_at_words() {
        let text: String = (0..300_000).map(|i| format!("{i} ")).collect();
        let tokenizer = bytes();
        let pieces = |size: usize| -> Vec<String> {
            let chunks: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            let parts: Vec<_> = chunks
                .iter()
                .enumerate()
                .map(|(i, chunk)| part(std::str::from_utf8(chunk).unwrap(), i + 1 == chunks.len(), 0))
                .collect();
            let units =
                Units::new(parts.into_iter(), &tokenizer, Choice::All, 0, u64::MAX).map(Result::unwrap);
            let units: Vec<Unit> = units.collect();
            assert!(units.iter().enumerate().all(|(i, unit)| unit.about.piece == i as u64));
            assert!(
                units[..units.len() - 1].iter().all(|unit| !unit.about.last)
                    && units.last().unwrap().about.last
            );
            units.into_iter().map(|unit| unit.text).collect()
        };
        let whole = pieces(usize::MAX);
        assert_eq!(whole.concat(), text);
        assert!(whole.len() > 4 && whole.iter().all(|piece| piece.len() < PIECE + 100));
        assert_eq!(pieces(100_000), whole);
        assert_eq!(pieces(700_001), whole);
    }

    #[test]
    fn splits_share_out_the_documents() {
        let held =
            |choice: Choice| (0..10_000).filter(|&document| choice.holds(document)).collect::<Vec<u64>>();
        let (validation, training) = (held(Choice::Validation(0.1, 5)), held(Choice::Training(0.1, 5)));
        assert!((900..1100).contains(&validation.len()), "{}", validation.len());
        let mut all = [validation.clone(), training].concat();
        all.sort_unstable();
        assert_eq!(all, held(Choice::All));
        assert_ne!(validation, held(Choice::Validation(0.1, 6)));
    }

    #[test]
    fn shuffling_moves_documents_and_loses_none() {
        let parts = |seed| {
            let parts = (0..25_000).map(|i| part(&i.to_string(), true, 0));
            Shuffled::new(parts, seed).map(|part| part.unwrap().text.parse().unwrap()).collect::<Vec<usize>>()
        };
        let (one, two) = (parts(1), parts(2));
        assert_ne!(one, two);
        assert_eq!(one, parts(1));
        let moved: usize = one.iter().enumerate().map(|(i, &n)| i.abs_diff(n)).sum();
        assert!(moved / one.len() > 2000, "{}", moved / one.len());
        let mut sorted = one;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..25_000));
    }

    #[test]
    fn parts_of_a_long_document_stay_together() {
        let parts = [part("a", true, 0), part("b1", false, 0), part("b2", true, 0), part("c", true, 0)];
        let texts: Vec<String> = Shuffled::new(parts.into_iter(), 3).map(|part| part.unwrap().text).collect();
        let at = texts.iter().position(|text| text == "b1").unwrap();
        assert_eq!((texts.len(), &texts[at + 1][..]), (4, "b2"));
    }
}
