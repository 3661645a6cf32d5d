//! Documents → one stream of tokens → blocks of equal length.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::{DatasetWriter, Document, Tokenizer};
use crate::Error;

/// Bytes of text a thread that are tokenized at a time; a document longer than that is taken whole.
const BATCH_BYTES: usize = 256 << 10;

/// More threads than any machine has use for; the operating system may break down before it refuses them.
const MAX_THREADS: usize = 1024;

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
/// the number of threads. The document of a token, for a writer that wants it, is a running number from 0, modulo
/// 2³¹. `progress` is told how far it has come.
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
    if threads > MAX_THREADS {
        return Err(Error::new(format!("--num-proc is {threads}")).with_hint("0 takes one thread a core"));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|cause| {
        Error::new(format!("cannot start {threads} threads: {cause}")).with_hint("give fewer with --num-proc")
    })?;
    let mut documents = documents.into_iter();
    let mut counts = Counts::default();
    let mut rest: Vec<u32> = Vec::new();
    // The documents of `rest`.
    let mut numbers: Vec<i32> = Vec::new();
    loop {
        let batch = batch(&mut documents, BATCH_BYTES * pool.current_num_threads())?;
        if batch.is_empty() {
            break;
        }
        let encode = |document: &Document| tokenizer.encode(&document.text);
        let encoded = pool.install(|| batch.par_iter().map(encode).collect::<Result<Vec<_>, _>>())?;
        for (document, ids) in batch.iter().zip(encoded) {
            rest.extend(ids);
            rest.extend(eos);
            numbers.resize(rest.len(), (counts.documents & i32::MAX as u64) as i32);
            counts.documents += 1;
            counts.bytes += document.text.len() as u64;
            counts.input_bytes += document.input_bytes;
            let blocks = rest.chunks_exact(seq_len);
            counts.blocks += blocks.len() as u64;
            let whole = blocks.len() * seq_len;
            for (block, numbers) in blocks.zip(numbers.chunks_exact(seq_len)) {
                writer.push(block, Some(numbers))?;
            }
            rest.drain(..whole);
            numbers.drain(..whole);
        }
        counts.tokens = counts.blocks * seq_len as u64;
        counts.dropped_tokens = rest.len() as u64;
        progress(&counts);
    }
    match (counts.blocks, counts.dropped_tokens) {
        (0, 0) => Err(Error::new("the dataset holds no text").with_hint("give some with --dataset")),
        (0, tokens) => {
            let hint = match tokens {
                1 => "give more text".to_owned(),
                _ => format!("--seq-len {tokens} or less fits; or give more text"),
            };
            Err(Error::new(format!("the text is {tokens} tokens long, less than one block of {seq_len}"))
                .with_hint(hint))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Card, Dataset};

    fn document(text: &str) -> Result<Document, Error> {
        Ok(Document { text: text.to_owned(), input_bytes: text.len() as u64 + 1 })
    }

    /// What [`pack`] counts, and the blocks it wrote.
    fn packed(
        texts: &[&str],
        seq_len: usize,
        append_eos: bool,
        threads: usize,
    ) -> Result<(Counts, Vec<Vec<i32>>), Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let mut writer = DatasetWriter::create(&path, seq_len, true)?;
        let tokenizer = Tokenizer::load("bytes")?;
        let texts = texts.iter().map(|text| document(text));
        let counts = pack(texts, &tokenizer, seq_len, append_eos, threads, &mut writer, |_| ())?;
        assert_eq!(writer.blocks(), counts.blocks);
        writer.finish(&Card {
            tokenizer: "bytes".into(),
            vocab_size: 257,
            eos_id: Some(256),
            seq_len,
            append_eos,
            document_ids: true,
            documents: counts.documents,
            tokens: counts.tokens,
            dropped_tokens: counts.dropped_tokens,
            bytes: counts.bytes,
            source: String::new(),
        })?;
        let data = Dataset::open(&path)?;
        let blocks = (0..data.len()).map(|i| Ok(data.sample(i)?.input_ids[..].to_vec()));
        Ok((counts, blocks.collect::<Result<_, Error>>()?))
    }

    #[test]
    fn documents_are_glued_and_cut() {
        let (counts, blocks) = packed(&["\u{1}\u{2}\u{3}\u{4}\u{5}", "", "\u{6}\u{7}"], 3, false, 1).unwrap();
        assert_eq!(blocks, [[1, 2, 3], [4, 5, 6]]);
        let expected =
            Counts { documents: 3, bytes: 7, input_bytes: 10, blocks: 2, tokens: 6, dropped_tokens: 1 };
        assert_eq!(counts, expected);
    }

    #[test]
    fn the_end_of_text_follows_every_document() {
        let (counts, blocks) = packed(&["\u{1}\u{2}", "", "\u{3}"], 2, true, 1).unwrap();
        assert_eq!(blocks, [[1, 2], [256, 256], [3, 256]]);
        assert_eq!((counts.tokens, counts.dropped_tokens), (6, 0));
    }

    #[test]
    fn blocks_do_not_depend_on_batches_and_threads() {
        // Several batches, one document longer than a batch, and many short ones.
        let long = "é".repeat(BATCH_BYTES);
        let short: Vec<String> = (0..30_000).map(|i| i.to_string()).collect();
        let mut texts: Vec<&str> = short.iter().map(String::as_str).collect();
        texts.insert(7, &long);
        let stream: Vec<i32> = texts.iter().flat_map(|t| t.bytes().map(i32::from).chain([256])).collect();
        for threads in [1, 3] {
            let (counts, blocks) = packed(&texts, 64, true, threads).unwrap();
            assert_eq!(counts.documents, 30_001);
            assert_eq!(counts.tokens + counts.dropped_tokens, stream.len() as u64);
            assert!(blocks.concat() == stream[..counts.tokens as usize], "{threads} threads");
        }
    }

    #[test]
    fn progress_ends_at_the_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = DatasetWriter::create(&dir.path().join("data"), 2, false).unwrap();
        let tokenizer = Tokenizer::load("bytes").unwrap();
        let text = "x".repeat(BATCH_BYTES);
        let mut seen = Vec::new();
        let texts = (0..3).map(|_| document(&text));
        let counts = pack(texts, &tokenizer, 2, false, 1, &mut writer, |c| seen.push(*c)).unwrap();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen.last(), Some(&counts));
    }

    #[test]
    fn too_little_text_is_refused() {
        let empty = packed(&["", ""], 4, false, 1).unwrap_err();
        assert!(empty.to_string().contains("no text"), "{empty}");
        let short = packed(&["abc"], 4, false, 1).unwrap_err();
        assert!(short.to_string().contains("3 tokens long, less than one block of 4"), "{short}");
        assert!(short.hint().unwrap().contains("--seq-len 3"), "{short:?}");
        let shortest = packed(&["a"], 4, false, 1).unwrap_err();
        assert_eq!(shortest.hint(), Some("give more text"));
    }

    #[test]
    fn an_end_of_text_is_needed_to_append_it() {
        let dir = tempfile::tempdir().unwrap();
        let json = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
        std::fs::write(dir.path().join("tokenizer.json"), json).unwrap();
        let tokenizer = Tokenizer::load(dir.path().to_str().unwrap()).unwrap();
        let mut writer = DatasetWriter::create(&dir.path().join("data"), 2, false).unwrap();
        let mut pack = |append_eos| {
            pack([document("a"), document("b")], &tokenizer, 2, append_eos, 1, &mut writer, |_| ())
        };
        let error = pack(true).unwrap_err();
        assert!(error.to_string().contains("no end-of-text token"), "{error}");
        assert!(error.hint().unwrap().contains("--append-eos"), "{error:?}");
        assert_eq!(pack(false).unwrap().blocks, 1);
    }

    #[test]
    fn too_many_threads_are_refused() {
        let error = packed(&["ab"], 2, false, 100_000).unwrap_err();
        assert_eq!(error.to_string(), "--num-proc is 100000");
        assert!(error.hint().is_some());
    }

    #[test]
    fn errors_of_documents_pass_through() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = DatasetWriter::create(&dir.path().join("data"), 2, false).unwrap();
        let tokenizer = Tokenizer::load("bytes").unwrap();
        let texts = [document("abc"), Err(Error::new("a.jsonl:2: broken"))];
        let error = pack(texts, &tokenizer, 2, false, 1, &mut writer, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "a.jsonl:2: broken");
    }
}
