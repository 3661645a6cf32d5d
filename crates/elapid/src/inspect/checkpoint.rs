//! Checkpoints and folders of them.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Fields, fields, model};
use crate::Error;
use crate::checkpoint::{LATEST, MANIFEST, Manifest, list};
use crate::config::ModelConfig;

/// Everything that the manifest says, and the model.
pub(super) fn describe(dir: &Path, check: bool, faults: &mut Vec<String>) -> Result<Fields, Error> {
    let manifest = Manifest::read(&dir.join(MANIFEST))?;
    let files: Vec<_> = manifest
        .files
        .iter()
        .map(|(name, info)| {
            let fault = if check { fault(manifest.verify(dir, name), faults) } else { None };
            json!({ "name": name, "bytes": info.bytes, "crc32": info.crc32, "fault": fault })
        })
        .collect();
    let config = ModelConfig::load(dir);
    let progress = &manifest.progress;
    Ok(fields(json!({
        "step": progress.step,
        "tag": tag(dir),
        "samples": progress.samples,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "first_loss": progress.first_loss,
        "last_loss": progress.last_loss,
        "mesh": manifest.mesh,
        "order": progress.order,
        "data": progress.data,
        "tokenizer": manifest.tokenizer,
        "metrics": progress.metrics,
        "bytes": manifest.files.values().map(|file| file.bytes).sum::<u64>(),
        "verified": check,
        "files": files,
        "model": match config {
            Ok(config) => model::describe(&config).into(),
            Err(error) => json!({ "fault": fault::<()>(Err(error), faults) }),
        },
        "settings": progress.settings,
    })))
}

/// A line a checkpoint.
pub(super) fn describe_all(dir: &Path, check: bool, faults: &mut Vec<String>) -> Result<Fields, Error> {
    let latest = fs::read_to_string(dir.join(LATEST)).ok().map(|name| name.trim().to_owned());
    Ok(fields(json!({ "latest": latest, "checkpoints": rows(dir, check, faults)?, "verified": check })))
}

/// The checkpoints of a folder, oldest first; none where there is no such folder.
pub(super) fn rows(dir: &Path, check: bool, faults: &mut Vec<String>) -> Result<Vec<Value>, Error> {
    let row = |(step, name): (u64, String)| {
        let place = dir.join(&name);
        let manifest = Manifest::read(&place.join(MANIFEST));
        let found = manifest.as_ref().ok().map(|manifest| {
            let bytes: u64 = manifest.files.values().map(|file| file.bytes).sum();
            (bytes, manifest.progress.samples, manifest.progress.last_loss)
        });
        let whole = manifest.and_then(|manifest| {
            let mut files = manifest.files.keys().filter(|_| check);
            files.try_for_each(|file| manifest.verify(&place, file))
        });
        json!({
            "name": name,
            "step": step,
            "tag": tag(&place),
            "bytes": found.map(|found| found.0),
            "samples": found.map(|found| found.1),
            "last_loss": found.map(|found| found.2),
            "fault": fault(whole, faults),
        })
    };
    Ok(list(dir)?.into_iter().map(row).collect())
}

/// The message of an error, which is remembered.
fn fault<T>(result: Result<T, Error>, faults: &mut Vec<String>) -> Option<String> {
    let message = result.err()?.to_string();
    faults.push(message.clone());
    Some(message)
}

/// `exp` of `step-00000042-exp`.
fn tag(dir: &Path) -> Option<String> {
    // `.` has no name of its own.
    let dir = dir.canonicalize().ok()?;
    let rest = dir.file_name()?.to_str()?.strip_prefix("step-")?;
    rest.split_once('-').map(|(_, tag)| tag.to_owned())
}
