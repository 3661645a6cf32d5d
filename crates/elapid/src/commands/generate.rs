//! `elapid generate`.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::print_line;
use crate::Error;
use crate::config::run::Dtype;
use crate::data::Tokenizer;
use crate::generate::{Sampler, Sampling, generate};
use crate::model::Mamba2ForCausalLM;
use crate::train::cpu;

/// Flags of `elapid generate`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub(super) struct GenerateArgs {
    /// Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to continue
    #[arg(long, group = "input")]
    prompt: Option<String>,
    /// Token ids to continue
    #[arg(long, group = "input", value_delimiter = ',', value_name = "1,2,3")]
    prompt_ids: Option<Vec<u32>>,
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
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// Compute dtype
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Dtype,
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
    let tokenizer = tokenizer(&args.model, args.prompt.is_some())?;
    let backend = cpu(args.threads)?;
    let model = Mamba2ForCausalLM::from_pretrained(&backend, &args.model, args.dtype.compute())?;
    let config = model.config();
    let prompt = match (&args.prompt_ids, &args.prompt, &tokenizer) {
        (Some(ids), _, _) => ids.clone(),
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text)?,
        _ => Vec::new(),
    };
    if prompt.is_empty() {
        return Err(
            Error::new("the prompt holds no token").with_hint("give some text, or --prompt-ids 1,2,3")
        );
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(Error::new(format!(
            "the prompt holds token {id}, but the model's vocabulary has {} tokens",
            config.vocab_size
        ))
        .with_hint("tokenize with the model's own tokenizer"));
    }

    let ends: Vec<u32> = match &config.eos_token_id {
        Some(ids) if !args.ignore_eos => ids.as_slice().to_vec(),
        _ => Vec::new(),
    };
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut text = Text::new(tokenizer.as_ref(), &prompt, !args.json);
    text.show_prompt(args.prompt.as_deref());
    let ids = generate(
        &backend,
        &model,
        &prompt,
        args.max_new_tokens,
        &mut Sampler::new(sampling),
        |id| ends.contains(&id),
        |id| text.push(id),
    );
    if args.json {
        let object = json!({ "prompt_ids": prompt, "ids": ids, "text": text.done() });
        return print_line(&object.to_string());
    }
    text.show_rest(&text.done().unwrap_or_default());
    print_line("")
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

/// The continuation as text, shown while it grows.
struct Text<'a> {
    tokenizer: Option<&'a Tokenizer>,
    prompt: Vec<u32>,
    ids: Vec<u32>,
    /// Bytes of the decoded continuation that have been shown.
    shown: usize,
    live: bool,
}

impl<'a> Text<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, prompt: &[u32], live: bool) -> Self {
        Self { tokenizer, prompt: prompt.to_vec(), ids: Vec::new(), shown: 0, live }
    }

    fn show_prompt(&self, text: Option<&str>) {
        if self.live {
            show(&match (text, self.tokenizer) {
                (Some(text), _) => text.to_owned(),
                (None, Some(tokenizer)) => tokenizer.decode(&self.prompt),
                (None, None) => self.prompt.iter().map(|id| format!("{id} ")).collect(),
            });
        }
    }

    fn push(&mut self, id: u32) {
        self.ids.push(id);
        if !self.live {
            return;
        }
        if self.tokenizer.is_none() {
            return show(&format!("{id} "));
        }
        let text = self.done().unwrap_or_default();
        // A character may span several tokens: its first ones decode to a replacement character.
        if !text.ends_with('\u{fffd}') {
            self.show_rest(&text);
        }
    }

    fn show_rest(&mut self, text: &str) {
        show(text.get(self.shown..).unwrap_or_default());
        self.shown = text.len();
    }

    /// The continuation; None without a tokenizer.
    fn done(&self) -> Option<String> {
        self.tokenizer.map(|tokenizer| tokenizer.decode(&self.ids))
    }
}

fn show(text: &str) {
    let mut out = std::io::stdout();
    // A reader that has gone away is no error of ours.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
