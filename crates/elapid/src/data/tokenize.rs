//! Text → a dataset folder of token blocks, its tokenizer with it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::aside::{Aside, write_json};
use super::dataset::{DICT, TOKENIZER};
use super::pack::{Counts, Packer, Place};
use super::progress::Progress;
use super::sampler::Permutation;
use super::sources::{Part, Source, SourceOptions};
use super::units::{Choice, Shuffled, Unit, Units};
use super::writer::{IdType, MAX_SHARD_SIZE, Rows, ShardWriter, Shards};
use super::{Card, Tokenizer, pipeline};
use crate::Error;
use crate::config::run::check_threads;
use crate::error::say;

/// Documents that `--dryrun` reads.
const DRYRUN: u64 = 8192;

/// Changes where the same options would give other bytes than before.
const VERSION: u32 = 1;

/// What [`tokenize`] reads and writes.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// As [`Source::open`] takes it.
    pub dataset: PathBuf,
    /// Column, or field of a JSON object, that holds the text.
    pub text_column: String,
    /// Which split of a dataset that has several; None: `train`.
    pub split: Option<String>,
    /// Which configuration of a dataset on the Hub that has several.
    pub dataset_config: Option<String>,
    /// As [`Tokenizer::load`] takes it.
    pub tokenizer: String,
    /// Tokens a block, L; at least 2.
    pub seq_len: usize,
    /// The dataset folder, not there yet or empty.
    pub save_path: PathBuf,
    /// Put the end of text after each document.
    pub append_eos: bool,
    /// Write the column `document_ids`.
    pub document_ids: bool,
    /// Put about this fraction of the documents into a split `validation` of its own.
    pub val_fraction: Option<f64>,
    /// Read files and documents in a random order.
    pub shuffle_seed: Option<u64>,
    /// Bytes of a shard at most.
    pub max_shard_size: u64,
    /// What ids are written as.
    pub id_type: IdType,
    /// Read the first 8192 documents only.
    pub dryrun: bool,
    /// Threads that tokenize; 0: one a core.
    pub threads: usize,
}

impl Default for TokenizeOptions {
    /// Field `text`, bytes, blocks of 2048; paths are empty.
    fn default() -> Self {
        Self {
            dataset: PathBuf::new(),
            text_column: "text".into(),
            split: None,
            dataset_config: None,
            tokenizer: "bytes".into(),
            seq_len: 2048,
            save_path: PathBuf::new(),
            append_eos: false,
            document_ids: false,
            val_fraction: None,
            shuffle_seed: None,
            max_shard_size: MAX_SHARD_SIZE,
            id_type: IdType::Smallest,
            dryrun: false,
            threads: 0,
        }
    }
}

/// What [`tokenize`] wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokenized {
    /// The dataset, or its split `train`.
    pub train: Card,
    /// Its split `validation`, where one was asked for.
    pub validation: Option<Card>,
}

/// How far a split has come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Split {
    shards: Shards,
    place: Place,
    /// Where all of it is on disk: counts, and the tokens after the last block.
    ended: Option<(Counts, u64)>,
}

/// Tokenizes and packs text into a dataset folder, with the tokenizer in its subfolder `tokenizer`; with a validation
/// split the folder is a `DatasetDict` of two. Progress goes to stderr. Memory is bounded, whatever the size of the
/// text. What was interrupted goes on after the last shard that was finished, and comes to the same bytes.
///
/// # Errors
/// Those of [`Source::open`], of reading it, and of [`Tokenizer::load`]; a block of less than 2 tokens, an end of text that
/// the tokenizer lacks, less text than a block; a full disk. Nothing is left behind, except finished shards in the hidden
/// folder `.NAME.partial`.
pub fn tokenize(options: &TokenizeOptions) -> Result<Tokenized, Error> {
    tokenize_noting(options, |_| ())
}

/// [`tokenize`]; `noted` is told of the hidden folder each time that more of the work is safe.
fn tokenize_noting(options: &TokenizeOptions, mut noted: impl FnMut(&Path)) -> Result<Tokenized, Error> {
    let tokenizer = Tokenizer::load(&options.tokenizer)?;
    let eos = check(options, &tokenizer)?;
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let source_options = SourceOptions {
        text_column: options.text_column.clone(),
        split: options.split.clone(),
        config: options.dataset_config.clone(),
    };
    let mut source = Source::open(&options.dataset, &source_options)?;
    let ids = options.id_type.resolve(tokenizer.vocab_size())?;
    let plan = plan(options, &source, &tokenizer, ids);
    if let Some(seed) = options.shuffle_seed {
        let order = Permutation::new(source.files(), seed, 0);
        source.reorder(|place| order.at(place));
    }
    let rows = Rows::new(options.seq_len, ids, options.document_ids, options.max_shard_size);
    let (mut aside, begun) = Aside::open::<Vec<Split>>(&options.save_path, Some(&plan))?;
    let folder = aside.folder();
    let seed = options.shuffle_seed.unwrap_or(0);
    let splits = match options.val_fraction {
        None => vec![("train", folder.clone(), Choice::All)],
        Some(fraction) => vec![
            ("train", folder.join("train"), Choice::Training(fraction, seed)),
            ("validation", folder.join("validation"), Choice::Validation(fraction, seed)),
        ],
    };
    let resumed = begun.is_some();
    let mut progress = begun.unwrap_or_else(|| vec![Split::default(); splits.len()]);
    if resumed {
        let shards: u64 = progress.iter().map(|split| split.shards.rows).sum();
        say(format_args!("going on after {shards} blocks in {}", folder.display()));
    }
    let work = Work { options, tokenizer: &tokenizer, eos, threads, source: &source, rows };
    let mut cards = Vec::new();
    for (i, (name, dir, choice)) in splits.iter().enumerate() {
        let mut out = ShardWriter::open(dir, rows, progress[i].shards.clone())?;
        let ended = match progress[i].ended {
            Some(ended) => ended,
            None => {
                let ended = work
                    .split(*choice, &mut out, progress[i].place, |out, place| {
                        progress[i].shards = out.shards().clone();
                        progress[i].place = place;
                        aside.note(&progress)?;
                        noted(aside.path());
                        Ok(())
                    })
                    .map_err(|error| if splits.len() > 1 { error.at(name) } else { error })?;
                progress[i].shards = out.end()?.clone();
                progress[i].ended = Some(ended);
                ended
            }
        };
        if splits.len() > 1 {
            aside.note(&progress)?;
            noted(aside.path());
        }
        cards.push(work.card(name, &out, ended));
        out.complete(name, &cards[i])?;
        tokenizer.save(&dir.join(TOKENIZER))?;
    }
    if splits.len() > 1 {
        let names: Vec<&str> = splits.iter().map(|(name, ..)| *name).collect();
        write_json(&folder.join(DICT), &json!({ "splits": names }))?;
    }
    aside.place()?;
    let mut cards = cards.into_iter();
    let train = cards.next().expect("there is always one split");
    Ok(Tokenized { train, validation: cards.next() })
}

/// The end of text to append, where all options make sense.
fn check(options: &TokenizeOptions, tokenizer: &Tokenizer) -> Result<Option<u32>, Error> {
    if options.seq_len < 2 {
        return Err(Error::new(format!("--seq-len is {}", options.seq_len))
            .with_hint("at least 2: what a model learns is the next token of the same block"));
    }
    check_threads("--num-proc", options.threads.max(1))?;
    if let Some(fraction) = options.val_fraction.filter(|fraction| !(*fraction > 0.0 && *fraction < 1.0)) {
        return Err(Error::new(format!("--val-fraction is {fraction}"))
            .with_hint("it must lie between 0 and 1, such as 0.01"));
    }
    match tokenizer.eos_id() {
        None if options.append_eos => Err(Error::new("the tokenizer has no end-of-text token to append")
            .with_hint("leave --append-eos out, or name its eos_token in tokenizer_config.json")),
        eos => Ok(eos.filter(|_| options.append_eos)),
    }
}

/// All that decides what will be written.
fn plan(options: &TokenizeOptions, source: &Source, tokenizer: &Tokenizer, ids: IdType) -> Value {
    let files = super::tokenizer::sha256(source.identity().to_string().as_bytes());
    json!({
        "version": VERSION,
        "dataset": options.dataset,
        "files": files,
        "text_column": options.text_column,
        "split": options.split,
        "dataset_config": options.dataset_config,
        "tokenizer": tokenizer.hash(),
        "eos": tokenizer.eos_id(),
        "seq_len": options.seq_len,
        "append_eos": options.append_eos,
        "document_ids": options.document_ids,
        "val_fraction": options.val_fraction,
        "shuffle_seed": options.shuffle_seed,
        "max_shard_size": options.max_shard_size,
        "id_type": ids,
        "dryrun": options.dryrun,
    })
}

struct Work<'a> {
    options: &'a TokenizeOptions,
    tokenizer: &'a Tokenizer,
    eos: Option<u32>,
    threads: usize,
    source: &'a Source,
    rows: Rows,
}

impl Work<'_> {
    /// Tokenizes the documents of a split from a place on; gives what it counted, and the tokens after the last block.
    fn split(
        &self,
        choice: Choice,
        out: &mut ShardWriter,
        from: Place,
        mut note: impl FnMut(&ShardWriter, Place) -> Result<(), Error>,
    ) -> Result<(Counts, u64), Error> {
        let limit = if self.options.dryrun { DRYRUN } else { u64::MAX };
        let mut progress = Progress::new(self.source.input_bytes(), from.counts.input_bytes);
        let mut packer = Packer::new(self.rows.seq_len, out, from);
        // What is shuffled has no short way to its middle.
        let (file, first) = match self.options.shuffle_seed {
            None => (from.unit.file, from.unit.first),
            Some(_) => (0, 0),
        };
        let mut documents = self.source.documents(file);
        let parts: Box<dyn Iterator<Item = Result<Part, Error>> + Send + '_> = match self.options.shuffle_seed
        {
            None => Box::new(&mut documents),
            Some(seed) => Box::new(Shuffled::new(&mut documents, seed)),
        };
        let open = |unit: &Result<Unit, Error>| !unit.as_ref().is_ok_and(|unit| from.is_after(&unit.about));
        let units = Units::new(parts, self.tokenizer, choice, first, limit).filter(open);
        let result = pipeline::run(units, self.tokenizer, self.eos, self.threads, |encoded| {
            packer.add(&encoded, &mut note)?;
            progress.show(packer.counts(), packer.tokens() + packer.rest());
            Ok(())
        });
        progress.finish();
        let skipped = documents.skipped();
        if skipped > 0 {
            say(format_args!("files passed over because they are not UTF-8 text: {skipped}"));
        }
        result?;
        let (blocks, rest) = (packer.tokens() / self.rows.seq_len as u64, packer.rest());
        match (blocks, rest) {
            (0, 0) => Err(Error::new("the dataset holds no text").with_hint("give some with --dataset")),
            (0, tokens) => {
                let hint = match tokens {
                    1 => "give more text".to_owned(),
                    _ => format!("--seq-len {tokens} or less fits; or give more text"),
                };
                Err(Error::new(format!(
                    "the text is {tokens} tokens long, less than one block of {}",
                    self.rows.seq_len
                ))
                .with_hint(hint))
            }
            _ => Ok((packer.counts(), rest)),
        }
    }

    fn card(&self, split: &str, out: &ShardWriter, (counts, rest): (Counts, u64)) -> Card {
        let options = self.options;
        Card {
            tokenizer: options.tokenizer.clone(),
            tokenizer_sha256: Some(self.tokenizer.hash()),
            vocab_size: self.tokenizer.vocab_size(),
            eos_id: self.tokenizer.eos_id(),
            seq_len: options.seq_len,
            append_eos: options.append_eos,
            document_ids: options.document_ids,
            documents: counts.documents,
            tokens: out.shards().rows * options.seq_len as u64,
            dropped_tokens: rest,
            bytes: counts.bytes,
            source: options.dataset.display().to_string(),
            text_column: Some(options.text_column.clone()),
            source_split: options.split.clone(),
            source_config: options.dataset_config.clone(),
            split: Some(split.to_owned()),
            val_fraction: options.val_fraction,
            shuffle_seed: options.shuffle_seed,
            dryrun: options.dryrun,
        }
    }
}

#[cfg(test)]
mod tests;
