//! Stand-in for the dataset folder: one text file of ids, to compile and test packing with.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Error;

/// Facts about a dataset, in `dataset_card.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Card {
    pub tokenizer: String,
    pub vocab_size: usize,
    pub eos_id: Option<u32>,
    pub seq_len: usize,
    pub append_eos: bool,
    pub documents: u64,
    pub tokens: u64,
    pub dropped_tokens: u64,
    pub bytes: u64,
    pub source: String,
}

/// Writes blocks.
#[derive(Debug)]
pub struct DatasetWriter {
    dir: PathBuf,
    part: PathBuf,
    seq_len: usize,
    ids: Vec<u32>,
    done: bool,
}

#[allow(missing_docs)]
impl DatasetWriter {
    pub fn create(dir: &Path, seq_len: usize) -> Result<Self, Error> {
        if dir.read_dir().is_ok_and(|mut d| d.next().is_some()) {
            return Err(
                Error::new(format!("{} is not empty", dir.display())).with_hint("another --save-path")
            );
        }
        let part = dir.with_extension("part");
        std::fs::create_dir_all(&part).map_err(|e| Error::io("create", &part, &e))?;
        Ok(Self { dir: dir.into(), part, seq_len, ids: Vec::new(), done: false })
    }
    pub fn push(&mut self, ids: &[u32]) -> Result<(), Error> {
        assert_eq!(ids.len(), self.seq_len);
        self.ids.extend(ids);
        Ok(())
    }
    pub fn blocks(&self) -> u64 {
        (self.ids.len() / self.seq_len) as u64
    }
    pub fn folder(&self) -> &Path {
        &self.part
    }
    pub fn finish(mut self, card: &Card) -> Result<(), Error> {
        std::fs::write(self.part.join("ids.json"), serde_json::to_vec(&self.ids).unwrap()).unwrap();
        std::fs::write(self.part.join("dataset_card.json"), serde_json::to_vec(card).unwrap()).unwrap();
        std::fs::rename(&self.part, &self.dir).map_err(|e| Error::io("rename", &self.part, &e))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for DatasetWriter {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_dir_all(&self.part);
        }
    }
}

/// Reads blocks.
#[derive(Debug)]
pub struct Dataset {
    ids: Vec<u32>,
    seq_len: usize,
}

#[allow(missing_docs)]
pub struct Sample {
    pub input_ids: Vec<i32>,
    pub labels: Vec<i32>,
}

#[allow(missing_docs)]
impl Dataset {
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let read = |name| std::fs::read(dir.join(name)).map_err(|e| Error::io("read", dir, &e));
        let card: Card = serde_json::from_slice(&read("dataset_card.json")?).unwrap();
        Ok(Self { ids: serde_json::from_slice(&read("ids.json")?).unwrap(), seq_len: card.seq_len })
    }
    pub fn len(&self) -> usize {
        self.ids.len() / self.seq_len
    }
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }
    pub fn sample(&self, i: usize) -> Result<Sample, Error> {
        let ids: Vec<i32> = self.ids[i * self.seq_len..(i + 1) * self.seq_len].iter().map(|&i| i as i32).collect();
        Ok(Sample { labels: ids.clone(), input_ids: ids })
    }
    pub fn check_vocab(&self, _: usize) -> Result<(), Error> {
        Ok(())
    }
    pub fn card(&self) -> Option<&Card> {
        None
    }
    pub fn tokenizer(&self) -> Option<PathBuf> {
        None
    }
}
