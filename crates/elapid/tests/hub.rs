//! Datasets and tokenizers by name, from a small server on this machine.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Room, failed_in_order, stderr};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// How the server behaves.
#[derive(Default)]
struct Manner {
    /// Files of `org/data` and of its converted branch, by path.
    files: Vec<(&'static str, Vec<u8>)>,
    converted: Vec<(&'static str, Vec<u8>)>,
    /// Answers to requests whose path contains this, before it behaves: status line and headers.
    answers: Vec<(&'static str, &'static str)>,
    /// Breaks off the first of these many transfers of a file in its middle.
    cut: usize,
    /// Sends other bytes than it promised.
    lie: bool,
    ranges: bool,
}

/// First line, and headers in lower case.
type Request = (String, HashMap<String, String>);

struct Server {
    address: String,
    manner: Arc<Mutex<Manner>>,
    /// Every request: its first line, and its headers in lower case.
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn new(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (manner, seen) = (Arc::new(Mutex::new(manner)), Arc::new(Mutex::new(Vec::new())));
        let (with, log) = (manner.clone(), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                let _ = reader.read_line(&mut line);
                let mut headers = HashMap::new();
                loop {
                    let mut header = String::new();
                    if reader.read_line(&mut header).unwrap_or(0) <= 2 {
                        break;
                    }
                    if let Some((name, value)) = header.split_once(':') {
                        headers.insert(name.to_lowercase(), value.trim().to_owned());
                    }
                }
                let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                log.lock().unwrap().push((line.trim().to_owned(), headers.clone()));
                answer(&mut with.lock().unwrap(), stream, &path, &headers);
            }
        });
        Self { address, manner, seen }
    }

    fn requests(&self, part: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|(line, _)| line.contains(part)).count()
    }
}

fn answer(manner: &mut Manner, mut out: TcpStream, path: &str, headers: &HashMap<String, String>) {
    let mut send = |head: &str, body: &[u8]| {
        let _ = out.write_all(format!("HTTP/1.1 {head}\r\nconnection: close\r\n\r\n").as_bytes());
        let _ = out.write_all(body);
    };
    if let Some(i) = manner.answers.iter().position(|(part, _)| path.contains(part)) {
        let (_, head) = manner.answers.remove(i);
        return send(&format!("{head}\r\ncontent-length: 0"), b"");
    }
    let listing = |files: &[(&str, Vec<u8>)], sha: &str| {
        let hash =
            |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
        let file = |(name, bytes): &(&str, Vec<u8>)| {
            let mut file =
                json!({ "rfilename": name, "size": bytes.len(), "blobId": format!("git{}", bytes.len()) });
            if !name.ends_with(".md") {
                file["lfs"] = json!({ "sha256": hash(bytes), "size": bytes.len() });
            }
            file
        };
        json!({ "sha": sha, "siblings": files.iter().map(file).collect::<Vec<_>>() }).to_string()
    };
    let body = match path.split('?').next().unwrap() {
        "/api/datasets/org/data/revision/main" | "/api/models/org/model/revision/main" => {
            listing(&manner.files, "c0ffee").into_bytes()
        }
        "/api/datasets/org/data/revision/refs%2Fconvert%2Fparquet" if !manner.converted.is_empty() => {
            listing(&manner.converted, "deed").into_bytes()
        }
        other => {
            let name = other
                .split_once("/resolve/")
                .and_then(|(_, rest)| rest.split_once('/'))
                .map(|(_, name)| name);
            let all = manner.files.iter().chain(&manner.converted);
            let Some((_, bytes)) = all.into_iter().find(|(file, _)| Some(*file) == name) else {
                return send("404 Not Found\r\ncontent-length: 0", b"");
            };
            let mut bytes = bytes.clone();
            if manner.lie {
                bytes[0] ^= 1;
            }
            let range = headers.get("range").filter(|_| manner.ranges);
            let from: usize =
                range.map_or(0, |range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let head = format!("{status}\r\ncontent-length: {}", bytes.len() - from);
            let mut end = bytes.len();
            if manner.cut > 0 {
                manner.cut -= 1;
                end = from + (end - from) / 2;
            }
            return send(&head, &bytes[from..end]);
        }
    };
    send(&format!("200 OK\r\ncontent-length: {}", body.len()), &body);
}

fn lines(n: usize) -> Vec<u8> {
    (0..n).map(|i| json!({ "text": format!("line {i}") }).to_string() + "\n").collect::<String>().into_bytes()
}

/// `elapid tokenize` of a name, with the cache in the room.
fn tokenize(room: &Room, server: &Server, flags: &str, env: &[(&str, &str)]) -> Output {
    let line = format!("tokenize --dataset org/data --tokenizer bytes --seq-len 8 --json {flags}");
    let mut command = room.command(&line.split_whitespace().collect::<Vec<_>>());
    command.env("HF_ENDPOINT", &server.address).env("HF_HOME", room.path("home")).env("HF_HUB_OFFLINE", "0");
    command.env_remove("HF_TOKEN").env_remove("HF_HUB_CACHE").envs(env.iter().copied());
    for proxy in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command.output().unwrap()
}

fn documents(output: &Output) -> u64 {
    assert!(output.status.success(), "{}", stderr(output));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    object["documents"].as_u64().unwrap()
}

fn refused(output: &Output, expected: &[&str]) {
    let said = failed_in_order(output);
    for part in expected {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}

#[test]
fn a_dataset_is_downloaded_once_and_then_read_offline() {
    let room = Room::new();
    let files = vec![
        ("README.md", b"# x".to_vec()),
        ("train-0.jsonl", lines(50)),
        ("train-1.jsonl", lines(30)),
        ("test.jsonl", lines(7)),
    ];
    let server = Server::new(Manner { files, ranges: true, ..Manner::default() });
    assert_eq!(documents(&tokenize(&room, &server, "--save-path a", &[("HF_TOKEN", "secret")])), 80);
    let authorised = |(_, headers): &(String, HashMap<String, String>)| {
        headers.get("authorization").is_some_and(|value| value == "Bearer secret")
    };
    assert!(server.seen.lock().unwrap().iter().all(authorised));
    assert_eq!((server.requests("/resolve/c0ffee/train-"), server.requests("README")), (2, 1));
    // The layout of Python's cache.
    let snapshot = room.path("home/hub/datasets--org--data/snapshots/c0ffee");
    assert_eq!(fs::read(snapshot.join("train-1.jsonl")).unwrap(), lines(30));
    assert_eq!(room.read("home/hub/datasets--org--data/refs/main"), "c0ffee");

    assert_eq!(documents(&tokenize(&room, &server, "--save-path b --split test", &[])), 7);
    assert_eq!(documents(&tokenize(&room, &server, "--save-path c", &[])), 80);
    assert_eq!(server.requests("/resolve/"), 4);
    let before = server.seen.lock().unwrap().len();
    assert_eq!(documents(&tokenize(&room, &server, "--save-path d", &[("HF_HUB_OFFLINE", "1")])), 80);
    assert_eq!(server.seen.lock().unwrap().len(), before);
    let card: Value = serde_json::from_str(&room.read("b/dataset_card.json")).unwrap();
    assert_eq!((&card["source"], &card["source_split"]), (&json!("org/data"), &json!("test")));
}

/// Most datasets say in their README which files a configuration and a split are.
#[test]
fn the_readme_names_configurations_and_splits() {
    let room = Room::new();
    let readme = "---\nconfigs:\n- config_name: a\n  default: true\n  data_files:\n  - split: train\n    path: x/*.jsonl\n  \
                  - split: dev\n    path: y.jsonl\n- config_name: b\n  data_files: y.jsonl\n---\n# Data\n";
    let files = vec![
        ("README.md", readme.as_bytes().to_vec()),
        ("x/0.jsonl", lines(20)),
        ("x/1.jsonl", lines(30)),
        ("y.jsonl", lines(7)),
    ];
    let server = Server::new(Manner { files, ..Manner::default() });
    assert_eq!(documents(&tokenize(&room, &server, "--save-path a", &[])), 50);
    assert_eq!(documents(&tokenize(&room, &server, "--save-path b --split dev", &[])), 7);
    assert_eq!(documents(&tokenize(&room, &server, "--save-path c --dataset-config b", &[])), 7);
    let output = tokenize(&room, &server, "--save-path d --dataset-config c", &[]);
    refused(&output, &["org/data: there is no configuration \"c\"", "there are: a, b"]);
    let output = tokenize(&room, &server, "--save-path d --split test", &[]);
    refused(&output, &["no split \"test\"", "there are: train, dev"]);
}

/// Files that Python's `huggingface_hub` has left in the cache: read offline, and not downloaded again.
#[test]
#[cfg(unix)]
fn what_python_has_downloaded_is_found() {
    let room = Room::new();
    let bytes = lines(40);
    let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let repo = room.path("home/hub/datasets--org--data");
    for folder in ["blobs", "refs", "snapshots/c0ffee/data"] {
        fs::create_dir_all(repo.join(folder)).unwrap();
    }
    fs::write(repo.join("refs/main"), "c0ffee").unwrap();
    fs::write(repo.join("blobs").join(&hash), &bytes).unwrap();
    std::os::unix::fs::symlink(
        format!("../../../blobs/{hash}"),
        repo.join("snapshots/c0ffee/data/train.jsonl"),
    )
    .unwrap();
    let server = Server::new(Manner { files: vec![("data/train.jsonl", bytes)], ..Manner::default() });
    let output = tokenize(&room, &server, "--save-path a", &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(documents(&output), 40);
    assert!(stderr(&output).contains("warning: HF_HUB_OFFLINE"), "{}", stderr(&output));
    assert!(server.seen.lock().unwrap().is_empty());
    assert_eq!(documents(&tokenize(&room, &server, "--save-path b", &[])), 40);
    assert_eq!(server.requests("/resolve/"), 0);
}

#[test]
fn what_is_not_in_the_cache_is_refused_offline() {
    let room = Room::new();
    let server = Server::new(Manner::default());
    let output = tokenize(&room, &server, "--save-path a", &[("HF_HUB_OFFLINE", "1")]);
    refused(&output, &["no dataset org/data here", "HF_HUB_OFFLINE"]);
    assert!(server.seen.lock().unwrap().is_empty() && !room.path("a").exists());
}

#[test]
fn a_transfer_that_is_cut_off_goes_on() {
    for ranges in [true, false] {
        let room = Room::new();
        let server = Server::new(Manner {
            files: vec![("a.jsonl", lines(9000))],
            cut: 3,
            ranges,
            ..Manner::default()
        });
        assert_eq!(documents(&tokenize(&room, &server, "--save-path a", &[])), 9000);
        assert_eq!(server.requests("/resolve/"), 4);
        let seen = server.seen.lock().unwrap();
        assert_eq!(seen.iter().filter(|(_, headers)| headers.contains_key("range")).count(), 3);
    }
}

/// A process that is killed leaves a part, and the next one goes on from there.
#[test]
fn a_part_that_is_there_is_not_downloaded_again() {
    let room = Room::new();
    let bytes = lines(2000);
    let server =
        Server::new(Manner { files: vec![("a.jsonl", bytes.clone())], ranges: true, ..Manner::default() });
    let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let blobs = room.path("home/hub/datasets--org--data/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{hash}.incomplete")), &bytes[..1000]).unwrap();
    assert_eq!(documents(&tokenize(&room, &server, "--save-path a", &[])), 2000);
    let seen = server.seen.lock().unwrap();
    assert!(seen.iter().any(|(_, headers)| headers.get("range").is_some_and(|range| range == "bytes=1000-")));
    assert_eq!(fs::read_dir(&blobs).unwrap().count(), 1);
}

#[test]
fn other_bytes_than_promised_are_removed() {
    let room = Room::new();
    let server = Server::new(Manner { files: vec![("a.jsonl", lines(50))], lie: true, ..Manner::default() });
    refused(&tokenize(&room, &server, "--save-path a", &[]), &["is not what it should be: its SHA-256 is"]);
    assert_eq!(fs::read_dir(room.path("home/hub/datasets--org--data/blobs")).unwrap().count(), 0);
    assert!(!room.path("a").exists());
    server.manner.lock().unwrap().lie = false;
    assert_eq!(documents(&tokenize(&room, &server, "--save-path a", &[])), 50);
}

#[test]
fn refusals_say_what_to_do() {
    let room = Room::new();
    let server = Server::new(Manner::default());
    let answer = |head| server.manner.lock().unwrap().answers.push(("/api/", head));
    answer("404 Not Found");
    refused(
        &tokenize(&room, &server, "--save-path a", &[]),
        &["cannot get the dataset org/data: 404", "check its name"],
    );
    answer("401 Unauthorized");
    refused(&tokenize(&room, &server, "--save-path a", &[]), &["401", "set HF_TOKEN"]);
    answer("403 Forbidden");
    let with_token = tokenize(&room, &server, "--save-path a", &[("HF_TOKEN", "x")]);
    refused(&with_token, &["403", "the token in HF_TOKEN"]);
    let gone = [("HF_ENDPOINT", "http://no-such-host.invalid")];
    refused(
        &tokenize(&room, &server, "--save-path a", &gone),
        &["no-such-host.invalid", "check the connection"],
    );
}

#[test]
fn a_busy_server_is_asked_again_when_it_says() {
    let room = Room::new();
    let server = Server::new(Manner { files: vec![("a.jsonl", lines(50))], ..Manner::default() });
    server.manner.lock().unwrap().answers =
        vec![("/api/", "429 Too Many Requests\r\nretry-after: 2"), ("/resolve/", "503 Service Unavailable")];
    let start = Instant::now();
    let output = tokenize(&room, &server, "--save-path a", &[]);
    assert_eq!(documents(&output), 50);
    assert!(start.elapsed() >= Duration::from_millis(2500), "{:?}", start.elapsed());
    assert!(stderr(&output).contains("429") && stderr(&output).contains("again in 2.0 seconds"));
    // It is not asked for ever.
    let busy = "503 Service Unavailable\r\nretry-after: 0";
    server.manner.lock().unwrap().answers = vec![("/api/", busy); 5];
    refused(&tokenize(&room, &server, "--save-path b", &[]), &["503", "the server is busy"]);
}

#[test]
fn what_the_hub_has_converted_is_read_where_nothing_else_can_be() {
    let room = Room::new();
    let parquet =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sources/zstd.parquet")).unwrap();
    let server = Server::new(Manner {
        files: vec![("data.tar", vec![0; 9])],
        converted: vec![("en/train/0000.parquet", parquet.clone()), ("de/train/0000.parquet", parquet)],
        ..Manner::default()
    });
    refused(&tokenize(&room, &server, "--save-path a", &[]), &["several configurations", "de, en"]);
    assert_eq!(documents(&tokenize(&room, &server, "--save-path a --dataset-config en", &[])), 13);
}

#[test]
fn a_tokenizer_is_found_by_the_name_of_its_model() {
    let room = Room::new();
    let golden = |name: &str| {
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/neox").join(name)).unwrap()
    };
    let server = Server::new(Manner {
        files: vec![
            ("tokenizer.json", golden("tokenizer.json")),
            ("tokenizer_config.json", golden("tokenizer_config.json")),
            ("model.safetensors", vec![1; 100]),
        ],
        ..Manner::default()
    });
    let flags = "--dataset text.txt --tokenizer org/model --append-eos --save-path";
    assert_eq!(documents(&tokenize(&room, &server, &format!("{flags} a"), &[])), 1);
    assert_eq!(server.requests("model.safetensors"), 0);
    assert_eq!(room.read("a/tokenizer/tokenizer.json").into_bytes(), golden("tokenizer.json"));
    assert_eq!(documents(&tokenize(&room, &server, &format!("{flags} b"), &[("HF_HUB_OFFLINE", "1")])), 1);
    server.manner.lock().unwrap().files.remove(0);
    refused(
        &tokenize(&room, &server, &format!("{flags} c"), &[]),
        &["the model org/model on", "has no tokenizer.json"],
    );
}
