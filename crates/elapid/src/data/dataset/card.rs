//! `dataset_card.json`: what Elapid knows of a dataset that it wrote.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CARD;
use crate::Error;

/// Facts about a dataset, in `dataset_card.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// What `--tokenizer` said.
    pub tokenizer: String,
    /// SHA-256 of its `tokenizer.json`.
    #[serde(default)]
    pub tokenizer_sha256: Option<String>,
    /// Ids are below this.
    pub vocab_size: usize,
    /// End of text.
    pub eos_id: Option<u32>,
    /// L.
    pub seq_len: usize,
    /// Whether every document ends with `eos_id`.
    pub append_eos: bool,
    /// Whether there is a column `document_ids`.
    #[serde(default)]
    pub document_ids: bool,
    /// Documents read.
    pub documents: u64,
    /// Tokens in blocks.
    pub tokens: u64,
    /// Tokens after the last whole block.
    pub dropped_tokens: u64,
    /// UTF-8 bytes of the documents.
    pub bytes: u64,
    /// What `--dataset` said.
    pub source: String,
    /// What `--text-column` said.
    #[serde(default)]
    pub text_column: Option<String>,
    /// What `--split` said.
    #[serde(default)]
    pub source_split: Option<String>,
    /// What `--dataset-config` said.
    #[serde(default)]
    pub source_config: Option<String>,
    /// Which split this is.
    #[serde(default)]
    pub split: Option<String>,
    /// What `--val-fraction` said.
    #[serde(default)]
    pub val_fraction: Option<f64>,
    /// What `--shuffle-seed` said.
    #[serde(default)]
    pub shuffle_seed: Option<u64>,
    /// Whether only the first documents were read.
    #[serde(default)]
    pub dryrun: bool,
}

impl Card {
    /// Tokens that a byte of the text became: (tokens in blocks + dropped ones) / bytes. All of the text counts, since
    /// `bytes` does; ends of text are tokens without bytes, so what a model spends on them is charged to the text.
    pub fn tokens_per_byte(&self) -> Option<f64> {
        (self.bytes > 0).then(|| (self.tokens + self.dropped_tokens) as f64 / self.bytes as f64)
    }
}

pub(super) fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))
}

pub(super) fn read_card(dir: &Path) -> Result<Option<Card>, Error> {
    let path = dir.join(CARD);
    if !path.exists() {
        return Ok(None);
    }
    serde_json::from_str(&read(&path)?).map(Some).map_err(|cause| {
        Error::new(format!("{}: {cause}", path.display()))
            .with_hint("without that file the dataset is read all the same")
    })
}
