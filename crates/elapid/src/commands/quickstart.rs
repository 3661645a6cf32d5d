//! `elapid quickstart`: the whole way in a few minutes, offline.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;

use super::{print_line, train};
use crate::Error;
use crate::config::run::{TrainArgs, free_folder};
use crate::data::{Dataset, TokenizeOptions, Tokenizer, tokenize};
use crate::generate::{Sampling, generate};
use crate::model::Mamba2ForCausalLM;
use crate::train::{cpu, last_blocks};

/// The repository's own documentation and code.
const TEXT: &str = include_str!(concat!(env!("OUT_DIR"), "/quickstart.txt"));

const SEQ_LEN: usize = 256;
/// Share of the text that is kept from training, for the evaluation.
const HELD_OUT: f64 = 0.05;

/// Flags of `elapid quickstart`.
#[derive(clap::Args)]
pub(super) struct QuickstartArgs {
    /// Text file, .jsonl file or folder to learn from [default: Elapid's own code and documentation]
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u64).range(1..))]
    max_steps: u64,
    /// Folder for everything [default: runs/quickstart, or the first free runs/quickstart-N]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// `train`'s flags on their own, so that the quickstart runs exactly the command that it prints.
#[derive(Parser)]
struct TrainCommand {
    #[command(flatten)]
    args: TrainArgs,
}

pub(super) fn run(args: &QuickstartArgs) -> Result<(), Error> {
    let folder = args.output_dir.clone().unwrap_or_else(|| free_folder(Path::new("runs"), "quickstart"));
    if folder.exists() {
        return Err(Error::new(format!("{} exists already", folder.display()))
            .with_hint("give another --output-dir, or leave it out"));
    }
    fs::create_dir_all(&folder).map_err(|cause| Error::io("create", &folder, &cause))?;
    let text = match &args.text {
        Some(path) => path.clone(),
        None => {
            let path = folder.join("text.txt");
            fs::write(&path, TEXT).map_err(|cause| Error::io("write", &path, &cause))?;
            path
        }
    };

    print_line(&format!("1. tokens: {} in blocks of {SEQ_LEN} bytes", text.display()))?;
    let data = folder.join("data");
    let card = tokenize(&TokenizeOptions {
        dataset: text,
        seq_len: SEQ_LEN,
        save_path: data.clone(),
        append_eos: true,
        ..TokenizeOptions::default()
    })
    .map(|tokenized| tokenized.train)
    .inspect_err(|_| {
        // There is nothing in it yet that anybody could want.
        let _ = fs::remove_dir_all(&folder);
    })?;

    let flags = train_flags(args, &data, &folder);
    print_line(&format!("2. training: elapid train {}", flags.join(" ")))?;
    let command = TrainCommand::try_parse_from(std::iter::once("elapid".to_owned()).chain(flags))
        .map_err(|cause| Error::new(cause.to_string()))?;
    let outcome = crate::train::train(&command.args.resolve()?)?;
    train::report(&outcome)?;

    let model_dir = &outcome.model_dir;
    let backend = cpu(args.threads)?;
    let model = Mamba2ForCausalLM::from_pretrained(&backend, model_dir, elapid_tensor::DType::F32)?;
    let tokenizer = Tokenizer::load(&model_dir.display().to_string())?;
    let sampling = Sampling { temperature: 0.7, top_k: 0, top_p: 0.95, seed: 0 };
    let prompt = held_out_words(&data, &tokenizer)?;
    let prompts = [tokenizer.encode(&prompt)?];
    let is_end = |id| Some(id) == card.eos_id;
    let ids = generate(&backend, &model, &prompts, 200, sampling, is_end, |_, _| {});
    let sample = format!("{prompt}{}", tokenizer.decode(&ids[0]));
    print_line(&format!(
        "3. a sample, continuing {prompt:?} of the held-out text:\n   │ {}",
        sample.replace('\n', "\n   │ ")
    ))?;

    let (folder, data, model) = (folder.display(), data.display(), model_dir.display());
    print_line(&format!(
        "\nEverything is in {folder}:\n  \
           {data}  the dataset (Python: datasets.load_from_disk)\n  \
           {folder}/train/metrics.jsonl  loss and speed of every step\n  \
           {model}  the model (Python: AutoModelForCausalLM.from_pretrained)\n\
         Next:\n  \
           elapid generate --model {model} --prompt \"{prompt}\"\n  \
           elapid eval --model {model} --data-dir {data} --eval-fraction {HELD_OUT}\n  \
           elapid tokenize --dataset YOUR_TEXT --tokenizer bytes --seq-len 1024 --save-path data/mine\n  \
           elapid train --model mamba2-130m --data-dir data/mine --max-steps 1000 --dtype bfloat16"
    ))
}

/// The first words of the held-out text, without what a shell would take for its own.
fn held_out_words(data: &Path, tokenizer: &Tokenizer) -> Result<String, Error> {
    let data = Dataset::open(data)?;
    let block = data.sample(last_blocks(data.len(), HELD_OUT)?.start)?;
    let ids: Vec<u32> = block.input_ids.iter().map(|&id| id as u32).collect();
    let text = tokenizer.decode(&ids);
    let plain = |word: &&str| word.chars().all(|c| c.is_alphanumeric() || ".,:;-_".contains(c));
    // The first word may be the end of one.
    let words: Vec<_> = text.split_whitespace().skip(1).filter(plain).take(3).collect();
    Ok(if words.is_empty() { "The".into() } else { words.join(" ") })
}

fn train_flags(args: &QuickstartArgs, data: &Path, folder: &Path) -> Vec<String> {
    let mut flags: Vec<String> = [
        ("--model", "tiny".to_owned()),
        ("--vocab-size", "257".to_owned()),
        ("--data-dir", data.display().to_string()),
        ("--eval-fraction", HELD_OUT.to_string()),
        ("--shuffle", String::new()),
        ("--batch", "8".to_owned()),
        ("--max-steps", args.max_steps.to_string()),
        ("--lr", "3e-3".to_owned()),
        ("--warmup-steps", (args.max_steps / 20).to_string()),
        ("--logging-interval", "25".to_owned()),
        ("--output-dir", folder.join("train").display().to_string()),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .filter(|word| !word.is_empty())
    .collect();
    if let Some(threads) = args.threads {
        flags.extend(["--threads".to_owned(), threads.to_string()]);
    }
    flags
}
