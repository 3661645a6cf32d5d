//! `elapid generate`.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::print_line;
use crate::Error;
use crate::config::run::{Device, DeviceArgs, Dtype};
use crate::data::Tokenizer;
use crate::forward::Forward;
use crate::generate::{Sampling, generate, generate_by};
use crate::model::Mamba2ForCausalLM;
use crate::train::cpu;

/// Flags of `elapid generate`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub(super) struct GenerateArgs {
    /// Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to continue; repeated: several texts, in one batch
    #[arg(long, group = "input")]
    prompt: Vec<String>,
    /// Token ids to continue; repeated: several lists, in one batch
    #[arg(long, group = "input", value_name = "1,2,3", value_parser = ids)]
    prompt_ids: Vec<Vec<u32>>,
    /// File with a text to continue in each line, in one batch
    #[arg(long, group = "input", value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Longest continuation
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
    /// 0 always takes the most likely token
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Draw from the k most likely tokens only; 0: from all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the most likely tokens up to this total probability only
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Seed of the draws, of every prompt anew
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// Compute dtype
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Dtype,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    on: DeviceArgs,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &GenerateArgs) -> Result<(), Error> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::new(format!("--temperature is {}", args.temperature))
            .with_hint("0 takes the most likely token; 1 draws as the model says"));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(
            Error::new(format!("--top-p is {}", args.top_p)).with_hint("it is more than 0, at most 1")
        );
    }
    let device = Forward::open(args.device, &args.on)?;
    let texts = texts(args)?;
    let tokenizer = tokenizer(&args.model, args.prompt_ids.is_empty())?;
    let backend = cpu(args.threads)?;
    let model = Mamba2ForCausalLM::from_pretrained(&backend, &args.model, args.dtype.compute())?;
    let config = model.config();
    let prompts = match &tokenizer {
        Some(tokenizer) if args.prompt_ids.is_empty() => {
            texts.iter().map(|text| tokenizer.encode(text)).collect::<Result<_, _>>()?
        }
        _ => args.prompt_ids.clone(),
    };
    let several = prompts.len() > 1 || args.prompts.is_some();
    for (index, prompt) in prompts.iter().enumerate() {
        check(prompt, config.vocab_size)
            .map_err(|error| if several { error.at(format!("prompt {}", index + 1)) } else { error })?;
    }

    let ends: Vec<u32> = match &config.eos_token_id {
        Some(ids) if !args.ignore_eos => ids.as_slice().to_vec(),
        _ => Vec::new(),
    };
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let text = |index: usize| Text::new(tokenizer.as_ref(), &prompts[index], texts.get(index));
    let mut live = text(0);
    let watched = !several && !args.json;
    if watched {
        show(&live.prompt);
    }
    let is_end = |id| ends.contains(&id);
    let on_token = |_, id| {
        if watched {
            show(live.push(id));
        }
    };
    let most = args.max_new_tokens;
    let found = match device {
        None => generate(&backend, &model, &prompts, most, sampling, is_end, on_token),
        Some(device) => {
            let decode = device.decoder(&backend, &model, prompts.len())?;
            generate_by(decode, &prompts, most, sampling, is_end, on_token)?
        }
    };
    if args.json {
        let results = prompts.iter().zip(&found).map(|(prompt, ids)| {
            json!({ "prompt_ids": prompt, "ids": ids, "text": tokenizer.as_ref().map(|t| t.decode(ids)) })
        });
        let mut results: Vec<_> = results.collect();
        let object = if several { json!({ "results": results }) } else { results.remove(0) };
        return print_line(&object.to_string());
    }
    if watched {
        show(live.rest());
        return print_line("");
    }
    for (index, ids) in found.iter().enumerate() {
        let gap = if index == 0 { "" } else { "\n" };
        print_line(&format!("{gap}{}{}", text(index).prompt, written(tokenizer.as_ref(), ids)))?;
    }
    Ok(())
}

/// The texts of `--prompt` and `--prompts`.
fn texts(args: &GenerateArgs) -> Result<Vec<String>, Error> {
    let Some(path) = &args.prompts else { return Ok(args.prompt.clone()) };
    let text = std::fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))?;
    if text.is_empty() {
        return Err(
            Error::new(format!("{} is empty", path.display())).with_hint("give a prompt in each line")
        );
    }
    Ok(text.lines().map(str::to_owned).collect())
}

fn ids(list: &str) -> Result<Vec<u32>, std::num::ParseIntError> {
    list.split(',').map(|id| id.trim().parse()).collect()
}

fn check(prompt: &[u32], vocab_size: usize) -> Result<(), Error> {
    if prompt.is_empty() {
        return Err(
            Error::new("the prompt holds no token").with_hint("give some text, or --prompt-ids 1,2,3")
        );
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(Error::new(format!(
            "the prompt holds token {id}, but the model's vocabulary has {vocab_size} tokens"
        ))
        .with_hint("tokenize with the model's own tokenizer"));
    }
    Ok(())
}

/// The tokenizer in a model folder; None where there is none and none is `needed`.
fn tokenizer(dir: &Path, needed: bool) -> Result<Option<Tokenizer>, Error> {
    if !dir.is_dir() {
        return Err(Error::new(format!("there is no model folder {}", dir.display()))
            .with_hint("a model is a folder, such as the hf/ that `elapid train` leaves in its run folder"));
    }
    if dir.join("tokenizer.json").exists() {
        return Ok(Some(Tokenizer::load(&dir.display().to_string())?));
    }
    if needed {
        return Err(Error::new(format!("{} holds no tokenizer.json", dir.display()))
            .with_hint("put the model's tokenizer.json there, or give --prompt-ids 1,2,3"));
    }
    Ok(None)
}

/// A prompt and its continuation as text.
struct Text<'a> {
    tokenizer: Option<&'a Tokenizer>,
    prompt: String,
    ids: Vec<u32>,
    continuation: String,
    /// Bytes of the continuation that have been handed out.
    shown: usize,
}

impl<'a> Text<'a> {
    /// `text` is the prompt where it was given as text.
    fn new(tokenizer: Option<&'a Tokenizer>, prompt: &[u32], text: Option<&String>) -> Self {
        let prompt = text.map_or_else(|| written(tokenizer, prompt), String::clone);
        Self { tokenizer, prompt, ids: Vec::new(), continuation: String::new(), shown: 0 }
    }

    /// Adds a token; gives what is new of the text.
    fn push(&mut self, id: u32) -> &str {
        self.ids.push(id);
        self.continuation = written(self.tokenizer, &self.ids);
        // A character may span several tokens: its first ones decode to a replacement character.
        if self.continuation.ends_with('\u{fffd}') { "" } else { self.rest() }
    }

    /// What has not been handed out yet.
    fn rest(&mut self) -> &str {
        let from = std::mem::replace(&mut self.shown, self.continuation.len());
        self.continuation.get(from..).unwrap_or_default()
    }
}

/// Tokens as text; as numbers without a tokenizer.
fn written(tokenizer: Option<&Tokenizer>, ids: &[u32]) -> String {
    match tokenizer {
        Some(tokenizer) => tokenizer.decode(ids),
        None => ids.iter().map(|id| format!("{id} ")).collect(),
    }
}

fn show(text: &str) {
    let mut out = std::io::stdout();
    // A reader that has gone away is no error of ours.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
