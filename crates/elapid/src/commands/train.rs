//! `elapid train`.

use super::print_line;
use crate::Error;
use crate::config::run::TrainArgs;
use crate::train::memory::bytes;
use crate::train::{Outcome, train};

pub(super) fn run(args: TrainArgs) -> Result<(), Error> {
    let outcome = train(&args.resolve()?)?;
    report(&outcome)
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
