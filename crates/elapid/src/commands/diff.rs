//! `elapid diff`.

use std::path::PathBuf;

use super::convert::DimensionArgs;
use super::print_line;
use crate::Error;
use crate::convert::{TensorComparison, compare};

/// Flags of `elapid diff`.
#[derive(clap::Args)]
pub(super) struct DiffArgs {
    /// Model folder of any format, or a file of tensors
    a: PathBuf,
    /// The one to compare it with
    b: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    dimensions: DimensionArgs,
}

/// Whether the two are equal.
pub(super) fn run(args: &DiffArgs) -> Result<bool, Error> {
    let found = compare(&args.a, &args.b, &args.dimensions.resolve())?;
    if args.json {
        let json = serde_json::to_string(&found).expect("plain data");
        print_line(&json)?;
        return Ok(found.equal);
    }
    let different: Vec<_> = found.tensors.iter().filter(|tensor| !tensor.equal).collect();
    for tensor in &different {
        print_line(&format!("{}: {}", tensor.name, describe(tensor)))?;
    }
    print_line(&match different.len() {
        0 => format!("equal: {} tensors", found.tensors.len()),
        n => format!("{n} of {} tensors differ", found.tensors.len()),
    })?;
    Ok(found.equal)
}

fn describe(tensor: &TensorComparison) -> String {
    let [Some(a), Some(b)] = &tensor.shape else {
        return format!("missing in {}", if tensor.shape[0].is_none() { "A" } else { "B" });
    };
    let mut parts = Vec::new();
    if a != b {
        parts.push(format!("shape {a:?} and {b:?}"));
    }
    if let [Some(a), Some(b)] = tensor.dtype
        && a != b
    {
        parts.push(format!("{a} and {b}"));
    }
    if let (Some(different), Some(max_abs), Some(relative)) =
        (tensor.different, tensor.max_abs, tensor.relative)
        && different > 0
    {
        let elements: usize = a.iter().product();
        parts.push(format!(
            "{different} of {elements} elements, by up to {max_abs:.2e} ({relative:.2e} of the largest)"
        ));
    }
    parts.join("; ")
}
