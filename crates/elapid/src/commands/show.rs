//! The object of `--json` as text for people: a line a field, a table for a list of objects.
//!
//! The end of a field's name says what it is: `bytes`, `_s` (seconds, unless `_per_s`), `share` and `mfu` (of 1),
//! `error` and `tolerance`.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::print_line;
use crate::Error;
use crate::train::memory::bytes;

/// Prints `object` on stdout: as it is for programs, or laid out for people.
pub(super) fn show(object: &Value, json: bool) -> Result<(), Error> {
    if json {
        return print_line(&object.to_string());
    }
    let mut text = String::new();
    if let Some(fields) = object.as_object() {
        lay_out(&mut text, fields, 0);
    }
    print_line(text.trim_end())
}

fn lay_out(text: &mut String, fields: &Map<String, Value>, indent: usize) {
    let pad = " ".repeat(indent);
    let width = fields.keys().map(|name| title(name).chars().count()).max().unwrap_or(0);
    for (name, value) in fields {
        let label = title(name);
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                *text += &format!("{pad}{label}\n");
                lay_out(text, inner, indent + 2);
            }
            Value::Array(rows) if rows.iter().any(Value::is_object) => {
                *text += &format!("{pad}{label}\n");
                table(text, rows, indent + 2);
            }
            Value::Array(lines) if lines.iter().any(is_long) => {
                *text += &format!("{pad}{label}\n");
                for line in lines {
                    quote(text, line.as_str().unwrap_or_default(), indent + 2);
                }
            }
            value => *text += &format!("{pad}{label:width$}  {}\n", cell(name, value)),
        }
    }
}

/// Text of a document rather than a word.
fn is_long(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.contains('\n') || text.chars().count() > 60)
}

fn quote(text: &mut String, lines: &str, indent: usize) {
    for (i, line) in lines.split('\n').enumerate() {
        let mark = if i == 0 { '┌' } else { '│' };
        *text += &format!("{:indent$}{mark} {}\n", "", line.trim_end_matches('\r'));
    }
}

/// A column for each field of the first row; numbers to the right.
fn table(text: &mut String, rows: &[Value], indent: usize) {
    let rows: Vec<&Map<String, Value>> = rows.iter().filter_map(Value::as_object).collect();
    // A column that is null everywhere says nothing.
    let names =
        rows[0].keys().filter(|name| rows.iter().any(|row| row.get(*name).is_some_and(|v| !v.is_null())));
    let columns: Vec<(bool, Vec<String>)> = names
        .map(|name| {
            let value = |row: &&Map<String, Value>| row.get(name).cloned().unwrap_or_default();
            let numeric = rows.iter().all(|row| value(row).is_number() || value(row).is_null());
            let cells = rows.iter().map(|row| cell(name, &value(row)));
            (numeric, std::iter::once(title(name).to_owned()).chain(cells).collect())
        })
        .collect();
    for line in 0..=rows.len() {
        let mut out = " ".repeat(indent);
        for (numeric, cells) in &columns {
            let width = cells.iter().map(|cell| cell.chars().count()).max().unwrap_or(0);
            let cell = &cells[line];
            // Writing to a string does not fail.
            let _ = if *numeric { write!(out, "{cell:>width$}  ") } else { write!(out, "{cell:width$}  ") };
        }
        *text += out.trim_end();
        text.push('\n');
    }
}

/// A field's name for people; the unit moves into the value.
fn title(name: &str) -> String {
    if name == "bytes" {
        return "size".into();
    }
    let seconds = name.strip_suffix("_s").filter(|rest| !rest.ends_with("_per"));
    let name = name.strip_suffix("_bytes").or(seconds).unwrap_or(name);
    name.replace("_per_s", "/s").replace('_', " ")
}

fn cell(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::Bool(value) => (if *value { "yes" } else { "no" }).into(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "none".into(),
        Value::Array(items) => items.iter().map(|item| cell(name, item)).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{} {}", title(name), cell(name, value)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Number(number) => match (number.as_u64(), number.as_f64().unwrap_or(f64::NAN)) {
            (Some(count), _) if name.ends_with("bytes") => size(count),
            (_, value) if name.ends_with("share") || name == "mfu" => format!("{:.0} %", 100.0 * value),
            (_, 0.0) if number.is_f64() => "0".into(),
            (_, value) if name.ends_with("error") || name == "tolerance" => format!("{value:.1e}"),
            (_, value) if name.ends_with("_s") && !name.ends_with("_per_s") => seconds(value),
            (_, value) if number.is_f64() => short(value),
            _ => number.to_string(),
        },
    }
}

fn size(count: u64) -> String {
    match count {
        _ if count < 10_000 => format!("{count} B"),
        _ if count < 1 << 20 => format!("{:.0} KiB", count as f64 / 1024.0),
        _ => bytes(count),
    }
}

fn seconds(value: f64) -> String {
    match value {
        _ if value >= 1.0 => format!("{value:.2} s"),
        _ if value >= 1e-3 => format!("{:.2} ms", 1e3 * value),
        _ => format!("{:.1} µs", 1e6 * value),
    }
}

/// As it is where that is short, else four digits.
fn short(value: f64) -> String {
    match value.to_string() {
        exact if exact.len() <= 7 => exact,
        _ if value.abs() >= 1000.0 => format!("{value:.0}"),
        _ if value.abs() >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_and_tables_line_up() {
        let object = json!({
            "kind": "x",
            "size_bytes": 2 << 20,
            "rows": [
                { "name": "a", "best_s": 0.0125, "gone": null, "tokens_per_s": 12 },
                { "name": "long", "best_s": 2.5, "gone": null, "tokens_per_s": 1234.56 }
            ],
        });
        let mut text = String::new();
        lay_out(&mut text, object.as_object().unwrap(), 0);
        let expected = [
            "kind  x",
            "size  2.0 MiB",
            "rows",
            "  name      best  tokens/s",
            "  a     12.50 ms        12",
            "  long    2.50 s   1234.56",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }
}
