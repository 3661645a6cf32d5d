//! Units of text → their tokens, on many threads and in order.
//!
//! One thread reads, some tokenize, and the caller takes what they made in the order of the source. A ticket goes with each
//! batch from the reader round to the caller, so that only so many are under way, whatever is slow.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope};

use super::Tokenizer;
use super::dataset::quietly;
use super::units::{About, Unit};
use super::words::Encoder;
use crate::Error;

/// Bytes of text in a batch; a unit longer than that is taken whole.
const BATCH_BYTES: usize = 256 << 10;

/// Units with their tokens.
#[derive(Debug)]
pub(super) struct Encoded {
    /// Where each unit stands, its bytes of text, and the end of its tokens in `ids`.
    pub(super) units: Vec<(About, usize, usize)>,
    pub(super) ids: Vec<u32>,
}

type Numbered<T> = (u64, Result<T, Error>);

/// Tokenizes `units` on `threads` threads, with `eos` after each document, and gives them to `take` in order.
///
/// # Errors
/// The first of `units`, of the tokenizer or of `take`.
pub(super) fn run(
    units: impl Iterator<Item = Result<Unit, Error>> + Send,
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    threads: usize,
    mut take: impl FnMut(Encoded) -> Result<(), Error>,
) -> Result<(), Error> {
    let in_flight = 2 * threads + 2;
    thread::scope(|scope| {
        // What ends this closure drops its ends of the channels, and the threads leave.
        let (tickets, taken) = mpsc::sync_channel(in_flight);
        let (read, batches) = mpsc::sync_channel(in_flight);
        let (encoded, results) = mpsc::sync_channel(in_flight);
        let batches = Arc::new(Mutex::new(batches));
        for _ in 0..in_flight {
            tickets.send(()).expect("the receiver is here");
        }
        for _ in 0..threads {
            let (batches, encoded) = (batches.clone(), encoded.clone());
            start(scope, move || work(&batches, &encoded, tokenizer, eos))?;
        }
        drop((encoded, batches));
        start(scope, move || reader(units, &taken, &read))?;
        let mut early: BTreeMap<u64, Result<Encoded, Error>> = BTreeMap::new();
        let mut next = 0;
        for (number, result) in &results {
            early.insert(number, result);
            while let Some(result) = early.remove(&next) {
                take(result?)?;
                next += 1;
                // The reader may be through.
                let _ = tickets.send(());
            }
        }
        Ok(())
    })
}

fn start<'scope>(scope: &'scope Scope<'scope, '_>, work: impl FnOnce() + Send + 'scope) -> Result<(), Error> {
    thread::Builder::new().spawn_scoped(scope, work).map(|_| ()).map_err(|cause| {
        Error::new(format!("cannot start a thread: {cause}")).with_hint("give fewer with --num-proc")
    })
}

/// Makes batches of units, one a ticket.
fn reader(
    mut units: impl Iterator<Item = Result<Unit, Error>>,
    tickets: &Receiver<()>,
    batches: &SyncSender<Numbered<Vec<Unit>>>,
) {
    for number in 0.. {
        if tickets.recv().is_err() {
            return;
        }
        let (mut batch, mut size, mut fault) = (Vec::new(), 0, None);
        while size < BATCH_BYTES {
            match units.next() {
                Some(Ok(unit)) => {
                    // Empty documents take memory too.
                    size += unit.text.len() + size_of::<Unit>();
                    batch.push(unit);
                }
                Some(Err(error)) => {
                    fault = Some(error);
                    break;
                }
                None => break,
            }
        }
        let ended = size < BATCH_BYTES;
        if !batch.is_empty() && batches.send((number, Ok(batch))).is_err() {
            return;
        }
        if let Some(error) = fault {
            let _ = batches.send((number + u64::from(size > 0), Err(error)));
        }
        if ended {
            return;
        }
    }
}

fn work(
    batches: &Mutex<Receiver<Numbered<Vec<Unit>>>>,
    results: &SyncSender<Numbered<Encoded>>,
    tokenizer: &Tokenizer,
    eos: Option<u32>,
) {
    let mut encoder = Encoder::new(tokenizer);
    loop {
        let Ok(batches) = batches.lock() else { return };
        let Ok((number, batch)) = batches.recv() else { return };
        drop(batches);
        let encoded = batch.and_then(|units| encode(&units, &mut encoder, eos));
        if results.send((number, encoded)).is_err() {
            return;
        }
    }
}

/// How many tokens `texts` have, counted on `threads` threads: what the tokenizer can do where nothing else is done.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub(crate) fn count_tokens(texts: &[String], tokenizer: &Tokenizer, threads: usize) -> Result<u64, Error> {
    let next = AtomicUsize::new(0);
    let count = || -> Result<u64, Error> {
        let (mut encoder, mut ids, mut tokens) = (Encoder::new(tokenizer), Vec::new(), 0);
        while let Some(text) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
            ids.clear();
            encoder.encode(text, &mut ids)?;
            tokens += ids.len() as u64;
        }
        Ok(tokens)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(count)).collect();
        let counts =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|fault| resume_unwind(fault)));
        counts.sum()
    })
}

fn encode(units: &[Unit], encoder: &mut Encoder, eos: Option<u32>) -> Result<Encoded, Error> {
    let mut encoded = Encoded { units: Vec::with_capacity(units.len()), ids: Vec::new() };
    for Unit { text, about } in units {
        // The library is not ours, and a document is not to end the process.
        quietly(|| encoder.encode(text, &mut encoded.ids))
            .unwrap_or_else(|()| {
                Err(Error::new("the tokenizer broke down").with_hint("take the document out"))
            })
            .map_err(|error| error.at(format!("document {}", about.document)))?;
        encoded.ids.extend(eos.filter(|_| about.last));
        encoded.units.push((*about, text.len(), encoded.ids.len()));
    }
    Ok(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(document: u64, text: &str) -> Result<Unit, Error> {
        Ok(Unit { text: text.to_owned(), about: About { document, last: true, ..About::default() } })
    }

    fn stream(texts: &[String], threads: usize) -> Vec<u32> {
        let units = texts.iter().zip(0..).map(|(text, i)| unit(i, text));
        let (mut ids, mut documents) = (Vec::new(), 0);
        run(units, &Tokenizer::load("bytes").unwrap(), Some(256), threads, |encoded| {
            for (about, ..) in &encoded.units {
                assert_eq!(about.document, documents);
                documents += 1;
            }
            ids.extend(encoded.ids);
            Ok(())
        })
        .unwrap();
        ids
    }

    #[test]
    fn tokens_come_in_the_order_of_the_documents() {
        let mut texts: Vec<String> = (0..60_000).map(|i| i.to_string()).collect();
        texts.insert(7, "é".repeat(BATCH_BYTES));
        let expected: Vec<u32> = texts.iter().flat_map(|t| t.bytes().map(u32::from).chain([256])).collect();
        for threads in [1, 2, 7] {
            assert!(stream(&texts, threads) == expected, "{threads} threads");
        }
        assert!(stream(&[], 3).is_empty());
    }

    #[test]
    fn the_first_error_ends_it_after_what_came_before() {
        let texts =
            (0..).map(|i| if i == 50_000 { Err(Error::new("broken")) } else { unit(i, "0123456789") });
        let tokenizer = Tokenizer::load("bytes").unwrap();
        for threads in [1, 3] {
            let mut taken = 0;
            let error = run(texts.clone(), &tokenizer, None, threads, |encoded| {
                taken += encoded.units.len();
                Ok(())
            });
            assert_eq!((error.unwrap_err().to_string(), taken), ("broken".to_owned(), 50_000));
            let error = run(texts.clone(), &tokenizer, None, threads, |_| Err(Error::new("full")));
            assert_eq!(error.unwrap_err().to_string(), "full");
        }
    }
}
