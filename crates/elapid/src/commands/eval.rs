//! `elapid eval`.

use std::path::PathBuf;

use serde_json::json;

use super::print_line;
use crate::Error;
use crate::config::run::Dtype;
use crate::data::Dataset;
use crate::model::Mamba2ForCausalLM;
use crate::train::{cpu, evaluate};

/// Flags of `elapid eval`.
#[derive(clap::Args)]
pub(super) struct EvalArgs {
    /// Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Dataset folder
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Sequences at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Go on in the state of the block before, as `train --carry-state` does
    #[arg(long)]
    carry_state: bool,
    /// Compute dtype
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Dtype,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EvalArgs) -> Result<(), Error> {
    let mut data = Dataset::open(&args.data_dir)?;
    let backend = cpu(args.threads)?;
    let model = Mamba2ForCausalLM::from_pretrained(&backend, &args.model, args.dtype.compute())?;
    data.check_vocab(model.config().vocab_size)?;
    let result = evaluate(&backend, &model, &data, args.batch as usize, args.carry_state)?;
    if args.json {
        let object = json!({ "loss": result.loss, "perplexity": result.loss.exp(), "tokens": result.tokens });
        return print_line(&object.to_string());
    }
    print_line(&format!(
        "loss {:.4}  perplexity {:.3}  over {} tokens",
        result.loss,
        result.loss.exp(),
        result.tokens
    ))
}
