//! Text ↔ token ids: plain bytes, or any Hugging Face `tokenizer.json`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::Error;

/// End of text of the `bytes` tokenizer.
const END_OF_TEXT: &str = "<|endoftext|>";
const END_OF_TEXT_ID: u32 = 256;

/// Names of the end-of-text token, for a tokenizer without a configuration that says it.
const WELL_KNOWN_EOS: [&str; 6] =
    [END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]"];

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// Turns text into token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    eos_id: Option<u32>,
    /// What [`Tokenizer::save`] writes: file names and contents.
    files: Vec<(&'static str, Vec<u8>)>,
}

#[derive(Debug)]
enum Kind {
    /// The same ids as [`bytes_json`] gives, without the way through it.
    Bytes,
    Json(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// `bytes` (ids 0 to 255 are the bytes of UTF-8 text, 256 is `<|endoftext|>`), or the path of a `tokenizer.json`
    /// or of the folder that holds one. A folder named `bytes` is reached as `./bytes`.
    ///
    /// # Errors
    /// When there is no such file, it is no tokenizer, or its configuration names an end-of-text token that it lacks.
    pub fn load(spec: &str) -> Result<Self, Error> {
        if spec == "bytes" {
            return Ok(Self::bytes());
        }
        let path = Path::new(spec);
        let path = if path.is_dir() { path.join(TOKENIZER) } else { path.to_owned() };
        if !path.exists() {
            let hint = "give `bytes`, the path of a tokenizer.json or of the folder that holds one; nothing is \
                        downloaded, and transformers' `save_pretrained` writes one for most tokenizers";
            return Err(Error::new(format!("there is no tokenizer {}", path.display())).with_hint(hint));
        }
        let json = read(&path)?;
        if json == bytes_json() {
            return Ok(Self::bytes());
        }
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&json).map_err(|cause| {
            Error::new(format!("{} is not a Hugging Face tokenizer: {cause}", path.display()))
                .with_hint("it must be a tokenizer.json as the `tokenizers` library writes it")
        })?;
        // A file may ask for blocks of fixed length; documents are tokenized whole.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).expect("only a length can be refused");

        let mut files = vec![(TOKENIZER, json)];
        // Beside a file of another name they may belong to another tokenizer.
        if path.file_name().is_some_and(|name| name == TOKENIZER) {
            for name in [CONFIG, SPECIAL_TOKENS] {
                let companion = path.with_file_name(name);
                if companion.exists() {
                    files.push((name, read(&companion)?));
                }
            }
        }
        let eos_id = match named_eos(&files, &path)? {
            Some(token) => Some(tokenizer.token_to_id(&token).ok_or_else(|| {
                Error::new(format!("{}: the vocabulary has no eos_token {token:?}", path.display()))
                    .with_hint(format!("correct eos_token in the {CONFIG} beside it"))
            })?),
            None => WELL_KNOWN_EOS.iter().find_map(|token| {
                let id = tokenizer.token_to_id(token)?;
                tokenizer.get_added_tokens_decoder().contains_key(&id).then_some(id)
            }),
        };
        if !files.iter().any(|(name, _)| *name == CONFIG) {
            files.push((CONFIG, minimal_config(eos_id.and_then(|id| tokenizer.id_to_token(id)))));
        }
        Ok(Self { kind: Kind::Json(Box::new(tokenizer)), eos_id, files })
    }

    fn bytes() -> Self {
        let files = vec![(TOKENIZER, bytes_json()), (CONFIG, minimal_config(Some(END_OF_TEXT.to_owned())))];
        Self { kind: Kind::Bytes, eos_id: Some(END_OF_TEXT_ID), files }
    }

    /// The ids of `text`. Nothing is added at its ends; a special token spelled out in it becomes that token.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text and none for the unknown.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        match &self.kind {
            Kind::Bytes => {
                let mut ids = Vec::with_capacity(text.len());
                for (i, part) in text.split(END_OF_TEXT).enumerate() {
                    if i > 0 {
                        ids.push(END_OF_TEXT_ID);
                    }
                    ids.extend(part.bytes().map(u32::from));
                }
                Ok(ids)
            }
            Kind::Json(tokenizer) => match tokenizer.encode_fast(text, false) {
                Ok(encoding) => Ok(encoding.get_ids().to_vec()),
                Err(cause) => Err(Error::new(format!("the tokenizer cannot encode the text: {cause}"))),
            },
        }
    }

    /// The text of `ids`, special tokens and unknown ids left out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            // A decoder fails on no sequence of tokens that it knows, and it is given no other.
            Kind::Json(tokenizer) => tokenizer.decode(ids, true).unwrap_or_default(),
        }
    }

    /// The highest id + 1, added tokens included.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Bytes => END_OF_TEXT_ID as usize + 1,
            Kind::Json(tokenizer) => {
                tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
            }
        }
    }

    /// The id that ends a text, where the tokenizer has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Writes the files from which transformers' `AutoTokenizer.from_pretrained(dir)` and [`Tokenizer::load`] load
    /// this tokenizer. Creates `dir` where it is missing.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
        for (name, content) in &self.files {
            let path = dir.join(name);
            fs::write(&path, content).map_err(|e| Error::io("write", &path, &e))?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|e| Error::io("read", path, &e))
}

/// The `eos_token` that the configuration files name: a string, or an object with the string as `content`.
fn named_eos(files: &[(&str, Vec<u8>)], tokenizer: &Path) -> Result<Option<String>, Error> {
    for (name, content) in files.iter().filter(|(name, _)| *name != TOKENIZER) {
        let config: Value = serde_json::from_slice(content).map_err(|e| {
            Error::new(format!("{}: not JSON: {e}", tokenizer.with_file_name(name).display()))
        })?;
        let token = &config["eos_token"];
        if let Some(token) = token.as_str().or(token["content"].as_str()) {
            return Ok(Some(token.to_owned()));
        }
    }
    Ok(None)
}

/// A class that takes everything from `tokenizer.json`: with none named, transformers would take the model's own.
fn minimal_config(eos: Option<String>) -> Vec<u8> {
    let mut config =
        json!({ "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false });
    if let Some(eos) = eos {
        config["eos_token"] = eos.into();
    }
    pretty(&config)
}

/// The `bytes` tokenizer for the `tokenizers` library: byte-level BPE without a merge. Its vocabulary spells each
/// byte as the character that GPT-2's byte-level alphabet gives it.
fn bytes_json() -> Vec<u8> {
    let vocab: serde_json::Map<String, Value> =
        byte_alphabet().zip(0..).map(|(symbol, id)| (symbol.to_string(), Value::from(id))).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    pretty(&json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": END_OF_TEXT_ID,
            "content": END_OF_TEXT,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": [],
        },
    }))
}

/// The characters of the bytes 0 to 255: Latin-1's visible ones stand for themselves, the others are counted up from
/// U+0100.
fn byte_alphabet() -> impl Iterator<Item = char> {
    let mut next = 0x100;
    (0..=u8::MAX).map(move |byte| {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("below U+0200")
    })
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain JSON");
    text.push(b'\n');
    text
}
