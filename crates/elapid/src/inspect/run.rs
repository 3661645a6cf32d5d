//! Run folders and their settings.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Fields, SETTINGS, checkpoint, fields};
use crate::Error;
use crate::checkpoint::Lock;
use crate::train::{FINISHED, METRICS};

/// Steps shown of `metrics.jsonl`.
const LAST: usize = 5;

/// How far the run has come, and its checkpoints.
pub(super) fn describe(dir: &Path, verify: bool, faults: &mut Vec<String>) -> Result<Fields, Error> {
    let settings = if dir.join(SETTINGS).exists() { read(&dir.join(SETTINGS))? } else { Value::Null };
    let metrics = metrics(dir)?;
    let field = |line: Option<&Value>, name: &str| line.map(|line| line[name].clone());
    let state = match () {
        () if Lock::is_held(dir) => "running",
        () if dir.join(FINISHED).exists() => "finished",
        () if metrics.is_empty() => "not begun",
        () => "stopped",
    };
    let last = metrics.iter().rev().take(LAST).rev().map(|line| {
        let names = ["step", "loss", "grad_norm", "lr", "tokens_per_s", "mfu"];
        names.map(|name| (name.to_owned(), line[name].clone())).into_iter().collect::<Fields>()
    });
    let evaluated = metrics.iter().rev().find(|line| line["eval_loss"].is_number());
    let checkpoints = settings["checkpoint-dir"].as_str().map(PathBuf::from);
    // A run folder may have been moved, or be looked at from elsewhere.
    let checkpoints = checkpoints.filter(|dir| dir.is_dir()).unwrap_or_else(|| dir.join("checkpoints"));
    Ok(fields(json!({
        "state": state,
        "step": field(metrics.last(), "step"),
        "max_steps": settings["max-steps"],
        "model": settings["model"],
        "data_dir": settings["data-dir"],
        "tokens": field(metrics.last(), "tokens"),
        "first_loss": field(metrics.first(), "loss"),
        "last_loss": field(metrics.last(), "loss"),
        "evaluation": evaluated.map(|line| json!({ "step": line["step"], "loss": line["eval_loss"] })),
        "last_steps": last.collect::<Vec<_>>(),
        "exported_model": dir.join("hf/config.json").exists(),
        "checkpoints": checkpoint::rows(&checkpoints, verify, faults)?,
    })))
}

/// A `run.toml`.
pub(super) fn describe_settings(path: &Path) -> Result<Fields, Error> {
    Ok(fields(json!({ "settings": read(path)? })))
}

fn read(path: &Path) -> Result<Value, Error> {
    let text = fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))?;
    toml::from_str(&text).map_err(|cause| {
        Error::new(format!("{}: {}", path.display(), cause.message()))
            .with_hint("a run.toml holds flags of `elapid train`, one `name = value` a line")
    })
}

/// The lines of `metrics.jsonl`; one that is still being written is left out.
fn metrics(dir: &Path) -> Result<Vec<Value>, Error> {
    let path = dir.join(METRICS);
    match fs::read_to_string(&path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        text => {
            let text = text.map_err(|cause| Error::io("read", &path, &cause))?;
            Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
        }
    }
}
