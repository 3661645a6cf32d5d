//! Packed datasets, as training and evaluation read them.

mod card;
mod megatron;
mod mixture;
mod saved;

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Once;

use memmap2::{Advice, Mmap};
use rayon::prelude::*;

pub use self::card::Card;
use self::megatron::Megatron;
use self::mixture::Mixture;
use self::saved::Saved;
pub(super) use self::saved::{CARD, END_OF_STREAM, TOKENIZER};
pub(crate) use self::saved::{DICT, STATE};
use super::tokenizer::sha256;
use crate::Error;

/// The document of padding; those of samples are 0 or more.
pub const PAD_DOCUMENT: i32 = -1;

/// More samples than any run reads: the length of a mixture, which begins its parts anew for ever.
const ENDLESS: usize = 1 << 48;

/// One block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// `[L]`.
    pub input_ids: Vec<i32>,
    /// `[L]`, as stored: the label of a position is its own token, shifting is up to whoever trains.
    pub labels: Vec<i32>,
    /// `[L]`, at least 0, or [`PAD_DOCUMENT`]: where two neighbours differ, a document begins. None: the dataset does
    /// not say.
    pub documents: Option<Vec<i32>>,
}

impl Sample {
    /// Tokens that are their own labels, one document.
    pub fn new(ids: &[u32]) -> Self {
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        Self { labels: ids.clone(), input_ids: ids, documents: None }
    }
}

/// One folder or pair of files.
enum Part {
    Saved(Box<Saved>),
    Megatron(Megatron),
}

impl Part {
    fn open(path: &Path, seq_len: Option<usize>) -> Result<Self, Error> {
        match megatron::pair(path) {
            Some(pair) => Megatron::open(pair, seq_len).map(Self::Megatron),
            None => Saved::open(path).map(|data| Self::Saved(Box::new(data))),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Saved(data) => data.len,
            Self::Megatron(data) => data.len,
        }
    }

    fn seq_len(&self) -> usize {
        match self {
            Self::Saved(data) => data.seq_len,
            Self::Megatron(data) => data.seq_len,
        }
    }

    fn columns(&self) -> Vec<&'static str> {
        match self {
            Self::Saved(data) => data.columns(),
            Self::Megatron(_) => vec!["input_ids"],
        }
    }

    fn card(&self) -> Option<&Card> {
        match self {
            Self::Saved(data) => data.card.as_ref(),
            Self::Megatron(_) => None,
        }
    }

    fn fingerprint(&self) -> Option<&str> {
        match self {
            Self::Saved(data) => data.fingerprint.as_deref(),
            Self::Megatron(data) => Some(&data.fingerprint),
        }
    }

    fn sample(&self, row: usize, vocab_size: Option<usize>) -> Result<Sample, Error> {
        match self {
            Self::Saved(data) => data.sample(row, vocab_size),
            Self::Megatron(data) => data.sample(row, vocab_size),
        }
    }

    fn documents(&self, row: usize) -> Result<Option<Vec<i32>>, Error> {
        match self {
            Self::Saved(data) => data.documents(row),
            Self::Megatron(data) => Ok(Some(data.documents(row))),
        }
    }
}

/// A dataset, mapped into memory: one folder or several, end to end or mixed by weights.
pub struct Dataset {
    paths: Vec<PathBuf>,
    parts: Vec<Part>,
    /// Place of the first block of each part.
    firsts: Vec<usize>,
    len: usize,
    card: Option<Card>,
    fingerprint: Option<String>,
    mixture: Option<Mixture>,
    vocab_size: Option<usize>,
}

impl Dataset {
    /// Opens what `--data-dir` says: see [`Self::open_blocks`]; Megatron's files need a length that this does not know.
    ///
    /// # Errors
    /// As there.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_blocks(dir, None)
    }

    /// Opens a dataset folder (of a `DatasetDict` its `train` split), or Megatron's pair of files `NAME.bin` and
    /// `NAME.idx`, cut into blocks of `seq_len`. Several stand one after the other, separated by commas; with weights,
    /// `a:0.7,b:0.3`, they are mixed so that of any stretch of samples these shares are from each, and each begins anew
    /// when it is through.
    ///
    /// # Errors
    /// No such folder, files missing or damaged, other columns, no rows, or rows of different lengths; weights for some
    /// parts only; different tokenizers.
    pub fn open_blocks(dir: &Path, seq_len: Option<usize>) -> Result<Self, Error> {
        let (paths, weights) = mixture::parse(dir)?;
        let parts = paths.iter().map(|path| Part::open(path, seq_len)).collect::<Result<Vec<_>, _>>()?;
        let mut firsts = Vec::new();
        let mut len = 0;
        for (path, part) in paths.iter().zip(&parts) {
            if part.seq_len() != parts[0].seq_len() {
                return Err(Error::new(format!(
                    "{} has blocks of {} tokens, but {} of {}",
                    paths[0].display(),
                    parts[0].seq_len(),
                    path.display(),
                    part.seq_len()
                ))
                .with_hint("tokenize both with one --seq-len"));
            }
            firsts.push(len);
            len += part.len();
        }
        let lens: Vec<usize> = parts.iter().map(Part::len).collect();
        let mut data = Self {
            card: merged_card(&paths, &parts)?,
            mixture: weights.map(|weights| Mixture::new(&weights, &lens)),
            fingerprint: None,
            paths,
            parts,
            firsts,
            len,
            vocab_size: None,
        };
        data.fingerprint = data.identity();
        Ok(data)
    }

    /// That of the one part, or one of all of them with their weights.
    fn identity(&self) -> Option<String> {
        if let ([part], None) = (&self.parts[..], &self.mixture) {
            return part.fingerprint().map(str::to_owned);
        }
        let parts: Option<Vec<&str>> = self.parts.iter().map(Part::fingerprint).collect();
        Some(sha256(format!("{:?} {:?}", parts?, self.mixture).as_bytes())[..16].to_owned())
    }

    /// Number of blocks; never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of samples: the blocks, or of a mixture more than any run reads.
    pub fn samples(&self) -> usize {
        if self.mixture.is_some() { ENDLESS } else { self.len }
    }

    /// Whether the parts are mixed by weights. The order of samples is then the dataset's own.
    pub fn is_mixture(&self) -> bool {
        self.mixture.is_some()
    }

    /// Puts the blocks of each part of a mixture into a random order, another one each time that it begins anew.
    pub fn shuffle_parts(&mut self, seed: u64) {
        if let Some(mixture) = &mut self.mixture {
            mixture.seed = Some(seed);
        }
        self.fingerprint = self.identity();
    }

    /// L.
    pub fn seq_len(&self) -> usize {
        self.parts[0].seq_len()
    }

    /// The columns that Elapid reads, of the first part.
    pub fn columns(&self) -> Vec<&'static str> {
        self.parts[0].columns()
    }

    /// What is known of the dataset, where Elapid wrote it.
    pub fn card(&self) -> Option<&Card> {
        self.card.as_ref()
    }

    /// What changes with its content, where whoever wrote it said so.
    pub fn fingerprint(&self) -> Option<&str> {
        self.fingerprint.as_deref()
    }

    /// The folder of its tokenizer, where it has one.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        self.parts.iter().find_map(|part| match part {
            Part::Saved(data) => data.tokenizer(),
            Part::Megatron(_) => None,
        })
    }

    /// Checks that the model has all tokens of the tokenizer, and all tokens and labels: at once where the dataset does
    /// not say so itself, and in any case as samples are read.
    ///
    /// # Errors
    /// Names both numbers; or the row, the position and the id.
    pub fn check_vocab(&mut self, vocab_size: usize) -> Result<(), Error> {
        self.vocab_size = Some(vocab_size);
        for (path, part) in self.paths.iter().zip(&self.parts) {
            match part.card() {
                Some(card) if card.vocab_size > vocab_size => {
                    return Err(Error::new(format!(
                        "the tokenizer of {} ({}) has {} tokens, but the model's vocabulary has {vocab_size}",
                        path.display(),
                        card.tokenizer,
                        card.vocab_size
                    ))
                    .with_hint(
                        "give the model a larger --vocab-size, or tokenize with the model's own tokenizer",
                    ));
                }
                Some(_) => {}
                None => {
                    let sample = |row| part.sample(row, self.vocab_size).map(|_| ());
                    (0..part.len()).into_par_iter().try_for_each(sample)?;
                }
            }
        }
        Ok(())
    }

    /// The part that a sample is from, and its row there.
    fn place(&self, index: usize) -> (&Part, usize) {
        let (part, row) = match &self.mixture {
            Some(mixture) => mixture.place(index as u64),
            None => {
                let part = self.firsts.partition_point(|&first| first <= index) - 1;
                (part, index - self.firsts[part])
            }
        };
        (&self.parts[part], row)
    }

    /// Sample `index`.
    ///
    /// # Errors
    /// A token outside of the vocabulary that [`Self::check_vocab`] was told; a document id below 0.
    ///
    /// # Panics
    /// If `index` is not below [`Self::samples`].
    pub fn sample(&self, index: usize) -> Result<Sample, Error> {
        let (part, row) = self.place(index);
        part.sample(row, self.vocab_size)
    }

    /// Asks the system to read samples into memory, and does not wait for it.
    pub fn prefetch(&self, indices: impl IntoIterator<Item = usize>) {
        for index in indices {
            match self.place(index) {
                (Part::Saved(data), row) => data.prefetch(row),
                (Part::Megatron(data), row) => data.prefetch(row),
            }
        }
    }

    /// Does block `index` go on in the document that ended the block before it? Where the dataset knows no
    /// documents, all of it is one.
    ///
    /// # Errors
    /// A document id below 0.
    ///
    /// # Panics
    /// As [`Self::sample`].
    pub fn continues(&self, index: usize) -> Result<bool, Error> {
        let (part, row) = self.place(index);
        if row == 0 || self.is_mixture() {
            return Ok(false);
        }
        let (before, here) = (part.documents(row - 1)?, part.documents(row)?);
        Ok(before.as_ref().and_then(|ids| ids.last()) == here.as_ref().and_then(|ids| ids.first()))
    }

    /// Whether the blocks know their documents.
    pub fn knows_documents(&self) -> bool {
        self.parts.iter().any(|part| match part {
            Part::Saved(data) => data.knows_documents(),
            Part::Megatron(_) => true,
        })
    }
}

/// What the cards of all parts say together; None where one has none.
fn merged_card(paths: &[PathBuf], parts: &[Part]) -> Result<Option<Card>, Error> {
    let mut cards = paths.iter().zip(parts).filter_map(|(path, part)| part.card().map(|card| (path, card)));
    let Some((first, card)) = cards.next() else { return Ok(None) };
    let mut merged = card.clone();
    let mut count = 1;
    for (path, card) in cards {
        let other = match (&merged.tokenizer_sha256, &card.tokenizer_sha256) {
            (Some(one), Some(other)) => one != other,
            _ => (merged.vocab_size, merged.eos_id) != (card.vocab_size, card.eos_id),
        };
        if other {
            return Err(Error::new(format!(
                "{} and {} have different tokenizers ({} and {})",
                first.display(),
                path.display(),
                merged.tokenizer,
                card.tokenizer
            ))
            .with_hint("tokenize both with one tokenizer"));
        }
        merged.documents += card.documents;
        merged.tokens += card.tokens;
        merged.dropped_tokens += card.dropped_tokens;
        merged.bytes += card.bytes;
        count += 1;
    }
    Ok((count == parts.len()).then_some(merged))
}

/// That a token or a label is not below `limit`.
fn bad_id(path: &Path, row: usize, what: &str, position: usize, id: i64, limit: i64) -> Error {
    Error::new(format!(
        "{}: row {row} has {what} {id} at position {position}, but the vocabulary has {limit} tokens",
        path.display()
    ))
    .with_hint("give the model a larger --vocab-size, or tokenize with the model's own tokenizer")
}

/// Asks the system to read `len` bytes at an address of a mapping. It may refuse; reading then waits for them.
fn advise(map: &Mmap, address: usize, len: usize) {
    #[cfg(unix)]
    if let Some(offset) =
        address.checked_sub(map.as_ptr() as usize).filter(|offset| offset + len <= map.len())
    {
        let _ = map.advise_range(Advice::WillNeed, offset, len);
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `decode`, with () for a panic in it, of which nothing is printed. `arrow-ipc` (60.1) takes the places of buffers
/// from the file without a check and panics where they lie outside of it.
pub(super) fn quietly<T>(decode: impl FnOnce() -> T) -> Result<T, ()> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    // What `decode` had in hand is given up with it: the caller ends with an error.
    let result = panic::catch_unwind(AssertUnwindSafe(decode));
    QUIET.set(false);
    result.map_err(|_| ())
}

#[cfg(test)]
mod tests;
