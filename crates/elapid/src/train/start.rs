//! The table that a run prints before its first step.

use elapid_cpu::CpuBackend;

use super::evaluate::HeldOut;
use super::memory::{Memory, bytes};
use crate::config::run::Run;
use crate::data::Dataset;
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::parallel::Mesh;

/// Prints model, data, step, optimizer and device to stderr.
pub(super) fn print(
    run: &Run,
    data: &Dataset,
    held_out: Option<&HeldOut<'_>>,
    model: &Mamba2ForCausalLM<CpuBackend>,
    device: &str,
    memory: &Memory,
) {
    let args = &run.args;
    let config = model.config();
    let row = |name: &str, value: String| say(format_args!("  {name:<12} {value}"));
    let source = args.model.clone().or(args.init_from.as_ref().map(|d| d.display().to_string()));
    say(format_args!("training {}", source.unwrap_or_default()));
    row(
        "model",
        format!(
            "{} parameters: {} layers, D {}, H {}, P {}, G {}, N {}, V {}",
            model.layout().parameter_count(),
            config.num_hidden_layers,
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            config.n_groups,
            config.state_size,
            config.vocab_size
        ),
    );
    if let (Some(name), None) = (&args.model, args.n_groups)
        && let Some(note) = config.groups_note(name)
    {
        row("", format!("{note}; --n-groups chooses another"));
    }
    let training = held_out.map_or(data.len(), HeldOut::training_blocks);
    let per_step = args.batch * args.grad_accum_usteps * run.mesh.dp;
    row(
        "data",
        format!(
            "{}: {} blocks of {} tokens, {:.2} epochs",
            args.data_dir.display(),
            training,
            data.seq_len(),
            (args.max_steps as usize * per_step) as f64 / training as f64
        ),
    );
    if let Some(held_out) = held_out {
        let dir = args.eval_data_dir.as_ref().unwrap_or(&args.data_dir);
        let when = match args.eval_freq {
            Some(freq) => format!("every {freq} steps and after the last"),
            None => "after the last step".into(),
        };
        row("evaluation", format!("{}: {} blocks, {when}", dir.display(), held_out.len()));
    }
    row(
        "step",
        format!(
            "{} tokens = {} sequences × {} micro-steps × {}; {} steps",
            per_step * data.seq_len(),
            args.batch * run.mesh.dp,
            args.grad_accum_usteps,
            data.seq_len(),
            args.max_steps
        ),
    );
    row(
        "AdamW",
        format!(
            "lr {:.2e} → {:.2e} ({:?}), warm-up {}, betas {} {}, eps {:e}, weight decay {}, clip {}",
            run.schedule.lr,
            run.schedule.last_rate(),
            run.schedule.shape,
            args.warmup_steps,
            args.beta1,
            args.beta2,
            args.eps,
            args.weight_decay,
            args.max_grad_norm
        ),
    );
    row("device", format!("{device}; compute in {:?}", args.dtype));
    if run.mesh.size() > 1 {
        let zero1 = if model.zero1() { ", ZeRO-1" } else { "" };
        let sequence = if model.sequence_parallel() { ", sequence parallel" } else { "" };
        let Mesh { dp, tp } = run.mesh;
        row("ranks", format!("{} = dp {dp} × tp {tp}{zero1}{sequence}", run.mesh.size()));
    }
    row("memory", format!("{} at most: {memory}", bytes(memory.total())));
    row("run folder", run.output_dir.display().to_string());
    for line in model.layout().to_string().lines() {
        say(format_args!("  {line}"));
    }
}
