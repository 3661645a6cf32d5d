//! Initial values.
//!
//! One code path for every parameter, by role: nothing reinitialises what another part has set. Each tensor draws
//! from its own stream, derived from the seed and the tensor's name, so its values depend neither on the order nor on
//! which other tensors exist. A rank that holds a part of a tensor draws all of it, so the model is the same on any number
//! of ranks.

use elapid_tensor::Slot;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::layout::{Layout, ParamInfo, Role};
use crate::config::ModelConfig;

/// Whose initialisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// That of state-spaces/mamba (`Mamba2` and `MambaLMHeadModel`): A ~ U(1, 16); convolution weight and bias
    /// U(±1/√K); in_proj, out_proj and an untied head U(±1/√fan-in), out_proj divided by √layers; embedding
    /// N(0, 0.02²). Its constants are its own: `initializer_range` and `rescale_prenorm_residual` of the
    /// configuration belong to transformers and are not read.
    #[default]
    StateSpaces,
    /// That of transformers 5.23 (`Mamba2PreTrainedModel`): A = 1, 2, …, H; convolution weight U(±1/√K), bias 0;
    /// out_proj U(±1/√E), divided by √layers if `rescale_prenorm_residual`; in_proj, embedding and head
    /// N(0, `initializer_range`²), where a range of 0 means 0.02.
    Transformers,
}

/// Standard deviation of state-spaces' embedding (`initializer_range` of its `_init_weights`).
const STATE_SPACES_STD: f64 = 0.02;

/// Initial values of every parameter, handed to `sink` one tensor at a time, row-major.
///
/// Common to both schemes: Δt log-uniform in \[`time_step_min`, `time_step_max`\], at least `time_step_floor`, and
/// dt_bias its inverse under softplus; D and norm weights 1; biases of the projections 0.
pub fn initialise(
    config: &ModelConfig,
    layout: &Layout,
    scheme: Init,
    seed: u64,
    mut sink: impl FnMut(&Slot, &[f32]),
) {
    for (name, slot, info) in layout.iter() {
        let mut rng = stream(seed, &name);
        sink(&slot, &info.cuts(layout.share).slice(&values(config, info, scheme, &mut rng)));
    }
}

/// The random stream of one tensor.
fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    // FNV-1a: fixed for all time, unlike the standard library's hasher.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(hash);
    rng
}

fn values(config: &ModelConfig, info: &ParamInfo, scheme: Init, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let count = info.elements();
    let fan_in: usize = info.shape[1..].iter().product();
    let state_spaces = scheme == Init::StateSpaces;
    let mut draw = |sample: &mut dyn FnMut(&mut ChaCha8Rng) -> f64| -> Vec<f32> {
        (0..count).map(|_| sample(rng) as f32).collect()
    };
    // torch's default for Linear and Conv1d, kaiming_uniform with a = √5, is U(±1/√fan-in).
    let uniform = |bound: f64| move |rng: &mut ChaCha8Rng| rng.random_range(-bound..bound);
    let normal = |std: f64| move |rng: &mut ChaCha8Rng| std * rng.sample::<f64, _>(StandardNormal);
    let transformers_std = if config.initializer_range == 0.0 { 0.02 } else { config.initializer_range };
    let by_fan_in = 1.0 / (fan_in as f64).sqrt();
    match info.role {
        Role::Embedding if state_spaces => draw(&mut normal(STATE_SPACES_STD)),
        Role::InProj | Role::Head if state_spaces => draw(&mut uniform(by_fan_in)),
        Role::Embedding | Role::InProj | Role::Head => draw(&mut normal(transformers_std)),
        Role::OutProj if state_spaces || config.rescale_prenorm_residual => {
            draw(&mut uniform(by_fan_in / (config.num_hidden_layers as f64).sqrt()))
        }
        Role::OutProj | Role::ConvWeight => draw(&mut uniform(by_fan_in)),
        Role::ConvBias if state_spaces => draw(&mut uniform(1.0 / (config.conv_kernel as f64).sqrt())),
        Role::LinearBias | Role::ConvBias => vec![0.0; count],
        Role::ALog if state_spaces => draw(&mut |rng| rng.random_range(1.0_f64..16.0).ln()),
        Role::ALog => (1..=count).map(|a| (a as f64).ln() as f32).collect(),
        Role::DtBias => {
            let (low, high) = (config.time_step_min.ln(), config.time_step_max.ln());
            draw(&mut |rng| {
                let dt = (low + rng.random::<f64>() * (high - low)).exp().max(config.time_step_floor);
                // softplus⁻¹(Δ) = ln(e^Δ − 1), written so that a small Δ keeps its digits.
                dt + (-(-dt).exp_m1()).ln()
            })
        }
        Role::D | Role::Norm => vec![1.0; count],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn config() -> ModelConfig {
        ModelConfig {
            num_heads: 512,
            head_dim: 2,
            hidden_size: 512,
            vocab_size: 300,
            num_hidden_layers: 4,
            use_bias: true,
            tie_word_embeddings: false,
            initializer_range: 0.1,
            ..ModelConfig::preset("tiny").unwrap()
        }
    }

    fn fill(config: &ModelConfig, scheme: Init, seed: u64) -> HashMap<String, Vec<f32>> {
        let layout = Layout::new(config);
        let names: Vec<_> = layout.iter().map(|(name, slot, _)| (slot, name)).collect();
        let mut tensors = HashMap::new();
        initialise(config, &layout, scheme, seed, |slot, values| {
            assert_eq!(values.len(), slot.len());
            let name = names.iter().find(|(place, _)| place == slot).unwrap().1.clone();
            tensors.insert(name, values.to_vec());
        });
        assert_eq!(tensors.len(), names.len());
        tensors
    }

    /// The Kolmogorov-Smirnov statistic against `cdf` lies below its 0.1 % bound, 1.95/√n.
    fn follows(sample: impl IntoIterator<Item = f64>, cdf: impl Fn(f64) -> f64) {
        let mut sample: Vec<f64> = sample.into_iter().collect();
        sample.sort_by(f64::total_cmp);
        let n = sample.len() as f64;
        let distance = sample.iter().enumerate().fold(0.0_f64, |worst, (rank, value)| {
            let expected = cdf(*value);
            worst.max((expected - rank as f64 / n).abs()).max((expected - (rank + 1) as f64 / n).abs())
        });
        assert!(distance < 1.95 / n.sqrt(), "distance {distance} for {n} samples");
    }

    fn uniform(tensor: &[f32], low: f64, high: f64) {
        assert!(tensor.iter().all(|value| (low..=high).contains(&f64::from(*value))));
        follows(tensor.iter().map(|value| f64::from(*value)), |value| (value - low) / (high - low));
    }

    fn normal(tensor: &[f32], std: f64) {
        let n = tensor.len() as f64;
        let moment =
            |power| tensor.iter().map(|value| (f64::from(*value) / std).powi(power)).sum::<f64>() / n;
        assert!(moment(1).abs() < 4.0 / n.sqrt(), "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 4.0 * (2.0 / n).sqrt(), "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 4.0 * (96.0 / n).sqrt(), "kurtosis {}", moment(4));
    }

    fn softplus(x: f32) -> f64 {
        f64::from(x).exp().ln_1p()
    }

    fn in_layer(tensors: &HashMap<String, Vec<f32>>, name: &str) -> Vec<f32> {
        (0..4).flat_map(|layer| tensors[&format!("backbone.layers.{layer}.{name}")].clone()).collect()
    }

    #[test]
    fn t3_state_spaces() {
        let tensors = fill(&config(), Init::StateSpaces, 1);
        let layer = |name: &str| in_layer(&tensors, name);
        follows(layer("mixer.A_log").iter().map(|a| f64::from(*a).exp()), |a| (a - 1.0) / 15.0);
        let steps = layer("mixer.dt_bias");
        follows(steps.iter().map(|b| softplus(*b).ln()), |dt| (dt - 1e-3_f64.ln()) / 100_f64.ln());
        uniform(&layer("mixer.conv1d.weight"), -0.5, 0.5);
        uniform(&layer("mixer.conv1d.bias"), -0.5, 0.5);
        let bound = 1.0 / 512_f64.sqrt();
        uniform(&layer("mixer.in_proj.weight"), -bound, bound);
        uniform(&tensors["lm_head.weight"], -bound, bound);
        // 1/√E, and 1/√4 for four layers.
        let bound = 0.5 / 1024_f64.sqrt();
        uniform(&layer("mixer.out_proj.weight"), -bound, bound);
        normal(&tensors["backbone.embeddings.weight"], 0.02);
        for (name, value) in [
            ("norm.weight", 1.0),
            ("mixer.norm.weight", 1.0),
            ("mixer.D", 1.0),
            ("mixer.in_proj.bias", 0.0),
            ("mixer.out_proj.bias", 0.0),
        ] {
            assert!(layer(name).iter().all(|v| *v == value), "{name}");
        }
        assert!(tensors["backbone.norm_f.weight"].iter().all(|v| *v == 1.0));
    }

    #[test]
    fn t3_transformers() {
        let tensors = fill(&config(), Init::Transformers, 1);
        let layer = |name: &str| in_layer(&tensors, name);
        let a_log = &tensors["backbone.layers.3.mixer.A_log"];
        assert!(a_log.iter().enumerate().all(|(head, a)| *a == ((head + 1) as f64).ln() as f32));
        uniform(&layer("mixer.conv1d.weight"), -0.5, 0.5);
        assert!(layer("mixer.conv1d.bias").iter().all(|b| *b == 0.0));
        normal(&layer("mixer.in_proj.weight"), 0.1);
        normal(&tensors["lm_head.weight"], 0.1);
        normal(&tensors["backbone.embeddings.weight"], 0.1);
        // The presets ask for the rescaling; transformers' default does not.
        let bound = 1.0 / 1024_f64.sqrt();
        uniform(&layer("mixer.out_proj.weight"), -bound / 2.0, bound / 2.0);
        let plain = ModelConfig { rescale_prenorm_residual: false, ..config() };
        uniform(&in_layer(&fill(&plain, Init::Transformers, 1), "mixer.out_proj.weight"), -bound, bound);
    }

    #[test]
    fn the_floor_raises_small_steps() {
        let floored = ModelConfig { time_step_floor: 1e-2, ..config() };
        let tensors = fill(&floored, Init::StateSpaces, 1);
        let steps: Vec<_> = in_layer(&tensors, "mixer.dt_bias").iter().map(|b| softplus(*b)).collect();
        assert!(steps.iter().all(|dt| *dt > 0.01 - 1e-8));
        // Half of the log-uniform interval lies below the floor.
        let raised = steps.iter().filter(|dt| **dt < 0.01 + 1e-8).count() as f64 / steps.len() as f64;
        assert!((raised - 0.5).abs() < 0.05, "{raised}");
    }

    #[test]
    fn a_tensor_depends_on_seed_and_name_only() {
        let (one, two) = (fill(&config(), Init::StateSpaces, 1), fill(&config(), Init::StateSpaces, 2));
        let deeper = fill(&ModelConfig { use_bias: false, ..config() }, Init::StateSpaces, 1);
        let name = |layer| format!("backbone.layers.{layer}.mixer.in_proj.weight");
        assert_ne!(one[&name(0)], one[&name(1)]);
        assert_ne!(one[&name(0)], two[&name(0)]);
        assert_eq!(one[&name(0)], deeper[&name(0)]);
        assert_eq!(one, fill(&config(), Init::StateSpaces, 1));
    }
}
