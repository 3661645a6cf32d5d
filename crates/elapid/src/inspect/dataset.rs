//! Dataset folders.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use super::blocks::scan;
use super::{Fields, fields};
use crate::Error;
use crate::data::{Dataset, Sample, Tokenizer};

/// Tokens shown of a block.
const EXCERPT: usize = 128;
/// Stands where a document ends and the next one begins.
const BOUNDARY: &str = "⟨next document⟩";

/// Counts, what a pass through all blocks tells, and the beginnings of a few blocks.
pub(super) fn describe(dir: &Path) -> Result<Fields, Error> {
    let data = Dataset::open(dir)?;
    let card = data.card();
    let tokenizer = match data.tokenizer() {
        Some(dir) => Some(Tokenizer::load(&dir.display().to_string())?),
        None => None,
    };
    let blocks = BTreeSet::from([0, data.len() / 2, data.len() - 1]);
    let samples = blocks
        .into_iter()
        .map(|block| Ok(excerpt(&data.sample(block)?, tokenizer.as_ref())))
        .collect::<Result<Vec<_>, Error>>()?;
    let eos = card.filter(|card| card.append_eos).and_then(|card| card.eos_id);
    let mut found = fields(json!({
        "blocks": data.len(),
        "seq_len": data.seq_len(),
        "columns": data.columns(),
        "tokens": data.len() * data.seq_len(),
        "dropped_tokens": card.map(|card| card.dropped_tokens),
        "documents": card.map(|card| card.documents),
        "text_bytes": card.map(|card| card.bytes),
        "tokens_per_byte": card.and_then(|card| card.tokens_per_byte()),
        "tokenizer": card.map(|card| &card.tokenizer),
        "vocab_size": card.map(|card| card.vocab_size),
        "eos_id": card.and_then(|card| card.eos_id),
        "append_eos": card.map(|card| card.append_eos),
        "source": card.map(|card| &card.source),
        "fingerprint": data.fingerprint(),
    }));
    found.extend(scan(&data, eos, tokenizer.as_ref())?);
    found.insert("samples".into(), samples.into());
    Ok(found)
}

/// The beginning of a block as text, or as numbers without a tokenizer, with the bounds of documents marked where the
/// dataset knows them.
fn excerpt(sample: &Sample, tokenizer: Option<&Tokenizer>) -> String {
    let ids = &sample.input_ids[..EXCERPT.min(sample.input_ids.len())];
    let written = |ids: &[i32]| match tokenizer {
        Some(tokenizer) => tokenizer.decode(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>()),
        None => ids.iter().map(i32::to_string).collect::<Vec<_>>().join(" "),
    };
    let Some(documents) = &sample.documents else { return written(ids) };
    let mut rest = ids;
    let parts = documents[..ids.len()].chunk_by(|a, b| a == b).map(|document| {
        let (part, after) = rest.split_at(document.len());
        rest = after;
        written(part)
    });
    parts.collect::<Vec<_>>().join(&format!(" {BOUNDARY} "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_told_apart() {
        let documents = Some(vec![3, 3, 4, 4, 4, 3]);
        let sample = Sample { documents, ..Sample::new(&[1, 2, 3, 4, 5, 6]) };
        let expected = format!("1 2 {BOUNDARY} 3 4 5 {BOUNDARY} 6");
        assert_eq!(excerpt(&sample, None), expected);
        assert_eq!(excerpt(&Sample { documents: None, ..sample }, None), "1 2 3 4 5 6");
    }
}
