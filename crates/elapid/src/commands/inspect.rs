//! `elapid inspect`.

use super::show::show;
use crate::Error;
use crate::config::run::{ActivationCheckpointing, Dtype};
use crate::inspect::{MicroStep, inspect, plan};
use crate::parallel::Arrangement;

/// Flags of `elapid inspect`.
#[derive(clap::Args)]
pub(super) struct InspectArgs {
    /// Model folder, config.json, preset, dataset, checkpoint, folder of checkpoints, run folder or run.toml
    #[arg(value_name = "PATH")]
    path: String,
    /// Read all files of checkpoints and compare them with their sizes and checksums
    #[arg(long)]
    verify: bool,
    /// Of a model: what each rank of a training run holds and sends
    #[arg(long, conflicts_with = "verify")]
    plan: bool,
    /// With --plan: this mesh, such as dp=4,tp=8,zero-1,sp (sp: sequence parallel); may be repeated [default: some usual ones]
    #[arg(long, value_name = "MESH", requires = "plan")]
    mesh: Vec<Arrangement>,
    /// With --plan: sequences in a micro-step of a rank
    #[arg(long, value_name = "B", default_value_t = 1, requires = "plan", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    batch: u32,
    /// With --plan: tokens a sequence
    #[arg(long, value_name = "L", default_value_t = 2048, requires = "plan", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    seq_len: u32,
    /// With --plan: compute dtype
    #[arg(long, value_enum, default_value = "float32", requires = "plan")]
    dtype: Dtype,
    /// With --plan: what layers keep for the backward pass
    #[arg(long, value_enum, default_value = "none", requires = "plan")]
    activation_checkpointing: ActivationCheckpointing,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), Error> {
    if args.plan {
        let micro_step = MicroStep {
            batch: args.batch as usize,
            seq_len: args.seq_len as usize,
            dtype: args.dtype,
            checkpointing: args.activation_checkpointing,
        };
        return show(&plan(&args.path, &micro_step, &args.mesh)?, args.json);
    }
    let found = inspect(&args.path, args.verify)?;
    show(&found.object, args.json)?;
    if found.faults.is_empty() {
        return Ok(());
    }
    Err(Error::new(found.faults.join("; ")).with_hint("go on from a checkpoint that is whole"))
}
