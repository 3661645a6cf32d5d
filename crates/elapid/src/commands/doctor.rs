//! `elapid doctor`.

use super::show::show;
use crate::Error;
use crate::doctor::examine;

/// Flags of `elapid doctor`.
#[derive(clap::Args)]
pub(super) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), Error> {
    let report = examine()?;
    show(&report, args.json)?;
    let red: Vec<String> = report["checks"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|check| check["ok"] != true)
        .map(|check| format!("{} on {}", check["kernel"], check["path"]))
        .collect();
    if red.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!("kernels that do not compute what they should: {}", red.join("; ")))
        .with_hint("do not train on this machine; memory or CPU may be faulty, or this build of elapid is"))
}
