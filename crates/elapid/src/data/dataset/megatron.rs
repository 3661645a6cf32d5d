//! Megatron-LM's indexed datasets: tokens in `NAME.bin`, and in `NAME.idx` where sequences and documents begin.
//!
//! `NAME.idx`, little endian: `MMIDIDX\0\0`, version 1 (u64), type of the tokens (u8), number of sequences n (u64), number of
//! document bounds d (u64), lengths of the sequences (n × i32), their places in bytes (n × i64), for each document its first
//! sequence and at the end n (d × i64).

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{Sample, advise, bad_id};
use crate::Error;
use crate::data::tokenizer::sha256;

const MAGIC: &[u8] = b"MMIDIDX\0\0";
const HEADER: usize = MAGIC.len() + 8 + 1 + 8 + 8;

/// The two files at `path`: `NAME`, `NAME.bin` or `NAME.idx`. None: it is no such pair.
pub(super) fn pair(path: &Path) -> Option<[PathBuf; 2]> {
    let name = match path.extension().and_then(|extension| extension.to_str()) {
        Some("bin" | "idx") => path.with_extension(""),
        _ => path.to_owned(),
    };
    let with = |extension: &str| {
        let mut path = name.clone().into_os_string();
        path.push(extension);
        PathBuf::from(path)
    };
    let pair = [with(".bin"), with(".idx")];
    pair.iter().all(|path| path.is_file()).then_some(pair)
}

/// One stream of tokens, cut into blocks.
pub(super) struct Megatron {
    path: PathBuf,
    tokens: Mmap,
    index: Mmap,
    /// Bytes of a token, and whether it has a sign.
    width: usize,
    signed: bool,
    /// Sequences, and bounds of documents.
    sequences: usize,
    bounds: usize,
    pub(super) len: usize,
    pub(super) seq_len: usize,
    pub(super) fingerprint: String,
}

impl Megatron {
    /// Cuts the tokens of a pair of files into blocks of `seq_len`.
    ///
    /// # Errors
    /// No `seq_len`; the files are damaged, do not belong together, or hold less than a block.
    pub(super) fn open([bin, idx]: [PathBuf; 2], seq_len: Option<usize>) -> Result<Self, Error> {
        let seq_len = seq_len.filter(|&seq_len| seq_len >= 2).ok_or_else(|| {
            Error::new(format!(
                "{} is one stream of tokens, and --seq-len does not say how to cut it",
                bin.display()
            ))
            .with_hint("give --seq-len 2 or more")
        })?;
        let map = |path: &Path| {
            let file = File::open(path).map_err(|cause| Error::io("open", path, &cause))?;
            // SAFETY: the mapping is only read. Another process that cuts the file off while it is mapped would end this
            // one with SIGBUS, as with every mapped file.
            unsafe { Mmap::map(&file) }.map_err(|cause| Error::io("map", path, &cause))
        };
        let damaged = |what: &str| {
            Error::new(format!("{}: {what}", idx.display())).with_hint(
                "it must be the .idx file of Megatron-LM's indexed datasets that belongs to the .bin file",
            )
        };
        let (tokens, index) = (map(&bin)?, map(&idx)?);
        if !index.starts_with(MAGIC) || index.len() < HEADER {
            return Err(damaged("it does not begin as an index"));
        }
        let number = |at: usize| u64::from_le_bytes(index[at..at + 8].try_into().expect("eight bytes"));
        let version = number(MAGIC.len());
        if version != 1 {
            return Err(damaged(&format!("it is of version {version}, not 1")));
        }
        let code = index[MAGIC.len() + 8];
        let (width, signed) = match code {
            1 => (1, false),
            2 => (1, true),
            3 => (2, true),
            4 => (4, true),
            5 => (8, true),
            8 => (2, false),
            _ => return Err(damaged(&format!("its tokens are of type {code}, which is no integer"))),
        };
        let (sequences, bounds) = (number(MAGIC.len() + 9), number(MAGIC.len() + 17));
        let size = u128::from(sequences) * 12 + u128::from(bounds) * 8 + HEADER as u128;
        if size != index.len() as u128 {
            return Err(damaged(&format!("it is {} bytes long instead of {size}", index.len())));
        }
        let fingerprint = sha256(format!("{} {} {seq_len}", sha256(&index), tokens.len()).as_bytes());
        let data = Self {
            path: bin,
            width,
            signed,
            sequences: sequences as usize,
            bounds: bounds as usize,
            len: tokens.len() / width / seq_len,
            seq_len,
            fingerprint: fingerprint[..16].to_owned(),
            tokens,
            index,
        };
        // The blocks are cut from the file as it lies: sequences must follow each other in it.
        let mut end = 0;
        for sequence in 0..data.sequences {
            if data.start(sequence) != Some(end) {
                return Err(damaged(&format!(
                    "sequence {sequence} does not begin where the one before it ends"
                )));
            }
            let at = HEADER + 4 * sequence;
            let length = i32::from_le_bytes(data.index[at..at + 4].try_into().expect("four bytes"));
            end += usize::try_from(length)
                .map_err(|_| damaged(&format!("sequence {sequence} is {length} tokens long")))?;
        }
        if end * width != data.tokens.len() {
            return Err(damaged(&format!(
                "its sequences are {end} tokens of {width} bytes, but {} has {} bytes",
                data.path.display(),
                data.tokens.len()
            )));
        }
        if data.len == 0 {
            return Err(Error::new(format!(
                "{} holds {end} tokens, less than a block of {seq_len}",
                data.path.display()
            ))
            .with_hint("give a shorter --seq-len"));
        }
        Ok(data)
    }

    fn long(&self, at: usize) -> i64 {
        i64::from_le_bytes(self.index[at..at + 8].try_into().expect("eight bytes"))
    }

    /// The token that a sequence begins with; None where that is none.
    fn start(&self, sequence: usize) -> Option<usize> {
        let bytes = usize::try_from(self.long(HEADER + 4 * self.sequences + 8 * sequence)).ok()?;
        bytes.is_multiple_of(self.width).then_some(bytes / self.width)
    }

    /// The first token of a document, or the end of the last.
    fn bound(&self, document: usize) -> usize {
        let sequence = self.long(HEADER + 12 * self.sequences + 8 * document).max(0) as usize;
        if sequence < self.sequences {
            self.start(sequence).unwrap_or(0)
        } else {
            self.tokens.len() / self.width
        }
    }

    pub(super) fn sample(&self, row: usize, vocab_size: Option<usize>) -> Result<Sample, Error> {
        let limit = vocab_size.map_or(i64::from(i32::MAX), |v| v as i64);
        let block = self.seq_len * self.width;
        let bytes = &self.tokens[row * block..(row + 1) * block];
        let id = |(position, bytes): (usize, &[u8])| {
            let negative = self.signed && bytes[self.width - 1] >= 0x80;
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..self.width].copy_from_slice(bytes);
            let id = i64::from_le_bytes(wide);
            if (0..limit).contains(&id) {
                Ok(id as i32)
            } else {
                Err(bad_id(&self.path, row, "token", position, id, limit))
            }
        };
        let input_ids = bytes.chunks_exact(self.width).enumerate().map(id).collect::<Result<Vec<_>, _>>()?;
        Ok(Sample { labels: input_ids.clone(), input_ids, documents: Some(self.documents(row)) })
    }

    /// The documents of a block, modulo 2³¹.
    pub(super) fn documents(&self, row: usize) -> Vec<i32> {
        let (first, end) = (row * self.seq_len, (row + 1) * self.seq_len);
        // The last document that begins at `first` or before; empty ones have no token.
        let (mut low, mut high) = (0, self.bounds);
        while low < high {
            let middle = low.midpoint(high);
            if self.bound(middle) <= first { low = middle + 1 } else { high = middle }
        }
        let mut documents = Vec::with_capacity(self.seq_len);
        let mut document = low;
        while documents.len() < self.seq_len {
            let until = if document < self.bounds { self.bound(document).clamp(first, end) } else { end };
            documents.resize(until - first, (document as u64 & i32::MAX as u64) as i32);
            document += 1;
        }
        documents
    }

    pub(super) fn prefetch(&self, row: usize) {
        let block = self.seq_len * self.width;
        advise(&self.tokens, self.tokens.as_ptr() as usize + row * block, block);
    }
}
