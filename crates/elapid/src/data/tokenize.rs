//! Text → a dataset folder of token blocks, its tokenizer with it.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::{Card, Counts, DatasetWriter, Tokenizer, documents, pack};
use crate::Error;
use crate::config::run::check_threads;
use crate::error::say;

/// Time between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What [`tokenize`] reads and writes.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// Text file, `.jsonl` file, or folder of them.
    pub dataset: PathBuf,
    /// Field of a `.jsonl` line that holds the text.
    pub text_column: String,
    /// As [`Tokenizer::load`] takes it.
    pub tokenizer: String,
    /// Tokens a block, L; at least 2.
    pub seq_len: usize,
    /// The dataset folder, not there yet or empty.
    pub save_path: PathBuf,
    /// Put the end of text after each document.
    pub append_eos: bool,
    /// Write the column `document_ids`.
    pub document_ids: bool,
    /// Worker threads; 0: one a core.
    pub threads: usize,
}

/// Tokenizes and packs text into a dataset folder, with the tokenizer in its subfolder `tokenizer`. Progress goes to
/// stderr.
///
/// # Errors
/// Those of [`documents`], [`Tokenizer::load`], [`pack`] and [`DatasetWriter`]; a block of less than 2 tokens. Nothing
/// is left behind.
pub fn tokenize(options: &TokenizeOptions) -> Result<Card, Error> {
    let TokenizeOptions { dataset, seq_len, append_eos, document_ids, .. } = options;
    if *seq_len < 2 {
        return Err(Error::new(format!("--seq-len is {seq_len}"))
            .with_hint("at least 2: what a model learns is the next token of the same block"));
    }
    check_threads("--num-proc", options.threads.max(1))?;
    let tokenizer = Tokenizer::load(&options.tokenizer)?;
    // Listed before the new folder could be among its files.
    let mut documents = documents(dataset, &options.text_column)?;
    let mut writer = DatasetWriter::create(&options.save_path, *seq_len, *document_ids)?;
    tokenizer.save(&writer.folder().join("tokenizer"))?;

    let mut progress = Progress::new(documents.input_bytes());
    let counts =
        pack(&mut documents, &tokenizer, *seq_len, *append_eos, options.threads, &mut writer, |counts| {
            progress.show(counts);
        });
    progress.finish();
    let skipped = documents.skipped();
    if skipped > 0 {
        say(format_args!("files passed over because they are not UTF-8 text: {skipped}"));
    }
    let counts = counts?;
    let card = Card {
        tokenizer: options.tokenizer.clone(),
        vocab_size: tokenizer.vocab_size(),
        eos_id: tokenizer.eos_id(),
        seq_len: *seq_len,
        append_eos: *append_eos,
        document_ids: *document_ids,
        documents: counts.documents,
        tokens: counts.tokens,
        dropped_tokens: counts.dropped_tokens,
        bytes: counts.bytes,
        source: dataset.display().to_string(),
    };
    writer.finish(&card)?;
    Ok(card)
}

/// Shows how far it has come: a bar on a terminal, a line every few seconds elsewhere.
enum Progress {
    Bar(ProgressBar, Instant),
    Lines { total: u64, started: Instant, last: Instant },
}

impl Progress {
    fn new(total: u64) -> Self {
        let now = Instant::now();
        if !std::io::stderr().is_terminal() {
            return Self::Lines { total, started: now, last: now };
        }
        let style = ProgressStyle::with_template("{percent:>3} % {bar:24} {msg}  ETA {eta}")
            .expect("the template is constant");
        Self::Bar(ProgressBar::new(total).with_style(style.progress_chars("━╸ ")), now)
    }

    fn show(&mut self, counts: &Counts) {
        match self {
            Self::Bar(bar, started) => {
                bar.set_message(line(counts, started.elapsed()));
                bar.set_position(counts.input_bytes);
            }
            Self::Lines { total, started, last } => {
                if last.elapsed() < LINE_EVERY {
                    return;
                }
                *last = Instant::now();
                let done = (counts.input_bytes as f64 / *total as f64).min(1.0);
                let time = started.elapsed();
                let left = time.mul_f64((1.0 - done) / done.max(1e-9));
                say(format_args!(
                    "{:3.0} %  {}  ETA {}",
                    100.0 * done,
                    line(counts, time),
                    HumanDuration(left)
                ));
            }
        }
    }

    fn finish(&self) {
        if let Self::Bar(bar, _) = self {
            bar.finish_and_clear();
        }
    }
}

fn line(counts: &Counts, time: Duration) -> String {
    format!(
        "{} documents  {} tokens  {:.1} MB/s",
        counts.documents,
        counts.tokens + counts.dropped_tokens,
        counts.input_bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Dataset;

    fn options(dir: &std::path::Path) -> TokenizeOptions {
        TokenizeOptions {
            dataset: dir.join("text"),
            text_column: "text".into(),
            tokenizer: "bytes".into(),
            seq_len: 4,
            save_path: dir.join("data"),
            append_eos: true,
            document_ids: true,
            threads: 1,
        }
    }

    #[test]
    fn a_folder_of_text_becomes_a_dataset() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        std::fs::create_dir(&options.dataset).unwrap();
        std::fs::write(options.dataset.join("a"), "abcd").unwrap();
        std::fs::write(options.dataset.join("b"), "ef").unwrap();
        std::fs::write(options.dataset.join("c"), b"\xff").unwrap();
        let card = tokenize(&options).unwrap();
        assert_eq!((card.documents, card.bytes, card.tokens, card.dropped_tokens), (2, 6, 8, 0));
        assert_eq!((card.vocab_size, card.eos_id), (257, Some(256)));
        let data = Dataset::open(&options.save_path).unwrap();
        let sample = data.sample(1).unwrap();
        assert_eq!(sample.input_ids, [256, 101, 102, 256]);
        assert_eq!(sample.documents, Some(vec![0, 1, 1, 1]));
        assert!(card.document_ids && data.continues(1).unwrap());
        let tokenizer = options.save_path.join("tokenizer");
        assert_eq!(Tokenizer::load(tokenizer.to_str().unwrap()).unwrap().vocab_size(), 257);
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        std::fs::write(&options.dataset, "ab").unwrap();
        tokenize(&options).unwrap_err();
        let left: Vec<_> = dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["text"]);
    }

    #[test]
    fn a_block_of_one_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = tokenize(&TokenizeOptions { seq_len: 1, ..options(dir.path()) }).unwrap_err();
        assert_eq!(error.to_string(), "--seq-len is 1");
        assert!(error.hint().is_some());
    }
}
