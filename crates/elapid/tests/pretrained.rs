//! Model folders: round trips to the byte, and one test for every way in which a folder can be bad.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use elapid::Error;
use elapid::config::ModelConfig;
use elapid::model::init::{Init, initialise};
use elapid::model::layout::Layout;
use elapid::model::pretrained::{FileDType, MAX_SHARD_SIZE, export_warning, load_weights, save};
use elapid_tensor::NormGroup;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

/// name → (dtype, shape, bytes)
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn config() -> ModelConfig {
    ModelConfig {
        num_heads: 4,
        head_dim: 4,
        hidden_size: 8,
        state_size: 3,
        n_groups: 2,
        vocab_size: 11,
        num_hidden_layers: 2,
        use_bias: true,
        ..ModelConfig::preset("tiny").unwrap()
    }
}

/// The values of all parameters, in a flat buffer.
fn weights(config: &ModelConfig) -> Vec<f32> {
    let layout = Layout::new(config);
    let mut flat = vec![0.0; layout.flat.len()];
    initialise(config, &layout, Init::StateSpaces, 7, |slot, values| {
        flat[layout.flat.range(slot)].copy_from_slice(values);
    });
    flat
}

fn save_flat(dir: &Path, config: &ModelConfig, dtype: FileDType, flat: &[f32]) -> Result<(), Error> {
    save_shards(dir, config, dtype, MAX_SHARD_SIZE, flat)
}

fn save_shards(
    dir: &Path,
    config: &ModelConfig,
    dtype: FileDType,
    max_shard: u64,
    flat: &[f32],
) -> Result<(), Error> {
    let layout = Layout::new(config);
    save(dir, config, &layout, dtype, max_shard, stretches(&layout, flat))
}

/// Gives stretches of the tensors that lie in `flat`.
fn stretches(layout: &Layout, flat: &[f32]) -> impl Fn(&str, usize, usize) -> Vec<f32> {
    move |name, first, count| {
        let (_, slot, _) = layout.iter().find(|(found, _, _)| found == name).unwrap();
        flat[layout.flat.range(&slot)][first..first + count].to_vec()
    }
}

/// The weight files of a folder.
fn weight_files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("model")).collect();
    names.sort();
    names
}

#[test]
fn large_models_are_written_in_several_files() {
    let dir = TempDir::new().unwrap();
    let (config, flat) = (config(), weights(&config()));
    let layout = Layout::new(&config);
    let limit = 2000;
    save_shards(dir.path(), &config, FileDType::F32, limit, &flat).unwrap();
    assert_eq!(load_flat(dir.path()).unwrap(), flat);

    let files = weight_files(dir.path());
    let n = files.len() - 1;
    assert!(n > 2, "{files:?}");
    let index = fs::read_to_string(dir.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_parameters"], layout.parameter_count());
    assert_eq!(index["metadata"]["total_size"], 4 * layout.parameter_count());
    for (i, file) in files[..n].iter().enumerate() {
        assert_eq!(*file, format!("model-{:05}-of-{n:05}.safetensors", i + 1));
        let bytes = fs::read(dir.path().join(file)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let size: usize = tensors.tensors().iter().map(|(_, tensor)| tensor.data().len()).sum();
        assert!(size <= limit as usize || tensors.len() == 1, "{file} holds {size} bytes");
        for name in tensors.names() {
            assert_eq!(index["weight_map"][name], **file, "{name}");
        }
    }
    assert_eq!(index["weight_map"].as_object().unwrap().len(), layout.iter().count());

    // Divided otherwise, and whole again: nothing of the division before is left, nor mistaken for the model.
    let other: Vec<f32> = flat.iter().map(|value| 2.0 * value).collect();
    save_shards(dir.path(), &config, FileDType::F32, 3000, &other).unwrap();
    assert_eq!(load_flat(dir.path()).unwrap(), other);
    assert!(weight_files(dir.path()).len() < n + 1);
    save_flat(dir.path(), &config, FileDType::F32, &flat).unwrap();
    assert_eq!(weight_files(dir.path()), ["model.safetensors"]);
    save_shards(dir.path(), &config, FileDType::F32, limit, &other).unwrap();
    assert_eq!(load_flat(dir.path()).unwrap(), other);
}

#[test]
fn no_more_than_a_few_mib_of_a_model_are_in_memory() {
    let dir = TempDir::new().unwrap();
    let config = ModelConfig { vocab_size: 300_000, ..config() };
    let (layout, flat) = (Layout::new(&config), weights(&config));
    let source = |name: &str, first, count| {
        assert!(count <= 1 << 20, "{count} elements of {name} at once");
        stretches(&layout, &flat)(name, first, count)
    };
    save(dir.path(), &config, &layout, FileDType::F32, MAX_SHARD_SIZE, source).unwrap();
    assert!(load_flat(dir.path()).unwrap() == flat);
    // The place of a bad value is counted from the start of its tensor, not of the stretch.
    let mut bad = flat.clone();
    bad[layout.flat.range(&layout.shared().embedding).start + 8 * 250_000 + 3] = f32::NAN;
    let error = save_flat(dir.path(), &config, FileDType::F32, &bad).unwrap_err();
    assert!(error.to_string().contains("backbone.embeddings.weight[250000, 3] is NaN"), "{error}");
}

fn load_flat(dir: &Path) -> Result<Vec<f32>, Error> {
    let layout = Layout::new(&ModelConfig::load(dir)?);
    let mut flat = vec![0.0; layout.flat.len()];
    load_weights(dir, &layout, |slot, values| flat[layout.flat.range(slot)].copy_from_slice(values))?;
    Ok(flat)
}

/// Place of the first element of the embedding in a flat buffer.
fn embedding_start() -> usize {
    let layout = Layout::new(&config());
    layout.flat.range(&layout.shared().embedding).start
}

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    tensors.tensors().into_iter().map(|(name, view)| (name, owned(view))).collect()
}

/// The file as the safetensors library makes it.
fn serialize(tensors: &Tensors) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(format)).unwrap()
}

fn saved(config: &ModelConfig) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    save_flat(dir.path(), config, FileDType::F32, &weights(config)).unwrap();
    dir
}

/// The folder of [`config`] after a change of its tensors.
fn changed(change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = saved(&config());
    let path = dir.path().join("model.safetensors");
    let mut tensors = read_tensors(&path);
    change(&mut tensors);
    fs::write(&path, serialize(&tensors)).unwrap();
    dir
}

#[track_caller]
fn refused(dir: &TempDir, expected: &[&str]) {
    let error = load_flat(dir.path()).expect_err("must be refused");
    for part in expected {
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
    assert!(error.hint().is_some(), "no hint: {error}");
}

#[test]
fn round_trips_to_the_byte() {
    for tied in [true, false] {
        let config = ModelConfig { tie_word_embeddings: tied, ..config() };
        for dtype in [FileDType::F32, FileDType::Bf16, FileDType::F16] {
            let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            save_flat(first.path(), &config, dtype, &weights(&config)).unwrap();
            let loaded = load_flat(first.path()).unwrap();
            if dtype == FileDType::F32 {
                assert_eq!(loaded, weights(&config));
            }
            save_flat(second.path(), &ModelConfig::load(first.path()).unwrap(), dtype, &loaded).unwrap();
            let mut names: Vec<_> =
                fs::read_dir(second.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors"]);
            for name in names {
                let read = |dir: &TempDir| fs::read(dir.path().join(&name)).unwrap();
                assert!(read(&first) == read(&second), "{name:?} changed, {dtype:?}");
            }
        }
    }
}

#[test]
fn sixteen_bits_are_rounded_to_nearest() {
    let mut flat = weights(&config());
    flat[embedding_start()] = 1.0 + 0.75 / 128.0;
    for (dtype, nearest) in [(FileDType::Bf16, 1.0 + 1.0 / 128.0), (FileDType::F16, 1.0 + 6.0 / 1024.0)] {
        let dir = tempfile::tempdir().unwrap();
        save_flat(dir.path(), &config(), dtype, &flat).unwrap();
        assert_eq!(load_flat(dir.path()).unwrap()[embedding_start()], nearest);
        assert_eq!(ModelConfig::load(dir.path()).unwrap().dtype.as_deref(), Some(dtype.name()));
    }
}

#[test]
fn the_file_is_the_one_that_the_library_writes() {
    let dir = saved(&config());
    let path = dir.path().join("model.safetensors");
    assert!(fs::read(&path).unwrap() == serialize(&read_tensors(&path)));
}

#[test]
fn shards_read_like_one_file() {
    let dir = saved(&config());
    let at = |name: &str| dir.path().join(name);
    let (mut one, mut two) = (read_tensors(&at("model.safetensors")), read_tensors(&at("model.safetensors")));
    fs::remove_file(at("model.safetensors")).unwrap();
    one.retain(|name, _| name.len().is_multiple_of(2));
    two.retain(|name, _| !name.len().is_multiple_of(2));
    let mut map = serde_json::Map::new();
    for (file, part) in
        [("model-00001-of-00002.safetensors", &one), ("model-00002-of-00002.safetensors", &two)]
    {
        assert!(!part.is_empty());
        fs::write(at(file), serialize(part)).unwrap();
        map.extend(part.keys().map(|name| (name.clone(), file.into())));
    }
    let index = at("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    assert_eq!(load_flat(dir.path()).unwrap(), weights(&config()));

    // The same tensor in both pieces.
    let repeated = one.first_key_value().unwrap();
    two.insert(repeated.0.clone(), repeated.1.clone());
    fs::write(at("model-00002-of-00002.safetensors"), serialize(&two)).unwrap();
    refused(&dir, &[repeated.0, "00001-of-00002", "00002-of-00002"]);

    fs::remove_file(at("model-00002-of-00002.safetensors")).unwrap();
    refused(&dir, &["index.json names files that are missing: model-00002-of-00002.safetensors"]);
    for bad in [r#"{"weight_map": {"a": "../x.safetensors"}}"#, r#"{"weight_map": {}}"#, "[]"] {
        fs::write(&index, bad).unwrap();
        refused(&dir, &["no weight_map"]);
    }
    fs::write(&index, "{").unwrap();
    refused(&dir, &["is not JSON"]);
}

#[test]
fn t13_state_spaces_spelling_of_the_embedding() {
    let dir = changed(|tensors| {
        let embedding = tensors.remove("backbone.embeddings.weight").unwrap();
        tensors.insert("backbone.embedding.weight".into(), embedding);
    });
    assert_eq!(load_flat(dir.path()).unwrap(), weights(&config()));
    let both = changed(|tensors| {
        let embedding = tensors["backbone.embeddings.weight"].clone();
        tensors.insert("backbone.embedding.weight".into(), embedding);
    });
    refused(&both, &["1 unexpected (backbone.embedding.weight)"]);
}

#[test]
fn t14_alias_of_a_tied_head() {
    let alias = |tensors: &mut Tensors| {
        let embedding = tensors["backbone.embeddings.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding);
    };
    assert_eq!(load_flat(changed(alias).path()).unwrap(), weights(&config()));
    let different = changed(|tensors| {
        alias(tensors);
        tensors.get_mut("lm_head.weight").unwrap().2[3] ^= 0x80;
    });
    refused(&different, &["lm_head.weight", "differs from backbone.embeddings.weight"]);
    assert!(!read_tensors(&saved(&config()).path().join("model.safetensors")).contains_key("lm_head.weight"));
}

#[test]
fn missing_tensors_are_all_named() {
    let dir = changed(|tensors| {
        tensors.remove("backbone.layers.0.mixer.A_log").unwrap();
        tensors.remove("backbone.norm_f.weight").unwrap();
    });
    refused(&dir, &["2 missing (backbone.layers.0.mixer.A_log, backbone.norm_f.weight)"]);
}

#[test]
fn an_untied_head_that_is_missing_gets_its_own_hint() {
    let dir = saved(&config());
    let untied = ModelConfig { tie_word_embeddings: false, ..config() };
    fs::write(dir.path().join("config.json"), untied.to_json()).unwrap();
    let error = load_flat(dir.path()).unwrap_err();
    assert!(error.to_string().contains("1 missing (lm_head.weight)"), "{error}");
    assert!(error.hint().unwrap().contains("tie_word_embeddings"));
}

#[test]
fn a_model_without_its_prefix_gets_its_own_hint() {
    let dir = changed(|tensors| {
        let bare = std::mem::take(tensors).into_iter();
        tensors.extend(bare.map(|(name, tensor)| (name.replace("backbone.", ""), tensor)));
    });
    let error = load_flat(dir.path()).unwrap_err();
    assert!(error.hint().unwrap().contains("Mamba2ForCausalLM"), "{:?}", error.hint());
}

#[test]
fn unexpected_tensors_are_named() {
    let dir = changed(|tensors| {
        let norm = tensors["backbone.norm_f.weight"].clone();
        tensors.insert("backbone.layers.9.norm.weight".into(), norm);
    });
    refused(&dir, &["1 unexpected (backbone.layers.9.norm.weight)"]);
}

#[test]
fn a_wrong_shape_names_both() {
    let dir = changed(|tensors| {
        let norm = tensors.get_mut("backbone.norm_f.weight").unwrap();
        norm.1 = vec![7];
        norm.2.truncate(28);
    });
    refused(&dir, &["backbone.norm_f.weight is [7]", "makes it [8]", "model.safetensors"]);
}

#[test]
fn an_unsupported_element_type_is_named() {
    let dir = changed(|tensors| {
        let norm = tensors.get_mut("backbone.norm_f.weight").unwrap();
        norm.0 = Dtype::F64;
        norm.2 = vec![0; 64];
    });
    refused(&dir, &["backbone.norm_f.weight", "F64"]);
}

#[test]
fn damaged_files_are_refused() {
    let dir = saved(&config());
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 4, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        refused(&dir, &["model.safetensors", &format!("({length} bytes)"), "not a whole safetensors file"]);
    }
    fs::remove_file(&path).unwrap();
    refused(&dir, &["there is no model.safetensors"]);
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    let error = load_flat(dir.path()).unwrap_err();
    assert!(error.hint().unwrap().contains("pickle"));
}

#[test]
fn values_that_are_not_finite_are_located() {
    for value in [f32::NAN, f32::NEG_INFINITY] {
        let dir = changed(|tensors| {
            let bytes = &mut tensors.get_mut("backbone.embeddings.weight").unwrap().2;
            bytes[4 * (2 * 8 + 5)..][..4].copy_from_slice(&value.to_le_bytes());
        });
        refused(&dir, &["model.safetensors", &format!("backbone.embeddings.weight[2, 5] is {value}")]);
    }
}

#[test]
fn a_failed_save_leaves_the_old_model() {
    let dir = saved(&config());
    for (value, hint) in [(f32::NAN, "diverged"), (70000.0, "does not fit float16")] {
        let mut flat = weights(&config());
        flat[embedding_start()] = value;
        let error = save_flat(dir.path(), &config(), FileDType::F16, &flat).unwrap_err();
        assert!(error.to_string().contains("backbone.embeddings.weight[0, 0]"), "{error}");
        assert!(error.hint().unwrap().contains(hint), "{:?}", error.hint());
        assert_eq!(load_flat(dir.path()).unwrap(), weights(&config()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "a partial file is left");
    }
    let file = dir.path().join("config.json").join("below a file");
    let error = save_flat(&file, &config(), FileDType::F32, &weights(&config())).unwrap_err();
    assert!(error.to_string().contains("below a file"), "{error}");
}

#[test]
fn t1_export_of_a_whole_width_norm_warns() {
    let across = ModelConfig { norm_group: NormGroup::Across, ..config() };
    assert!(export_warning(&across).unwrap().contains("2 groups"));
    assert_eq!(export_warning(&config()), None);
    assert_eq!(export_warning(&ModelConfig { n_groups: 1, ..across.clone() }), None);
    assert_eq!(ModelConfig::load(saved(&across).path()).unwrap().norm_group, NormGroup::Across);
}

/// T9: transformers rescales the out_proj that it has read where the configuration asks for rescaled initial values.
#[test]
fn t9_an_exported_model_asks_for_no_rescaling() {
    let config = ModelConfig { rescale_prenorm_residual: true, ..config() };
    let dir = saved(&config);
    assert!(!ModelConfig::load(dir.path()).unwrap().rescale_prenorm_residual);
}
