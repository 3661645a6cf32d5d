//! Generation: a prompt in one pass, then one token at a time.

use std::time::Instant;

use elapid_tensor::{Backend, DType};
use serde_json::{Value, json};

use super::{Limits, Setup, check, median, refuse};
use crate::Error;
use crate::error::say;
use crate::memory;
use crate::model::init::Init;
use crate::model::{Layout, Mamba2ForCausalLM, Role};
use crate::train::memory::peak_resident;

/// Reads a random prompt of L tokens, three times, and goes on for `tokens` tokens: the object that
/// `elapid bench decode --json` prints.
///
/// # Errors
/// The model needs more memory than there is; an op does not compute what it should; threads cannot be started.
pub fn decode(setup: &Setup, tokens: usize) -> Result<Value, Error> {
    const PREFILLS: usize = 3;
    let timed = setup.backend()?;
    let (layout, compute) = (Layout::new(&setup.config), setup.compute());
    let copies = if compute == DType::F32 { 4.0 } else { 6.0 };
    // The widest activation of a prompt, and those around it.
    let prompt = 16.0 * (setup.batch * setup.seq_len) as f64 * setup.config.spec().projection() as f64;
    memory::check(
        copies * layout.parameter_count() as f64 + prompt,
        "model and prompt",
        "give a smaller --batch, --seq-len or --model",
    )?;
    let model = Mamba2ForCausalLM::new(&timed, &setup.config, compute, Init::StateSpaces, 0);
    let ids = |length: usize| -> Vec<i32> { setup.ids(length).into_iter().map(|id| id as i32).collect() };

    let (mut states, mut prefill) = (Vec::new(), Vec::new());
    let ids_of_prompt = timed.tensor_i32(&ids(setup.seq_len), &[setup.batch, setup.seq_len]);
    for _ in 0..PREFILLS {
        states.clear();
        let start = Instant::now();
        model.next_logits(&timed, &ids_of_prompt, None, &mut states);
        prefill.push(start.elapsed().as_secs_f64());
    }
    let prefill_ops = timed.take();
    let prefill = prefill.into_iter().fold(f64::INFINITY, f64::min);
    let prompt_tokens = (setup.batch * setup.seq_len) as f64;
    say(format_args!("prefill  {:.0} tokens/s", prompt_tokens / prefill));

    let next = timed.tensor_i32(&ids(1), &[setup.batch, 1]);
    // The first one finds its memory.
    model.next_logits(&timed, &next, None, &mut states);
    timed.take();
    let mut seconds = Vec::new();
    for _ in 0..tokens {
        let start = Instant::now();
        model.next_logits(&timed, &next, None, &mut states);
        seconds.push(start.elapsed().as_secs_f64());
    }
    let ops = timed.take();
    let (total, mid) = (seconds.iter().sum(), median(seconds));
    say(format_args!("decode  {:.0} tokens/s", setup.batch as f64 / mid));
    let peak = peak_resident();
    // Only now, or the memory of the check would be counted with the model's.
    let checks = check(timed.inner())?;
    refuse(prefill_ops.iter().chain(&ops).map(|op| op.0), &checks)?;

    let limits = Limits::measure(timed.inner(), compute, 1);
    let (weights, state) = (weight_bytes(setup, &layout), state_bytes(setup));
    let figures = json!({
        "prefill_s": prefill,
        "prefill_tokens_per_s": prompt_tokens / prefill,
        "decoded_tokens": tokens,
        "median_step_s": mid,
        "tokens_per_s": setup.batch as f64 / mid,
        "weights_bytes": weights,
        "state_bytes": state,
        "bandwidth_share": (weights + 2 * state) as f64 / mid / limits.peaks.bandwidth(),
        "peak_bytes": peak,
        "ops": limits.breakdown(ops, total),
    });
    Ok(setup.report("decode", timed.inner(), &limits, figures))
}

/// What a step reads of the parameters: all but the rows of an embedding table that is not the head.
fn weight_bytes(setup: &Setup, layout: &Layout) -> usize {
    let size = |dtype| if dtype == DType::Bf16 { 2 } else { 4 };
    let tied = setup.config.tie_word_embeddings;
    layout
        .iter()
        .filter(|(_, _, info)| tied || info.role != Role::Embedding)
        .map(|(_, slot, info)| slot.len() * size(info.dtype(setup.compute())))
        .sum()
}

/// The states of all layers, fp32: read and written by every step.
fn state_bytes(setup: &Setup) -> usize {
    let spec = setup.config.spec();
    let layer = spec.inner() * spec.state + (spec.conv_kernel - 1) * spec.conv_channels();
    4 * setup.batch * setup.config.num_hidden_layers * layer
}
