//! Runs on devices, as programs.
#![allow(dead_code)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::run::command;

/// A kind of device: flags and variables that lead there.
pub(crate) struct Device {
    pub(crate) flags: String,
    pub(crate) variables: Vec<(&'static str, String)>,
}

impl Device {
    pub(crate) fn simulated(dir: &Path) -> Self {
        let variables = elapid_sim::install(&dir.join("sdk"));
        Self { flags: "--device neuron --target trn1 --compile-cache neff".into(), variables }
    }

    /// None, with a line that says so, where no plugin is named.
    pub(crate) fn xla() -> Option<Self> {
        let Ok(plugin) = std::env::var("ELAPID_PJRT_CPU") else {
            eprintln!("skipped: ELAPID_PJRT_CPU names no plugin");
            return None;
        };
        Some(Self { flags: format!("--device pjrt --plugin {plugin}"), variables: Vec::new() })
    }

    pub(crate) fn command(&self, dir: &Path, flags: &str) -> Command {
        let mut command = command(dir, &format!("{} {flags}", self.flags));
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs to the end; gives stderr.
    pub(crate) fn succeeds(&self, dir: &Path, flags: &str) -> String {
        let output = self.command(dir, flags).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{flags}: {said}");
        said
    }

    pub(crate) fn selftest(&self, dir: &Path, flags: &str, more: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elapid"));
        let flags = format!("selftest --json {} {flags}", self.flags);
        command.current_dir(dir).args(flags.split_whitespace());
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).envs(more.iter().copied());
        command.output().unwrap()
    }

    /// Runs into an error; gives stderr.
    pub(crate) fn fails(&self, dir: &Path, flags: &str) -> String {
        let output = self.command(dir, flags).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{flags}: {said}");
        assert!(said.contains("error: ") && said.contains("hint: ") && !said.contains("panicked"), "{said}");
        said
    }
}

/// Loss, gradient norm and evaluation of every step.
pub(crate) fn curve(run: &Path) -> Vec<[f64; 3]> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let figures = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        ["loss", "grad_norm", "eval_loss"].map(|name| line[name].as_f64().unwrap_or(0.0))
    };
    text.lines().map(figures).collect()
}

#[track_caller]
pub(crate) fn same_curve(run: &Path, expected: &Path) {
    let (got, want) = (curve(run), curve(expected));
    assert_eq!(got.len(), want.len(), "{}", run.display());
    for (step, (got, want)) in got.iter().zip(&want).enumerate() {
        for (got, want) in got.iter().zip(want) {
            let error = (got - want).abs() / want.abs().max(1e-3);
            assert!(error < 1e-4, "step {}: {got} instead of {want}", step + 1);
        }
    }
}
