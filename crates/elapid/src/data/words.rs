//! Words whose tokens are known already.
//!
//! The library takes microseconds for a word, and most words of a text have come before. So text is cut at words where
//! that changes no token, and a word is looked up among those that came before it is given to the library. That it
//! changes none is a matter of the tokenizer's kind: byte-level BPE merges within what its regular expression finds, and
//! none of the known ones finds anything that reaches from a word over the blank behind it.

use std::collections::HashMap;
use std::ops::Range;

use foldhash::fast::RandomState;
use serde_json::Value;

use super::Tokenizer;
use crate::Error;

/// Words that are remembered, and as many that came before those.
const WORDS: usize = 1 << 16;
/// A longer word, in bytes, will hardly come again.
const LONG: usize = 64;

/// Expressions that cut text into what byte-level BPE merges, besides the built-in one of GPT-2: Llama 3's, Qwen's, GPT-4o's.
const EXPRESSIONS: [&str; 3] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Does the tokenizer that `tokenizer.json` describes give the same tokens for the [`words`] of any text, one by one, as
/// for the text? False where that is not known.
pub(super) fn fall_apart(tokenizer: &Value) -> bool {
    let is = |value: &Value, kind: &str| value["type"] == kind;
    let byte_level = |step: &Value| is(step, "ByteLevel") && step["add_prefix_space"] == false;
    let own_expression = |step: &Value| step["use_regex"].as_bool().unwrap_or(true);
    let known = |step: &Value| {
        let pattern = step["pattern"]["Regex"].as_str();
        is(step, "Split")
            && step["behavior"] == "Isolated"
            && step["invert"] == false
            && pattern.is_some_and(|pattern| EXPRESSIONS.contains(&pattern))
    };
    let steps = match &tokenizer["pre_tokenizer"] {
        sequence if is(sequence, "Sequence") => {
            sequence["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice)
        }
        step => std::slice::from_ref(step),
    };
    let cut = match steps {
        [one] => byte_level(one) && own_expression(one),
        [split, one] => byte_level(one) && (known(split) || is(split, "Digits") && own_expression(one)),
        _ => false,
    };
    // A token that was added is found in the text before all else.
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten().all(|token| {
        let whole = token["content"].as_str().is_some_and(|content| words(content).count() == 1);
        whole && token["single_word"] == false && token["rstrip"] == false
    });
    // Composed characters do not reach over a blank.
    let normal = tokenizer["normalizer"].is_null() || is(&tokenizer["normalizer"], "NFC");
    let model = &tokenizer["model"];
    let sure = is(model, "BPE") && model["dropout"].as_f64().unwrap_or(0.0) == 0.0;
    cut && added && normal && sure
}

/// `text` cut before each space behind something that is no blank, and each line end behind an ASCII letter or digit
/// (some expressions add line ends to punctuation).
fn words(text: &str) -> impl Iterator<Item = &str> {
    let bytes = text.as_bytes();
    let mut start = 0;
    std::iter::from_fn(move || {
        if start == bytes.len() {
            return None;
        }
        let ends = |i: &usize| {
            let before = bytes[*i - 1];
            match bytes[*i] {
                b' ' if before.is_ascii() => before.is_ascii_graphic(),
                b' ' => !text[..*i].ends_with(char::is_whitespace),
                b'\n' => before.is_ascii_alphanumeric(),
                _ => false,
            }
        };
        let end = (start + 1..bytes.len()).find(ends).unwrap_or(bytes.len());
        Some(&text[std::mem::replace(&mut start, end)..end])
    })
}

/// Tokenizes text after text, and remembers words.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    words: Memory,
    before: Memory,
}

/// Words, and where their tokens are.
#[derive(Default)]
struct Memory {
    places: HashMap<Box<str>, Range<u32>, RandomState>,
    ids: Vec<u32>,
}

impl Memory {
    fn find(&self, word: &str) -> Option<&[u32]> {
        let place = self.places.get(word)?;
        Some(&self.ids[place.start as usize..place.end as usize])
    }

    fn add(&mut self, word: &str, ids: &[u32]) {
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.places.insert(word.into(), start..self.ids.len() as u32);
    }
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, words: Memory::default(), before: Memory::default() }
    }

    /// Adds the ids of `text`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(super) fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if !self.tokenizer.falls_apart() {
            return self.tokenizer.encode_piece(text, ids);
        }
        for word in words(text) {
            if word.len() > LONG {
                self.tokenizer.encode_piece(word, ids)?;
            } else if let Some(known) = self.words.find(word) {
                ids.extend_from_slice(known);
            } else {
                let start = ids.len();
                match self.before.find(word) {
                    Some(known) => ids.extend_from_slice(known),
                    None => self.tokenizer.encode_piece(word, ids)?,
                }
                if self.words.places.len() == WORDS {
                    self.before = std::mem::take(&mut self.words);
                }
                self.words.add(word, &ids[start..]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::path::Path;

    fn golden(name: &str) -> Value {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("tokenizer.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn load(json: &Value) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::load(path.to_str().unwrap()).unwrap()
    }

    fn split(pattern: &str) -> Value {
        json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false } ] })
    }

    /// A golden tokenizer with tokens added that text may collide with, cut by each of the known expressions.
    fn kinds() -> Vec<Tokenizer> {
        let mut json = golden("tokenizers/bpe");
        let size = load(&json).vocab_size();
        let added = json["added_tokens"].as_array_mut().unwrap();
        for (i, (content, lstrip, normalized)) in [
            ("  ", false, true),
            ("   ", false, true),
            ("\n\n", false, false),
            ("<m>", true, false),
            (" é", false, true),
        ]
        .into_iter()
        .enumerate()
        {
            added.push(json!({ "id": size + i, "content": content, "single_word": false, "lstrip": lstrip,
                               "rstrip": false, "normalized": normalized, "special": false }));
        }
        json["normalizer"] = json!({ "type": "NFC" });
        let own = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true });
        let digits = json!({ "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, own] });
        let steps = EXPRESSIONS.map(split).into_iter().chain([own, digits]);
        steps
            .map(|step| {
                json["pre_tokenizer"] = step;
                load(&json)
            })
            .collect()
    }

    #[test]
    fn words_have_the_tokens_of_their_text() {
        const PARTS: [&str; 34] = [
            " ",
            " ",
            "  ",
            "\n",
            "\n",
            "\r\n",
            "\t",
            "\u{a0}",
            "\u{3000}",
            "\u{85}",
            "\u{2028}",
            "a",
            "the",
            "It's",
            "'S",
            "don't",
            "é",
            "e\u{301}",
            "\u{301}",
            "7",
            "1234",
            "٣",
            "状態",
            "🐍",
            ".",
            ",",
            "...",
            "//",
            "«",
            "\0",
            "<m>",
            "<|endoftext|>",
            "x1",
            "ſ",
        ];
        let kinds = kinds();
        let text =
            prop::collection::vec(prop::sample::select(&PARTS[..]), 0..40).prop_map(|parts| parts.concat());
        let mut runner =
            proptest::test_runner::TestRunner::new(ProptestConfig { cases: 2000, ..Default::default() });
        let mut encoders: Vec<Encoder> = kinds.iter().map(Encoder::new).collect();
        let encoders = std::cell::RefCell::new(&mut encoders);
        runner
            .run(&text, |text| {
                prop_assert_eq!(words(&text).collect::<String>(), &text[..]);
                for (i, encoder) in encoders.borrow_mut().iter_mut().enumerate() {
                    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                    prop_assert!(encoder.tokenizer.falls_apart());
                    encoder.encode(&text, &mut ours).unwrap();
                    encoder.tokenizer.encode_piece(&text, &mut theirs).unwrap();
                    prop_assert_eq!(ours, theirs, "kind {}, {:?}", i, text);
                }
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn words_are_forgotten_and_still_right() {
        let tokenizer = load(&golden("tokenizers/bpe"));
        let mut encoder = Encoder::new(&tokenizer);
        let text: String = (0..3 * WORDS).map(|i| format!(" {}", i % (WORDS + 9))).collect();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        encoder.encode(&text, &mut ours).unwrap();
        tokenizer.encode_piece(&text, &mut theirs).unwrap();
        assert!(ours == theirs);
        assert!(encoder.words.places.len() <= WORDS && encoder.before.places.len() == WORDS);
    }

    #[test]
    fn what_is_not_known_to_fall_apart_is_left_whole() {
        let json = golden("tokenizers/bpe");
        assert!(fall_apart(&json));
        let with = |pointer: &str, value: Value| {
            let mut json = json.clone();
            *json.pointer_mut(pointer).unwrap() = value;
            json
        };
        assert!(fall_apart(&with("/pre_tokenizer", split(EXPRESSIONS[0]))));
        let token = |content: &str, rstrip: bool, single: bool| {
            json!([{ "id": 0, "content": content, "single_word": single, "lstrip": false, "rstrip": rstrip,
                     "normalized": false, "special": true }])
        };
        assert!(fall_apart(&with("/added_tokens", token(" a", false, false))));
        for other in [
            with("/pre_tokenizer", split(r"\p{L}+ \p{L}+")),
            with("/pre_tokenizer", json!({ "type": "Whitespace" })),
            with(
                "/pre_tokenizer",
                json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true }),
            ),
            with(
                "/pre_tokenizer",
                json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": false }),
            ),
            with("/pre_tokenizer", Value::Null),
            with("/normalizer", json!({ "type": "NFKC" })),
            with("/normalizer", json!({ "type": "Prepend", "prepend": "a" })),
            with("/model/dropout", json!(0.1)),
            with("/model/type", json!("Unigram")),
            with("/added_tokens", token("a b", false, false)),
            with("/added_tokens", token("a", true, false)),
            with("/added_tokens", token("a", false, true)),
            with("/added_tokens", token("", false, false)),
        ] {
            assert!(!fall_apart(&other), "{}", other["pre_tokenizer"]);
        }
    }
}
