//! `config.json` in and out.
//!
//! The file is transformers', so the rules are too: a missing field has transformers' default, and what is written
//! is what transformers 5.23 reads. Fields that would change the model into one that Elapid does not have are
//! refused by name; others are kept.

use std::fs;
use std::path::Path;

use elapid_tensor::NormGroup;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::ModelConfig;
use crate::Error;

/// Fields that are refused unless switched off (null, false, 0 or empty), and why.
const REFUSED: [(&str, &str); 8] = [
    ("attn_layer_idx", "it makes a hybrid with attention layers; Elapid has Mamba-2 layers only"),
    ("attn_cfg", "it makes a hybrid with attention layers; Elapid has Mamba-2 layers only"),
    ("d_intermediate", "it adds an MLP to every block; Elapid's blocks have none"),
    ("quantization_config", "quantised weights cannot be trained; use the original model"),
    ("per_layer_config", "all layers of a model have the same shape here"),
    ("is_encoder_decoder", "Mamba-2 is a decoder"),
    ("add_cross_attention", "Mamba-2 has no attention"),
    ("tie_encoder_decoder", "Mamba-2 is a decoder"),
];

impl ModelConfig {
    /// Reads `config.json`, given the file or the folder it lies in, and validates it.
    ///
    /// # Errors
    /// The file is missing, is not JSON, holds a field of the wrong type or a value Elapid does not implement, or
    /// describes an impossible model; the message names file, field and value.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = fs::read_to_string(&file).map_err(|cause| {
            Error::io("read", &file, &cause).with_hint(
                "a model is a folder with a config.json, such as transformers' save_pretrained writes",
            )
        })?;
        Self::from_json(&text).map_err(|error| error.at(file.display()))
    }

    /// Reads the text of a `config.json` and validates it.
    ///
    /// # Errors
    /// As [`ModelConfig::load`]; the message names no file.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(&tag_bare_floats(text)).map_err(|cause| {
            Error::new(format!("not JSON: {cause}"))
                .with_hint("the file may be cut off; write or copy it again")
        })?;
        let Value::Object(map) = value else {
            return Err(Error::new("not a JSON object").with_hint("a config.json is one object: { … }"));
        };
        let config = read(Fields(map))?;
        config.validate()?;
        Ok(config)
    }

    /// The text of a `config.json` that transformers 5.23 reads as the same model: every field written out, keys in
    /// alphabetical order.
    pub fn to_json(&self) -> String {
        let (low, high) = self.time_step_limit;
        let Value::Object(mut map) = json!({
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "state_size": self.state_size,
            "num_hidden_layers": self.num_hidden_layers,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "expand": self.expand,
            "conv_kernel": self.conv_kernel,
            "n_groups": self.n_groups,
            "use_bias": self.use_bias,
            "use_conv_bias": self.use_conv_bias,
            "hidden_act": self.hidden_act,
            "initializer_range": self.initializer_range,
            "residual_in_fp32": self.residual_in_fp32,
            "time_step_rank": self.time_step_rank,
            "time_step_min": self.time_step_min,
            "time_step_max": self.time_step_max,
            "time_step_floor": self.time_step_floor,
            "time_step_limit": [tagged(low), tagged(high)],
            "rescale_prenorm_residual": self.rescale_prenorm_residual,
            "use_cache": self.use_cache,
            "chunk_size": self.chunk_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "norm_group": match self.norm_group {
                NormGroup::PerGroup => "per_group",
                NormGroup::Across => "across",
            },
        }) else {
            unreachable!("json!({{…}}) is an object")
        };
        for (name, value) in [("dtype", &self.dtype), ("transformers_version", &self.transformers_version)] {
            if let Some(text) = value {
                map.insert(name.into(), json!(text));
            }
        }
        for (name, value) in &self.extra {
            map.entry(name).or_insert_with(|| value.clone());
        }
        map.sort_keys();
        format!("{:#}\n", Value::Object(map))
    }
}

/// All fields of the file, each taken out as it is understood.
fn read(mut fields: Fields) -> Result<ModelConfig, Error> {
    check_kind(&mut fields)?;
    for (name, why) in REFUSED {
        if let Some(value) = fields.0.shift_remove(name).filter(|value| !is_off(value)) {
            return Err(
                Error::new(format!("{name} is {value}, which Elapid does not implement")).with_hint(why)
            );
        }
    }
    if !fields.flag("rms_norm", true)? {
        return Err(Error::new("rms_norm is false: LayerNorm in its place is not implemented").with_hint(
            "transformers' Mamba2 has RMS norms only; remove the field if the weights have no norm biases",
        ));
    }
    // An early field without effect: transformers always gates first, and so do the weights of Mamba-Codestral, whose
    // own config.json says `true`.
    fields.flag("norm_before_gate", false)?;
    let intermediate_size = fields.count("intermediate_size", 0)?;
    // Remote code does not travel with the weights, and the place they came from is not theirs any more.
    for name in ["auto_map", "_name_or_path", "_commit_hash"] {
        fields.0.shift_remove(name);
    }

    let torch_dtype: Option<String> = fields.take("torch_dtype", "the name of an element type", None)?;
    let dtype: Option<String> = fields.take("dtype", "the name of an element type", None)?;
    let old = ModelConfig::default();
    let mut config = ModelConfig {
        num_heads: fields.count("num_heads", old.num_heads)?,
        head_dim: fields.count("head_dim", old.head_dim)?,
        vocab_size: fields.count("vocab_size", old.vocab_size)?,
        hidden_size: fields.count("hidden_size", old.hidden_size)?,
        state_size: fields.count("state_size", old.state_size)?,
        num_hidden_layers: fields.count("num_hidden_layers", old.num_hidden_layers)?,
        layer_norm_epsilon: fields.number("layer_norm_epsilon", old.layer_norm_epsilon)?,
        pad_token_id: fields.take("pad_token_id", "a token id or null", old.pad_token_id)?,
        bos_token_id: fields.take("bos_token_id", "a token id or null", old.bos_token_id)?,
        eos_token_id: fields.take("eos_token_id", "a token id, a list of them or null", old.eos_token_id)?,
        expand: fields.count("expand", old.expand)?,
        conv_kernel: fields.count("conv_kernel", old.conv_kernel)?,
        n_groups: fields.count("n_groups", old.n_groups)?,
        use_bias: fields.flag("use_bias", old.use_bias)?,
        use_conv_bias: fields.flag("use_conv_bias", old.use_conv_bias)?,
        hidden_act: fields.take("hidden_act", "a name", old.hidden_act)?,
        initializer_range: fields.number("initializer_range", old.initializer_range)?,
        residual_in_fp32: fields.flag("residual_in_fp32", old.residual_in_fp32)?,
        time_step_rank: 0,
        time_step_min: fields.number("time_step_min", old.time_step_min)?,
        time_step_max: fields.number("time_step_max", old.time_step_max)?,
        time_step_floor: fields.number("time_step_floor", old.time_step_floor)?,
        time_step_limit: fields.interval("time_step_limit", old.time_step_limit)?,
        rescale_prenorm_residual: fields.flag("rescale_prenorm_residual", old.rescale_prenorm_residual)?,
        use_cache: fields.flag("use_cache", old.use_cache)?,
        chunk_size: fields.count("chunk_size", old.chunk_size)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings", old.tie_word_embeddings)?,
        norm_group: fields.norm_group()?,
        dtype: dtype.or(torch_dtype),
        transformers_version: fields.take("transformers_version", "a version", None)?,
        extra: Map::new(),
    };
    config.time_step_rank = match fields.0.get("time_step_rank").and_then(Value::as_str) {
        Some("auto") => {
            fields.0.shift_remove("time_step_rank");
            config.hidden_size.div_ceil(16)
        }
        _ => fields.count("time_step_rank", config.hidden_size.div_ceil(16))?,
    };
    if !["silu", "swish"].contains(&config.hidden_act.as_str()) {
        return Err(Error::new(format!(
            "hidden_act is {:?}, which Elapid does not implement",
            config.hidden_act
        ))
        .with_hint("Mamba-2 uses silu (swish is the same function)"));
    }
    let inner = config.hidden_size.saturating_mul(config.expand);
    if intermediate_size != 0 && intermediate_size != inner {
        return Err(Error::new(format!(
            "intermediate_size is {intermediate_size}, but hidden_size · expand = {} · {} = {inner}",
            config.hidden_size, config.expand
        ))
        .with_hint("remove the field: the inner width follows from the other two"));
    }
    fields.refuse_misspelt(&config)?;
    config.extra = fields.0;
    Ok(config)
}

/// Is this the configuration of a Mamba-2 model in transformers' spelling?
fn check_kind(fields: &mut Fields) -> Result<(), Error> {
    if fields.0.contains_key("d_model") || fields.0.contains_key("ssm_cfg") {
        return Err(Error::new("this is a configuration of state-spaces/mamba, not of transformers")
            .with_hint("convert the model first: elapid convert --from mamba_ssm --to hf"));
    }
    match fields.0.shift_remove("model_type") {
        Some(Value::String(kind)) if kind == "mamba2" => {}
        Some(kind) => {
            return Err(Error::new(format!("model_type is {kind}, which Elapid does not implement"))
                .with_hint("the only supported model_type is \"mamba2\""));
        }
        None => {
            return Err(Error::new("model_type is missing").with_hint(
                "is this the config.json of a model? For Mamba-2 it says \"model_type\": \"mamba2\"",
            ));
        }
    }
    let architectures: Option<Vec<String>> = fields.take("architectures", "a list of class names", None)?;
    match architectures.unwrap_or_default().iter().find(|name| *name != "Mamba2ForCausalLM") {
        Some(other) => {
            Err(Error::new(format!("architectures names {other}, which Elapid does not implement"))
                .with_hint("the only supported architecture is Mamba2ForCausalLM"))
        }
        None => Ok(()),
    }
}

/// The object of the file.
pub(super) struct Fields(pub(super) Map<String, Value>);

impl Fields {
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
        default: T,
    ) -> Result<T, Error> {
        let Some(value) = self.0.shift_remove(name) else { return Ok(default) };
        let text = value.to_string();
        serde_json::from_value(value).map_err(|_| wrong_type(name, &text, expected))
    }

    pub(super) fn count(&mut self, name: &str, default: usize) -> Result<usize, Error> {
        self.take(name, "a whole number, 0 or greater", default)
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> Result<bool, Error> {
        self.take(name, "true or false", default)
    }

    pub(super) fn number(&mut self, name: &str, default: f64) -> Result<f64, Error> {
        let Some(value) = self.0.shift_remove(name) else { return Ok(default) };
        untagged(&value).ok_or_else(|| wrong_type(name, &value.to_string(), "a number"))
    }

    pub(super) fn interval(&mut self, name: &str, default: (f64, f64)) -> Result<(f64, f64), Error> {
        let Some(value) = self.0.shift_remove(name) else { return Ok(default) };
        match value.as_array().map(Vec::as_slice) {
            Some([low, high]) => untagged(low).zip(untagged(high)),
            _ => None,
        }
        .ok_or_else(|| wrong_type(name, &value.to_string(), "two numbers, [lowest, highest]"))
    }

    fn norm_group(&mut self) -> Result<NormGroup, Error> {
        let name: String = self.take("norm_group", "\"per_group\" or \"across\"", "per_group".into())?;
        match name.as_str() {
            "per_group" => Ok(NormGroup::PerGroup),
            "across" => Ok(NormGroup::Across),
            _ => Err(wrong_type("norm_group", &format!("{name:?}"), "\"per_group\" or \"across\"")),
        }
    }

    /// A leftover field that is a slip of the pen away from one of ours would silently mean its default. Two letters
    /// would be too many: `num_beams` is not `num_heads`.
    fn refuse_misspelt(&self, config: &ModelConfig) -> Result<(), Error> {
        let plain = |name: &str| name.to_lowercase().replace(['_', '-'], "");
        let known: Map<String, Value> = serde_json::from_str(&config.to_json()).unwrap_or_default();
        for name in self.0.keys() {
            if let Some(near) =
                known.keys().find(|known| strsim::osa_distance(&plain(known), &plain(name)) <= 1)
            {
                return Err(Error::new(format!("unknown field {name:?}"))
                    .with_hint(format!("did you mean {near:?}? Remove the field otherwise")));
            }
        }
        Ok(())
    }
}

fn wrong_type(name: &str, value: &str, expected: &str) -> Error {
    Error::new(format!("{name} is {value}")).with_hint(format!("{name} must be {expected}"))
}

/// Null, false, zero or empty: what a switched-off field looks like.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// The three floats that JSON lacks, as Python writes them and as transformers 5 tags them.
const SPECIAL: [(&str, f64); 3] =
    [("-Infinity", f64::NEG_INFINITY), ("Infinity", f64::INFINITY), ("NaN", f64::NAN)];

/// Replaces the bare `Infinity`, `-Infinity` and `NaN` of Python's `json` (outside strings) by the tagged objects of
/// transformers 5.
pub(super) fn tag_bare_floats(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(next) = rest.chars().next() {
        let special = SPECIAL.iter().find(|(name, _)| !in_string && rest.starts_with(name));
        let taken = match (special, next) {
            (Some((name, _)), _) => name.len(),
            // A backslash takes the next character with it, be it a quote.
            (None, '\\') if in_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, _) => next.len_utf8(),
        };
        in_string ^= next == '"';
        match special {
            Some((name, _)) => out.push_str(&json!({ "__float__": name }).to_string()),
            None => out.push_str(&rest[..taken]),
        }
        rest = &rest[taken..];
    }
    out
}

/// A float as transformers 5 writes it.
fn tagged(value: f64) -> Value {
    match SPECIAL.iter().find(|(_, special)| special.to_bits() == value.to_bits()) {
        Some((name, _)) => json!({ "__float__": name }),
        None => json!(value),
    }
}

/// A number, tagged or plain.
fn untagged(value: &Value) -> Option<f64> {
    let tag = value.as_object().filter(|map| map.len() == 1).and_then(|map| map.get("__float__"));
    match tag.and_then(Value::as_str) {
        Some(tag) => SPECIAL.iter().find(|(name, _)| *name == tag).map(|(_, number)| *number),
        None => value.as_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::TokenIds;
    use super::*;

    fn refused(fields: &str) -> Error {
        let text = format!(r#"{{"model_type": "mamba2"{fields}}}"#);
        ModelConfig::from_json(&text).expect_err(fields)
    }

    #[test]
    fn missing_fields_have_transformers_defaults() {
        let config = ModelConfig::from_json(r#"{"model_type": "mamba2"}"#).unwrap();
        assert_eq!(config, ModelConfig::default());
    }

    #[test]
    fn written_and_read_again_is_the_same() {
        let mut config = ModelConfig::preset("mamba2-130m").unwrap();
        config.eos_token_id = Some(TokenIds::Many(vec![1, 2]));
        config.pad_token_id = None;
        config.time_step_limit = (0.001, 0.1);
        config.norm_group = NormGroup::Across;
        config.dtype = Some("bfloat16".into());
        config.transformers_version = Some("5.23.0".into());
        config.extra.insert("tokenizer_class".into(), json!("GPTNeoXTokenizer"));
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
        config.time_step_limit = (0.0, f64::INFINITY);
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn t25_infinity_in_both_spellings() {
        for limit in [r#"[0.0, {"__float__": "Infinity"}]"#, "[0.0, Infinity]", "[0,Infinity]"] {
            let text = format!(r#"{{"model_type": "mamba2", "time_step_limit": {limit}}}"#);
            let config = ModelConfig::from_json(&text).unwrap();
            assert_eq!(config.time_step_limit, (0.0, f64::INFINITY), "{limit}");
            assert!(config.to_json().contains(r#""__float__": "Infinity""#));
        }
        assert!(refused(r#", "time_step_limit": [NaN, Infinity]"#).to_string().contains("[NaN, inf]"));
        assert!(refused(r#", "time_step_limit": [-Infinity, 1]"#).to_string().contains("[-inf, 1]"));
        assert!(refused(r#", "time_step_limit": [0.0]"#).hint().unwrap().contains("two numbers"));
    }

    #[test]
    fn bare_floats_inside_strings_stay() {
        for kept in [r#"{"a\"Infinity": "NaN -Infinity\\"}"#, "{\"é\\é NaN\": 1}", "\"\\"] {
            assert_eq!(tag_bare_floats(kept), kept);
        }
        assert_eq!(tag_bare_floats(r#"{"a\\":NaN}"#), r#"{"a\\":{"__float__":"NaN"}}"#);
    }

    #[test]
    fn codestral_of_transformers_4_44() {
        let config = ModelConfig::from_json(
            r#"{"_name_or_path": "x", "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_beams": 1,
                "n_groups": 8, "num_heads": 128, "intermediate_size": 8192, "norm_before_gate": true,
                "rms_norm": true, "time_step_init_scheme": "random", "time_step_scale": 1.0,
                "time_step_rank": "auto", "time_step_limit": [0.0, Infinity], "torch_dtype": "bfloat16",
                "pad_token_id": null, "eos_token_id": [0, 3], "auto_map": {"AutoConfig": "x.Y"}}"#,
        )
        .unwrap();
        assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
        assert_eq!(config.eos_token_id.as_ref().unwrap().as_slice(), [0, 3]);
        assert_eq!(config.pad_token_id, None);
        assert_eq!(config.time_step_rank, 256);
        assert_eq!(config.extra["time_step_scale"], json!(1.0));
        let kept: Vec<_> = config.extra.keys().map(String::as_str).collect();
        assert_eq!(kept, ["num_beams", "time_step_init_scheme", "time_step_scale"]);
    }

    #[test]
    fn t13_what_we_do_not_implement_is_refused_by_name() {
        for (fields, name) in [
            (r#", "hidden_act": "gelu""#, "hidden_act is \"gelu\""),
            (r#", "rms_norm": false"#, "rms_norm is false"),
            (r#", "attn_layer_idx": [3]"#, "attn_layer_idx is [3]"),
            (r#", "d_intermediate": 256"#, "d_intermediate is 256"),
            (r#", "quantization_config": {"bits": 4}"#, "quantization_config"),
            (r#", "per_layer_config": {"0": {}}"#, "per_layer_config"),
            (r#", "architectures": ["Mamba2Model"]"#, "Mamba2Model"),
            (r#", "intermediate_size": 100"#, "intermediate_size is 100"),
            (r#", "norm_group": "all""#, "norm_group is \"all\""),
        ] {
            let error = refused(fields);
            assert!(error.to_string().contains(name), "{error}");
            assert!(error.hint().is_some());
        }
        let off = r#"{"model_type": "mamba2", "attn_layer_idx": [], "d_intermediate": 0, "quantization_config": null}"#;
        ModelConfig::from_json(off).unwrap();
        let error = ModelConfig::from_json(r#"{"model_type": "mamba"}"#).unwrap_err();
        assert!(
            error.to_string().contains("model_type is \"mamba\"") && error.hint().unwrap().contains("mamba2")
        );
        let error = ModelConfig::from_json(r#"{"d_model": 768, "ssm_cfg": {}}"#).unwrap_err();
        assert!(error.hint().unwrap().contains("convert --from mamba_ssm"));
        assert!(ModelConfig::from_json("{}").unwrap_err().to_string().contains("model_type is missing"));
    }

    #[test]
    fn wrong_types_name_field_and_value() {
        for (fields, message) in [
            (r#", "num_heads": "many""#, "num_heads is \"many\""),
            (r#", "num_heads": -1"#, "num_heads is -1"),
            (r#", "hidden_size": 1.5"#, "hidden_size is 1.5"),
            (r#", "use_bias": 1"#, "use_bias is 1"),
            (r#", "eos_token_id": "end""#, "eos_token_id is \"end\""),
            (r#", "layer_norm_epsilon": null"#, "layer_norm_epsilon is null"),
            (r#", "n_group": 4"#, "unknown field \"n_group\""),
            (r#", "numHeads": 4"#, "unknown field \"numHeads\""),
        ] {
            assert_eq!(refused(fields).to_string(), message);
        }
        assert!(ModelConfig::from_json("{\"num_heads\": ").unwrap_err().to_string().contains("not JSON"));
        assert!(ModelConfig::from_json("[]").unwrap_err().to_string().contains("not a JSON object"));
    }

    #[test]
    fn the_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = ModelConfig::load(folder.path()).unwrap_err();
        assert!(error.to_string().starts_with("cannot read") && error.to_string().contains("config.json"));
        fs::write(folder.path().join("config.json"), r#"{"model_type": "mamba2", "n_groups": 3}"#).unwrap();
        let error = ModelConfig::load(folder.path()).unwrap_err();
        assert!(error.to_string().contains("config.json: num_heads = 128"), "{error}");
    }
}
