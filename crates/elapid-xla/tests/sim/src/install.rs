//! A folder that looks like an installation of the Neuron SDK.

use std::fs;
use std::path::{Path, PathBuf};

/// What stands in for the compiler.
const COMPILER: &str = include_str!("../neuronx-cc");

/// This crate as a shared library, beside the test that runs.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.with_file_name(format!("{}elapid_sim{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX))
}

/// Puts `bin/neuronx-cc` and `lib/libnrt.so.1` into `dir`; gives the variables that make a program find them.
///
/// # Panics
/// Where that cannot be written.
pub fn install(dir: &Path) -> Vec<(&'static str, String)> {
    use std::os::unix::fs::PermissionsExt;
    let (bin, lib) = (dir.join("bin"), dir.join("lib"));
    [&bin, &lib].into_iter().for_each(|dir| fs::create_dir_all(dir).expect("a test writes into its folder"));
    let (compiler, runtime, aside) = (bin.join("neuronx-cc"), lib.join("libnrt.so.1"), dir.join("aside"));
    // Renamed into place: a process may have the old ones open.
    fs::write(&aside, COMPILER).expect("written");
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).expect("its own file");
    fs::rename(&aside, &compiler).expect("its own folder");
    fs::copy(library(), &aside).expect("cargo builds the library with the tests");
    fs::rename(&aside, &runtime).expect("its own folder");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    vec![("PATH", path), ("ELAPID_LIBNRT", runtime.display().to_string())]
}
