//! `elapid compile`.

use std::fs;
use std::path::{Path, PathBuf};

use elapid_tensor::AdamW;
use elapid_xla::driver::neuron;
use elapid_xla::{Estimate, Module, Options, Port, Type, estimate, lint};
use serde_json::{Value, json};

use super::print_line;
use crate::Error;
use crate::config::ModelConfig;
use crate::config::run::{
    ActivationCheckpointing, Dtype, LayerLoop, Target, at_least_one, check, resolve_model,
};
use crate::error::say;
use crate::record::Recording;
use crate::train::memory::bytes;

/// More than this after unrolling, and the compiler gives up.
const MAX_INSTRUCTIONS: u64 = 5_000_000;

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
    /// Tensor-parallel ranks; only 1 so far
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: usize,
    /// Data-parallel ranks; only 1 so far
    #[arg(long, value_name = "N", default_value_t = 1)]
    dp: usize,
    /// Not yet: needs --dp
    #[arg(long)]
    use_zero_1: bool,
    /// Not yet: needs --tp
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
        for (flag, given) in [
            (format!("--tp {}", self.tp), self.tp != 1),
            (format!("--dp {}", self.dp), self.dp != 1),
            ("--use-zero-1".into(), self.use_zero_1),
            ("--sequence-parallel-enabled".into(), self.sequence_parallel_enabled),
        ] {
            if given {
                return Err(Error::new(format!("{flag}: modules for several ranks cannot be written yet"))
                    .with_hint("leave it out: the modules are for one core"));
            }
        }
        Ok(())
    }

    fn recording<'c>(&self, config: &'c ModelConfig) -> Recording<'c> {
        Recording {
            config,
            dtype: self.dtype.compute(),
            batch: self.batch,
            length: self.seq_len,
            documents: self.documents,
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
            options: Options { layers: self.layer_loop.into(), ..Options::default() },
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
    fs::create_dir_all(&args.output_dir).map_err(|cause| Error::io("make", &args.output_dir, &cause))?;
    // A manifest stands for a whole set of modules: the old one goes first, the new one comes last.
    let manifest = args.output_dir.join("manifest.json");
    if manifest.exists() {
        fs::remove_file(&manifest).map_err(|cause| Error::io("replace", &manifest, &cause))?;
    }
    let recording = args.recording(&config);
    let recorders: [fn(&Recording<'_>) -> Module; 4] =
        [|r| r.micro_step(), |r| r.update(), |r| r.eval(), |r| r.decode()];
    let (mut entries, mut commands) = (Vec::new(), Vec::new());
    for record in recorders {
        let module = record(&recording);
        let name = module.proto.name.clone();
        let broken = lint(&module.proto);
        if let Some(first) = broken.first() {
            return Err(Error::new(format!("module {name} breaks {} rules: {first}", broken.len()))
                .with_hint("this is a fault of elapid; please report the command line"));
        }
        let needs = estimate(&module.proto);
        warn(args.target.into(), &name, needs);
        let contents = module.to_bytes();
        let file = format!("{name}.hlo.pb");
        put(&args.output_dir.join(&file), &contents)?;
        put(&args.output_dir.join(format!("{name}.txt")), module.to_text().as_bytes())?;
        print_line(&format!(
            "{name:<11} {:>6} instructions in {file} ({}); on the device about {} of memory, {} instructions",
            module.instructions(),
            bytes(contents.len() as u64),
            bytes(needs.memory()),
            needs.instructions
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
                "memory": needs.memory(), "memory_of_target": neuron::Target::from(args.target).memory(),
                "device_instructions": needs.instructions, "most_device_instructions": MAX_INSTRUCTIONS,
            },
            "compile": command,
        }));
        commands.push(command);
    }
    let text = manifest_text(args, &model, &config, entries)?;
    put(&manifest, text.as_bytes())?;
    print_line(&how_to_go_on(args, &commands))
}

/// Says where a module is too large for a core.
fn warn(target: neuron::Target, name: &str, needs: Estimate) {
    let name_of_target = target.name();
    if needs.memory() > target.memory() {
        say(format_args!(
            "warning: {name} needs about {} of device memory; a core of {name_of_target} has {}",
            bytes(needs.memory()),
            bytes(target.memory())
        ));
    }
    if needs.instructions > MAX_INSTRUCTIONS {
        say(format_args!(
            "warning: {name} may become {} instructions; the compiler takes {MAX_INSTRUCTIONS}",
            needs.instructions
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
        "tp": args.tp,
        "dp": args.dp,
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
    let dir = args.output_dir.display();
    let place = if on_path("neuronx-cc") {
        format!("Next, in {dir}:")
    } else {
        format!(
            "neuronx-cc is not on this machine's path. Copy {dir} to an x86-64 Linux machine with the AWS Neuron SDK (no \
             device is needed, but tens of GB of memory) and run there, in that folder:"
        )
    };
    format!("{place}\n  {}", commands.join("\n  "))
}

/// Writes a file aside and renames it into place.
fn put(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let aside = path.with_extension("partial");
    fs::write(&aside, contents)
        .and_then(|()| fs::rename(&aside, path))
        .map_err(|cause| Error::io("write", path, &cause))
}
