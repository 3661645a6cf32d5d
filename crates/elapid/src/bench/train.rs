//! A whole optimizer step.

use std::time::Instant;

use elapid_tensor::{AdamW, Checkpointing};
use serde_json::{Value, json};

use super::{Limits, Setup, Tally, Timed, check, median, refuse};
use crate::Error;
use crate::data::Sample;
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::model::init::Init;
use crate::train::memory::{Demand, Memory, peak_resident};
use crate::train::{Batch, Trainer};

/// Trains `steps` steps on one batch of random tokens, after one that is not measured: the object that
/// `elapid bench train --json` prints.
///
/// # Errors
/// The model needs more memory than there is; an op does not compute what it should; threads cannot be started.
pub fn train(setup: &Setup, steps: usize, checkpointing: Checkpointing) -> Result<Value, Error> {
    let timed = setup.backend()?;
    let (memory, runs) = measured(setup, &timed, steps, checkpointing)?;
    let peak = peak_resident();
    // Only now, or the memory of the check would be counted with the step's.
    let checks = check(timed.inner())?;
    let mid = median(runs.iter().map(|run| run.0).collect());
    let (seconds, ops) =
        runs.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("at least one step is measured");
    refuse(ops.iter().map(|op| op.0), &checks)?;

    let limits = Limits::measure(timed.inner(), setup.compute());
    let flops = setup.config.flops_per_token();
    let tokens_per_s = (setup.batch * setup.seq_len) as f64 / seconds;
    let figures = json!({
        "steps": steps,
        "best_step_s": seconds,
        "median_step_s": mid,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * (flops.forward + flops.backward) as f64 / limits.peaks.product,
        "predicted_bytes": memory.total(),
        "peak_bytes": peak,
        "ops": limits.breakdown(ops, seconds),
    });
    Ok(setup.report("train", timed.inner(), &limits, figures))
}

/// Seconds of a step, and its ops.
type Run = (f64, Vec<(&'static str, Tally)>);

/// The predicted memory, and `steps` steps on one batch of random tokens after one that is not measured.
pub(super) fn measured(
    setup: &Setup,
    timed: &Timed,
    steps: usize,
    checkpointing: Checkpointing,
) -> Result<(Memory, Vec<Run>), Error> {
    let memory = Memory::predict(&Demand::alone(
        &setup.config,
        (setup.batch, setup.seq_len),
        setup.compute(),
        checkpointing,
        timed.inner().threads(),
    ));
    if let Some(warning) = memory.check(false)? {
        say(format_args!("warning: {warning}"));
    }
    let samples: Vec<Sample> = setup.ids(setup.seq_len).chunks(setup.seq_len).map(Sample::new).collect();
    let batch = Batch::new(&samples);
    let model = Mamba2ForCausalLM::new(timed, &setup.config, setup.compute(), Init::StateSpaces, 0);
    let mut trainer = Trainer::new(timed, model, checkpointing);

    let mut runs = Vec::new();
    for step in 0..=steps {
        timed.take();
        let start = Instant::now();
        trainer.micro_step(&batch);
        let hyper =
            AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: step as u64 + 1 };
        trainer.update(&hyper, 1.0, batch.valid());
        let seconds = start.elapsed().as_secs_f64();
        if step > 0 {
            say(format_args!("step {step}/{steps}  {:.0} tokens/s", batch.tokens() as f64 / seconds));
            runs.push((seconds, timed.take()));
        }
    }
    Ok((memory, runs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::train::cpu;
    use elapid_tensor::DType;

    #[test]
    fn the_ops_of_a_step_have_the_flops_of_the_model() {
        let config = ModelConfig {
            n_groups: 4,
            tie_word_embeddings: false,
            num_hidden_layers: 3,
            ..ModelConfig::preset("tiny").unwrap()
        };
        let timed = Timed::new(cpu(Some(1)).unwrap());
        let batch = Batch::new(&[Sample::new(&[1, 2, 3, 4, 5]), Sample::new(&[5, 4, 3, 2, 1])]);
        let model = Mamba2ForCausalLM::new(&timed, &config, DType::F32, Init::StateSpaces, 0);
        let mut trainer = Trainer::new(&timed, model, Checkpointing::None);
        trainer.micro_step(&batch);
        // The model's count leaves out norms and sums.
        let counted = ["linear", "linear adjoint", "mamba2", "mamba2 adjoint", "head_loss adjoint"];
        let ops = timed.take();
        let sum: u64 = ops.iter().filter(|op| counted.contains(&op.0)).map(|op| op.1.work.flops).sum();
        let flops = config.flops_per_token();
        assert_eq!(sum, batch.tokens() as u64 * (flops.forward + flops.backward));
        assert_eq!(ops.iter().find(|op| op.0 == "linear").unwrap().1.calls, 6);
    }
}
