//! The model's configuration: the fields of a transformers `config.json`, checked.
//!
//! [`ModelConfig`] is what every other part reads; [`ModelConfig::load`] reads it from a file and
//! [`ModelConfig::preset`] knows the usual sizes. Both give valid models; whoever changes a field afterwards calls
//! [`ModelConfig::validate`].

mod device;
pub(crate) mod file;
mod json;
mod presets;
pub mod run;
mod state_spaces;

use elapid_tensor::{Mamba2Spec, NormGroup};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;
pub use presets::PRESETS;

/// One token id or several: `eos_token_id` may be a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// A number in the file.
    One(u32),
    /// A list in the file.
    Many(Vec<u32>),
}

impl TokenIds {
    /// The ids.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

/// A Mamba-2 model, in the words of transformers' `Mamba2Config`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// H.
    pub num_heads: usize,
    /// P.
    pub head_dim: usize,
    /// V, rows of the embedding table.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// N.
    pub state_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Epsilon of every RMS norm.
    pub layer_norm_epsilon: f64,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// First token of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_id: Option<TokenIds>,
    /// E / D.
    pub expand: usize,
    /// K, 1 to 4.
    pub conv_kernel: usize,
    /// G.
    pub n_groups: usize,
    /// Biases of in_proj and out_proj.
    pub use_bias: bool,
    /// Bias of the convolution.
    pub use_conv_bias: bool,
    /// `silu` or its other name `swish`.
    pub hidden_act: String,
    /// Standard deviation of transformers' own initialisation.
    pub initializer_range: f64,
    /// Keep the residual stream in fp32 whatever the compute dtype.
    pub residual_in_fp32: bool,
    /// Unused by Mamba-2, kept for transformers.
    pub time_step_rank: usize,
    /// Smallest initial Δt.
    pub time_step_min: f64,
    /// Largest initial Δt.
    pub time_step_max: f64,
    /// An initial Δt below this is raised to it.
    pub time_step_floor: f64,
    /// Δt is clamped to this interval; the upper end may be infinite.
    pub time_step_limit: (f64, f64),
    /// Divide out_proj by √layers in transformers' own initialisation.
    pub rescale_prenorm_residual: bool,
    /// Kept for transformers' `generate`.
    pub use_cache: bool,
    /// Q.
    pub chunk_size: usize,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Over which channels the gated norm takes its mean: `"norm_group": "per_group" | "across"` in the file.
    /// Elapid's own field; transformers knows only per group and passes over it.
    pub norm_group: NormGroup,
    /// Element type of the weights beside the file, such as `bfloat16`.
    pub dtype: Option<String>,
    /// The version of transformers that wrote the file.
    pub transformers_version: Option<String>,
    /// Fields that say nothing about the model, kept as they were read.
    pub extra: Map<String, Value>,
}

impl Default for ModelConfig {
    /// The defaults of `Mamba2Config` in transformers 5.23: what a field missing from the file means.
    fn default() -> Self {
        Self {
            num_heads: 128,
            head_dim: 64,
            vocab_size: 32768,
            hidden_size: 4096,
            state_size: 128,
            num_hidden_layers: 64,
            layer_norm_epsilon: 1e-5,
            pad_token_id: Some(1),
            bos_token_id: Some(0),
            eos_token_id: Some(TokenIds::One(2)),
            expand: 2,
            conv_kernel: 4,
            n_groups: 8,
            use_bias: false,
            use_conv_bias: true,
            hidden_act: "silu".into(),
            initializer_range: 0.1,
            residual_in_fp32: true,
            time_step_rank: 256,
            time_step_min: 1e-3,
            time_step_max: 0.1,
            time_step_floor: 1e-4,
            time_step_limit: (0.0, f64::INFINITY),
            rescale_prenorm_residual: false,
            use_cache: true,
            chunk_size: 256,
            tie_word_embeddings: false,
            norm_group: NormGroup::PerGroup,
            dtype: None,
            transformers_version: None,
            extra: Map::new(),
        }
    }
}

/// Model FLOPs of one token, a multiply-add counted as two. See [`ModelConfig::flops_per_token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlopCount {
    /// Of the forward pass.
    pub forward: u64,
    /// Of all adjoints, recomputation not counted.
    pub backward: u64,
}

/// No size of a real model comes near this; below it, products of two sizes cannot overflow.
const MAX_SIZE: usize = 1 << 20;

impl ModelConfig {
    /// Checks that the values make a model that Elapid can build.
    ///
    /// # Errors
    /// The first value that does not, with every value it disagrees with.
    pub fn validate(&self) -> Result<(), Error> {
        for (name, value) in [
            ("num_heads", self.num_heads),
            ("head_dim", self.head_dim),
            ("hidden_size", self.hidden_size),
            ("state_size", self.state_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("expand", self.expand),
            ("n_groups", self.n_groups),
            ("chunk_size", self.chunk_size),
        ] {
            if !(1..=MAX_SIZE).contains(&value) {
                return Err(Error::new(format!("{name} is {value}"))
                    .with_hint(format!("{name} must lie between 1 and {MAX_SIZE}")));
            }
        }
        if !(1..=i32::MAX as usize).contains(&self.vocab_size) {
            return Err(Error::new(format!("vocab_size is {}", self.vocab_size))
                .with_hint(format!("vocab_size must lie between 1 and {}; token ids are 32-bit", i32::MAX)));
        }
        if !(1..=4).contains(&self.conv_kernel) {
            return Err(Error::new(format!("conv_kernel is {}", self.conv_kernel))
                .with_hint("the convolution kernels exist for widths 1 to 4; Mamba-2 models use 4"));
        }
        let (inner, by_heads) = (self.hidden_size * self.expand, self.num_heads * self.head_dim);
        if inner != by_heads {
            return Err(Error::new(format!(
                "hidden_size · expand = {} · {} = {inner}, but num_heads · head_dim = {} · {} = {by_heads}",
                self.hidden_size, self.expand, self.num_heads, self.head_dim
            ))
            .with_hint("both products are the inner width and must be equal: change num_heads or head_dim"));
        }
        if !self.num_heads.is_multiple_of(self.n_groups) {
            let divisor = presets::groups_for(self.num_heads, self.n_groups);
            return Err(Error::new(format!(
                "num_heads = {} is not a multiple of n_groups = {}",
                self.num_heads, self.n_groups
            ))
            .with_hint(format!(
                "every group needs the same number of heads; n_groups = {divisor} would do"
            )));
        }
        let spec = self.spec();
        let parameters = (spec.projection() + spec.inner()) as f64
            * self.hidden_size as f64
            * self.num_hidden_layers as f64
            + 2.0 * self.vocab_size as f64 * self.hidden_size as f64;
        if parameters > 1e15 {
            return Err(Error::new(format!("the sizes describe a model of {parameters:.1e} parameters"))
                .with_hint("no machine holds 10^15 parameters; look for a digit too many"));
        }
        for (name, value) in [
            ("layer_norm_epsilon", self.layer_norm_epsilon),
            ("time_step_min", self.time_step_min),
            ("time_step_max", self.time_step_max),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::new(format!("{name} is {value}"))
                    .with_hint(format!("{name} must be a finite number greater than 0")));
            }
        }
        for (name, value) in
            [("initializer_range", self.initializer_range), ("time_step_floor", self.time_step_floor)]
        {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::new(format!("{name} is {value}"))
                    .with_hint(format!("{name} must be a finite number, 0 or greater")));
            }
        }
        if self.time_step_min > self.time_step_max {
            return Err(Error::new(format!(
                "time_step_min = {} is greater than time_step_max = {}",
                self.time_step_min, self.time_step_max
            ))
            .with_hint("initial Δt is drawn between the two; the usual values are 0.001 and 0.1"));
        }
        let (low, high) = self.time_step_limit;
        // Written so that a NaN on either side fails.
        if !(low <= high && low.is_finite()) {
            return Err(Error::new(format!("time_step_limit is [{low}, {high}]"))
                .with_hint("it is [lowest, highest] Δt; [0.0, Infinity] means no limit"));
        }
        Ok(())
    }

    /// The constants of the `mamba2` op of the whole model.
    pub fn spec(&self) -> Mamba2Spec {
        Mamba2Spec {
            heads: self.num_heads,
            head_dim: self.head_dim,
            groups: self.n_groups,
            state: self.state_size,
            conv_kernel: self.conv_kernel,
            chunk: self.chunk_size,
            dt_limit: (self.time_step_limit.0 as f32, self.time_step_limit.1 as f32),
            norm: self.norm_group,
            norm_ranks: 1,
            norm_eps: self.layer_norm_epsilon as f32,
        }
    }

    /// Exact model FLOPs of one token, for model FLOPs utilisation. They depend neither on the sequence length nor
    /// on the algorithm that a kernel uses:
    ///
    /// - a product with a matrix `[O, I]`: 2·O·I forward (in_proj, out_proj, vocabulary head), twice that backward
    ///   (cotangent of the input, gradient of the matrix);
    /// - the convolution: 2·K·C, twice that backward;
    /// - the scan as the recurrence it computes, for each of the E·N elements of the state: decay 1, input 2,
    ///   output 2; backward dC, dS from y, dS from S, da, du, dB: 2 + 2 + 1 + 2 + 2 + 2 = 11;
    /// - the skip y += D·x: 2·E, twice that backward.
    ///
    /// Norms, activations, softmax and residual additions are left out, as is recomputation.
    pub fn flops_per_token(&self) -> FlopCount {
        let spec = self.spec();
        let (hidden, inner) = (self.hidden_size, spec.inner());
        let matrices = hidden * spec.projection() + inner * hidden;
        let products = matrices + self.conv_kernel * spec.conv_channels() + inner;
        let state = inner * self.state_size;
        let layers = self.num_hidden_layers;
        let head = hidden * self.vocab_size;
        FlopCount {
            forward: (layers * (2 * products + 5 * state) + 2 * head) as u64,
            backward: (layers * (4 * products + 11 * state) + 4 * head) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Validation of the smallest legal change of a valid configuration.
    fn refused(change: impl FnOnce(&mut ModelConfig)) -> Error {
        let mut config = ModelConfig::preset("tiny").unwrap();
        change(&mut config);
        config.validate().expect_err("must be refused")
    }

    #[test]
    fn width_mismatch_names_both_products() {
        let error = refused(|c| c.num_heads += 1);
        assert_eq!(
            error.to_string(),
            "hidden_size · expand = 128 · 2 = 256, but num_heads · head_dim = 9 · 32 = 288"
        );
        assert!(error.hint().is_some());
    }

    #[test]
    fn groups_must_divide_heads() {
        let error = refused(|c| c.n_groups = 3);
        assert_eq!(error.to_string(), "num_heads = 8 is not a multiple of n_groups = 3");
        assert!(error.hint().unwrap().contains("n_groups = 2"));
    }

    #[test]
    fn every_size_is_bounded() {
        type Field = fn(&mut ModelConfig) -> &mut usize;
        let fields: [(&str, Field); 10] = [
            ("num_heads", |c| &mut c.num_heads),
            ("head_dim", |c| &mut c.head_dim),
            ("hidden_size", |c| &mut c.hidden_size),
            ("state_size", |c| &mut c.state_size),
            ("num_hidden_layers", |c| &mut c.num_hidden_layers),
            ("expand", |c| &mut c.expand),
            ("n_groups", |c| &mut c.n_groups),
            ("chunk_size", |c| &mut c.chunk_size),
            ("vocab_size", |c| &mut c.vocab_size),
            ("conv_kernel", |c| &mut c.conv_kernel),
        ];
        for (name, field) in fields {
            for value in [0, usize::MAX] {
                let error = refused(|c| *field(c) = value);
                assert_eq!(error.to_string(), format!("{name} is {value}"));
            }
        }
        assert!(refused(|c| c.conv_kernel = 5).to_string().contains("conv_kernel is 5"));
        let huge = refused(|c| {
            c.state_size = MAX_SIZE;
            c.n_groups = 8;
            c.num_hidden_layers = MAX_SIZE;
        });
        assert!(huge.to_string().contains("parameters"), "{huge}");
    }

    #[test]
    fn rates_are_checked() {
        assert!(refused(|c| c.layer_norm_epsilon = 0.0).to_string().contains("layer_norm_epsilon is 0"));
        assert!(refused(|c| c.time_step_min = f64::NAN).to_string().contains("time_step_min is NaN"));
        assert!(refused(|c| c.initializer_range = -1.0).to_string().contains("initializer_range is -1"));
        assert!(refused(|c| c.time_step_min = 0.2).to_string().contains("time_step_min = 0.2"));
        for limit in [(1.0, 0.5), (f64::NAN, 1.0), (0.0, f64::NAN), (f64::INFINITY, f64::INFINITY)] {
            assert!(refused(|c| c.time_step_limit = limit).to_string().contains("time_step_limit"));
        }
    }

    #[test]
    fn flops_by_hand() {
        let config = ModelConfig {
            num_heads: 2,
            head_dim: 3,
            hidden_size: 3,
            expand: 2,
            state_size: 5,
            n_groups: 1,
            conv_kernel: 4,
            num_hidden_layers: 7,
            vocab_size: 11,
            ..ModelConfig::default()
        };
        config.validate().unwrap();
        // in_proj [6 + 6 + 5 + 5 + 2, 3], out_proj [3, 6], conv [16, 4], D [6], state 6·5, head [11, 3].
        let products = 24 * 3 + 18 + 64 + 6;
        let count = config.flops_per_token();
        assert_eq!(count.forward, 7 * (2 * products + 5 * 30) + 2 * 33);
        assert_eq!(count.backward, 7 * (4 * products + 11 * 30) + 4 * 33);
    }
}
