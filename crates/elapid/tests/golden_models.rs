//! Model folders written by transformers (`golden/models`): they are read whole, and what we write in their place is
//! the same file.

use std::fs;
use std::path::{Path, PathBuf};

use elapid::config::ModelConfig;
use elapid::model::layout::Layout;
use elapid::model::pretrained::{FileDType, MAX_SHARD_SIZE, load_weights, save};

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()
}

#[test]
fn folders_of_transformers_come_back_to_the_byte() {
    let folders = folders();
    assert!(folders.len() >= 8, "only {} golden models", folders.len());
    for folder in folders {
        let config = ModelConfig::load(&folder).unwrap();
        let layout = Layout::new(&config);
        let mut flat = vec![f32::NAN; layout.flat.len()];
        load_weights(&folder, &layout, |slot, values| flat[layout.flat.range(slot)].copy_from_slice(values))
            .unwrap();
        for (name, slot, _) in layout.iter() {
            assert!(
                !flat[layout.flat.range(&slot)].iter().any(|value| value.is_nan()),
                "{name} was not read"
            );
        }

        let copy = tempfile::tempdir().unwrap();
        let source = |name: &str, first, count| {
            let (_, slot, _) = layout.iter().find(|(found, _, _)| found == name).unwrap();
            flat[layout.flat.range(&slot)][first..first + count].to_vec()
        };
        save(copy.path(), &config, &layout, FileDType::F32, MAX_SHARD_SIZE, source).unwrap();
        let read = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
        assert!(read(&folder) == read(copy.path()), "{} changed", folder.display());
        assert_eq!(ModelConfig::load(copy.path()).unwrap(), config);
    }
}

#[test]
fn t22_the_reference_curve_decays_the_same_parameters() {
    for folder in folders() {
        let layout = Layout::new(&ModelConfig::load(&folder).unwrap());
        let mut ours: Vec<String> =
            layout.iter().filter(|(_, _, info)| info.role.decayed()).map(|(name, _, _)| name).collect();
        ours.sort();
        let golden: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let theirs: Vec<String> = serde_json::from_value(golden["curve"]["decayed"].clone()).unwrap();
        assert_eq!(ours, theirs, "{}", folder.display());
    }
}
