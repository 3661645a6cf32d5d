//! What a path holds: a model, a dataset, a checkpoint, a run.
//!
//! Each kind has a module whose `describe` gives the fields of the object that `elapid inspect --json` prints.

mod blocks;
mod checkpoint;
mod dataset;
mod model;
mod plan;
mod run;

use std::path::Path;

use serde_json::{Map, Value};

pub use plan::{MicroStep, plan};

use crate::Error;
use crate::checkpoint::MANIFEST;
use crate::config::{ModelConfig, PRESETS};
use crate::data::{DICT, STATE};
use crate::train::METRICS;

const CONFIG: &str = "config.json";
const SETTINGS: &str = "run.toml";

type Fields = Map<String, Value>;

/// A description.
#[derive(Debug)]
pub struct Description {
    /// An object; `kind` says which fields it has.
    pub object: Value,
    /// Damage that was found, each with its file.
    pub faults: Vec<String>,
}

/// Recognises and describes `path`: a file, a folder, or the name of a preset. Files of checkpoints are read and compared
/// with their checksums where `verify` asks for it.
///
/// # Errors
/// It is nothing that Elapid knows, or cannot be read, or is damaged so that nothing can be said of it.
pub fn inspect(path: &str, verify: bool) -> Result<Description, Error> {
    let mut faults = Vec::new();
    let (kind, fields) = recognise(path, verify, &mut faults)?;
    let mut object = Fields::new();
    object.insert("kind".into(), kind.into());
    object.insert("path".into(), path.into());
    object.extend(fields);
    Ok(Description { object: object.into(), faults })
}

fn recognise(name: &str, verify: bool, faults: &mut Vec<String>) -> Result<(&'static str, Fields), Error> {
    let path = Path::new(name);
    if PRESETS.contains(&name) {
        return Ok(("preset", model::describe(&ModelConfig::preset(name)?)));
    }
    if !path.exists() {
        // Says which presets there are, and which of them is meant.
        let hint = ModelConfig::preset(name).err().and_then(|error| error.hint().map(str::to_owned));
        return Err(Error::new(format!("there is neither a path nor a preset {name:?}"))
            .with_hint(hint.unwrap_or_default()));
    }
    let holds = |file: &str| path.join(file).exists();
    let ends_with = |ending: &str| path.extension().is_some_and(|extension| extension == ending);
    if path.is_file() {
        return match () {
            () if ends_with("toml") => Ok(("settings", run::describe_settings(path)?)),
            () if path.ends_with(MANIFEST) => recognise_parent(path, verify, faults),
            () if ends_with("json") => Ok(("config", model::describe(&ModelConfig::load(path)?))),
            () => Err(unknown(path)),
        };
    }
    if holds(MANIFEST) {
        Ok(("checkpoint", checkpoint::describe(path, verify, faults)?))
    } else if holds(STATE) || holds(DICT) {
        Ok(("dataset", dataset::describe(path)?))
    } else if holds(CONFIG) {
        Ok(("model", model::describe_folder(path)?))
    } else if holds(SETTINGS) || holds(METRICS) {
        Ok(("run", run::describe(path, verify, faults)?))
    } else if crate::checkpoint::list(path)?.is_empty() {
        Err(unknown(path))
    } else {
        Ok(("checkpoints", checkpoint::describe_all(path, verify, faults)?))
    }
}

fn recognise_parent(
    manifest: &Path,
    verify: bool,
    faults: &mut Vec<String>,
) -> Result<(&'static str, Fields), Error> {
    let dir = manifest.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(("checkpoint", checkpoint::describe(dir, verify, faults)?))
}

fn unknown(path: &Path) -> Error {
    Error::new(format!("{} is nothing that elapid knows", path.display())).with_hint(format!(
        "looked for {MANIFEST} (a checkpoint), folders step-… (checkpoints), {STATE} or {DICT} (a dataset), {CONFIG} \
         (a model), {SETTINGS} or {METRICS} (a run), and for files ….json and ….toml"
    ))
}

/// The fields of an object that was made with `json!`.
fn fields(object: Value) -> Fields {
    match object {
        Value::Object(fields) => fields,
        other => unreachable!("{other} is no object"),
    }
}
