//! Settings in a TOML file: `key = value` for each flag. They become words of a command line, so that names, types and
//! bounds are written down once, at the flags.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::ffi::OsString;
use std::fs;
use std::ops::Range;
use std::path::Path;

use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::Error;
use crate::error::nearest;

/// Flags that a file cannot hold: they say what to do with it.
const NOT_IN_A_FILE: [&str; 3] = ["config", "print-config", "help"];

/// The flags of `command` in the file at `path`, as `--key=value`. Keys may be spelled with dashes or underscores.
///
/// # Errors
/// The file cannot be read or is no TOML; a key that is no flag or stands there twice; a value that the flag does not
/// take. With the file's name, and the line.
pub(crate) fn words(path: &Path, command: &Command) -> Result<Vec<OsString>, Error> {
    let text = fs::read_to_string(path).map_err(|cause| Error::io("read", path, &cause))?;
    let table = DeTable::parse(&text).map_err(|cause| {
        at(path, &text, &cause.span().unwrap_or_default(), cause.message())
            .with_hint("a line is key = value, with texts in quotes: dtype = \"bfloat16\"")
    })?;
    let flags: BTreeMap<_, _> = command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_long()?, arg)))
        .filter(|(long, _)| !NOT_IN_A_FILE.contains(long))
        .collect();
    let mut seen = Vec::new();
    let mut words = Vec::new();
    for (key, value) in table.get_ref() {
        let flag = key.get_ref().replace('_', "-");
        let fault = |what: String| at(path, &text, &key.span(), what);
        let Some(arg) = flags.get(flag.as_str()) else {
            let hint = match nearest(&flag, flags.keys().copied()) {
                Some(name) => format!("did you mean {name}?"),
                None => "keys are the names of flags; `elapid train --help` lists them".to_owned(),
            };
            return Err(fault(format!("there is no setting {}", key.get_ref())).with_hint(hint));
        };
        if seen.contains(&flag) {
            return Err(fault(format!("{flag} stands there twice")).with_hint("take one of the two out"));
        }
        let raw = text[value.span()].trim();
        let value = plain(arg, value)
            .and_then(|value| check(&flag, arg.get_value_parser(), value))
            .map_err(|hint| fault(format!("{} is {raw}", key.get_ref())).with_hint(hint))?;
        // A file only says yes: what it does not turn on is off.
        match value.as_str() {
            "false" if is::<bool>(arg) => {}
            "true" if is::<bool>(arg) => words.push(format!("--{flag}").into()),
            value => words.push(format!("--{flag}={value}").into()),
        }
        seen.push(flag);
    }
    Ok(words)
}

fn at(path: &Path, text: &str, span: &Range<usize>, what: impl std::fmt::Display) -> Error {
    let line = text[..span.start].matches('\n').count() + 1;
    Error::new(format!("{}:{line}: {what}", path.display()))
}

fn is<T: 'static>(arg: &Arg) -> bool {
    arg.get_value_parser().type_id() == TypeId::of::<T>()
}

/// The value as a word of the command line; what it must be where it is of another type than the flag's.
fn plain(arg: &Arg, value: &Spanned<DeValue<'_>>) -> Result<String, String> {
    let integer = is::<u64>(arg) || is::<i64>(arg) || is::<usize>(arg);
    let float = is::<f64>(arg) || is::<f32>(arg);
    match value.get_ref() {
        DeValue::Boolean(value) if is::<bool>(arg) => Ok(value.to_string()),
        DeValue::Integer(value) if integer || float => i128::from_str_radix(value.as_str(), value.radix())
            .map_err(|cause| cause.to_string())
            .and_then(|value| match value {
                ..0 if is::<u64>(arg) || is::<usize>(arg) => Err("it must be 0 or more".into()),
                value => Ok(value.to_string()),
            }),
        DeValue::Float(value) if float => Ok(value.as_str().to_owned()),
        DeValue::String(value) if !integer && !float && !is::<bool>(arg) => Ok(value.to_string()),
        other => Err(format!(
            "it must be {}, not {} {}",
            match (is::<bool>(arg), integer, float) {
                (true, ..) => "true or false",
                (_, true, _) => "an integer",
                (_, _, true) => "a number",
                _ => "a text in quotes",
            },
            if matches!(other, DeValue::Integer(_) | DeValue::Array(_)) { "an" } else { "a" },
            other.type_str()
        )),
    }
}

/// What the flag's own parser says to the value.
fn check(flag: &str, parser: &ValueParser, value: String) -> Result<String, String> {
    let arg = Arg::new("value").long("value").value_parser(parser.clone());
    let probe = Command::new("train").no_binary_name(true).arg(arg);
    match probe.try_get_matches_from([format!("--value={value}")]) {
        Ok(_) => Ok(value),
        Err(error) => Err(match (error.get(ContextKind::ValidValue), error.source()) {
            (Some(ContextValue::Strings(names)), _) => format!("give one of {}", names.join(", ")),
            (_, Some(cause)) => cause.to_string(),
            _ => format!("`elapid train --help` says what {flag} takes"),
        }),
    }
}
