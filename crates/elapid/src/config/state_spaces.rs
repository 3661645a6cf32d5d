//! The configurations of state-spaces/mamba (`config.json`) and of Mamba-Codestral (`params.json`), in and out.
//!
//! What the file says is either understood, or kept because it has no meaning for trained weights, or refused by name.

use elapid_tensor::NormGroup;
use serde_json::{Map, Value, json};

use super::json::{Fields, is_off, tag_bare_floats};
use super::{ModelConfig, TokenIds};
use crate::Error;

/// Epsilon of all norms of the library, which is not in its file.
const NORM_EPSILON: f64 = 1e-5;

/// Fields that are refused unless switched off, and why.
const REFUSED: [(&str, &str); 3] = [
    ("attn_layer_idx", "it makes a hybrid with attention layers; Elapid has Mamba-2 layers only"),
    ("attn_cfg", "it makes a hybrid with attention layers; Elapid has Mamba-2 layers only"),
    ("d_intermediate", "it adds an MLP to every block; Elapid's blocks have none"),
];

/// Fields that say how the weights were begun or which kernel computes with them: kept, and written back.
const KEPT: [&str; 2] = ["fused_add_norm", "pad_vocab_size_multiple"];
/// The same of `ssm_cfg`.
const KEPT_OF_LAYER: [&str; 3] = ["A_init_range", "conv_init", "use_mem_eff_path"];

/// The layer's arguments at their defaults.
fn layer_defaults() -> Value {
    json!({
        "layer": "Mamba2", "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "rmsnorm": true,
        "norm_before_gate": false, "dt_min": 1e-3, "dt_max": 0.1, "dt_init_floor": 1e-4, "bias": false,
        "conv_bias": true, "chunk_size": 256,
    })
}

impl ModelConfig {
    /// Reads the text of a `config.json` of state-spaces/mamba. The vocabulary is rounded up to its padding.
    ///
    /// # Errors
    /// Text that is no such file; a field that Elapid does not implement or does not know, by name; an impossible model.
    pub fn from_state_spaces(text: &str) -> Result<Self, Error> {
        Self::of_state_spaces(Fields::parse(text)?)
    }

    fn of_state_spaces(mut fields: Fields) -> Result<Self, Error> {
        for (name, why) in REFUSED {
            if let Some(value) = fields.0.shift_remove(name).filter(|value| !is_off(value)) {
                return Err(
                    Error::new(format!("{name} is {value}, which Elapid does not implement")).with_hint(why)
                );
            }
        }
        if !fields.flag("rms_norm", true)? {
            return Err(Error::new("rms_norm is false: LayerNorm in its place is not implemented")
                .with_hint("only models with RMS norms can be converted"));
        }
        for name in ["d_model", "n_layer", "vocab_size"] {
            if !fields.0.contains_key(name) {
                return Err(Error::new(format!("{name} is missing"))
                    .with_hint("is this the config.json of a model of state-spaces/mamba?"));
            }
        }
        let layer: Option<Map<String, Value>> = fields.take("ssm_cfg", "an object", None)?;
        let mut layer = Fields(layer.unwrap_or_default());
        let kind: String = layer.take("layer", "\"Mamba2\"", "Mamba1".into())?;
        if kind != "Mamba2" {
            return Err(Error::new(format!("ssm_cfg.layer is {kind:?}, which Elapid does not implement"))
                .with_hint("only \"Mamba2\" is; a configuration without it describes Mamba-1"));
        }
        for (name, on, default) in
            [("rmsnorm", true, true), ("norm_before_gate", false, false), ("D_has_hdim", false, false)]
        {
            if layer.flag(name, default)? != on {
                return Err(Error::new(format!(
                    "ssm_cfg.{name} is {}, which Elapid does not implement",
                    !on
                ))
                .with_hint(format!("only models with {name} = {on} can be converted")));
            }
        }
        let old = Self::default();
        let hidden_size = fields.count("d_model", 0)?;
        let expand = layer.count("expand", 2)?;
        let inner = hidden_size.saturating_mul(expand);
        let d_ssm: Option<usize> = layer.take("d_ssm", "a whole number or null", None)?;
        if d_ssm.is_some_and(|width| width != inner) {
            return Err(Error::new(format!(
                "ssm_cfg.d_ssm is {}, but d_model · expand = {inner}",
                d_ssm.unwrap_or(0)
            ))
            .with_hint("it puts an MLP beside the scan, which Elapid does not implement"));
        }
        let head_dim = layer.count("headdim", 64)?;
        let multiple = fields.0.get("pad_vocab_size_multiple").and_then(Value::as_u64).unwrap_or(8);
        let multiple =
            usize::try_from(multiple).ok().filter(|m| (1..=1 << 20).contains(m)).ok_or_else(|| {
                Error::new(format!("pad_vocab_size_multiple is {multiple}"))
                    .with_hint("it is a small number, often 8 or 16")
            })?;
        let vocab_size = fields.count("vocab_size", 0)?;
        fields.0.entry("pad_vocab_size_multiple").or_insert(json!(multiple));
        let mut config = Self {
            hidden_size,
            expand,
            head_dim,
            num_heads: inner.checked_div(head_dim).unwrap_or(0),
            num_hidden_layers: fields.count("n_layer", 0)?,
            vocab_size: vocab_size.checked_next_multiple_of(multiple).unwrap_or(vocab_size),
            state_size: layer.count("d_state", 128)?,
            conv_kernel: layer.count("d_conv", 4)?,
            n_groups: layer.count("ngroups", 1)?,
            use_bias: layer.flag("bias", false)?,
            use_conv_bias: layer.flag("conv_bias", true)?,
            chunk_size: layer.count("chunk_size", 256)?,
            time_step_min: layer.number("dt_min", 1e-3)?,
            time_step_max: layer.number("dt_max", 0.1)?,
            time_step_floor: layer.number("dt_init_floor", 1e-4)?,
            time_step_limit: layer.interval("dt_limit", old.time_step_limit)?,
            residual_in_fp32: fields.flag("residual_in_fp32", true)?,
            tie_word_embeddings: fields.flag("tie_embeddings", true)?,
            layer_norm_epsilon: NORM_EPSILON,
            norm_group: NormGroup::PerGroup,
            time_step_rank: hidden_size.div_ceil(16),
            // GPT-NeoX's <|endoftext|> plays all three parts.
            pad_token_id: Some(0),
            bos_token_id: Some(0),
            eos_token_id: Some(TokenIds::One(0)),
            ..old
        };
        for (fields, kept, place) in
            [(&mut fields, &KEPT[..], ""), (&mut layer, &KEPT_OF_LAYER[..], "ssm_cfg.")]
        {
            for name in kept {
                config.extra.extend(fields.0.shift_remove(*name).map(|value| ((*name).to_owned(), value)));
            }
            if let Some((name, value)) = fields.0.iter().next() {
                return Err(Error::new(format!("{place}{name} is {value}, which Elapid does not know"))
                    .with_hint("remove the field if it says nothing about the model"));
            }
        }
        config.validate()?;
        Ok(config)
    }

    /// The text of the `config.json` with which state-spaces/mamba builds the same model.
    ///
    /// # Errors
    /// A value that its file cannot say, by name.
    pub fn to_state_spaces(&self) -> Result<String, Error> {
        let text = format!("{:#}\n", Value::Object(self.state_spaces()?));
        // Python's json has a word for what JSON lacks.
        Ok(text.replace("\"Infinity\"", "Infinity"))
    }

    fn state_spaces(&self) -> Result<Map<String, Value>, Error> {
        let cannot = |what: String| {
            Error::new(format!("{what}, which a model of state-spaces/mamba cannot have"))
                .with_hint("convert to hf instead")
        };
        if self.layer_norm_epsilon != NORM_EPSILON {
            return Err(cannot(format!("layer_norm_epsilon is {:e}", self.layer_norm_epsilon)));
        }
        if self.norm_group == NormGroup::Across && self.n_groups > 1 {
            return Err(cannot(format!("norm_group is \"across\" with {} groups", self.n_groups)));
        }
        let (mut layer, mut kept) = (layer_defaults(), Map::new());
        for (name, value) in [
            ("d_state", json!(self.state_size)),
            ("d_conv", json!(self.conv_kernel)),
            ("expand", json!(self.expand)),
            ("headdim", json!(self.head_dim)),
            ("ngroups", json!(self.n_groups)),
            ("bias", json!(self.use_bias)),
            ("conv_bias", json!(self.use_conv_bias)),
            ("chunk_size", json!(self.chunk_size)),
            ("dt_min", json!(self.time_step_min)),
            ("dt_max", json!(self.time_step_max)),
            ("dt_init_floor", json!(self.time_step_floor)),
        ] {
            layer[name] = value;
        }
        let (low, high) = self.time_step_limit;
        if (low, high) != (0.0, f64::INFINITY) {
            layer["dt_limit"] = json!([low, if high.is_finite() { json!(high) } else { json!("Infinity") }]);
        }
        for name in KEPT_OF_LAYER {
            if let Some(value) = self.extra.get(name) {
                layer[name] = value.clone();
            }
        }
        let fits = |multiple: &&Value| {
            multiple.as_u64().is_some_and(|m| m > 0 && (self.vocab_size as u64).is_multiple_of(m))
        };
        let multiple = self.extra.get("pad_vocab_size_multiple").filter(fits).cloned().unwrap_or(json!(1));
        let fused = self.extra.get("fused_add_norm").cloned().unwrap_or(json!(true));
        for (name, value) in [
            ("d_model", json!(self.hidden_size)),
            ("d_intermediate", json!(0)),
            ("n_layer", json!(self.num_hidden_layers)),
            ("vocab_size", json!(self.vocab_size)),
            ("ssm_cfg", layer),
            ("attn_layer_idx", json!([])),
            ("attn_cfg", json!({})),
            ("rms_norm", json!(true)),
            ("residual_in_fp32", json!(self.residual_in_fp32)),
            ("fused_add_norm", fused),
            ("pad_vocab_size_multiple", multiple),
            ("tie_embeddings", json!(self.tie_word_embeddings)),
        ] {
            kept.insert(name.into(), value);
        }
        Ok(kept)
    }

    /// Reads the text of a `params.json` of Mamba-Codestral: the sizes that it does not name are state-spaces' defaults.
    ///
    /// # Errors
    /// As [`ModelConfig::from_state_spaces`].
    pub fn from_codestral(text: &str) -> Result<Self, Error> {
        let mut fields = Fields::parse(text)?;
        let kind: String = fields.take("model_type", "\"mamba\"", "mamba".into())?;
        if kind != "mamba" {
            return Err(Error::new(format!("model_type is {kind:?}, which Elapid does not implement"))
                .with_hint("the params.json of a Mamba-2 model says \"mamba\""));
        }
        let mut map = Map::new();
        for (theirs, ours) in [("dim", "d_model"), ("n_layers", "n_layer")] {
            let value = fields.0.shift_remove(theirs).ok_or_else(|| {
                Error::new(format!("{theirs} is missing"))
                    .with_hint("is this the params.json of a Mamba model?")
            })?;
            map.insert(ours.into(), value);
        }
        let groups = fields.count("n_groups", 1)?;
        map.insert("ssm_cfg".into(), json!({ "layer": "Mamba2", "ngroups": groups }));
        for (name, value) in fields.0 {
            if map.insert(name.clone(), value).is_some() {
                return Err(Error::new(format!("{name} is no field of a params.json"))
                    .with_hint("convert it as mamba_ssm if it comes from state-spaces/mamba"));
            }
        }
        let config = Self::of_state_spaces(Fields(map))?;
        Ok(Self {
            bos_token_id: Some(0),
            pad_token_id: Some(1),
            eos_token_id: Some(TokenIds::One(2)),
            ..config
        })
    }

    /// The text of the `params.json` of the same model.
    ///
    /// # Errors
    /// A value that the file cannot say, by name.
    pub fn to_codestral(&self) -> Result<String, Error> {
        let mut map = self.state_spaces()?;
        let Some(Value::Object(layer)) = map.shift_remove("ssm_cfg") else { unreachable!("put there above") };
        let defaults = layer_defaults();
        for (name, value) in &layer {
            let initial = ["dt_min", "dt_max", "dt_init_floor"].contains(&name.as_str());
            if name != "ngroups"
                && !initial
                && !KEPT_OF_LAYER.contains(&name.as_str())
                && defaults.get(name) != Some(value)
            {
                return Err(Error::new(format!("{name} is {value}, which a params.json cannot say"))
                    .with_hint("convert to hf or mamba_ssm instead"));
            }
        }
        map.retain(|name, _| !["d_intermediate", "attn_layer_idx", "attn_cfg"].contains(&name.as_str()));
        for (ours, theirs) in [("d_model", "dim"), ("n_layer", "n_layers")] {
            let value = map.shift_remove(ours).unwrap_or_default();
            map.insert(theirs.into(), value);
        }
        map.insert("n_groups".into(), json!(self.n_groups));
        map.insert("model_type".into(), json!("mamba"));
        Ok(format!("{:#}\n", Value::Object(map)))
    }
}

impl Fields {
    /// The object that a text holds, Python's `Infinity` allowed.
    fn parse(text: &str) -> Result<Self, Error> {
        match serde_json::from_str(&tag_bare_floats(text)) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(Error::new("not a JSON object").with_hint("the file is one object: { … }")),
            Err(cause) => Err(Error::new(format!("not JSON: {cause}"))
                .with_hint("the file may be cut off; write or copy it again")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str =
        r#""d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": {"layer": "Mamba2", "headdim": 8"#;

    fn read(layer: &str, rest: &str) -> Result<ModelConfig, Error> {
        ModelConfig::from_state_spaces(&format!("{{{SMALL}{layer}}}{rest}}}"))
    }

    #[test]
    fn t13_every_field_has_its_place() {
        let layer = r#", "d_state": 5, "d_conv": 3, "expand": 3, "ngroups": 2, "chunk_size": 32, "bias": true,
            "conv_bias": false, "dt_min": 0.002, "dt_max": 0.2, "dt_init_floor": 1e-5, "dt_limit": [0.01, Infinity],
            "A_init_range": [1, 8], "rmsnorm": true, "norm_before_gate": false, "D_has_hdim": false, "d_ssm": 48"#;
        let rest = r#", "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": true,
            "residual_in_fp32": false, "fused_add_norm": false, "pad_vocab_size_multiple": 16, "tie_embeddings": false"#;
        let config = read(layer, rest).unwrap();
        assert_eq!((config.hidden_size, config.num_hidden_layers, config.vocab_size), (16, 2, 64));
        assert_eq!((config.head_dim, config.num_heads, config.n_groups, config.state_size), (8, 6, 2, 5));
        assert_eq!((config.conv_kernel, config.expand, config.chunk_size), (3, 3, 32));
        assert!(
            config.use_bias
                && !config.use_conv_bias
                && !config.residual_in_fp32
                && !config.tie_word_embeddings
        );
        assert_eq!((config.time_step_min, config.time_step_max, config.time_step_floor), (0.002, 0.2, 1e-5));
        assert_eq!(config.time_step_limit, (0.01, f64::INFINITY));
        assert_eq!(config.extra["A_init_range"], json!([1, 8]));

        let text = config.to_state_spaces().unwrap();
        assert!(text.contains("Infinity") && !text.contains("\"Infinity\""), "{text}");
        assert_eq!(ModelConfig::from_state_spaces(&text).unwrap(), config);
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn t13_defaults_are_those_of_the_library() {
        let config = read("", "").unwrap();
        assert_eq!((config.vocab_size, config.n_groups, config.state_size), (56, 1, 128));
        assert!(
            config.tie_word_embeddings && config.residual_in_fp32 && config.use_conv_bias && !config.use_bias
        );
        assert_eq!(config.time_step_limit, (0.0, f64::INFINITY));
        assert_eq!(config.eos_token_id, Some(TokenIds::One(0)));
    }

    #[test]
    fn t13_what_is_not_implemented_is_refused_by_name() {
        for (layer, rest, expected) in [
            ("", r#", "attn_layer_idx": [1]"#, "attn_layer_idx is [1]"),
            ("", r#", "d_intermediate": 64"#, "d_intermediate is 64"),
            ("", r#", "rms_norm": false"#, "rms_norm is false"),
            ("", r#", "moe": true"#, "moe is true"),
            (r#", "norm_before_gate": true"#, "", "ssm_cfg.norm_before_gate is true"),
            (r#", "rmsnorm": false"#, "", "ssm_cfg.rmsnorm is false"),
            (r#", "D_has_hdim": true"#, "", "ssm_cfg.D_has_hdim is true"),
            (r#", "d_ssm": 16"#, "", "ssm_cfg.d_ssm is 16"),
            (r#", "dstate": 16"#, "", "ssm_cfg.dstate is 16"),
            (r#", "ngroups": 3"#, "", "n_groups = 3"),
            (r#", "headdim": 0"#, "", "head_dim is 0"),
            ("", r#", "pad_vocab_size_multiple": 0"#, "pad_vocab_size_multiple is 0"),
        ] {
            let error = read(layer, rest).expect_err(expected);
            assert!(error.to_string().contains(expected) && error.hint().is_some(), "{error}");
        }
        let mamba1 = r#"{"d_model": 16, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {}}"#;
        assert!(ModelConfig::from_state_spaces(mamba1).unwrap_err().to_string().contains("\"Mamba1\""));
        let across = ModelConfig { norm_group: NormGroup::Across, n_groups: 2, ..read("", "").unwrap() };
        assert!(across.to_state_spaces().unwrap_err().to_string().contains("across"));
        let other = ModelConfig { layer_norm_epsilon: 1e-6, ..read("", "").unwrap() };
        assert!(other.to_state_spaces().unwrap_err().to_string().contains("layer_norm_epsilon is 1e-6"));
    }

    #[test]
    fn codestral_in_and_out() {
        let text = r#"{"dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "rms_norm": true,
            "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 1, "tie_embeddings": false,
            "model_type": "mamba"}"#;
        let config = ModelConfig::from_codestral(text).unwrap();
        assert_eq!(
            (config.num_heads, config.head_dim, config.n_groups, config.vocab_size),
            (128, 64, 8, 32768)
        );
        assert_eq!((config.bos_token_id, config.pad_token_id), (Some(0), Some(1)));
        assert_eq!(ModelConfig::from_codestral(&config.to_codestral().unwrap()).unwrap(), config);
        let wide = ModelConfig { head_dim: 128, num_heads: 64, ..config };
        assert!(wide.to_codestral().unwrap_err().to_string().contains("headdim is 128"));
        let unknown = text.replace("\"dim\"", "\"lora\": {\"rank\": 8}, \"dim\"");
        assert!(ModelConfig::from_codestral(&unknown).unwrap_err().to_string().contains("lora"));
        let twice = text.replace("\"dim\"", "\"d_model\": 8, \"dim\"");
        assert!(ModelConfig::from_codestral(&twice).unwrap_err().to_string().contains("d_model"));
    }
}
