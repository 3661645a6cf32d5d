//! A file of texts; its first byte says which kind.
#![no_main]

use elapid::data::{Source, SourceOptions};
use libfuzzer_sys::fuzz_target;

const KINDS: [&str; 6] = ["parquet", "arrow", "jsonl", "csv", "jsonl.gz", "jsonl.zst"];

fuzz_target!(|bytes: &[u8]| {
    // Whole files begin as their kind does.
    let kind = match bytes {
        [b'P', b'A', ..] => KINDS[0],
        [b'A', b'R', ..] | [0xff, ..] => KINDS[1],
        [0x1f, 0x8b, ..] => KINDS[4],
        [0x28, 0xb5, ..] => KINDS[5],
        [b'{', ..] => KINDS[2],
        [first, ..] => KINDS[usize::from(*first) % KINDS.len()],
        [] => return,
    };
    let name = format!("text.{kind}");
    elapid_fuzz::with_files(&[(&name, bytes)], |dir| {
        if let Ok(source) = Source::open(&dir.join(&name), &SourceOptions::default()) {
            source.documents(0).take(100).for_each(drop);
        }
    });
});
