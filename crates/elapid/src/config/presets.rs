//! Models by name.

use std::path::Path;

use super::{ModelConfig, TokenIds};
use crate::Error;
use crate::error::nearest;

/// G of a preset that states none, where the heads allow it.
const GROUPS: usize = 8;

/// (name, D, layers, P, G; None: the largest divisor of H up to [`GROUPS`]).
type Preset = (&'static str, usize, usize, usize, Option<usize>);

/// The sizes of the published state-spaces/mamba2-* checkpoints, then a family of the same sizes with heads twice as
/// wide and with groups.
const SIZES: [Preset; 11] = [
    ("mamba2-130m", 768, 24, 64, Some(1)),
    ("mamba2-370m", 1024, 48, 64, Some(1)),
    ("mamba2-780m", 1536, 48, 64, Some(1)),
    ("mamba2-1.3b", 2048, 48, 64, Some(1)),
    ("mamba2-2.7b", 2560, 64, 64, Some(1)),
    ("Mamba130M", 768, 24, 128, None),
    ("Mamba370M", 1024, 48, 128, None),
    ("Mamba780M", 1536, 48, 128, None),
    ("Mamba1B", 2048, 48, 128, None),
    ("Mamba3B", 2560, 64, 128, None),
    ("Mamba7B", 4096, 64, 128, None),
];

/// Every name that [`ModelConfig::preset`] knows.
pub const PRESETS: [&str; 12] = [
    "tiny",
    "mamba2-130m",
    "mamba2-370m",
    "mamba2-780m",
    "mamba2-1.3b",
    "mamba2-2.7b",
    "Mamba130M",
    "Mamba370M",
    "Mamba780M",
    "Mamba1B",
    "Mamba3B",
    "Mamba7B",
];

/// The largest divisor of `heads` that is at most `wanted`.
pub(super) fn groups_for(heads: usize, wanted: usize) -> usize {
    (1..=wanted.min(heads)).rev().find(|groups| heads.is_multiple_of(*groups)).unwrap_or(1)
}

impl ModelConfig {
    /// The model that `--model` names: a preset or, where a file of that name exists, what [`Self::load`] reads.
    ///
    /// # Errors
    /// As [`Self::load`] and [`Self::preset`].
    pub fn find(name: &str) -> Result<Self, Error> {
        if PRESETS.contains(&name) || !Path::new(name).exists() {
            return Self::preset(name);
        }
        Self::load(Path::new(name))
    }

    /// The model of that name, one of [`PRESETS`]. The vocabulary is GPT-NeoX's, padded (50288), except for `tiny`,
    /// which is made for the quickstart.
    ///
    /// # Errors
    /// An unknown name, with the nearest known one; `Mamba2Hybrid*`, which Elapid does not have.
    pub fn preset(name: &str) -> Result<Self, Error> {
        if name.to_lowercase().starts_with("mamba2hybrid") {
            return Err(Error::new(format!("model {name} is a hybrid of Mamba-2 and attention layers"))
                .with_hint("Elapid trains pure Mamba-2 models only; choose one of the Mamba presets, such as Mamba130M"));
        }
        if name == "tiny" {
            return Ok(Self {
                num_heads: 8,
                head_dim: 32,
                state_size: 32,
                vocab_size: 512,
                chunk_size: 64,
                ..Self::trained_from_scratch(128, 4, 1)
            });
        }
        let Some(&(_, hidden, layers, head_dim, groups)) = SIZES.iter().find(|size| size.0 == name) else {
            let hint = match nearest(name, PRESETS) {
                Some(near) => format!("did you mean {near}? "),
                None => String::new(),
            };
            return Err(Error::new(format!("there is no model preset {name:?}")).with_hint(format!(
                "{hint}The presets are {}; a path of a config.json or of a model folder does as well",
                PRESETS.join(", ")
            )));
        };
        let num_heads = 2 * hidden / head_dim;
        let n_groups = groups.unwrap_or_else(|| groups_for(num_heads, GROUPS));
        Ok(Self { num_heads, head_dim, ..Self::trained_from_scratch(hidden, layers, n_groups) })
    }

    /// What there is to say of G where it is not what the preset `name` would have.
    pub(crate) fn groups_note(&self, name: &str) -> Option<String> {
        let fitted = SIZES.iter().any(|&(preset, .., groups)| preset == name && groups.is_none());
        (fitted && self.n_groups == groups_for(self.num_heads, GROUPS) && self.n_groups < GROUPS).then(|| {
            format!("G {} is the largest divisor of H {} up to {GROUPS}", self.n_groups, self.num_heads)
        })
    }

    /// What the presets share: expand 2, N = 128, tied embeddings, and state-spaces' initialisation constants.
    fn trained_from_scratch(hidden_size: usize, num_hidden_layers: usize, n_groups: usize) -> Self {
        Self {
            hidden_size,
            num_hidden_layers,
            n_groups,
            vocab_size: 50288,
            // GPT-NeoX's <|endoftext|> plays all three parts.
            pad_token_id: Some(0),
            bos_token_id: Some(0),
            eos_token_id: Some(TokenIds::One(0)),
            initializer_range: 0.02,
            rescale_prenorm_residual: true,
            time_step_rank: hidden_size.div_ceil(16),
            tie_word_embeddings: true,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid() {
        for name in PRESETS {
            ModelConfig::preset(name).unwrap().validate().unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert_eq!(PRESETS.len(), SIZES.len() + 1);
    }

    #[test]
    fn groups_fit_the_heads() {
        // 2·768/128 = 12 heads: 8 does not divide them, 6 does.
        assert_eq!(ModelConfig::preset("Mamba130M").unwrap().n_groups, 6);
        assert_eq!(ModelConfig::preset("Mamba370M").unwrap().n_groups, 8);
        assert_eq!(ModelConfig::preset("mamba2-130m").unwrap().n_groups, 1);
        let note = |name| ModelConfig::preset(name).unwrap().groups_note(name);
        assert_eq!(note("Mamba130M").unwrap(), "G 6 is the largest divisor of H 12 up to 8");
        assert_eq!((note("Mamba370M"), note("mamba2-130m"), note("tiny")), (None, None, None));
        assert_eq!(groups_for(4, 8), 4);
        assert_eq!(groups_for(7, 8), 7);
        assert_eq!(groups_for(11, 8), 1);
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        let error = ModelConfig::preset("mamba2-130M").unwrap_err();
        assert!(error.to_string().contains("\"mamba2-130M\""));
        assert!(error.hint().unwrap().starts_with("did you mean mamba2-130m?"), "{:?}", error.hint());
        assert!(error.hint().unwrap().contains("Mamba7B"));
        let error = ModelConfig::preset("gpt2").unwrap_err();
        assert!(error.hint().unwrap().starts_with("The presets are tiny"), "{:?}", error.hint());
    }

    #[test]
    fn hybrids_are_refused_by_name() {
        let error = ModelConfig::preset("Mamba2Hybrid8B").unwrap_err();
        assert!(error.to_string().contains("Mamba2Hybrid8B") && error.to_string().contains("attention"));
    }
}
