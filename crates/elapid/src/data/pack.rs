//! Documents → one stream of tokens → blocks of equal length.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::{DatasetWriter, Document, Tokenizer};
use crate::Error;

/// Bytes of text a thread that are tokenized at a time; a document longer than that is taken whole.
const BATCH_BYTES: usize = 256 << 10;

/// What has been packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Documents.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Bytes of input that they were read from.
    pub input_bytes: u64,
    /// Blocks.
    pub blocks: u64,
    /// Tokens in blocks.
    pub tokens: u64,
    /// Tokens after the last block, too few for another.
    pub dropped_tokens: u64,
}

/// Tokenizes `documents` on `threads` threads (0: one a core) and packs them, end to end, into blocks of `seq_len`
/// ids, with the tokenizer's end of text after each document where `append_eos` says so. The blocks do not depend on
/// the number of threads. `progress` is told how far it has come.
///
/// # Errors
/// Those of `documents`, `tokenizer` and `writer`; an end of text that the tokenizer lacks; fewer tokens than a block.
pub fn pack(
    documents: impl IntoIterator<Item = Result<Document, Error>>,
    tokenizer: &Tokenizer,
    seq_len: usize,
    append_eos: bool,
    threads: usize,
    writer: &mut DatasetWriter,
    mut progress: impl FnMut(&Counts),
) -> Result<Counts, Error> {
    let eos = match tokenizer.eos_id() {
        Some(id) => append_eos.then_some(id),
        None if append_eos => {
            return Err(Error::new("the tokenizer has no end-of-text token to append")
                .with_hint("leave --append-eos out, or name its eos_token in tokenizer_config.json"));
        }
        None => None,
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|cause| {
        Error::new(format!("cannot start {threads} threads: {cause}")).with_hint("give fewer with --num-proc")
    })?;
    let mut documents = documents.into_iter();
    let mut counts = Counts::default();
    let mut rest: Vec<u32> = Vec::new();
    loop {
        let batch = batch(&mut documents, BATCH_BYTES * pool.current_num_threads())?;
        if batch.is_empty() {
            break;
        }
        let encode = |document: &Document| tokenizer.encode(&document.text);
        let encoded = pool.install(|| batch.par_iter().map(encode).collect::<Result<Vec<_>, _>>())?;
        for (document, ids) in batch.iter().zip(encoded) {
            counts.documents += 1;
            counts.bytes += document.text.len() as u64;
            counts.input_bytes += document.input_bytes;
            rest.extend(ids);
            rest.extend(eos);
            let blocks = rest.chunks_exact(seq_len);
            counts.blocks += blocks.len() as u64;
            let whole = blocks.len() * seq_len;
            for block in blocks {
                writer.push(block)?;
            }
            rest.drain(..whole);
        }
        counts.tokens = counts.blocks * seq_len as u64;
        counts.dropped_tokens = rest.len() as u64;
        progress(&counts);
    }
    match (counts.blocks, counts.dropped_tokens) {
        (0, 0) => Err(Error::new("the dataset holds no text").with_hint("give some with --dataset")),
        (0, tokens) => {
            Err(Error::new(format!("the text is {tokens} tokens long, less than one block of {seq_len}"))
                .with_hint(format!("--seq-len {tokens} or less fits; or give more text")))
        }
        _ => Ok(counts),
    }
}

/// The next documents, about `bytes` of text.
fn batch(
    documents: &mut impl Iterator<Item = Result<Document, Error>>,
    bytes: usize,
) -> Result<Vec<Document>, Error> {
    let (mut batch, mut size) = (Vec::new(), 0);
    while size < bytes
        && let Some(document) = documents.next().transpose()?
    {
        // Empty documents take memory too.
        size += document.text.len() + size_of::<Document>();
        batch.push(document);
    }
    Ok(batch)
}
