//! From text to blocks, whole and interrupted.

use std::fs;
use std::path::Path;

use super::*;
use crate::data::Dataset;

/// One document a line of `text.jsonl`, bytes, blocks of `seq_len`, one thread.
fn options(dir: &Path, texts: &[&str], seq_len: usize) -> TokenizeOptions {
    let lines: String = texts.iter().map(|text| json!({ "text": text }).to_string() + "\n").collect();
    fs::write(dir.join("text.jsonl"), lines).unwrap();
    TokenizeOptions {
        dataset: dir.join("text.jsonl"),
        seq_len,
        save_path: dir.join("data"),
        document_ids: true,
        threads: 1,
        ..TokenizeOptions::default()
    }
}

fn rows(dir: &Path) -> Vec<Vec<i32>> {
    let data = Dataset::open(dir).unwrap();
    (0..data.len()).map(|i| data.sample(i).unwrap().input_ids).collect()
}

/// Every file below a folder, by its path.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let (mut files, mut folders) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                files.push((name, fs::read(path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        dir.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_folder_of_text_becomes_a_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    let options = TokenizeOptions { dataset: text.clone(), append_eos: true, ..options(dir.path(), &[], 4) };
    fs::create_dir(&text).unwrap();
    fs::write(text.join("a"), "abcd").unwrap();
    fs::write(text.join("b"), "ef").unwrap();
    fs::write(text.join("c"), b"\xff").unwrap();
    let card = tokenize(&options).unwrap().train;
    assert_eq!((card.documents, card.bytes, card.tokens, card.dropped_tokens), (2, 6, 8, 0));
    assert_eq!((card.vocab_size, card.eos_id), (257, Some(256)));
    let data = Dataset::open(&options.save_path).unwrap();
    assert_eq!(data.card(), Some(&card));
    let sample = data.sample(1).unwrap();
    assert_eq!(sample.input_ids, [256, 101, 102, 256]);
    assert_eq!(sample.documents, Some(vec![0, 1, 1, 1]));
    assert!(card.document_ids && data.continues(1).unwrap());
    let tokenizer = Tokenizer::load(options.save_path.join("tokenizer").to_str().unwrap()).unwrap();
    assert_eq!((tokenizer.vocab_size(), Some(tokenizer.hash())), (257, card.tokenizer_sha256));
}

#[test]
fn documents_are_glued_and_cut() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), &["\u{1}\u{2}\u{3}\u{4}\u{5}", "", "\u{6}\u{7}"], 3);
    let card = tokenize(&options).unwrap().train;
    assert_eq!(rows(&options.save_path), [[1, 2, 3], [4, 5, 6]]);
    assert_eq!((card.documents, card.bytes, card.tokens, card.dropped_tokens), (3, 7, 6, 1));
}

#[test]
fn the_end_of_text_follows_every_document() {
    let dir = tempfile::tempdir().unwrap();
    let options =
        TokenizeOptions { append_eos: true, ..options(dir.path(), &["\u{1}\u{2}", "", "\u{3}"], 2) };
    let card = tokenize(&options).unwrap().train;
    assert_eq!(rows(&options.save_path), [[1, 2], [256, 256], [3, 256]]);
    assert_eq!((card.tokens, card.dropped_tokens), (6, 0));
}

/// Many short documents, empty ones, and one that is cut into pieces.
fn corpus() -> Vec<String> {
    let mut texts: Vec<String> = (0..20_000).map(|i| "é ".repeat(i % 7) + &i.to_string()).collect();
    texts.insert(700, (0..100_000).map(|i| format!("word{i} ")).collect());
    texts.insert(0, String::new());
    texts
}

#[test]
fn the_bytes_do_not_depend_on_threads() {
    let texts = corpus();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let dir = tempfile::tempdir().unwrap();
    let options = TokenizeOptions {
        append_eos: true,
        val_fraction: Some(0.1),
        max_shard_size: 300_000,
        ..options(dir.path(), &texts, 64)
    };
    let mut all = Vec::new();
    for threads in [1, 2, 5] {
        let save_path = dir.path().join(format!("data{threads}"));
        tokenize(&TokenizeOptions { threads, save_path: save_path.clone(), ..options.clone() }).unwrap();
        all.push(files(&save_path));
    }
    assert!(all[0].len() > 10);
    assert!(all.iter().all(|files| *files == all[0]));
}

#[test]
fn no_token_is_lost_but_the_last_ones() {
    let texts = corpus();
    let stream: Vec<i32> = texts.iter().flat_map(|t| t.bytes().map(i32::from).chain([256])).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let dir = tempfile::tempdir().unwrap();
    let options =
        TokenizeOptions { append_eos: true, max_shard_size: 100_000, ..options(dir.path(), &texts, 64) };
    let card = tokenize(&options).unwrap().train;
    assert_eq!(card.tokens + card.dropped_tokens, stream.len() as u64);
    assert!(card.dropped_tokens < 64);
    assert!(rows(&options.save_path).concat() == stream[..card.tokens as usize]);
    let data = Dataset::open(&options.save_path).unwrap();
    let last = data.sample(data.len() - 1).unwrap().documents.unwrap()[63];
    assert!((19_990..20_002).contains(&last), "{last}");
}

/// Wherever it ends, the rest of the work comes to the same bytes.
#[test]
fn interrupted_work_goes_on_to_the_same_bytes() {
    let texts = corpus();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for shuffle_seed in [None, Some(3)] {
        let dir = tempfile::tempdir().unwrap();
        let options = TokenizeOptions {
            append_eos: true,
            val_fraction: Some(0.2),
            shuffle_seed,
            max_shard_size: 1_500_000,
            ..options(dir.path(), &texts, 64)
        };
        let whole = TokenizeOptions { save_path: dir.path().join("whole"), ..options.clone() };
        tokenize(&whole).unwrap();
        let expected = files(&whole.save_path);
        // What a killed process leaves, at each of its shards: a copy that is made when the shard has been noted.
        let stops = stops(&options, dir.path());
        assert!(stops > 6, "{stops}");
        for stop in 0..stops {
            let partial = dir.path().join(".data.partial");
            fs::rename(dir.path().join(format!("stop{stop}")), &partial).unwrap();
            let progress: Vec<Split> =
                serde_json::from_slice(&fs::read(partial.join("progress.json")).unwrap()).unwrap();
            // The next shard was begun and torn.
            let splits = ["train", "validation"].into_iter().zip(&progress);
            if let Some((name, split)) = splits.into_iter().find(|(_, split)| split.ended.is_none()) {
                let dir = partial.join("dataset").join(name);
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join(format!("data-{:05}.arrow", split.shards.count())), "torn").unwrap();
            }
            let card = tokenize(&options).unwrap();
            assert!(files(&options.save_path) == expected, "stop {stop}");
            assert!(card.validation.is_some());
            fs::remove_dir_all(&options.save_path).unwrap();
            assert!(!partial.exists());
        }
    }
}

/// Runs the work up to its end and copies its hidden folder at every note; gives the number of copies.
fn stops(options: &TokenizeOptions, dir: &Path) -> usize {
    let mut count = 0;
    let _ = tokenize_noting(options, |aside| {
        copy(aside, &dir.join(format!("stop{count}")));
        count += 1;
    })
    .unwrap();
    fs::remove_dir_all(&options.save_path).unwrap();
    count
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &to) } else { assert!(fs::copy(&path, to).is_ok()) }
    }
}

#[test]
fn a_failure_leaves_nothing_behind_but_finished_shards() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), &["ab"], 4);
    let error = tokenize(&options).unwrap_err();
    assert!(
        error.to_string().contains("the text is 2 tokens long")
            && error.hint().unwrap().contains("--seq-len 2")
    );
    assert_eq!(names(dir.path()), ["text.jsonl"]);

    // A bad line after the first shard.
    fs::write(&options.dataset, "{\"text\": \"abcdefgh\"}\nbroken").unwrap();
    let options = TokenizeOptions { max_shard_size: 1, ..options };
    let error = tokenize(&options).unwrap_err();
    assert!(error.to_string().contains("text.jsonl:2: not a JSON object"), "{error}");
    assert_eq!(names(dir.path()), [".data.partial", "text.jsonl"]);
    // Another source is another work.
    fs::write(&options.dataset, "{\"text\": \"abcdefgh\"}\n").unwrap();
    let error = tokenize(&options).unwrap_err();
    assert!(error.to_string().contains("another source (files)"), "{error}");
}

#[test]
fn splits_are_a_dataset_dict() {
    let texts: Vec<String> = (0..1000).map(|i| format!("{i:04}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let dir = tempfile::tempdir().unwrap();
    let options = TokenizeOptions { val_fraction: Some(0.25), ..options(dir.path(), &texts, 4) };
    let Tokenized { train, validation } = tokenize(&options).unwrap();
    let validation = validation.unwrap();
    assert_eq!(train.documents + validation.documents, 1000);
    assert!((200..300).contains(&validation.documents), "{}", validation.documents);
    let (train, validation) = (rows(&options.save_path), rows(&options.save_path.join("validation")));
    let mut all = [train, validation].concat();
    all.sort();
    let text = |row: &Vec<i32>| row.iter().map(|&id| id as u8 as char).collect::<String>();
    assert_eq!(all.iter().map(text).collect::<Vec<_>>(), texts);
}

#[test]
fn a_dry_run_reads_the_first_documents() {
    let dir = tempfile::tempdir().unwrap();
    let options = TokenizeOptions { dryrun: true, ..options(dir.path(), &["ab"; 10_000], 2) };
    let card = tokenize(&options).unwrap().train;
    assert_eq!((card.documents, card.tokens, card.dryrun), (8192, 16384, true));
}

#[test]
fn ids_are_as_small_as_the_vocabulary_allows() {
    assert_eq!(IdType::Smallest.resolve(1 << 16).unwrap(), IdType::Uint16);
    assert_eq!(IdType::Smallest.resolve((1 << 16) + 1).unwrap(), IdType::Int32);
    assert!(IdType::Uint16.resolve(100_000).is_err());
    let dir = tempfile::tempdir().unwrap();
    let mut sizes = Vec::new();
    for id_type in [IdType::Smallest, IdType::Int32, IdType::Int64] {
        let text = "abcdefgh".repeat(10_000);
        let options = TokenizeOptions { id_type, ..options(dir.path(), &[&text], 64) };
        tokenize(&options).unwrap();
        assert_eq!(rows(&options.save_path).len(), 1250);
        sizes.push(fs::metadata(options.save_path.join("data-00000-of-00001.arrow")).unwrap().len());
        fs::remove_dir_all(&options.save_path).unwrap();
    }
    // Two columns of ids, one of documents.
    let tokens = 80_000;
    for (size, row) in sizes.iter().zip([8, 12, 20]) {
        assert!((tokens * row..tokens * row + 20_000).contains(size), "{sizes:?}");
    }
}

#[test]
fn an_end_of_text_must_exist() {
    let dir = tempfile::tempdir().unwrap();
    let json = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "unk_token": "?", "vocab": { "a": 0, "b": 1 } },
    });
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let options = TokenizeOptions {
        tokenizer: dir.path().display().to_string(),
        append_eos: true,
        ..options(dir.path(), &["a", "b"], 2)
    };
    let error = tokenize(&options).unwrap_err();
    assert!(error.to_string().contains("no end-of-text token"), "{error}");
    assert!(error.hint().unwrap().contains("--append-eos"), "{error:?}");
    tokenize(&TokenizeOptions { append_eos: false, ..options.clone() }).unwrap();
    assert_eq!(rows(&options.save_path), [[0, 1]]);
    // A document that cannot be encoded is named.
    fs::remove_dir_all(&options.save_path).unwrap();
    fs::write(&options.dataset, "{\"text\": \"a\"}\n{\"text\": \"x\"}\n").unwrap();
    let error = tokenize(&TokenizeOptions { append_eos: false, ..options }).unwrap_err();
    assert!(error.to_string().contains("document 1: the tokenizer cannot encode"), "{error}");
}

#[test]
fn senseless_options_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), &["ab"], 2);
    for (bad, expected) in [
        (TokenizeOptions { seq_len: 1, ..options.clone() }, "--seq-len is 1"),
        (TokenizeOptions { threads: 100_000, ..options.clone() }, "--num-proc is 100000"),
        (TokenizeOptions { val_fraction: Some(1.0), ..options.clone() }, "--val-fraction is 1"),
        (TokenizeOptions { val_fraction: Some(f64::NAN), ..options.clone() }, "--val-fraction is NaN"),
    ] {
        let error = tokenize(&bad).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().is_some());
    }
    fs::write(&options.dataset, "").unwrap();
    assert_eq!(tokenize(&options).unwrap_err().to_string(), "the dataset holds no text");
}
