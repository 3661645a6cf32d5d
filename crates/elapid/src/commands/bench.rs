//! `elapid bench`.

use std::path::PathBuf;

use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use elapid_cpu::Isa;

use super::show::show;
use crate::Error;
use crate::bench::{KERNELS, Setup, Text, comm, data, decode, kernels, train};
use crate::config::ModelConfig;
use crate::config::run::{ActivationCheckpointing, Dtype};
use crate::parallel::Arrangement;

/// Flags of `elapid bench`.
#[derive(clap::Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Each kernel by itself, on every instruction-set path of this machine
    Kernels {
        #[command(flatten)]
        common: Common,
        /// Paths, such as avx2,avx512 (`elapid doctor` lists them) [default: all]
        #[arg(long, value_name = "PATH", value_delimiter = ',', value_parser = path)]
        paths: Vec<Isa>,
        /// Kernels [default: all]
        #[arg(long, value_name = "KERNEL", value_delimiter = ',', value_parser = PossibleValuesParser::new(KERNELS))]
        kernels: Vec<String>,
    },
    /// A whole optimizer step on random tokens, op by op
    Train {
        #[command(flatten)]
        common: Common,
        /// Steps to measure, after one that is not
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
        steps: u16,
        /// What layers keep for the backward pass
        #[arg(long, value_enum, default_value = "none")]
        activation_checkpointing: ActivationCheckpointing,
        /// Ranks, such as dp=2,zero-1 or tp=2,sp [default: one; under mpirun as many dp as were started]
        #[arg(long, value_name = "MESH")]
        mesh: Option<Arrangement>,
    },
    /// Collectives between ranks, from small to large
    Comm {
        /// Ranks [default: 2; under mpirun as many as were started]
        #[arg(long, value_name = "N")]
        dp: Option<usize>,
        /// The largest data to measure
        #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
        max_mib: u16,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Generation: a prompt of L tokens in one pass, then one token at a time
    Decode {
        #[command(flatten)]
        common: Common,
        /// Tokens to generate
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
        tokens: u16,
    },
    /// From text to batches: the tokenizer, the pipeline around it, and what the model reads beside what it trains
    Data {
        #[command(flatten)]
        common: Common,
        /// As for `tokenize` [default: made-up words]
        #[arg(long, value_name = "PATH")]
        dataset: Option<PathBuf>,
        /// Column, or field of a JSON object, that holds the text
        #[arg(long, value_name = "NAME", default_value = "text")]
        text_column: String,
        /// `bytes`, the path of a tokenizer.json or of the folder that holds one, or a model's name on the Hub
        #[arg(long, value_name = "SPEC", default_value = "bytes")]
        tokenizer: String,
        /// Text to take, in MB
        #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
        megabytes: u32,
    },
}

#[derive(clap::Args)]
struct Common {
    /// Preset name, or a config.json, or a folder that holds one; weights are random
    #[arg(long, value_name = "PRESET|PATH", default_value = "mamba2-130m")]
    model: String,
    /// Sequences
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    batch: u32,
    /// Tokens a sequence
    #[arg(long, value_name = "L", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    seq_len: u32,
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

impl Common {
    fn setup(&self) -> Result<Setup, Error> {
        Ok(Setup {
            model: self.model.clone(),
            config: ModelConfig::find(&self.model)?,
            batch: self.batch as usize,
            seq_len: self.seq_len as usize,
            dtype: self.dtype,
            threads: self.threads,
        })
    }
}

/// A path of this machine by its name, however it is spelled.
fn path(text: &str) -> Result<Isa, String> {
    let same = |isa: &Isa| format!("{isa:?}").eq_ignore_ascii_case(&text.replace(['_', '-'], ""));
    Isa::available().into_iter().find(same).ok_or_else(|| {
        let paths: Vec<_> = Isa::available().iter().map(|isa| format!("{isa:?}").to_lowercase()).collect();
        format!("this machine can run {}", paths.join(", "))
    })
}

pub(super) fn run(args: &BenchArgs) -> Result<(), Error> {
    match &args.what {
        What::Kernels { common, paths, kernels: only } => {
            let paths = if paths.is_empty() { Isa::available() } else { paths.clone() };
            let report = kernels(&common.setup()?, &paths, only)?;
            show(&report, common.json)?;
            let refused =
                report["kernels"].as_array().into_iter().flatten().filter(|row| !row["refused"].is_null());
            match refused.count() {
                0 => Ok(()),
                count => Err(Error::new(format!("{count} kernels do not compute what they should"))
                    .with_hint("`elapid doctor` shows every check")),
            }
        }
        What::Train { common, steps, activation_checkpointing, mesh } => {
            let checkpointing = (*activation_checkpointing).into();
            show(&train(&common.setup()?, usize::from(*steps), checkpointing, *mesh)?, common.json)
        }
        What::Comm { dp, max_mib, json } => show(&comm(*dp, usize::from(*max_mib) << 20)?, *json),
        What::Decode { common, tokens } => {
            show(&decode(&common.setup()?, usize::from(*tokens))?, common.json)
        }
        What::Data { common, dataset, text_column, tokenizer, megabytes } => {
            let text = Text {
                dataset: dataset.clone(),
                text_column: text_column.clone(),
                tokenizer: tokenizer.clone(),
                bytes: u64::from(*megabytes) * 1_000_000,
            };
            show(&data(&common.setup()?, &text)?, common.json)
        }
    }
}
