//! Every reader of foreign files, on thousands of damaged ones: each is read or refused, none ends the process or makes
//! room for what is not there.
//!
//! `ELAPID_FUZZ_SECONDS=60 cargo test --release --test fuzz -- --nocapture` goes on for a minute a reader.
#![allow(missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use elapid::checkpoint::{Checkpoint, Manifest};
use elapid::config::ModelConfig;
use elapid::convert::{Conversion, Dimensions, Format, compare, convert};
use elapid::model::layout::Layout as Slots;
use elapid::model::pretrained::load_weights;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// The system's allocator, which remembers the largest request.
struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every request goes to the system's allocator as it came; the counter is beside it.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// The files that are damaged have some tens of KB; a reader works in pieces of 4 MiB.
const LARGEST_ALLOWED: usize = 64 << 20;
const ROUNDS: usize = 100;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        match entry.path() {
            dir if dir.is_dir() => copy(&dir, &to.join(entry.file_name())),
            file => drop(fs::copy(file, to.join(entry.file_name())).unwrap()),
        }
    }
}

/// Numbers that sizes, offsets and lengths do not expect.
const ODD: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// Damages a file: bits, bytes, numbers, digits, ends, stretches moved and doubled.
fn damage(whole: &[u8], rng: &mut SmallRng) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..rng.random_range(1..4) {
        if bytes.is_empty() {
            bytes.push(rng.random());
        }
        // Headers and directories lie at the ends.
        let at = match rng.random_range(0..3) {
            0 => rng.random_range(0..bytes.len()),
            1 => rng.random_range(0..bytes.len().min(600)),
            _ => bytes.len() - 1 - rng.random_range(0..bytes.len().min(600)),
        };
        let stretch = rng.random_range(0..=(bytes.len() - at).min(64));
        match rng.random_range(0..9) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + stretch)),
            4 => {
                let moved = bytes[at..at + stretch].to_vec();
                let to = rng.random_range(0..=bytes.len());
                bytes.splice(to..to, moved);
            }
            5 => {
                let odd = ODD[rng.random_range(0..ODD.len())].to_le_bytes();
                let width = [1, 2, 4, 8][rng.random_range(0..4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&odd[..width]);
            }
            6 => {
                // The next digits, as a number that nobody expects.
                let from = (at..bytes.len()).find(|i| bytes[*i].is_ascii_digit()).unwrap_or(at);
                let len = bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                let odd =
                    ["0", "-1", "1e99", "99999999999999999999", "18446744073709551615", "1099511627776"];
                let odd = odd[rng.random_range(0..odd.len())];
                bytes.splice(from..from + len, odd.bytes());
            }
            7 => {
                let odd: &[u8] =
                    [&b"../"[..], b"[[[[", b"{}", b"null", b"\"", b"Infinity", b"\xff\xfe", b"os\nsystem\n"]
                        [rng.random_range(0..8)];
                bytes.splice(at..at, odd.iter().copied());
            }
            _ => {
                let other = rng.random_range(0..bytes.len());
                let len = stretch.min(bytes.len() - other);
                let to = at.min(bytes.len() - len);
                bytes.copy_within(other..other + len, to);
            }
        }
    }
    bytes
}

/// Readers run one after the other: they share the counter of the allocator.
static TURN: Mutex<()> = Mutex::new(());

/// Damages `file` of a copy of the folder `of` again and again and gives the copy to `reader`, which says whether it was
/// read. `repair` makes checksums fit again, in every other round.
fn fuzz(
    of: &Path,
    file: &str,
    repair: fn(Vec<u8>) -> Vec<u8>,
    reader: impl Fn(&Path) -> bool + std::panic::RefUnwindSafe,
) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let room = tempfile::tempdir().unwrap();
    copy(of, room.path());
    let path = room.path().join(file);
    let whole = fs::read(&path).unwrap();
    assert!(reader(room.path()), "{file} of {} is not read even whole", of.display());

    let seconds = std::env::var("ELAPID_FUZZ_SECONDS").ok().map(|text| text.parse().unwrap());
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let (mut rounds, mut read, mut largest) = (0, 0, 0);
    while end.map_or(rounds < ROUNDS, |end| Instant::now() < end) {
        let mut rng = SmallRng::seed_from_u64(rounds as u64);
        let mut bytes = damage(&whole, &mut rng);
        if rounds % 2 == 1 {
            bytes = repair(bytes);
        }
        fs::write(&path, &bytes).unwrap();
        LARGEST.store(0, Ordering::Relaxed);
        let outcome = catch_unwind(|| reader(room.path()));
        largest = largest.max(LARGEST.load(Ordering::Relaxed));
        let what = format!("{file} of {}, round {rounds}", of.display());
        read += usize::from(outcome.unwrap_or_else(|_| panic!("panic at {what}")));
        assert!(largest < LARGEST_ALLOWED, "{largest} bytes at once at {what}");
        rounds += 1;
    }
    println!("{file} of {}: {rounds} files, {read} read, at most {largest} bytes at once", of.display());
}

fn nothing(bytes: Vec<u8>) -> Vec<u8> {
    bytes
}

fn same(path: &Path) -> bool {
    compare(path, path, &Dimensions::default()).is_ok()
}

fn to_hf(from: Format, dir: &Path) -> bool {
    let output = dir.join("converted");
    let done = convert(&Conversion {
        from,
        to: Format::Hf,
        input: dir.to_owned(),
        output: output.clone(),
        dtype: None,
        tokenizer: None,
        split_proj: false,
        dimensions: Dimensions::default(),
    });
    if done.is_ok() {
        fs::remove_dir_all(&output).unwrap();
    }
    assert!(!output.exists());
    let partial = fs::read_dir(dir)
        .unwrap()
        .any(|entry| entry.unwrap().file_name().to_string_lossy().contains("partial"));
    assert!(!partial, "something is left half written");
    done.is_ok()
}

/// Writes the checksums of all files of a zip archive anew, where it still is one.
fn repair_zip(mut bytes: Vec<u8>) -> Vec<u8> {
    let entries: Vec<(usize, u32)> = {
        let Ok(mut archive) = zip::ZipArchive::new(std::io::Cursor::new(&bytes[..])) else { return bytes };
        let files = archive.len();
        let entry = |index| {
            let file = archive.by_index_raw(index).ok()?;
            let start = file.data_start()? as usize;
            let len = usize::try_from(file.size()).ok()?;
            let central = file.central_header_start() as usize;
            let crc = bytes.get(start..start.checked_add(len)?).map(crc32fast::hash)?;
            Some((central + 16, crc))
        };
        (0..files).filter_map(entry).collect()
    };
    for (at, crc) in entries {
        if let Some(place) = bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&crc.to_le_bytes());
        }
    }
    bytes
}

/// The manifest's own checksum.
fn repair_manifest(bytes: Vec<u8>) -> Vec<u8> {
    const SEAL: &str = ",\n  \"crc32\": \"";
    let body = std::str::from_utf8(&bytes).ok().and_then(|text| text.rsplit_once(SEAL)).map(|(body, _)| body);
    match body {
        Some(body) => format!("{body}{SEAL}{:08x}\"\n}}\n", crc32fast::hash(body.as_bytes())).into_bytes(),
        None => bytes,
    }
}

#[test]
fn pickles_in_archives() {
    for case in ["convert/ssm_g1_tied_fp32", "convert/ssm_views"] {
        fuzz(&golden(case), "pytorch_model.bin", repair_zip, |dir| same(&dir.join("pytorch_model.bin")));
    }
    fuzz(&golden("convert/ssm_g4_fp16"), "pytorch_model.bin", repair_zip, |dir| to_hf(Format::MambaSsm, dir));
}

#[test]
fn ranks() {
    let file = "model/dp_rank_00_tp_rank_01_pp_rank_00.pt";
    fuzz(&golden("convert/tp2"), file, repair_zip, |dir| to_hf(Format::NeuronTp, dir));
}

#[test]
fn safetensors() {
    let file = "consolidated.safetensors";
    fuzz(&golden("convert/codestral"), file, nothing, |dir| same(&dir.join(file)));
    fuzz(&golden("convert/hf_split"), "model.safetensors", nothing, |dir| to_hf(Format::Hf, dir));
    fuzz(&golden("models/base"), "model.safetensors", nothing, |dir| {
        let layout = Slots::new(&ModelConfig::load(dir).unwrap());
        load_weights(dir, &layout, |_, _| {}).is_ok()
    });
}

#[test]
fn configurations() {
    fuzz(&golden("models/base"), "config.json", nothing, |dir| ModelConfig::load(dir).is_ok());
    for case in ["convert/ssm_g1_tied_fp32", "convert/ssm_views"] {
        fuzz(&golden(case), "config.json", nothing, |dir| to_hf(Format::MambaSsm, dir));
    }
    fuzz(&golden("convert/codestral"), "params.json", nothing, |dir| to_hf(Format::Codestral, dir));
    fuzz(&golden("convert/tp4"), "config.json", nothing, |dir| to_hf(Format::NeuronTp, dir));
}

#[test]
fn indices() {
    let room = tempfile::tempdir().unwrap();
    copy(&golden("models/base"), room.path());
    fs::rename(room.path().join("model.safetensors"), room.path().join("model-00001-of-00001.safetensors"))
        .unwrap();
    let index = r#"{"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}"#;
    fs::write(room.path().join("model.safetensors.index.json"), index).unwrap();
    fuzz(room.path(), "model.safetensors.index.json", nothing, |dir| to_hf(Format::Hf, dir));
}

#[test]
fn checkpoints() {
    let room = tempfile::tempdir().unwrap();
    let run = |line: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_elapid"));
        let output = command.args(line.split_whitespace()).current_dir(room.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    fs::write(room.path().join("text.txt"), "Some text of no length. ".repeat(40)).unwrap();
    let tiny = r#"{"model_type": "mamba2", "num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 4,
        "num_hidden_layers": 1, "n_groups": 1, "vocab_size": 257, "tie_word_embeddings": true}"#;
    fs::write(room.path().join("tiny.json"), tiny).unwrap();
    run("tokenize --dataset text.txt --tokenizer bytes --seq-len 32 --save-path data");
    run("train --model tiny.json --data-dir data --max-steps 1 --save-last-step --output-dir run");
    let checkpoint = room.path().join("run/checkpoints/step-00000001");
    let read = |dir: &Path| {
        let layout = |checkpoint: &Checkpoint| checkpoint.config().map(|config| Slots::new(&config));
        let Ok(checkpoint) = Checkpoint::open(dir) else { return false };
        let _: &Manifest = checkpoint.manifest();
        layout(&checkpoint).is_ok_and(|layout| checkpoint.read("model", &layout, (1, 0), |_, _| {}).is_ok())
    };
    fuzz(&checkpoint, "manifest.json", repair_manifest, read);
    fuzz(&checkpoint, "manifest.json", repair_manifest, |dir| to_hf(Format::Elapid, dir));
    fuzz(&checkpoint, "rank-00000.safetensors", nothing, read);
}
