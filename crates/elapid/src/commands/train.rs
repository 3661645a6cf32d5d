//! `elapid train`.

use std::path::PathBuf;

use super::print_line;
use crate::Error;
use crate::config::run::TrainArgs;
use crate::train::memory::bytes;
use crate::train::{Outcome, compile_only, train};

/// Flags of `elapid train`.
#[derive(clap::Args)]
pub(super) struct TrainCommand {
    #[command(flatten)]
    pub(super) train: TrainArgs,
    /// Take settings from a TOML file, such as the run.toml of a run; flags override it
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Print the settings as TOML for --config, and do nothing else
    #[arg(long)]
    print_config: bool,
}

pub(super) fn run(args: TrainCommand) -> Result<(), Error> {
    let run = args.train.resolve()?;
    if args.print_config {
        return print_line(run.to_toml()?.trim_end());
    }
    if run.args.compile_only {
        return compile_only(&run);
    }
    report(&train(&run)?)
}

/// What a finished run came to.
pub(super) fn report(outcome: &Outcome) -> Result<(), Error> {
    print_line(&format!(
        "loss {:.4} → {:.4} over {} tokens in {:.1} s ({:.0} tokens/s)",
        outcome.first_loss,
        outcome.last_loss,
        outcome.tokens,
        outcome.seconds,
        outcome.tokens as f64 / outcome.seconds
    ))?;
    if let Some(evaluation) = &outcome.evaluation {
        print_line(&format!("evaluation: {evaluation}  over {} tokens", evaluation.tokens))?;
    }
    if let Some(peak) = outcome.peak_memory {
        print_line(&format!("peak memory {} (predicted {})", bytes(peak), bytes(outcome.predicted_memory)))?;
    }
    print_line(&format!("model in {}", outcome.model_dir.display()))
}
