//! `elapid inspect`.

use super::show::show;
use crate::Error;
use crate::inspect::inspect;

/// Flags of `elapid inspect`.
#[derive(clap::Args)]
pub(super) struct InspectArgs {
    /// Model folder, config.json, preset, dataset, checkpoint, folder of checkpoints, run folder or run.toml
    #[arg(value_name = "PATH")]
    path: String,
    /// Read all files of checkpoints and compare them with their sizes and checksums
    #[arg(long)]
    verify: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), Error> {
    let found = inspect(&args.path, args.verify)?;
    show(&found.object, args.json)?;
    if found.faults.is_empty() {
        return Ok(());
    }
    Err(Error::new(found.faults.join("; ")).with_hint("go on from a checkpoint that is whole"))
}
