//! `elapid tokenize`.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::print_line;
use crate::Error;
use crate::data::{Card, IdType, MAX_SHARD_SIZE, TokenizeOptions, tokenize};

/// Flags of `elapid tokenize`.
#[derive(clap::Args)]
pub(super) struct TokenizeArgs {
    /// File, folder or glob of text, .jsonl, .json, .csv (.gz, .zst), .parquet, .arrow; a dataset folder of Python's; or a
    /// dataset's name on the Hugging Face Hub
    #[arg(long, value_name = "PATH")]
    dataset: PathBuf,
    /// Column, or field of a JSON object, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// Split of a dataset that has several [default: train]
    #[arg(long, value_name = "NAME")]
    split: Option<String>,
    /// Configuration of a dataset on the Hub that has several
    #[arg(long, value_name = "NAME")]
    dataset_config: Option<String>,
    /// `bytes`, the path of a tokenizer.json or of the folder that holds one, or a model's name on the Hub
    #[arg(long, value_name = "SPEC")]
    tokenizer: String,
    /// Tokens a block
    #[arg(long, value_name = "L")]
    seq_len: usize,
    /// The dataset folder to write
    #[arg(long, value_name = "DIR")]
    save_path: PathBuf,
    /// Put the tokenizer's end of text after each document
    #[arg(long)]
    append_eos: bool,
    /// Write down which document a token belongs to: training and evaluation then keep documents apart
    #[arg(long)]
    document_ids: bool,
    /// Put about this fraction of the documents into a split `validation` of its own
    #[arg(long, value_name = "F")]
    val_fraction: Option<f64>,
    /// Read files, and documents within reach of a buffer, in a random order
    #[arg(long, value_name = "SEED")]
    shuffle_seed: Option<u64>,
    /// Bytes of a shard at most, such as 500MB or 1GiB
    #[arg(long, value_name = "SIZE", default_value_t = MAX_SHARD_SIZE, value_parser = size)]
    max_shard_size: u64,
    /// Type of token ids on disk; int32 and int64 for Python code that takes nothing else
    #[arg(long, value_enum, default_value = "smallest")]
    id_type: IdType,
    /// Read the first 8192 documents only
    #[arg(long)]
    dryrun: bool,
    /// Threads that tokenize; 0: one a core
    #[arg(long, value_name = "N", default_value_t = 0)]
    num_proc: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A number of bytes, perhaps with a unit.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        other => return Err(format!("there is no unit {other:?}; give one of KB, MB, GB, KiB, MiB, GiB")),
    };
    let bytes = text[..digits].parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.filter(|&bytes| bytes > 0).ok_or_else(|| "it must be a number of bytes such as 500MB".into())
}

pub(super) fn run(args: TokenizeArgs) -> Result<(), Error> {
    let json = args.json;
    let options = TokenizeOptions {
        dataset: args.dataset,
        text_column: args.text_column,
        split: args.split,
        dataset_config: args.dataset_config,
        tokenizer: args.tokenizer,
        seq_len: args.seq_len,
        save_path: args.save_path,
        append_eos: args.append_eos,
        document_ids: args.document_ids,
        val_fraction: args.val_fraction,
        shuffle_seed: args.shuffle_seed,
        max_shard_size: args.max_shard_size,
        id_type: args.id_type,
        dryrun: args.dryrun,
        threads: args.num_proc,
    };
    let tokenized = tokenize(&options)?;
    let (train, validation) = (&tokenized.train, tokenized.validation.as_ref());
    if json {
        let mut object = counts(train);
        object["seq_len"] = json!(train.seq_len);
        object["vocab_size"] = json!(train.vocab_size);
        object["save_path"] = json!(options.save_path);
        if let Some(card) = validation {
            object["validation"] = counts(card);
        }
        return print_line(&object.to_string());
    }
    for (name, card) in [("", Some(train)), ("validation: ", validation)] {
        let Some(card) = card else { continue };
        print_line(&format!(
            "{name}{} documents, {} bytes → {} blocks of {} tokens; the last {} tokens fill no block and are left out",
            card.documents,
            card.bytes,
            blocks(card),
            card.seq_len,
            card.dropped_tokens
        ))?;
    }
    print_line(&format!("dataset in {}", options.save_path.display()))
}

fn blocks(card: &Card) -> u64 {
    card.tokens / card.seq_len as u64
}

fn counts(card: &Card) -> Value {
    json!({
        "documents": card.documents,
        "tokens": card.tokens,
        "blocks": blocks(card),
        "bytes": card.bytes,
        "dropped_tokens": card.dropped_tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        assert_eq!((size("7"), size("500MB"), size("2 GiB")), (Ok(7), Ok(500_000_000), Ok(2 << 30)));
        for bad in ["", "MB", "0", "1.5GB", "3 bananas", "99999999999GB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
