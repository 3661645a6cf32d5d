//! Text ↔ token ids: plain bytes, or any Hugging Face `tokenizer.json`.

use std::fs;
use std::path::Path;

use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::hub;
use super::words::{Encoder, fall_apart};
use crate::Error;
use crate::disk;

/// End of text of the `bytes` tokenizer.
const END_OF_TEXT: &str = "<|endoftext|>";
const END_OF_TEXT_ID: u32 = 256;

/// Names of the end-of-text token, for a tokenizer without a configuration that says it.
const WELL_KNOWN_EOS: [&str; 6] =
    [END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]"];

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// Length in bytes from which a text is tokenized in pieces: the library takes two hundred times the memory of a text.
pub(super) const PIECE: usize = 256 << 10;
/// Bytes on either side of a cut between pieces that are tokenized to try it.
const WINDOW: usize = 512;
/// Cuts to try before a piece grows by another [`PIECE`].
const TRIES: usize = 8;

/// Turns text into token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    /// Words may be tokenized one by one.
    falls_apart: bool,
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
    /// or of the folder that holds one. A folder named `bytes` is reached as `./bytes`. What does not exist and could be
    /// a name is looked for on the Hugging Face Hub and downloaded.
    ///
    /// # Errors
    /// When there is no such file or model, it is no tokenizer, or its configuration names an end-of-text token that it lacks.
    pub fn load(spec: &str) -> Result<Self, Error> {
        if spec == "bytes" {
            return Ok(Self::bytes());
        }
        let path = Path::new(spec);
        if !path.exists() && hub::is_name(spec) {
            let dir = hub::tokenizer(spec, &[TOKENIZER, CONFIG, SPECIAL_TOKENS])?;
            return Self::load(&dir.display().to_string());
        }
        let path = if path.is_dir() { path.join(TOKENIZER) } else { path.to_owned() };
        if !path.exists() {
            let hint = "give `bytes`, a model's name on the Hugging Face Hub, or the path of a tokenizer.json or of \
                        the folder that holds one; transformers' `save_pretrained` writes one for most tokenizers";
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
        let falls_apart = serde_json::from_slice(&json).is_ok_and(|json| fall_apart(&json));
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
        Ok(Self { kind: Kind::Json(Box::new(tokenizer)), falls_apart, eos_id, files })
    }

    fn bytes() -> Self {
        let files = vec![(TOKENIZER, bytes_json()), (CONFIG, minimal_config(Some(END_OF_TEXT.to_owned())))];
        Self { kind: Kind::Bytes, falls_apart: false, eos_id: Some(END_OF_TEXT_ID), files }
    }

    /// The ids of `text`. Nothing is added at its ends; a special token spelled out in it becomes that token.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text and none for the unknown.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let pieces: Result<Vec<_>, _> = self
            .pieces(text)
            .into_par_iter()
            .map(|piece| {
                let mut ids = Vec::new();
                Encoder::new(self).encode(piece, &mut ids).map(|()| ids)
            })
            .collect();
        Ok(pieces?.concat())
    }

    /// Whether words may be tokenized one by one ([`Encoder`]).
    pub(super) fn falls_apart(&self) -> bool {
        self.falls_apart
    }

    /// Adds the ids of `text`, which is tokenized in one.
    pub(super) fn encode_piece(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        match &self.kind {
            Kind::Bytes => {
                for (i, part) in text.split(END_OF_TEXT).enumerate() {
                    if i > 0 {
                        ids.push(END_OF_TEXT_ID);
                    }
                    ids.extend(part.bytes().map(u32::from));
                }
            }
            Kind::Json(tokenizer) => {
                let encoding = tokenizer.encode_fast(text, false).map_err(|cause| {
                    Error::new(format!("the tokenizer cannot encode the text: {cause}"))
                        .with_hint("it has no token for some part of the text and none for the unknown")
                })?;
                ids.extend_from_slice(encoding.get_ids());
            }
        }
        Ok(())
    }

    /// `text` in pieces that give the same tokens one by one as in one.
    fn pieces<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let (mut pieces, mut start, mut from) = (Vec::new(), 0, PIECE);
        while start + from < text.len() {
            match self.find_cut(&text[start..], from) {
                Some(cut) => {
                    pieces.push(&text[start..start + cut]);
                    (start, from) = (start + cut, PIECE);
                }
                None => from += PIECE,
            }
        }
        pieces.push(&text[start..]);
        pieces
    }

    /// A place soon after `from`, which is a multiple of [`PIECE`], where the text around it gives the same tokens in
    /// two as in one. Ends of words come into question; a tokenizer that marks the start of a text passes at none of
    /// them. It looks at less than two [`PIECE`]s beyond `from`.
    pub(super) fn find_cut(&self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        let boundary =
            |at: usize| (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        (from..bytes.len().min(from + PIECE))
            .filter(|&i| bytes[i].is_ascii_whitespace() && !bytes[i - 1].is_ascii_whitespace())
            .take(TRIES)
            .find(|&i| {
                let (start, end) = (boundary(i - WINDOW), boundary(i + WINDOW));
                let ids = |text: &str| {
                    let mut ids = Vec::new();
                    self.encode_piece(text, &mut ids).ok().map(|()| ids)
                };
                let both =
                    ids(&text[start..i]).zip(ids(&text[i..end])).map(|(left, right)| [left, right].concat());
                both.is_some() && both == ids(&text[start..end])
            })
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

    /// SHA-256 of its `tokenizer.json`, in hexadecimal digits.
    pub fn hash(&self) -> String {
        sha256(&self.files[0].1)
    }

    /// The id that ends a text, where the tokenizer has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The id of the token that stands for what the vocabulary lacks, where there is one.
    pub fn unknown_id(&self) -> Option<u32> {
        let Kind::Json(tokenizer) = &self.kind else { return None };
        let json: Value = serde_json::from_slice(&self.files[0].1).ok()?;
        let model = &json["model"];
        let by_place = model["unk_id"].as_u64().and_then(|id| u32::try_from(id).ok());
        by_place.or_else(|| tokenizer.token_to_id(model["unk_token"].as_str()?))
    }

    /// Writes the files from which transformers' `AutoTokenizer.from_pretrained(dir)` and [`Tokenizer::load`] load
    /// this tokenizer. Creates `dir` where it is missing.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
        for (name, content) in self.files() {
            disk::write(&dir.join(name), content)?;
        }
        disk::sync_names(dir)
    }

    /// Names and contents of the files that [`Self::save`] writes.
    pub(crate) fn files(&self) -> &[(&'static str, Vec<u8>)] {
        &self.files
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

/// SHA-256 in hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain JSON");
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: [&str; 5] = [
        "",
        "  two\tspaces\r\n\n",
        "größer 状態 🐍",
        "a<|endoftext|>b <|endoftext|>",
        "\0\u{7f}\u{a0}\u{ad}don't",
    ];

    fn load(path: &Path) -> Result<Tokenizer, Error> {
        Tokenizer::load(path.to_str().unwrap())
    }

    fn golden() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers/bpe")
    }

    /// Words `a` and `</s>` without a token for the unknown; `extra` is added to the file.
    fn words(dir: &Path, extra: &[(&str, Value)]) {
        let mut json = json!({
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": { "type": "Whitespace" },
            "model": { "type": "WordLevel", "unk_token": "?", "vocab": { "a": 0, "</s>": 7 } },
        });
        for (key, value) in extra {
            json[*key] = value.clone();
        }
        fs::write(dir.join(TOKENIZER), json.to_string()).unwrap();
    }

    fn added(content: &str, id: u32) -> Value {
        json!([{ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true }])
    }

    #[test]
    fn bytes_are_their_own_ids() {
        let tokenizer = Tokenizer::load("bytes").unwrap();
        assert_eq!(tokenizer.encode("Aé<|endoftext|>\n").unwrap(), [0x41, 0xc3, 0xa9, 256, 0x0a]);
        assert_eq!(tokenizer.decode(&[0x41, 0xc3, 256, 0xa9, 257, 0xff]), "Aé\u{fffd}");
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_id()), (257, Some(256)));
    }

    #[test]
    fn the_library_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = Tokenizer::load("bytes").unwrap();
        bytes.save(dir.path()).unwrap();
        let saved = load(dir.path()).unwrap();
        assert!(matches!(saved.kind, Kind::Bytes));

        let mut json = bytes_json();
        json.push(b'\n');
        fs::write(dir.path().join(TOKENIZER), json).unwrap();
        let library = load(dir.path()).unwrap();
        assert!(matches!(library.kind, Kind::Json(_)));
        assert_eq!((library.vocab_size(), library.eos_id()), (257, Some(256)));
        for text in TEXTS {
            let ids = bytes.encode(text).unwrap();
            assert_eq!(library.encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(library.decode(&ids), bytes.decode(&ids), "{text:?}");
        }
        let torn = [0xf0, 0x9f, 256, 0x41, 300, 0x80];
        assert_eq!(library.decode(&torn), bytes.decode(&torn));
    }

    #[test]
    fn ids_are_those_of_the_python_library() {
        let expected: Value =
            serde_json::from_slice(&fs::read(golden().join("expected.json")).unwrap()).unwrap();
        let tokenizer = load(&golden()).unwrap();
        assert_eq!(tokenizer.vocab_size() as u64, expected["vocab_size"].as_u64().unwrap());
        assert_eq!(tokenizer.eos_id().map(u64::from), expected["endoftext"].as_u64());
        let samples = expected["samples"].as_array().unwrap();
        assert!(samples.len() > 5);
        for sample in samples {
            let text = sample["text"].as_str().unwrap();
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(json!(ids), sample["ids"], "{text:?}");
            assert_eq!(tokenizer.decode(&ids), text.replace(END_OF_TEXT, ""));
        }
    }

    #[test]
    fn a_long_text_gives_the_same_tokens_in_pieces() {
        let tokenizer = load(&golden()).unwrap();
        let mut text: String =
            (0..20_000).map(|i| format!("{i}-th line, état {}!\r\n\n\t状態 it's", i * i)).collect();
        text.insert_str(PIECE, &"x".repeat(2 * PIECE));
        let split = tokenizer.pieces(&text);
        assert!(split.len() > 2 && split.concat() == text);
        let mut whole = Vec::new();
        tokenizer.encode_piece(&text, &mut whole).unwrap();
        assert!(tokenizer.encode(&text).unwrap() == whole);
    }

    #[test]
    fn a_text_whose_start_is_marked_is_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        words(dir.path(), &[("normalizer", json!({ "type": "Prepend", "prepend": "a " }))]);
        let tokenizer = load(dir.path()).unwrap();
        assert_eq!(tokenizer.encode(&"a ".repeat(PIECE)).unwrap().len(), PIECE + 1);
    }

    #[test]
    fn a_saved_tokenizer_is_the_same_and_has_a_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = load(&golden().join(TOKENIZER)).unwrap();
        tokenizer.save(&dir.path().join("new")).unwrap();
        let saved = load(&dir.path().join("new")).unwrap();
        assert_eq!(saved.files, tokenizer.files);
        for text in TEXTS {
            assert_eq!(saved.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        }
        let config: Value =
            serde_json::from_slice(&fs::read(dir.path().join("new").join(CONFIG)).unwrap()).unwrap();
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
        assert_eq!(config["eos_token"], END_OF_TEXT);
    }

    #[test]
    fn configuration_files_travel_along_unchanged() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        words(from.path(), &[]);
        fs::write(from.path().join(CONFIG), r#"{"eos_token": null, "chat_template": "x"}"#).unwrap();
        fs::write(from.path().join(SPECIAL_TOKENS), r#"{"eos_token": {"content": "a"}}"#).unwrap();
        let tokenizer = load(from.path()).unwrap();
        assert_eq!(tokenizer.eos_id(), Some(0));
        tokenizer.save(to.path()).unwrap();
        for name in [TOKENIZER, CONFIG, SPECIAL_TOKENS] {
            assert_eq!(fs::read(to.path().join(name)).unwrap(), fs::read(from.path().join(name)).unwrap());
        }
        // Beside a file of another name they count for nothing.
        fs::copy(from.path().join(TOKENIZER), from.path().join("other.json")).unwrap();
        assert_eq!(load(&from.path().join("other.json")).unwrap().eos_id(), None);
    }

    #[test]
    fn the_end_of_text_is_named_or_well_known() {
        let dir = tempfile::tempdir().unwrap();
        words(dir.path(), &[]);
        // `</s>` is in the vocabulary, but an ordinary word.
        assert_eq!(load(dir.path()).unwrap().eos_id(), None);
        words(dir.path(), &[("added_tokens", added("</s>", 7))]);
        assert_eq!(load(dir.path()).unwrap().eos_id(), Some(7));
        fs::write(dir.path().join(CONFIG), r#"{"eos_token": "a"}"#).unwrap();
        assert_eq!(load(dir.path()).unwrap().eos_id(), Some(0));
    }

    #[test]
    fn the_unknown_has_a_token_or_none() {
        let dir = tempfile::tempdir().unwrap();
        words(dir.path(), &[]);
        assert_eq!(load(dir.path()).unwrap().unknown_id(), None);
        let known = json!({ "type": "WordLevel", "unk_token": "?", "vocab": { "a": 0, "?": 4 } });
        words(dir.path(), &[("model", known)]);
        let tokenizer = load(dir.path()).unwrap();
        assert_eq!((tokenizer.unknown_id(), tokenizer.encode("a b").unwrap()), (Some(4), vec![0, 4]));
        assert_eq!((load(&golden()).unwrap().unknown_id(), Tokenizer::bytes().unknown_id()), (None, None));
    }

    #[test]
    fn the_vocabulary_ends_at_the_highest_id() {
        let dir = tempfile::tempdir().unwrap();
        words(dir.path(), &[]);
        assert_eq!(load(dir.path()).unwrap().vocab_size(), 8);
        let dense = json!({ "type": "WordLevel", "unk_token": "?", "vocab": { "a": 0, "b": 1 } });
        words(dir.path(), &[("model", dense), ("added_tokens", added("<pad>", 2))]);
        assert_eq!(load(dir.path()).unwrap().vocab_size(), 3);
    }

    #[test]
    fn padding_truncation_and_special_tokens_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let padding = json!({ "strategy": { "Fixed": 6 }, "direction": "Right", "pad_to_multiple_of": null,
                              "pad_id": 7, "pad_type_id": 0, "pad_token": "</s>" });
        let truncation =
            json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
        let post = json!({ "type": "BertProcessing", "sep": ["</s>", 7], "cls": ["</s>", 7] });
        words(dir.path(), &[("padding", padding), ("truncation", truncation), ("post_processor", post)]);
        assert_eq!(load(dir.path()).unwrap().encode("a a a").unwrap(), [0, 0, 0]);
    }

    #[test]
    fn bad_tokenizers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let missing = load(dir.path()).unwrap_err();
        assert!(
            missing.to_string().contains(TOKENIZER) && missing.hint().unwrap().contains("`bytes`"),
            "{missing}"
        );

        fs::write(dir.path().join(TOKENIZER), "{}").unwrap();
        let broken = load(dir.path()).unwrap_err();
        assert!(broken.to_string().contains("is not a Hugging Face tokenizer"), "{broken}");

        words(dir.path(), &[]);
        fs::write(dir.path().join(CONFIG), r#"{"eos_token": "b"}"#).unwrap();
        let lacking = load(dir.path()).unwrap_err();
        assert!(lacking.to_string().contains(r#"no eos_token "b""#), "{lacking}");

        fs::write(dir.path().join(CONFIG), "{").unwrap();
        let config = load(dir.path()).unwrap_err();
        assert!(config.to_string().contains("tokenizer_config.json: not JSON"), "{config}");
    }

    #[test]
    fn what_cannot_be_encoded_or_written_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        words(dir.path(), &[]);
        let tokenizer = load(dir.path()).unwrap();
        let unknown = tokenizer.encode("b").unwrap_err();
        assert!(unknown.to_string().contains("cannot encode"), "{unknown}");
        assert!(tokenizer.save(&dir.path().join(TOKENIZER)).is_err());
    }
}
