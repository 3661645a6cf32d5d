//! `elapid replay`.

use std::path::PathBuf;

use super::print_line;
use crate::Error;
use crate::config::run::Dtype;
use crate::train::{Extents, NonFinite, cpu};

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
        "step {} in {dtype:?}: loss {:?}  gradient norm {:?}",
        found.step.step, report.loss, report.grad_norm
    ))?;
    let table = |row: [&dyn std::fmt::Display; 4]| {
        let [name, activation, cotangent, gradient] = row;
        print_line(format!("  {name:<10} {activation:<28} {cotangent:<28} {gradient:<28}").trim_end())
    };
    print_line("largest absolute values:")?;
    table([&"", &"activation", &"cotangent", &"gradient"])?;
    let (outside, layers) = diagnosis.layers.split_last().expect("what stands outside is always there");
    let line = |name: String, extents: &Extents| {
        table([&name, &extents.activation, &extents.cotangent, &extents.gradient])
    };
    for (layer, extents) in layers.iter().enumerate() {
        line(format!("layer {layer}"), extents)?;
    }
    line("outside".into(), outside)?;
    print_line(&diagnosis.to_string())
}
