//! `elapid eval`.

use std::path::PathBuf;

use serde_json::json;

use super::print_line;
use crate::Error;
use crate::config::run::{Device, DeviceArgs, Dtype};
use crate::data::Dataset;
use crate::forward::Forward;
use crate::model::Mamba2ForCausalLM;
use crate::train::{cpu, evaluate, evaluate_by, last_blocks};

/// Flags of `elapid eval`.
#[derive(clap::Args)]
pub(super) struct EvalArgs {
    /// Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Dataset folder, or several, separated by commas
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Tokens a block, for Megatron's files, which do not say
    #[arg(long, value_name = "L")]
    seq_len: Option<usize>,
    /// Only the last F of the blocks, at least one: what `train` held out
    #[arg(long, value_name = "F", value_parser = fraction)]
    eval_fraction: Option<f64>,
    /// Sequences at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Go on in the state of the block before, as `train --carry-state` does
    #[arg(long)]
    carry_state: bool,
    /// Compute dtype
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Dtype,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    on: DeviceArgs,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value > 0.0 && value < 1.0 => Ok(value),
        _ => Err("it must lie between 0 and 1, such as 0.05".into()),
    }
}

pub(super) fn run(args: &EvalArgs) -> Result<(), Error> {
    if args.device != Device::Cpu && args.carry_state {
        return Err(Error::new("--carry-state is for the CPU so far").with_hint("leave --device out"));
    }
    let device = Forward::open(args.device, &args.on)?;
    let mut data = Dataset::open_blocks(&args.data_dir, args.seq_len)?;
    if data.is_mixture() {
        return Err(Error::new(format!("--data-dir {} has weights", args.data_dir.display()))
            .with_hint("an evaluation reads every block once: give the datasets without weights"));
    }
    let blocks = match args.eval_fraction {
        Some(fraction) => last_blocks(data.len(), fraction)?,
        None => 0..data.len(),
    };
    let backend = cpu(args.threads)?;
    let model = Mamba2ForCausalLM::from_pretrained(&backend, &args.model, args.dtype.compute())?;
    data.check_vocab(model.config().vocab_size)?;
    let batch = (args.batch as usize).min(blocks.len());
    let result = match device {
        None => evaluate(&backend, &model, &data, blocks, batch, args.carry_state)?,
        Some(device) => {
            let losses = device.losses(&backend, &model, batch, data.seq_len(), data.knows_documents())?;
            evaluate_by(&data, blocks, batch, false, losses)?
        }
    };
    if args.json {
        let object = json!({
            "loss": result.loss,
            "perplexity": result.perplexity(),
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
        });
        return print_line(&object.to_string());
    }
    print_line(&format!("{result}  over {} tokens", result.tokens))
}
