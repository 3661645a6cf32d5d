//! Random small models.

use std::ops::Range;

use elapid::config::ModelConfig;
use elapid_tensor::NormGroup;
use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// What a model's extents are drawn from; layers, K and switches are drawn from the same for all.
pub(crate) struct Extents<'a> {
    /// (H, G).
    pub(crate) heads: &'a [(usize, usize)],
    /// N.
    pub(crate) state: Range<usize>,
    /// V.
    pub(crate) vocab: Range<usize>,
    /// Q.
    pub(crate) chunks: &'a [usize],
}

pub(crate) fn coin(rng: &mut ChaCha8Rng) -> bool {
    rng.random_bool(0.5)
}

/// A valid model.
pub(crate) fn model(rng: &mut ChaCha8Rng, extents: &Extents<'_>) -> ModelConfig {
    let (num_heads, n_groups) = *extents.heads.choose(rng).unwrap();
    let head_dim = *[4, 8].choose(rng).unwrap();
    let config = ModelConfig {
        num_heads,
        n_groups,
        head_dim,
        hidden_size: num_heads * head_dim / 2,
        expand: 2,
        state_size: rng.random_range(extents.state.clone()),
        num_hidden_layers: rng.random_range(1..4),
        vocab_size: rng.random_range(extents.vocab.clone()),
        conv_kernel: rng.random_range(1..5),
        chunk_size: *extents.chunks.choose(rng).unwrap(),
        use_bias: coin(rng),
        use_conv_bias: coin(rng),
        tie_word_embeddings: coin(rng),
        residual_in_fp32: coin(rng),
        norm_group: if coin(rng) { NormGroup::PerGroup } else { NormGroup::Across },
        time_step_limit: if coin(rng) { (0.0, f64::INFINITY) } else { (0.002, 0.05) },
        ..ModelConfig::preset("tiny").unwrap()
    };
    config.validate().unwrap();
    config
}
