//! `elapid convert`.

use std::path::PathBuf;

use super::print_line;
use crate::Error;
use crate::convert::{Conversion, Dimensions, Format, convert};
use crate::model::pretrained::FileDType;

/// Flags of `elapid convert`.
#[derive(clap::Args)]
pub(super) struct ConvertArgs {
    /// Format of the input
    #[arg(short = 'm', long, visible_alias = "mamba2-model-type", value_enum, value_name = "FORMAT")]
    from: Format,
    /// Format of the output
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "hf")]
    to: Format,
    /// Model folder to read
    #[arg(short, long, alias = "mamba2-checkpoint-directory", value_name = "DIR")]
    input: PathBuf,
    /// Model folder to write
    #[arg(short, long, alias = "output-dir", value_name = "DIR")]
    output: PathBuf,
    /// Element type to write [default: as it is]
    #[arg(short, long, value_enum)]
    precision: Option<Precision>,
    /// Tokenizer: a folder with tokenizer.json or tokenizer.model, such a file, or a model on the Hub [default: the input's]
    #[arg(short, long, alias = "tokenizer-model-path", value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Write in_proj as in_proj_z, in_proj_xBC and in_proj_dt
    #[arg(long)]
    split_proj: bool,
    #[command(flatten)]
    dimensions: DimensionArgs,
}

/// What files of ranks do not say.
#[derive(clap::Args)]
pub(super) struct DimensionArgs {
    /// Of neuron-tp: preset, config.json or a folder with one [default: the config.json beside the files]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Of neuron-tp: rows of the embedding table [default: the model's]
    #[arg(long, value_name = "V")]
    vocab_size: Option<usize>,
    /// Of neuron-tp: groups [default: of a preset, one a rank]
    #[arg(long, value_name = "G")]
    n_groups: Option<usize>,
}

impl DimensionArgs {
    pub(super) fn resolve(&self) -> Dimensions {
        Dimensions { model: self.model.clone(), vocab_size: self.vocab_size, n_groups: self.n_groups }
    }
}

/// Element types by the names of the replaced script.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Precision {
    Fp32,
    Bf16,
    Fp16,
}

pub(super) fn run(args: ConvertArgs) -> Result<(), Error> {
    let dtype = args.precision.map(|precision| match precision {
        Precision::Fp32 => FileDType::F32,
        Precision::Bf16 => FileDType::Bf16,
        Precision::Fp16 => FileDType::F16,
    });
    let conversion = Conversion {
        from: args.from,
        to: args.to,
        input: args.input,
        output: args.output,
        dtype,
        tokenizer: args.tokenizer,
        split_proj: args.split_proj,
        dimensions: args.dimensions.resolve(),
    };
    convert(&conversion)?;
    print_line(&format!("model in {}", conversion.output.display()))
}
