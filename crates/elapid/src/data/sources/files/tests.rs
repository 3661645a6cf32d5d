//! Files of every kind, whole and damaged.

use super::*;

fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn open(path: &Path) -> Result<Source, Error> {
    Source::open(path, &SourceOptions::default())
}

/// The documents, put together where they come in parts.
fn texts(path: &Path) -> Vec<String> {
    let (mut texts, mut whole) = (Vec::new(), true);
    for part in open(path).unwrap().documents(0) {
        let part = part.unwrap();
        if whole {
            texts.push(String::new());
        }
        texts.last_mut().unwrap().push_str(&part.text);
        whole = part.last;
    }
    assert!(whole);
    texts
}

fn read_bytes(source: &Source) -> u64 {
    source.documents(0).map(|part| part.unwrap().input_bytes).sum()
}

/// The error at the end of the documents of a file `name`, and the number of documents before it.
fn error(name: &str, content: impl AsRef<[u8]>) -> (usize, Error) {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join(name), content);
    let source = open(&dir.path().join(name)).unwrap();
    let all: Vec<_> = source.documents(0).collect();
    let n = all.len() - 1;
    (n, all.into_iter().next_back().unwrap().unwrap_err())
}

#[test]
fn a_text_file_is_one_document() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    write(&path, "one\r\ntwo\n\0é");
    assert_eq!(texts(&path), ["one\r\ntwo\n\0é"]);
    assert_eq!(read_bytes(&open(&path).unwrap()), 12);
}

#[test]
fn a_line_of_json_is_one_document() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.JSONL");
    write(&path, "{\"text\": \"one\\ntwo\", \"n\": 1}\r\n\n  \n{\"text\": \"\"}\n{\"text\":\"é\"}");
    assert_eq!(texts(&path), ["one\ntwo", "", "é"]);
    let source = open(&path).unwrap();
    let size = fs::metadata(&path).unwrap().len();
    assert_eq!((read_bytes(&source), source.input_bytes()), (size, size));

    write(&path, r#"{"text": "x", "body": "other", "body": "last"}"#);
    let options = SourceOptions { text_column: "body".into(), ..SourceOptions::default() };
    let source = Source::open(&path, &options).unwrap();
    assert_eq!(source.documents(0).map(|part| part.unwrap().text).collect::<Vec<_>>(), ["last"]);
}

#[test]
fn a_folder_is_read_in_the_order_of_its_paths() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("b/z.md"), "3");
    write(&at("a.txt"), "1");
    write(&at("b.py"), "4");
    write(&at("b/c/lines.jsonl"), "{\"text\":\"2a\"}\n{\"text\":\"2b\"}\n");
    write(&at("z"), "5");
    assert_eq!(texts(dir.path()), ["1", "2a", "2b", "3", "4", "5"]);
}

#[test]
fn a_folder_is_read_without_what_is_no_text_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("text"), "yes");
    write(&at("sub/targets/x"), "yes");
    write(&at(".hidden"), "no");
    write(&at(".git/config"), "no");
    write(&at("sub/target/debug.txt"), "no");
    write(&at("picture.png"), [0x89, b'P', b'N', b'G', 0, 0]);
    write(&at("latin1.txt"), [b'a', 0xe9, b'b']);
    let mut late = vec![b'a'; crate::data::sources::text::HEAD + 1];
    late.push(0xff);
    write(&at("late.txt"), late);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(at("text"), at("link")).unwrap();
        std::os::unix::fs::symlink(dir.path(), at("sub/loop")).unwrap();
    }
    let source = open(dir.path()).unwrap();
    let mut documents = source.documents(0);
    let read: Vec<_> = documents.by_ref().map(|d| d.unwrap()).collect();
    assert_eq!(read.iter().map(|d| &d.text[..]).collect::<Vec<_>>(), ["yes", "yes"]);
    assert_eq!(documents.skipped(), 3);
    // The progress of the input counts what was passed over.
    assert_eq!(read.iter().map(|d| d.input_bytes).sum::<u64>(), source.input_bytes());
}

#[test]
fn a_split_or_configuration_is_heeded_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("d/en/train-0.jsonl"), "{\"text\":\"train\"}\n");
    write(&at("d/en/test-0.jsonl"), "{\"text\":\"test\"}\n");
    write(&at("d/de/train.jsonl"), "{\"text\":\"deutsch\"}\n");
    let read = |path: &Path, config: Option<&str>, split: Option<&str>| -> Result<Vec<String>, Error> {
        let options = SourceOptions {
            split: split.map(str::to_owned),
            config: config.map(str::to_owned),
            ..SourceOptions::default()
        };
        Source::open(path, &options)?.documents(0).map(|part| part.map(|part| part.text)).collect()
    };
    assert_eq!(read(&at("d"), None, None).unwrap().len(), 3);
    assert_eq!(read(&at("d"), Some("en"), Some("test")).unwrap(), ["test"]);
    assert_eq!(read(&at("d/en"), None, Some("train")).unwrap(), ["train"]);
    assert_eq!(read(&at("d/de/train.jsonl"), None, Some("train")).unwrap(), ["deutsch"]);
    write(&at("d/README.md"), "---\nconfigs:\n- config_name: all\n  data_files: \"*/train*\"\n---\n");
    assert_eq!(read(&at("d"), Some("all"), None).unwrap(), ["deutsch", "train"]);

    let (file, glob) = (at("d/de/train.jsonl"), at("d/*/train*"));
    for (path, config, split, expected) in [
        (&file, None, Some("test"), "is a single file: it has no split \"test\""),
        (&file, Some("de"), Some("train"), "is a single file: it has no configuration \"de\""),
        (&glob, None, Some("test"), "is a glob: it has no split \"test\""),
        (&at("d"), Some("fr"), None, "no configuration \"fr\""),
        (&at("d/en"), None, Some("dev"), "no split \"dev\""),
    ] {
        let error = read(path, config, split).unwrap_err();
        assert!(error.to_string().contains(expected) && error.hint().is_some(), "{error}");
    }
}

#[test]
fn one_document_is_held_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("a.jsonl"), "{\"text\":\"1\"}\nbroken\n");
    write(&dir.path().join("b.txt"), "never read");
    let source = open(dir.path()).unwrap();
    let mut documents = source.documents(0);
    assert_eq!(documents.next().unwrap().unwrap().text, "1");
    assert!(documents.next().unwrap().is_err());
    assert!(documents.next().is_none());
}

#[test]
fn a_bad_line_is_named() {
    let (before, broken) = error("a.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \n");
    assert_eq!(before, 1);
    assert!(broken.to_string().contains("a.jsonl:3: not a JSON object"), "{broken}");

    let (_, array) = error("a.jsonl", "[\"text\"]");
    assert!(array.to_string().contains("a.jsonl:1: not a JSON object"), "{array}");

    let (_, missing) = error("a.jsonl", r#"{"title": "", "body": ""}"#);
    assert!(missing.to_string().contains(r#"a.jsonl:1: there is no field "text""#), "{missing}");
    assert!(missing.hint().unwrap().contains("title, body"), "{missing:?}");

    let (_, number) = error("a.jsonl", r#"{"text": 5}"#);
    assert!(number.to_string().contains(r#"a.jsonl:1: the field "text" is not a string: 5"#), "{number}");

    let (_, bytes) = error("a.jsonl", b"{\"text\": \"\xff\"}");
    assert!(bytes.to_string().contains("a.jsonl:1"), "{bytes}");
}

#[test]
fn a_named_file_must_be_text() {
    let (before, error) = error("a.txt", b"abc\xff");
    assert_eq!(before, 0);
    assert!(error.to_string().contains("a.txt is not UTF-8 text"), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn a_path_must_hold_something() {
    let dir = tempfile::tempdir().unwrap();
    let missing = open(&dir.path().join("none")).unwrap_err();
    assert!(missing.to_string().contains("none") && missing.hint().is_some(), "{missing}");
    write(&dir.path().join(".hidden"), "no");
    let empty = open(dir.path()).unwrap_err();
    assert!(empty.to_string().contains("holds no file to read"), "{empty}");
    let nothing = open(&dir.path().join("*.txt")).unwrap_err();
    assert!(nothing.to_string().contains("no file matches"), "{nothing}");
}

#[test]
fn json_is_an_array_or_objects_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    write(&path, r#" [{"text": "a\"}]{", "n": {"text": [1, "}"]}} , {"n":1,"text":"b\\"}] "#);
    assert_eq!(texts(&path), ["a\"}]{", "b\\"]);
    write(&path, "\u{feff}{\"text\": \"a\"}\n{\"text\":\n\"b\"}{\"text\":\"\"}");
    assert_eq!(texts(&path), ["a", "b", ""]);
    for empty in ["[]", "", " \n"] {
        write(&path, empty);
        assert!(texts(&path).is_empty());
    }
}

#[test]
fn bad_json_is_named_by_its_object() {
    for (content, before, expected) in [
        (r#"[{"text": "a"}, 5]"#, 1, "a.json, object 2: it is no object"),
        (r#"[{"text": "a"} {"text": "b"}]"#, 1, "object 2: there is no comma before it"),
        (r#"[{"text": "a"}"#, 1, "object 2: the end of the array is missing"),
        (r#"[{"text": "a"}, "#, 1, "object 2: it is missing"),
        (r#"[{"text": "a"}] 5"#, 1, "something follows"),
        (r#"{"text": "a"} {"text": "b""#, 1, "object 2: it has no end"),
        (r#"{"text": "a"} {"title": "b"}"#, 1, r#"object 2: there is no field "text""#),
        (r#"{"text": ["#, 0, "object 1: it has no end"),
        (r#"{"text": 1]"#, 0, "object 1: not a JSON object"),
        ("x", 0, "object 1: it is no object"),
    ] {
        let (n, error) = error("a.json", content);
        assert_eq!(n, before, "{content}: {error}");
        assert!(error.to_string().contains(expected) && error.hint().is_some(), "{content}: {error}");
    }
}

#[test]
fn settings_in_a_folder_are_text_and_tables_are_tables() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("1.json"), r#"{"name": "x"}"#);
    write(&at("2.json"), "[1, 2]");
    write(&at("3.json"), "// no JSON");
    write(&at("4.json"), r#"{"text": "four"}"#);
    write(&at("5.json"), r#"[{"text": "five"}]"#);
    assert_eq!(texts(dir.path()), [r#"{"name": "x"}"#, "[1, 2]", "// no JSON", "four", "five"]);
    write(&at("6.json"), r#"{"body": ""}{"body": ""}"#);
    assert!(open(dir.path()).unwrap().documents(0).last().unwrap().is_err());
}

#[test]
fn csv_has_a_line_of_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    write(&path, "id,text\r\n1,\"a, \"\"b\"\"\nc\"\r\n2,\n3,é\n");
    assert_eq!(texts(&path), ["a, \"b\"\nc", "", "é"]);
    write(&dir.path().join("a.tsv"), "text\tid\nx,y\t1\n");
    assert_eq!(texts(&dir.path().join("a.tsv")), ["x,y"]);

    let (_, missing) = error("a.csv", "id,body\n1,x\n");
    assert!(
        missing.to_string().contains("there is no column") && missing.hint().unwrap().contains("id, body")
    );
    let (n, unequal) = error("a.csv", "id,text\n1,x\n2\n");
    assert!(n == 1 && unequal.to_string().contains("a.csv:3: 1 fields, the first line has 2"), "{unequal}");
    let (_, bytes) = error("a.csv", b"text\n\xff\n");
    assert!(bytes.to_string().contains("a.csv:2: the text is not UTF-8"), "{bytes}");
    let (_, empty) = error("a.csv", "");
    assert!(empty.hint().unwrap().contains("there are: none"), "{empty:?}");
}

#[test]
fn a_glob_reads_named_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("b/1.txt"), "b");
    write(&at("a.txt"), "a");
    write(&at("c.md"), "c");
    assert_eq!(texts(&at("**/*.txt")), ["a", "b"]);
    write(&at("[x].txt"), "x");
    assert_eq!(texts(&at("[x].txt")), ["x"]);
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut out, text).unwrap();
    out.finish().unwrap()
}

fn zstd(text: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn compressed_files_read_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let lines = |from: usize| {
        (from..from + 5000).map(|i| format!("{{\"text\": \"line {i}\"}}\n")).collect::<String>()
    };
    let (one, two) = (lines(0), lines(5000));
    let path = dir.path().join("a.jsonl");
    write(&path, format!("{one}{two}"));
    let expected = texts(&path);
    // A frame to be skipped stands between the two.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    for (name, packed) in [
        ("a.jsonl.gz", [gzip(one.as_bytes()), gzip(two.as_bytes())].concat()),
        ("a.jsonl.zst", [zstd(one.as_bytes()), skippable, zstd(two.as_bytes())].concat()),
    ] {
        let path = dir.path().join(name);
        write(&path, &packed);
        assert!(texts(&path) == expected, "{name}");
        assert_eq!(read_bytes(&open(&path).unwrap()), packed.len() as u64, "{name}");
        for cut in [packed.len() - 1, packed.len() / 4, 20, 3] {
            let (_, error) = error(name, &packed[..cut]);
            assert!(error.to_string().contains("cannot decompress"), "{name} cut to {cut}: {error}");
        }
    }
    for (name, content, text) in [("b.txt.gz", gzip("é\0".as_bytes()), "é\0"), ("c.zst", zstd(b""), "")] {
        write(&dir.path().join(name), content);
        assert_eq!(texts(&dir.path().join(name)), [text]);
    }
}

#[test]
fn large_text_comes_in_parts() {
    use crate::data::sources::text::CHUNK;
    let dir = tempfile::tempdir().unwrap();
    let text = "aé状🐍".repeat(CHUNK / 5);
    write(&dir.path().join("a"), &text);
    // Whole chunks, to the byte.
    write(&dir.path().join("b"), "x".repeat(CHUNK));
    let mut bad = text.clone().into_bytes();
    bad.push(0xff);
    write(&dir.path().join("c"), &bad);
    assert!(texts(dir.path()) == [text, "x".repeat(CHUNK)]);
    let source = open(dir.path()).unwrap();
    let mut documents = source.documents(0);
    assert_eq!(documents.by_ref().filter(|part| part.as_ref().unwrap().last).count(), 2);
    assert_eq!(documents.skipped(), 1);
    let (n, error) = error("a", &bad);
    assert!(n == 1 && error.to_string().contains(&format!("byte {}", bad.len() - 1)), "{error}");
}
