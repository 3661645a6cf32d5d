//! `neuronx-cc` as a process, and a cache of what it made.
//!
//! A compilation takes from minutes to hours, so nothing is compiled twice: the place of a result follows from the bytes
//! of the module, the flags and the compiler's version. Who wants a result holds an OS lock on its place while the compiler
//! runs; a lock ends with its process, so none is ever stale. A result is written aside and renamed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::Target;
use crate::driver::{Fault, Kind};
use crate::hlo::Module;

/// The compiler's name, looked for on the path.
pub const COMPILER: &str = "neuronx-cc";

/// Lines of its log that an error shows.
const SHOWN: usize = 12;

/// Compiled modules of one target.
#[derive(Clone, Debug)]
pub struct Compiler {
    target: Target,
    cache: PathBuf,
    /// What it says of itself; None: it is not installed, and only the cache can help.
    version: Option<String>,
    flags: Vec<String>,
    /// Told what takes long.
    tell: fn(&str),
}

/// The flags for a target, beside files.
pub fn flags(target: Target) -> Vec<String> {
    let lnc = target.lnc().to_string();
    let words =
        ["--target", target.name(), "--lnc", &lnc, "--model-type", "transformer", "--auto-cast", "none"];
    words.map(str::to_owned).to_vec()
}

impl Compiler {
    /// The compiler on the path, with a cache in the folder `cache`. Without a compiler, modules of the version `pinned`
    /// in the cache can still be had.
    ///
    /// # Errors
    /// The cache cannot be made.
    pub fn new(target: Target, cache: &Path, tell: fn(&str)) -> Result<Self, Fault> {
        fs::create_dir_all(cache).map_err(|cause| io("make", cache, &cause))?;
        let output = Command::new(COMPILER).arg("--version").stdin(Stdio::null()).output();
        let version = output.ok().filter(|output| output.status.success()).map(|output| {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unknown").to_owned()
        });
        let pinned = cache.join("compiler-version");
        let version = match version {
            Some(version) => {
                let aside = cache.join(format!(".compiler-version.{}", std::process::id()));
                fs::write(&aside, &version)
                    .and_then(|()| fs::rename(&aside, &pinned))
                    .map_err(|cause| io("write", &pinned, &cause))?;
                Some(version)
            }
            None => None,
        };
        Ok(Self { target, cache: cache.to_owned(), version, flags: flags(target), tell })
    }

    /// What it compiles for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The compiler's version, of this machine or of the one that filled the cache last.
    fn version(&self) -> Result<String, Fault> {
        let filled = || fs::read_to_string(self.cache.join("compiler-version")).ok();
        self.version.clone().or_else(filled).ok_or_else(|| {
            Fault::new(
                Kind::Missing,
                format!(
                    "{COMPILER} is not on the path, and {} holds no compiled modules",
                    self.cache.display()
                ),
                "install the AWS Neuron SDK's compiler, or copy the cache from a machine that has it",
            )
        })
    }

    /// What identifies a compiled module.
    pub fn key(&self, module: &[u8]) -> Result<String, Fault> {
        let mut hash = Sha256::new();
        for part in [module, self.flags.join(" ").as_bytes(), self.version()?.as_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Ok(hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
    }

    /// The compiled module, from the cache or from the compiler.
    ///
    /// # Errors
    /// There is no compiler and nothing in the cache; the compiler refuses the module, in which case its log stays in the
    /// cache.
    pub fn compile(&self, module: &Module) -> Result<Vec<u8>, Fault> {
        let neff = self.compiled(module)?;
        fs::read(&neff).map_err(|cause| io("read", &neff, &cause))
    }

    /// [`Self::compile`] for who does not want the bytes: the file in the cache.
    ///
    /// # Errors
    /// As there.
    pub fn compiled(&self, module: &Module) -> Result<PathBuf, Fault> {
        let (name, bytes) = (&module.proto.name, module.to_bytes());
        let key = self.key(&bytes)?;
        let place = self.cache.join(format!("{name}-{key}"));
        let neff = place.join("module.neff");
        if neff.is_file() {
            return Ok(neff);
        }
        let _lock = self.lock(name, &key)?;
        // Another process may have made it in the meantime.
        if neff.is_file() {
            return Ok(neff);
        }
        if self.version.is_none() {
            return Err(Fault::new(
                Kind::Missing,
                format!(
                    "{COMPILER} is not on the path, and module {name} is not in {}",
                    self.cache.display()
                ),
                "install the AWS Neuron SDK's compiler, or compile where it is (--compile-only) and copy the cache",
            ));
        }
        let aside = self.cache.join(format!(".{name}-{key}.partial"));
        // What a killed process may have left.
        let _ = fs::remove_dir_all(&aside);
        fs::create_dir_all(&aside).map_err(|cause| io("make", &aside, &cause))?;
        match self.run(module, &bytes, &aside) {
            Ok(()) => {
                let _ = fs::remove_dir_all(&place);
                fs::rename(&aside, &place).map_err(|cause| io("write", &place, &cause))?;
                Ok(neff)
            }
            Err((log, mut fault)) => {
                // The log outlives the attempt.
                let kept = self.cache.join(format!("{name}-{key}.failed.log"));
                if fs::rename(log, &kept).is_ok() {
                    fault.hint = format!("{}; its whole log is in {}", fault.hint, kept.display());
                }
                let _ = fs::remove_dir_all(&aside);
                Err(fault)
            }
        }
    }

    /// Waits until no other process compiles the module.
    fn lock(&self, name: &str, key: &str) -> Result<File, Fault> {
        let path = self.cache.join(format!(".{name}-{key}.lock"));
        let file = File::create(&path).map_err(|cause| io("create", &path, &cause))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut told, true) {
                        (self.tell)(&format!("another process compiles {name}: waiting for it"));
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(fs::TryLockError::Error(cause)) => return Err(io("lock", &path, &cause)),
            }
        }
    }

    /// Waits for the compiler, and says so where it takes long.
    fn wait(&self, mut child: Child, name: &str) -> std::io::Result<ExitStatus> {
        let mut told = Some(Instant::now() + PATIENCE);
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if told.take_if(|at| Instant::now() > *at).is_some() {
                (self.tell)(&format!(
                    "compiling {name} for {}: this can take a long time",
                    self.target.name()
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn run(&self, module: &Module, bytes: &[u8], dir: &Path) -> Result<(), (PathBuf, Fault)> {
        let log = dir.join("compiler.log");
        let (source, neff) = (dir.join("module.hlo.pb"), dir.join("module.neff"));
        let failed = |fault| (log.clone(), fault);
        let fallible = |path: &Path, cause: &std::io::Error| failed(io("write", path, cause));
        fs::write(&source, bytes).map_err(|cause| fallible(&source, &cause))?;
        let out = File::create(&log).map_err(|cause| fallible(&log, &cause))?;
        let err = out.try_clone().map_err(|cause| fallible(&log, &cause))?;
        let mut command = Command::new(COMPILER);
        command.args(["compile", "--framework", "XLA", "module.hlo.pb"]).args(&self.flags);
        command
            .args(["--output", "module.neff"])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        let status =
            command.spawn().and_then(|child| self.wait(child, &module.proto.name)).map_err(|cause| {
                let why = format!("{COMPILER} cannot be started: {cause}");
                failed(Fault::new(Kind::Missing, why, "check the installation of the AWS Neuron SDK"))
            })?;
        if status.success() && neff.is_file() {
            return Ok(());
        }
        let said = fs::read(&log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
        let how = match status.code() {
            Some(0) => "ended without a result".to_owned(),
            Some(code) => format!("ended with code {code}"),
            None => "was killed; was there enough memory?".to_owned(),
        };
        let name = &module.proto.name;
        let mut message = format!("{COMPILER} cannot compile {name}: it {how}");
        for line in worth_showing(&said) {
            message.push_str("\n  ");
            message.push_str(&with_op_names(line, module));
        }
        Err(failed(Fault::new(
            Kind::Compile,
            message,
            "a later SDK, another --layer-loop or a smaller --batch may do",
        )))
    }
}

/// After so long somebody may wonder what is going on.
const PATIENCE: Duration = Duration::from_secs(5);

/// The lines of a log that tell what went wrong: those that speak of errors, or else the last ones.
fn worth_showing(log: &str) -> Vec<&str> {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let is_error = |line: &&&str| {
        let line = line.to_lowercase();
        ["error", "fail", "unsupported", "exceed", "[f"].iter().any(|word| line.contains(word))
    };
    let errors: Vec<&str> = lines.iter().filter(is_error).take(SHOWN).copied().collect();
    if errors.is_empty() { lines[lines.len().saturating_sub(SHOWN)..].to_vec() } else { errors }
}

/// A line with the op of ours behind each instruction that it names.
fn with_op_names(line: &str, module: &Module) -> String {
    let all = module.proto.computations.iter().flat_map(|computation| &computation.instructions);
    let ours: HashMap<&str, &str> = all
        .filter_map(|i| Some((i.name.as_str(), i.metadata.as_ref()?.op_name.as_str())))
        .filter(|(_, op)| !op.is_empty())
        .collect();
    let in_a_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let mut out = String::new();
    let mut rest = line;
    while let Some(start) = rest.find(in_a_name) {
        let word = &rest[start..];
        let word = &word[..word.find(|c| !in_a_name(c)).unwrap_or(word.len())];
        // A full stop behind it ends a sentence.
        let name = word.trim_end_matches('.');
        let word = if name.is_empty() { word } else { name };
        out.push_str(&rest[..start + word.len()]);
        if let Some(op) = ours.get(word) {
            out.push_str(&format!(" ({op})"));
        }
        rest = &rest[start + word.len()..];
    }
    out + rest
}

fn io(action: &str, path: &Path, cause: &std::io::Error) -> Fault {
    Fault::new(
        Kind::Device,
        format!("cannot {action} {}: {cause}", path.display()),
        "check the path, its permissions and the disk that it lies on; --compile-cache names another",
    )
}
