//! `elapid train`: what a run is set up from.

use std::time::Duration;

use elapid_cpu::CpuBackend;
use elapid_tensor::DType;
use serde_json::Value;

use super::device::{self, DeviceTrainer, Devices};
use super::evaluate::HeldOut;
use super::folder::RunFolder;
use super::host::peak;
use super::memory::{Demand, Memory};
use super::plan::waste;
use super::resume::{self, Start};
use super::session::{Session, saves_beside_training};
use super::stop::Graceful;
use super::{Outcome, start};
use crate::Error;
use crate::checkpoint::{Checkpoint, MANIFEST, Saver, Store};
use crate::config::run::{Run, TrainArgs};
use crate::config::{ModelConfig, TokenIds};
use crate::data::{Dataset, Tokenizer};
use crate::error::say;
use crate::model::Mamba2ForCausalLM;
use crate::parallel::{Launch, Rank, launch};

/// Trains as `run` says, from step 1 or from a checkpoint, and leaves `metrics.jsonl`, `run.toml` and the model in `hf/` in
/// the run folder.
///
/// # Errors
/// Anything that stops it, before the first step where that can be known then; a loss or gradient that is not finite,
/// before it reaches the parameters; a signal, after a checkpoint ([`Error::signal`]).
pub fn train(run: &Run) -> Result<Outcome, Error> {
    let (args, mesh) = (&run.args, run.mesh);
    let start = Launch { mesh, threads: args.threads, timeout: Duration::from_secs(args.comm_timeout) };
    // Before there are threads: it may set variables.
    let devices = Devices::open(args.device, &args.on, mesh)?;
    Ok(launch(&start, |rank| train_on(run, rank, devices.as_ref()))?.swap_remove(0))
}

/// Compiles what `run` would load, and does nothing else.
///
/// # Errors
/// The dataset cannot be read; the compiler is missing or refuses a module.
pub fn compile_only(run: &Run) -> Result<(), Error> {
    let data = open_data(run)?;
    device::compile(run, &data, HeldOut::open(run, &data)?.as_ref())
}

/// What one rank does of it.
fn train_on(run: &Run, rank: &Rank, devices: Option<&Devices>) -> Result<Outcome, Error> {
    let of_rank = |devices: &Devices| devices.of(rank.number(), rank.mesh().size());
    let driver = devices.map(of_rank).transpose()?;
    same_settings(&run.args, rank)?;
    // Where ranks are processes each has resolved its folders by itself; those of the first one count.
    let dirs = rank.from_first(|| Ok((run.output_dir.clone(), run.checkpoint_dir.clone())))?;
    let args = TrainArgs { output_dir: Some(dirs.0.clone()), ..run.args.clone() };
    let run = &Run { args, output_dir: dirs.0, checkpoint_dir: dirs.1, ..run.clone() };
    let settings = run.to_toml()?;
    let data = open_data(run)?;
    let tokenizer = open_tokenizer(run, &data)?;
    let held_out = HeldOut::open(run, &data)?;
    let blocks = held_out.as_ref().map_or(data.len(), HeldOut::training_blocks);
    let rows = run.args.batch * run.mesh.dp;
    if run.args.carry_state && blocks < rows {
        return Err(Error::new(format!(
            "--carry-state needs a block for each of the {rows} rows of a batch, but there are {blocks} to train on"
        ))
        .with_hint("give a smaller --batch, or more data"));
    }
    let backend = rank.cpu()?;
    let shapes = held_out.as_ref().map_or_else(Vec::new, HeldOut::shapes);
    let demand = Demand {
        config: &run.config,
        batch: run.args.batch,
        length: data.seq_len(),
        dtype: run.args.dtype.compute(),
        checkpointing: run.args.activation_checkpointing.into(),
        threads: backend.threads(),
        mesh: run.mesh,
        ranks_here: rank.ranks_here(),
        zero1: run.args.use_zero_1,
        sequence_parallel: run.args.sequence_parallel_enabled,
        evaluation: &shapes,
        log_norms: run.args.log_norms,
        saves: saves_beside_training(&run.args),
        carries: run.args.carry_state,
    };
    let mut memory = Memory::predict(&demand);
    if driver.is_some() {
        // Of the host: it holds the state, and computes nothing.
        memory = Memory { activations: 0, transient: 0, ..memory };
    }
    let on_host = memory.of_processes(rank.on_host());
    let warning = rank.from_first(|| on_host.check(run.args.ignore_memory_limit))?;
    for warning in waste(&demand).into_iter().chain(warning) {
        say(format_args!("warning: {warning}"));
    }
    // The first rank keeps the folders; the others are told what it finds there.
    let folder = rank.is_first().then(|| RunFolder::lock(&run.output_dir)).transpose()?;
    let open = if rank.is_first() { Store::open } else { Store::of_first_rank };
    let store = open(&run.checkpoint_dir, run.args.tag.clone(), run.keep)?;
    let from = match resume::start(run, rank, folder.as_ref(), &store)? {
        Start::Fresh => None,
        Start::From(checkpoint) => Some(*checkpoint),
        Start::Finished(outcome) => {
            say(format_args!("the run in {} is finished; nothing is left to do", run.output_dir.display()));
            return Ok(outcome);
        }
    };
    let mut model = build_model(run, rank, &data, &backend, from.is_some())?
        .with_sequence_parallel(run.args.sequence_parallel_enabled);
    if run.args.use_zero_1 {
        model = model.with_zero1(&backend);
    }
    let (peak, what) = match &driver {
        Some(driver) => (f64::NAN, driver.describe()),
        None => {
            let dtype = run.args.dtype.compute();
            let peak =
                rank.gather_numbers(peak(rank, &backend, dtype) as u64).into_iter().sum::<u64>() as f64;
            let (threads, isa, rate) = (backend.threads(), backend.isa(), peak / 1e9);
            let of = if dtype == DType::Bf16 { "bf16" } else { "fp32" };
            (peak, format!("CPU, {threads} threads, {isa:?}, {rate:.0} GFLOP/s in {of} products"))
        }
    };
    start::print(run, &data, held_out.as_ref(), &model, &what, &memory);
    let device =
        driver.map(|driver| DeviceTrainer::new(driver, rank, run, &data, held_out.as_ref())).transpose()?;
    let folder = folder.as_ref();
    folder.map_or(Ok(()), |folder| folder.write("run.toml", &settings))?;
    let held_out = held_out.as_ref();
    // Before the metrics are there: who sees them may count on a signal being heard.
    let signals = Graceful::new()?;
    let mut session = Session::new(
        run,
        rank,
        &data,
        held_out,
        folder,
        &backend,
        model,
        device,
        tokenizer,
        from.as_ref(),
        peak,
    )?;
    session.outcome.predicted_memory = memory.total();
    std::thread::scope(|scope| session.train(&signals, &store, Saver::new(scope, &store, rank, &backend)))
}

/// Refuses ranks that were not started with the same flags: each would make steps of its own.
fn same_settings(args: &TrainArgs, rank: &Rank) -> Result<(), Error> {
    let mut own = resume::settings(args);
    // What may differ from machine to machine, and folders, where those of the first rank count.
    for flag in
        ["output-dir", "checkpoint-dir", "data-dir", "eval-data-dir", "compile-cache", "plugin", "threads"]
    {
        own.as_object_mut().and_then(|flags| flags.remove(flag));
    }
    let all = rank.gather(own);
    let differ = |other: &Value| resume::differences_of(&all[0], other);
    let first = all.iter().map(differ).enumerate().find(|(_, differences)| !differences.is_empty());
    first.map_or(Ok(()), |(other, differences)| {
        Err(Error::new(format!("rank {other} has other settings than rank 0: {}", differences.join(", ")))
            .with_hint("start all ranks with the same flags"))
    })
}

/// Opens the dataset and checks it against the model.
fn open_data(run: &Run) -> Result<Dataset, Error> {
    let dir = &run.args.data_dir;
    let mut data = Dataset::open_blocks(dir, run.args.seq_len)?;
    if let Some(seq_len) = run.args.seq_len
        && seq_len != data.seq_len()
    {
        return Err(Error::new(format!(
            "--seq-len is {seq_len}, but the blocks of {} are {} tokens long",
            dir.display(),
            data.seq_len()
        ))
        .with_hint("leave --seq-len out, or tokenize again with that length"));
    }
    data.check_vocab(run.config.vocab_size)?;
    if data.is_mixture() && (run.args.carry_state || run.args.eval_fraction.is_some()) {
        let flag = if run.args.carry_state { "--carry-state" } else { "--eval-fraction" };
        return Err(Error::new(format!("{flag} with weights in --data-dir {}", dir.display())).with_hint(
            "blocks of a mixture do not follow each other; leave one out, or evaluate on --eval-data-dir",
        ));
    }
    if run.args.shuffle {
        data.shuffle_parts(run.args.seed);
    }
    Ok(data)
}

/// The tokenizer that is exported with the model: the dataset's, or that of the weights to start from. Loaded before the
/// run folder is made: a damaged one is not to be found after the last step.
fn open_tokenizer(run: &Run, data: &Dataset) -> Result<Option<Tokenizer>, Error> {
    let init_from = run.args.init_from.clone().filter(|dir| dir.join("tokenizer.json").exists());
    let Some(dir) = data.tokenizer().or(init_from) else { return Ok(None) };
    let tokenizer = Tokenizer::load(&dir.display().to_string())?;
    let (size, vocab) = (tokenizer.vocab_size(), run.config.vocab_size);
    if size > vocab {
        return Err(Error::new(format!(
            "the tokenizer in {} has {size} tokens, but the model's vocabulary has {vocab}",
            dir.display()
        ))
        .with_hint("give the model a larger --vocab-size, or tokenize with the model's own tokenizer"));
    }
    Ok(Some(tokenizer))
}

/// The model of a new run, or a model of zeros of the same configuration for a run that goes on.
fn build_model(
    run: &Run,
    rank: &Rank,
    data: &Dataset,
    backend: &CpuBackend,
    goes_on: bool,
) -> Result<Mamba2ForCausalLM<CpuBackend>, Error> {
    let (args, dtype) = (&run.args, run.args.dtype.compute());
    // A new model takes the special tokens of its data, where those are known and fit its vocabulary.
    let fits = |id: &u32| (*id as usize) < run.config.vocab_size;
    let config = match data.card().map(|card| card.eos_id.filter(fits)) {
        Some(id) if args.init_from.is_none() => ModelConfig {
            eos_token_id: id.map(TokenIds::One),
            bos_token_id: id,
            pad_token_id: id,
            ..run.config.clone()
        },
        _ => run.config.clone(),
    };
    if !goes_on && args.init_from.is_none() && !args.checkpoint_load {
        return Ok(Mamba2ForCausalLM::new(backend, &config, dtype, args.init.into(), args.seed));
    }
    let mut model = Mamba2ForCausalLM::empty(backend, &config, dtype);
    if goes_on {
        return Ok(model);
    }
    if let Some(dir) = &args.init_from {
        if dir.join(MANIFEST).exists() {
            resume::read_weights(&Checkpoint::open_on(rank, dir)?, backend, &mut model)?;
        } else {
            model.load(backend, dir)?;
        }
    } else {
        resume::load_weights(args, rank, backend, &mut model)?;
    }
    Ok(model)
}
