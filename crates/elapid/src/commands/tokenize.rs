//! `elapid tokenize`.

use std::path::PathBuf;

use serde_json::json;

use super::print_line;
use crate::Error;
use crate::data::{TokenizeOptions, tokenize};

/// Flags of `elapid tokenize`.
#[derive(clap::Args)]
pub(super) struct TokenizeArgs {
    /// Text file, .jsonl file (one document a line), or folder of them
    #[arg(long, value_name = "PATH")]
    dataset: PathBuf,
    /// Field of a .jsonl line that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// `bytes`, or the path of a tokenizer.json or of the folder that holds one
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
    /// Worker threads; 0: one a core
    #[arg(long, value_name = "N", default_value_t = 0)]
    num_proc: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: TokenizeArgs) -> Result<(), Error> {
    let json = args.json;
    let options = TokenizeOptions {
        dataset: args.dataset,
        text_column: args.text_column,
        tokenizer: args.tokenizer,
        seq_len: args.seq_len,
        save_path: args.save_path,
        append_eos: args.append_eos,
        document_ids: args.document_ids,
        threads: args.num_proc,
    };
    let card = tokenize(&options)?;
    let blocks = card.tokens / card.seq_len as u64;
    if json {
        let object = json!({
            "documents": card.documents,
            "tokens": card.tokens,
            "blocks": blocks,
            "bytes": card.bytes,
            "dropped_tokens": card.dropped_tokens,
            "seq_len": card.seq_len,
            "vocab_size": card.vocab_size,
            "save_path": options.save_path,
        });
        return print_line(&object.to_string());
    }
    print_line(&format!(
        "{} documents, {} bytes → {} blocks of {} tokens; the last {} tokens fill no block and are left out",
        card.documents, card.bytes, blocks, card.seq_len, card.dropped_tokens
    ))?;
    print_line(&format!("dataset in {}", options.save_path.display()))
}
