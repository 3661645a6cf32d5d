//! `elapid replay`.

use std::path::PathBuf;

use super::print_line;
use crate::Error;
use crate::config::run::Dtype;
use crate::train::{Largest, NonFinite, cpu};

/// Flags of `elapid replay`.
#[derive(clap::Args)]
pub(super) struct ReplayArgs {
    /// Folder nonfinite-step-… of a run
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Compute dtype [default: that of the run]
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ReplayArgs) -> Result<(), Error> {
    let found = NonFinite::open(&args.dir)?;
    let dtype = args.dtype.unwrap_or(found.step.dtype);
    let diagnosis = found.replay(&cpu(args.threads)?, dtype)?;
    if args.json {
        let mut object = diagnosis.to_json();
        object["step"] = found.step.step.into();
        object["dtype"] = serde_json::to_value(dtype).expect("plain data");
        return print_line(&object.to_string());
    }
    let report = diagnosis.report;
    print_line(&format!(
        "step {} in {dtype:?}: loss {}  gradient norm {}",
        found.step.step, report.loss, report.grad_norm
    ))?;
    print_line("largest absolute   activation    cotangent     gradient")?;
    let (outside, layers) = diagnosis.layers.split_last().expect("what stands outside is always there");
    let line = |name: String, largest: &Largest| {
        let Largest { activation, cotangent, gradient } = largest;
        print_line(&format!("  {name:<14} {activation:>12.3e} {cotangent:>12.3e} {gradient:>12.3e}"))
    };
    for (layer, largest) in layers.iter().enumerate() {
        line(format!("layer {layer}"), largest)?;
    }
    line("outside".into(), outside)?;
    print_line(&diagnosis.to_string())
}
