//! Puts the repository's own text into one file, for `elapid quickstart` to learn from.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../..");
    let mut files = Vec::new();
    // Not the tests, so that an edit of one does not build the crate again.
    let places = [
        "README.md",
        "CONTRIBUTING.md",
        "docs",
        "crates/elapid-tensor/src",
        "crates/elapid-cpu/src",
        "crates/elapid/src",
    ];
    for place in places {
        println!("cargo::rerun-if-changed={}", root.join(place).display());
        collect(&root.join(place), &mut files);
    }
    files.sort();
    let text: String = files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect();
    let out = PathBuf::from(env::var("OUT_DIR").expect("set by cargo"));
    fs::write(out.join("quickstart.txt"), text).expect("the output folder can be written");
}

/// All Markdown and Rust files at or below `path`.
fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    if let Ok(entries) = path.read_dir() {
        entries.flatten().for_each(|entry| collect(&entry.path(), files));
    } else if path.extension().is_some_and(|extension| extension == "md" || extension == "rs") {
        files.push(path.to_owned());
    }
}
