//! `elapid compile`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use elapid_tensor::{AdamW, Checkpointing};
use elapid_xla::driver::{Kind, neuron};
use elapid_xla::{Estimate, Module, Options, Port, Type, estimate};
use serde_json::{Value, json};

use super::print_line;
use crate::Error;
use crate::config::ModelConfig;
use crate::config::run::{
    ActivationCheckpointing, Dtype, LayerLoop, Target, at_least_one, check, resolve_model,
};
use crate::error::say;
use crate::model::shard::check_ranks;
use crate::parallel::Mesh;
use crate::record::{MAX_INSTRUCTIONS, Recording, keeps_rules};
use crate::train::memory::bytes;

/// Flags of `elapid compile`.
#[derive(clap::Args)]
pub(super) struct CompileArgs {
    /// Trainium generation
    #[arg(long, value_enum)]
    target: Target,
    /// Tokens of a sequence
    #[arg(long, value_name = "L")]
    seq_len: usize,
    /// Folder for the modules; made if it is not there
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Folder of what the compiler makes of them, where it is installed [default: elapid/neff in the user's cache]
    #[arg(long, value_name = "DIR")]
    compile_cache: Option<PathBuf>,
    /// Preset name, or a config.json, or a folder that holds one
    #[arg(long, value_name = "PRESET|PATH", required_unless_present = "init_from")]
    model: Option<String>,
    /// Rows of the embedding table, in place of the model's own
    #[arg(long, value_name = "V")]
    vocab_size: Option<usize>,
    /// Groups of B and C, in place of the model's own
    #[arg(long, value_name = "G")]
    n_groups: Option<usize>,
    /// Gated norm over the whole inner width instead of per group
    #[arg(long)]
    rmsnorm_across_groups: bool,
    /// Take the configuration of a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// Batches say where documents begin
    #[arg(long)]
    documents: bool,
    /// States pass from micro-step to micro-step, as far as documents go on
    #[arg(long)]
    carry_state: bool,
    /// Write what is updated beside what was there instead of in its place
    #[arg(long)]
    not_in_place: bool,
    /// Compute dtype
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Dtype,
    /// Sequences in a micro-step
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Decay of AdamW's first moment
    #[arg(long, default_value_t = 0.9)]
    beta1: f32,
    /// Decay of AdamW's second moment
    #[arg(long, default_value_t = 0.95)]
    beta2: f32,
    /// AdamW's epsilon
    #[arg(long, default_value_t = 1e-8)]
    eps: f32,
    /// Decoupled weight decay of matrices; vectors are never decayed
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f32,
    /// Clip gradients to this global norm; 0 does not clip
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f32,
    /// What layers keep for the backward pass
    #[arg(long, value_enum, default_value = "none")]
    activation_checkpointing: ActivationCheckpointing,
    /// How layers are written
    #[arg(long, value_enum, default_value = "call")]
    layer_loop: LayerLoop,
    /// Cut the micro-step into modules of so many groups of layers, forward and backward [default: as few as keep to the
    /// instructions of a module]
    #[arg(long, value_name = "N")]
    layer_groups: Option<usize>,
    /// Tensor-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: usize,
    /// Data-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    dp: usize,
    /// Each data-parallel rank keeps its part of the fp32 masters and moments only (ZeRO stage 1)
    #[arg(long = "use-zero-1")]
    use_zero_1: bool,
    /// Cut the residual stream along the sequence, between tensor-parallel ranks
    #[arg(long)]
    sequence_parallel_enabled: bool,
}

impl CompileArgs {
    fn check(&self) -> Result<(), Error> {
        at_least_one("--seq-len", self.seq_len as u64)?;
        at_least_one("--batch", self.batch as u64)?;
        // Positions and rows are s32 on the device.
        if self.batch.checked_mul(self.seq_len).is_none_or(|tokens| tokens > 1 << 24) {
            let (batch, length) = (self.batch, self.seq_len);
            return Err(Error::new(format!("--batch {batch} × --seq-len {length} are too many tokens"))
                .with_hint("a micro-step takes at most 16777216; accumulate gradients over more of them"));
        }
        let finite = |x: f32| x.is_finite() && x >= 0.0;
        let hint = "it must be a finite number, 0 or more";
        for (flag, value) in [("--weight-decay", self.weight_decay), ("--max-grad-norm", self.max_grad_norm)]
        {
            check(flag, f64::from(value), finite(value), hint)?;
        }
        for (flag, value) in [("--beta1", self.beta1), ("--beta2", self.beta2)] {
            let good = (0.0..1.0).contains(&value);
            check(flag, f64::from(value), good, "it must be 0 or more, and less than 1")?;
        }
        let eps = f64::from(self.eps);
        check("--eps", eps, eps > 0.0 && eps.is_finite(), "it must be a finite number above 0")?;
        Mesh::new(self.tp, Some(self.dp), None)?;
        Ok(())
    }

    fn recording<'c>(&self, config: &'c ModelConfig) -> Recording<'c> {
        Recording {
            config,
            dtype: self.dtype.compute(),
            batch: self.batch,
            length: self.seq_len,
            documents: self.documents,
            carried: self.carry_state,
            checkpointing: self.activation_checkpointing.into(),
            // Rate and step are inputs of the module.
            hyper: AdamW {
                lr: 1.0,
                beta1: self.beta1,
                beta2: self.beta2,
                eps: self.eps,
                weight_decay: self.weight_decay,
                step: 1,
            },
            max_norm: self.max_grad_norm,
            sequence_parallel: self.sequence_parallel_enabled,
            zero1: self.use_zero_1,
            options: Options {
                layers: self.layer_loop.into(),
                in_place: !self.not_in_place,
                dp: self.dp,
                tp: self.tp,
                ..Options::default()
            },
        }
    }
}

pub(super) fn run(args: &CompileArgs) -> Result<(), Error> {
    args.check()?;
    let (model, config) = resolve_model(
        args.model.as_deref(),
        args.init_from.as_deref(),
        args.vocab_size,
        args.n_groups,
        args.rmsnorm_across_groups,
    )?;
    check_ranks(&config, args.tp)?;
    fs::create_dir_all(&args.output_dir).map_err(|cause| Error::io("make", &args.output_dir, &cause))?;
    // A manifest stands for a whole set of modules: the old one goes first, the new one comes last.
    let manifest = args.output_dir.join("manifest.json");
    if manifest.exists() {
        fs::remove_file(&manifest).map_err(|cause| Error::io("replace", &manifest, &cause))?;
    }
    let recording = args.recording(&config);
    let mut modules = recording.micro_steps_of(args.layer_groups)?;
    let steps: Vec<String> = modules.iter().map(|module| module.proto.name.clone()).collect();
    modules.extend([recording.update(), recording.eval()]);
    // What training holds on the device from step to step, whatever runs; decoding is for itself.
    let held = held(&modules);
    modules.push(recording.decode());
    let target = neuron::Target::from(args.target);
    let (mut entries, mut commands) = (Vec::new(), Vec::new());
    for module in &modules {
        let name = module.proto.name.clone();
        keeps_rules(module)?;
        let needs = estimate(&module.proto);
        let memory = memory(&needs, if name == "decode" { needs.arguments } else { held });
        warn(target, &name, memory, needs.work.instructions);
        let contents = module.to_bytes();
        let file = format!("{name}.hlo.pb");
        put(&args.output_dir.join(&file), &contents)?;
        put(&args.output_dir.join(format!("{name}.txt")), module.to_text().as_bytes())?;
        print_line(&format!(
            "{name:<12} {:>6} instructions in {file} ({}); on the device about {} of memory, {} instructions",
            module.instructions(),
            bytes(contents.len() as u64),
            bytes(memory),
            needs.work.instructions
        ))?;
        let command = neuronx_cc(args.target, &name);
        entries.push(json!({
            "name": name,
            "file": file,
            "crc32": format!("{:08x}", crc32fast::hash(&contents)),
            "inputs": module.inputs.iter().map(port).collect::<Vec<_>>(),
            "outputs": module.outputs.iter().map(port).collect::<Vec<_>>(),
            "aliases": module.aliases,
            "instructions": module.instructions(),
            "estimate": {
                "arguments": needs.arguments, "outputs": needs.outputs, "temporaries": needs.temporaries,
                "temporaries_at_most": needs.temporaries_at_most,
                "temporaries_in_any_order": needs.temporaries_in_any_order,
                "memory": memory, "memory_of_target": target.memory(),
                "device_instructions": needs.work.instructions, "most_device_instructions": MAX_INSTRUCTIONS,
                "flops": needs.work.flops,
                "collectives": needs.work.collectives, "bytes_sent": needs.work.sent,
            },
            "compile": command,
        }));
        commands.push(command);
    }
    let text = manifest_text(args, &model, &config, held, &steps, entries)?;
    put(&manifest, text.as_bytes())?;
    advise(args, &recording, steps.len().div_ceil(2), target);
    // A cache that somebody names is to be filled, and without the compiler that is an error.
    if args.compile_cache.is_some() || on_path(neuron::COMPILER) {
        return fill_cache(args, &modules);
    }
    print_line(&how_to_go_on(args, &commands))
}

/// Has the compiler make what `train --device neuron` looks for. A module that it refuses does not keep it from the others.
fn fill_cache(args: &CompileArgs, modules: &[Module]) -> Result<(), Error> {
    let cache = args.compile_cache.clone().unwrap_or_else(neuron::default_cache);
    let compiler = neuron::Compiler::new(args.target.into(), &cache, |line| say(line))?;
    let mut refused = Vec::new();
    for module in modules {
        let (name, begun) = (&module.proto.name, Instant::now());
        match compiler.compiled(module) {
            Ok(neff) => {
                let time = begun.elapsed().as_secs_f64();
                print_line(&format!("{name:<12} compiled ({time:.1} s): {}", neff.display()))?;
            }
            Err(fault) if fault.kind == Kind::Compile => {
                say(format_args!("{fault}\n{}", fault.hint));
                refused.push(name.as_str());
            }
            Err(fault) => return Err(fault.into()),
        }
    }
    if !refused.is_empty() {
        let (names, compiler) = (refused.join(", "), neuron::COMPILER);
        return Err(Error::new(format!("{compiler} refuses {names}")).with_hint("its words are shown above"));
    }
    print_line(&format!(
        "They are in {}, where `elapid train --device neuron` looks; for an instance without the compiler, copy that folder.",
        cache.display()
    ))
}

/// Bytes of a rank's device while a module runs that needs so much, beside `held`.
fn memory(needs: &Estimate, held: u64) -> u64 {
    held + needs.outputs + needs.temporaries_at_most
}

/// The most that any of these modules needs while a device holds the inputs of all.
fn peak(modules: &[Module]) -> u64 {
    let held = held(modules);
    modules.iter().map(|module| memory(&estimate(&module.proto), held)).max().unwrap_or(0)
}

/// Where a step in modules of `groups` groups of layers does not fit into a core, says what would.
fn advise(args: &CompileArgs, recording: &Recording<'_>, groups: usize, target: neuron::Target) {
    let with = |checkpointing, groups| {
        let mut modules = Recording { checkpointing, ..*recording }.micro_steps(groups);
        modules.extend([recording.update(), recording.eval()]);
        peak(&modules)
    };
    let mut fits = Vec::new();
    if with(recording.checkpointing, groups) <= target.memory() {
        return;
    }
    let mut consider = |flags: String, needs: u64| {
        let good = needs <= target.memory();
        if good {
            fits.push(format!("{flags} ({})", bytes(needs)));
        }
        good
    };
    if recording.checkpointing == Checkpointing::None {
        let flags = "--activation-checkpointing block".to_owned();
        consider(flags, with(Checkpointing::Block, groups));
    }
    let most = if args.carry_state { 1 } else { recording.config.num_hidden_layers };
    let mut more = 2 * groups;
    while more <= most && !consider(format!("--layer-groups {more}"), with(recording.checkpointing, more)) {
        more *= 2;
    }
    let advice = if fits.is_empty() {
        "no way to write the layers makes it fit: share the model out to more ranks (--tp; --dp with --use-zero-1), or make \
         --batch or --seq-len smaller"
            .to_owned()
    } else {
        format!("it would fit with {}", fits.join(", or with "))
    };
    say(format_args!("hint: {advice}"));
}

/// Bytes of all inputs of these modules together, each name once: what a rank keeps on its device.
fn held(modules: &[Module]) -> u64 {
    let ports = modules.iter().flat_map(|module| &module.inputs);
    let sizes: BTreeMap<&str, usize> =
        ports.map(|port| (port.name.trim_end_matches(".must_alias_input"), port.shape.bytes())).collect();
    sizes.into_values().sum::<usize>() as u64
}

/// Says where a module is too large for a core.
fn warn(target: neuron::Target, name: &str, memory: u64, instructions: u64) {
    let name_of_target = target.name();
    if memory > target.memory() {
        say(format_args!(
            "warning: {name} needs about {} of device memory; a core of {name_of_target} has {}",
            bytes(memory),
            bytes(target.memory())
        ));
    }
    if instructions > MAX_INSTRUCTIONS {
        say(format_args!(
            "warning: {name} may become {instructions} instructions; the compiler takes {MAX_INSTRUCTIONS}"
        ));
    }
}

fn port(port: &Port) -> Value {
    let dtype = match port.shape.ty {
        Type::F32 => "f32",
        Type::Bf16 => "bf16",
        Type::S32 => "s32",
        Type::Pred => "pred",
    };
    json!({ "name": port.name, "dtype": dtype, "shape": port.shape.dims })
}

fn manifest_text(
    args: &CompileArgs,
    model: &str,
    config: &ModelConfig,
    held: u64,
    steps: &[String],
    modules: Vec<Value>,
) -> Result<String, Error> {
    let config: Value = serde_json::from_str(&config.to_json())
        .map_err(|cause| Error::new(format!("the configuration cannot be written: {cause}")))?;
    let manifest = json!({
        "elapid": env!("CARGO_PKG_VERSION"),
        "target": args.target,
        "model": model,
        "config": config,
        "dtype": args.dtype,
        "batch": args.batch,
        "seq_len": args.seq_len,
        "documents": args.documents,
        "carried": args.carry_state,
        "in_place": !args.not_in_place,
        "tp": args.tp,
        "dp": args.dp,
        "zero1": args.use_zero_1,
        "sequence_parallel": args.sequence_parallel_enabled,
        "held": held,
        "micro_step": steps,
        "rank_inputs": {
            "rank": "[data-parallel rank, tensor-parallel rank]; rank r of a run is r / tp and r mod tp of the two",
        },
        "step_inputs": {
            "scale": "1 / number of labels that count since the last update",
            "lr": "learning rate of the step",
            "bias_correction1": "1 - beta1^step, step counted from 1",
            "bias_correction2_root": "sqrt(1 - beta2^step)",
        },
        "beta1": args.beta1,
        "beta2": args.beta2,
        "modules": modules,
    });
    Ok(format!("{manifest:#}\n"))
}

/// The compiler's command line for a module, in the folder of the modules.
fn neuronx_cc(target: Target, name: &str) -> String {
    let flags = neuron::flags(target.into()).join(" ");
    format!("neuronx-cc compile --framework XLA {name}.hlo.pb {flags} --output {name}.neff")
}

/// Whether a program of that name can be started from here.
fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn how_to_go_on(args: &CompileArgs, commands: &[String]) -> String {
    format!(
        "neuronx-cc is not on this machine's path. Run this command again on an x86-64 Linux machine with the AWS Neuron SDK \
         (no device is needed, but tens of GB of memory): there it also compiles them, for `elapid train --device neuron`. \
         Without elapid, copy {} there and run in that folder:\n  {}",
        args.output_dir.display(),
        commands.join("\n  ")
    )
}

/// Writes a file aside and renames it into place.
fn put(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let aside = path.with_extension("partial");
    fs::write(&aside, contents)
        .and_then(|()| fs::rename(&aside, path))
        .map_err(|cause| Error::io("write", path, &cause))
}
