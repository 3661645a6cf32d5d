//! From text to batches: what the tokenizer can do, what the pipeline around it can, and what reading gives to training.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use elapid_tensor::Checkpointing;
use rand::distr::Distribution;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::{Setup, train};
use crate::Error;
use crate::data::{
    Dataset, Order, Sampler, Source, SourceOptions, TokenizeOptions, Tokenizer, count_tokens, tokenize,
};
use crate::error::say;
use crate::model::Layout;
use crate::train::Batch;

/// Where the text comes from and what it is made of.
#[derive(Clone, Debug)]
pub struct Text {
    /// As [`Source::open`] takes it; None: made up.
    pub dataset: Option<PathBuf>,
    /// Column, or field of a JSON object, that holds the text.
    pub text_column: String,
    /// As [`Tokenizer::load`] takes it.
    pub tokenizer: String,
    /// Bytes of text to take; a dataset that holds less is taken whole.
    pub bytes: u64,
}

/// Tokenizes text in memory, then from and to a folder for temporary files, with the tokenizer and with bytes in its
/// place; reads the dataset that comes of it as training does; and trains a few steps: the object that
/// `elapid bench data --json` prints.
///
/// # Errors
/// Those of reading and of [`tokenize`]; the model needs more memory than there is, or an op does not compute what it
/// should.
pub fn data(setup: &Setup, text: &Text) -> Result<Value, Error> {
    let tokenizer = Tokenizer::load(&text.tokenizer)?;
    let threads = match setup.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let texts = match &text.dataset {
        Some(path) => read(path, text)?,
        None => made_up(text.bytes),
    };
    let bytes: u64 = texts.iter().map(|text| text.len() as u64).sum();
    let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
    let folder = tempfile::tempdir().map_err(|cause| Error::io("create", &std::env::temp_dir(), &cause))?;
    let lines = folder.path().join("text.jsonl");
    write(&lines, &texts)?;

    say(format_args!("tokenizing {} MB in memory", bytes / 1_000_000));
    let start = Instant::now();
    let tokens = count_tokens(&texts, &tokenizer, threads)?;
    let alone = rate(start.elapsed().as_secs_f64());
    let documents = texts.len();
    drop(texts);

    let whole = |spec: &str, name: &str| -> Result<(f64, PathBuf), Error> {
        say(format_args!("tokenizing to disk with {spec}"));
        let path = folder.path().join(name);
        let start = Instant::now();
        tokenize(&TokenizeOptions {
            dataset: lines.clone(),
            tokenizer: spec.to_owned(),
            seq_len: setup.seq_len,
            save_path: path.clone(),
            threads,
            ..TokenizeOptions::default()
        })?;
        Ok((rate(start.elapsed().as_secs_f64()), path))
    };
    let (pipeline, _) = whole("bytes", "bytes")?;
    let (end_to_end, path) = whole(&text.tokenizer, "tokens")?;

    let dataset = Dataset::open(&path)?;
    let in_order = load(setup, &dataset, Order::Dataset)?;
    let shuffled = load(setup, &dataset, Order::Shuffled(1))?;
    say(format_args!("training {} on random tokens", setup.model));
    let trained = train(setup, 2, Checkpointing::None, None)?["tokens_per_s"].as_f64().unwrap_or(f64::NAN);
    Ok(json!({
        "bench": "data",
        "dataset": text.dataset,
        "tokenizer": text.tokenizer,
        "threads": threads,
        "text_bytes": bytes,
        "documents": documents,
        "tokens": tokens,
        "tokenizer_mb_per_s": alone,
        "pipeline_mb_per_s": pipeline,
        "end_to_end_mb_per_s": end_to_end,
        "model": setup.model,
        "parameters": Layout::new(&setup.config).parameter_count(),
        "batch": setup.batch,
        "seq_len": setup.seq_len,
        "dtype": setup.dtype,
        "loader_tokens_per_s": in_order,
        "loader_shuffled_tokens_per_s": shuffled,
        "train_tokens_per_s": trained,
        "loader_times_training": in_order.min(shuffled) / trained,
    }))
}

/// Documents of a dataset, as many as it takes.
fn read(path: &Path, text: &Text) -> Result<Vec<String>, Error> {
    let options = SourceOptions { text_column: text.text_column.clone(), ..SourceOptions::default() };
    let source = Source::open(path, &options)?;
    let (mut texts, mut size, mut whole) = (Vec::new(), 0, true);
    for part in source.documents(0) {
        let part = part?;
        size += part.text.len() as u64;
        if whole {
            texts.push(part.text);
        } else {
            texts.last_mut().unwrap_or(&mut String::new()).push_str(&part.text);
        }
        whole = part.last;
        if size >= text.bytes {
            break;
        }
    }
    Ok(texts)
}

/// Documents of words with about Zipf's frequencies: of 60,000, a rank that is uniform in its logarithm.
fn made_up(bytes: u64) -> Vec<String> {
    const WORDS: f64 = 60_000.0;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let words: Vec<String> = (0..WORDS as usize)
        .map(|_| {
            (0..rng.random_range(2..12))
                .map(|_| char::from(b'a' + rng.random_range(0..26u8).min(rng.random_range(0..26))))
                .collect()
        })
        .collect();
    let length = rand_distr::LogNormal::new(5.5, 1.0).expect("it has a mean and a deviation");
    let (mut texts, mut size) = (Vec::new(), 0);
    while size < bytes {
        let mut text = String::new();
        for i in 0..length.sample(&mut rng) as usize + 1 {
            text += if i == 0 {
                ""
            } else if i % 13 == 0 {
                ". "
            } else {
                " "
            };
            text += &words[(WORDS.powf(rng.random()) as usize).min(words.len()) - 1];
        }
        size += text.len() as u64;
        texts.push(text);
    }
    texts
}

fn write(path: &Path, texts: &[String]) -> Result<(), Error> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        for text in texts {
            writeln!(file, "{}", json!({ "text": text }))?;
        }
        file.flush()
    };
    write().map_err(|cause| Error::io("write", path, &cause))
}

/// Tokens a second that reading gives: all of the dataset, batch by batch, again and again for at least a while.
fn load(setup: &Setup, data: &Dataset, order: Order) -> Result<f64, Error> {
    const SECONDS: f64 = 0.3;
    let sampler =
        Sampler { len: data.samples(), batch: setup.batch, dp: 1, rank: 0, accum: 1, order, from: (0, 0) };
    let steps = data.samples().div_ceil(setup.batch) as u64;
    let (start, mut step) = (Instant::now(), 0);
    while step < steps || start.elapsed().as_secs_f64() < SECONDS {
        data.prefetch(sampler.indices(step + 1, 0));
        std::hint::black_box(Batch::read(data, &sampler.places(step, 0))?);
        step += 1;
    }
    Ok((step * (setup.batch * setup.seq_len) as u64) as f64 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_text_has_frequent_and_rare_words() {
        let texts = made_up(1_000_000);
        assert!(texts.iter().map(String::len).sum::<usize>() >= 1_000_000);
        let mut counts = std::collections::HashMap::new();
        for word in texts.iter().flat_map(|text| text.split_whitespace()) {
            *counts.entry(word).or_insert(0) += 1;
        }
        let most = counts.values().max().unwrap();
        assert!(counts.len() > 10_000 && *most > 1000, "{} {most}", counts.len());
    }
}
