//! The presets against what is published of them, by formulas of their own.

use elapid::config::{ModelConfig, PRESETS};
use elapid::model::Layout;
use elapid_tensor::Row;

/// Parameters of a tied model without projection biases: D, layers, P, G, with E = 2D, N = 128, K = 4. Written from
/// the architecture (Dao & Gu 2024, figure 6), not from the layout table.
fn parameters(d: usize, layers: usize, p: usize, g: usize) -> usize {
    // GPT-NeoX's 50277 tokens, padded to a multiple of 16.
    let vocabulary = 50277_usize.next_multiple_of(16);
    let (e, n, k) = (2 * d, 128, 4);
    let h = e / p;
    let conv = e + 2 * g * n;
    let in_proj = d * (e + conv + h); // z, x B C, dt
    let mixer = in_proj + conv * k + conv + 3 * h + e + e * d; // conv and its bias; dt_bias, A_log, D; gated norm; out_proj
    layers * (d + mixer) + d + vocabulary * d
}

/// (name, D, layers, P, G, millions that the name speaks of).
const PUBLISHED: [(&str, usize, usize, usize, usize, f64); 11] = [
    ("mamba2-130m", 768, 24, 64, 1, 130.0),
    ("mamba2-370m", 1024, 48, 64, 1, 370.0),
    ("mamba2-780m", 1536, 48, 64, 1, 780.0),
    ("mamba2-1.3b", 2048, 48, 64, 1, 1300.0),
    ("mamba2-2.7b", 2560, 64, 64, 1, 2700.0),
    // 8 groups, but for the 12 heads of the first: 6 is their largest divisor up to 8.
    ("Mamba130M", 768, 24, 128, 6, 130.0),
    ("Mamba370M", 1024, 48, 128, 8, 370.0),
    ("Mamba780M", 1536, 48, 128, 8, 780.0),
    ("Mamba1B", 2048, 48, 128, 8, 1300.0),
    ("Mamba3B", 2560, 64, 128, 8, 2700.0),
    ("Mamba7B", 4096, 64, 128, 8, 7000.0),
];

#[test]
fn sizes_are_the_published_ones() {
    assert_eq!(PRESETS.len(), PUBLISHED.len() + 1, "and tiny");
    for (name, d, layers, p, g, millions) in PUBLISHED {
        let config = ModelConfig::preset(name).unwrap();
        assert_eq!(
            (config.hidden_size, config.num_hidden_layers, config.head_dim, config.n_groups),
            (d, layers, p, g),
            "{name}"
        );
        assert_eq!((config.expand, config.state_size, config.conv_kernel), (2, 128, 4), "{name}");
        assert!(config.tie_word_embeddings && !config.use_bias && config.use_conv_bias, "{name}");
        let count = Layout::new(&config).parameter_count();
        assert_eq!(count, parameters(d, layers, p, g), "{name}");
        if g == 1 {
            // The names of the published models are their sizes, rounded.
            assert!((count as f64 / 1e6 / millions - 1.0).abs() < 0.04, "{name}: {count}");
        }
    }
    // As counted by the authors' own code.
    assert_eq!(parameters(768, 24, 64, 1), 128_989_632);
}

/// T23: the places of a large model's parameters lie beyond 2³¹ and 2³² elements, side by side and each where exact
/// arithmetic puts it.
#[test]
fn t23_offsets_of_a_large_model_pass_32_bits() {
    let layout = Layout::new(&ModelConfig::preset("Mamba7B").unwrap());
    assert!(layout.flat.len() as u128 > 1 << 32);
    let mut end = 0_u128;
    for (name, slot, _) in layout.iter() {
        let row = match slot.row {
            Row::Layer(layer) => layer as u128,
            Row::Shared => layout.flat.layers as u128,
        };
        let start = row * layout.flat.row as u128 + slot.offset as u128;
        let len: u128 = slot.shape.iter().map(|&extent| extent as u128).product();
        let range = layout.flat.range(&slot);
        assert_eq!((range.start as u128, range.end as u128), (start, start + len), "{name}");
        // The end of a row is padded to 16 elements.
        assert!(start >= end && start - end < 16, "{name} starts at {start}, the one before ends at {end}");
        end = start + len;
    }
    assert!(end > 7_000_000_000);
}
