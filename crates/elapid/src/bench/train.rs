//! A whole optimizer step.

use std::sync::Arc;
use std::time::{Duration, Instant};

use elapid_tensor::{AdamW, Checkpointing};
use serde_json::{Value, json};

use super::metered::{Account, Metered};
use super::timed::AWAIT;
use super::{Limits, Setup, Tally, Timed, check, kernel_of, median, refuse};
use crate::Error;
use crate::config::run::check_threads;
use crate::data::Sample;
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::model::init::Init;
use crate::model::shard::check_ranks;
use crate::parallel::{Arrangement, Launch, Mesh, Rank, launch, world_size};
use crate::train::memory::{Demand, Memory, peak_resident};
use crate::train::{Batch, Trainer};

/// Trains `steps` steps on one batch of random tokens a rank, after one that is not measured, on the ranks of `on`, or on
/// those that a launcher has started: the object that `elapid bench train --json` prints.
///
/// # Errors
/// The model needs more memory than there is, or cannot be shared out like that; an op does not compute what it should;
/// threads cannot be started.
pub fn train(
    setup: &Setup,
    steps: usize,
    checkpointing: Checkpointing,
    on: Option<Arrangement>,
) -> Result<Value, Error> {
    check_threads("--threads", setup.threads.unwrap_or(1))?;
    let world = world_size()?;
    let Arrangement { mesh: asked, zero1, sequence_parallel } = on.unwrap_or(Arrangement::ALONE);
    let mesh = Mesh::new(asked.tp, on.map(|_| asked.dp), world)?;
    check_ranks(&setup.config, mesh.tp)?;
    let on = Arrangement { mesh, zero1, sequence_parallel };
    let start = Launch { mesh, threads: setup.threads, timeout: Duration::from_secs(600) };
    Ok(launch(&start, |rank| train_on(setup, steps, checkpointing, on, rank))?.swap_remove(0))
}

fn train_on(
    setup: &Setup,
    steps: usize,
    checkpointing: Checkpointing,
    on: Arrangement,
    rank: &Rank,
) -> Result<Value, Error> {
    let account = Arc::new(Account::default());
    let metered = rank.with_groups(|group| match group.size() {
        1 => group,
        _ => Arc::new(Metered::new(group, &account)),
    });
    let timed = Timed::new(metered.cpu()?);
    let alone = Demand::alone(
        &setup.config,
        (setup.batch, setup.seq_len),
        setup.compute(),
        checkpointing,
        timed.inner().threads(),
    );
    let Arrangement { mesh, zero1, sequence_parallel } = on;
    let ranks_here = rank.ranks_here();
    let memory = Memory::predict(&Demand { mesh, ranks_here, zero1, sequence_parallel, ..alone });
    if let Some(warning) = rank.from_first(|| memory.check(false))? {
        say(format_args!("warning: {warning}"));
    }
    let samples: Vec<Sample> = setup.ids(setup.seq_len).chunks(setup.seq_len).map(Sample::new).collect();
    let batch = Batch::new(&samples);
    let (tokens, valid) = (batch.tokens() * mesh.dp, batch.valid() * mesh.dp);
    let mut model = Mamba2ForCausalLM::new(&timed, &setup.config, setup.compute(), Init::StateSpaces, 0)
        .with_sequence_parallel(sequence_parallel);
    if zero1 {
        model = model.with_zero1(&timed);
    }
    let mut trainer = Trainer::new(&timed, model, checkpointing);

    let mut runs = Vec::new();
    let mut between = [0.0; 2];
    for step in 0..=steps {
        rank.barrier();
        timed.take();
        account.take();
        let start = Instant::now();
        trainer.last_micro_step(&batch);
        let hyper =
            AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: step as u64 + 1 };
        trainer.update(&hyper, 1.0, valid);
        let seconds = start.elapsed().as_secs_f64();
        if step > 0 {
            say(format_args!("step {step}/{steps}  {:.0} tokens/s", tokens as f64 / seconds));
            let ops = timed.take();
            let [own, carried] = account.take().map(|time| time.as_secs_f64());
            let awaited: f64 = ops.iter().filter(|op| op.0 == AWAIT).map(|op| op.1.seconds).sum();
            between[0] += own + carried;
            between[1] += own + awaited;
            runs.push((seconds, ops));
        }
    }
    let peak = peak_resident();
    // Only now, or the memory of the check would be counted with the step's.
    let checks = if rank.is_first() { check(timed.inner())? } else { Vec::new() };
    let mid = median(runs.iter().map(|run| run.0).collect());
    let (seconds, ops) =
        runs.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("at least one step is measured");
    if rank.is_first() {
        refuse(ops.iter().map(|op| op.0), &checks)?;
    }

    rank.barrier();
    let limits = Limits::measure(timed.inner(), setup.compute(), ranks_here);
    let product: u64 = rank.gather_numbers(limits.product() as u64).iter().sum();
    rank.sum(&mut between);
    let [collectives, waited] = between.map(|time| time / (steps * mesh.size()) as f64);
    let flops = setup.config.flops_per_token();
    let tokens_per_s = tokens as f64 / seconds;
    let figures = json!({
        "steps": steps,
        "best_step_s": seconds,
        "median_step_s": mid,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * (flops.forward + flops.backward) as f64 / product as f64,
        "predicted_bytes": memory.total(),
        "peak_bytes": peak,
        "ranks": (mesh.size() > 1).then(|| json!({
            "dp": mesh.dp,
            "tp": mesh.tp,
            "zero_1": zero1,
            "sp": sequence_parallel,
            "collectives_s": collectives,
            "waited_s": waited,
            "hidden_share": (1.0 - waited / collectives).max(0.0),
        })),
        "scan_conv_norm_share": share_of(&["mamba2", "rms_norm"], &ops, seconds),
        "ops": limits.breakdown(ops, seconds),
    });
    Ok(setup.report("train", timed.inner(), &limits, figures))
}

/// What the ops of these kernels, adjoints included, have of `seconds`.
fn share_of(kernels: &[&str], ops: &[(&'static str, Tally)], seconds: f64) -> f64 {
    let theirs = ops.iter().filter(|(op, _)| kernels.contains(&kernel_of(op)));
    theirs.map(|(_, tally)| tally.seconds).sum::<f64>() / seconds
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
