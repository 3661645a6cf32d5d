//! Runs whose process is killed at a hundred moments around saves come to the same end, to the bit.
#![cfg(unix)]
#![allow(missing_docs)]

mod run;

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use elapid::checkpoint::Checkpoint;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use run::{checkpoints, command, leftovers, metrics, model, place, succeed};

const KILLS: usize = 100;
const STEPS: usize = 400;

/// The lines that were written whole.
fn whole_lines(run: &Path) -> Vec<String> {
    let path = run.join("metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    if whole.len() < text.len() {
        fs::write(&path, whole).unwrap();
    }
    metrics(run)
}

/// A checkpoint is in place and `latest` does not name it yet.
fn between_rename_and_pointer(run: &Path) -> bool {
    let Some(newest) = checkpoints(run).pop() else { return false };
    let latest = fs::read_to_string(run.join("checkpoints/latest")).unwrap_or_default();
    Path::new(latest.trim()).file_name() != newest.file_name()
}

/// Looks without a pause until `condition` holds or the process has ended.
fn watch(child: &mut Child, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() && child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(20) {}
}

fn kill_and_go_on(mesh: &str, seed: u64) {
    let dir = place();
    let flags = format!("--max-steps {STEPS} --shuffle {mesh}");
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    let straight = dir.path().join("straight");
    let (lines, weights) = (metrics(&straight), model(&straight));
    let rng = &mut SmallRng::seed_from_u64(seed);
    let (mut kills, mut unfinished, mut unnamed) = (0, 0, 0);
    for number in 0.. {
        let name = format!("run{number}");
        let run = dir.path().join(&name);
        let flags =
            format!("{flags} --checkpoint-freq 1 --num-kept-checkpoint 2 --resume auto --output-dir {name}");
        while kills < KILLS && !run.join("finished.json").exists() {
            let mut child = command(dir.path(), &flags).spawn().unwrap();
            let at = checkpoints(&run).pop();
            let delay = Duration::from_micros(rng.random_range(0..20_000));
            match kills % 3 {
                // In start, steps and saves alike.
                0 => {
                    watch(&mut child, || checkpoints(&run).pop() != at);
                    std::thread::sleep(delay);
                }
                1 => {
                    watch(&mut child, || leftovers(&run).iter().any(|name| name.ends_with(".partial")));
                    std::thread::sleep(delay / 20);
                }
                _ => {
                    watch(&mut child, || checkpoints(&run).pop() != at);
                    watch(&mut child, || between_rename_and_pointer(&run));
                }
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            unfinished += usize::from(!leftovers(&run).is_empty());
            unnamed += usize::from(between_rename_and_pointer(&run));
            // All that are in place are whole, and the pointer names one of them.
            for path in checkpoints(&run) {
                Checkpoint::open(&path).expect("what is in place is whole");
            }
            if run.join("checkpoints/latest").exists() {
                Checkpoint::find(&run.join("checkpoints")).expect("what the pointer names is whole");
            }
            let so_far = whole_lines(&run);
            assert!(so_far == lines[..so_far.len()], "another curve after {kills} kills");
        }
        succeed(dir.path(), &flags);
        assert!(metrics(&run) == lines && model(&run) == weights, "{name}");
        assert!(leftovers(&run).is_empty());
        if kills == KILLS {
            break;
        }
    }
    println!("{unfinished} of {kills} while a checkpoint was written, {unnamed} before the pointer named it");
    assert!(unfinished >= 10 && unnamed >= 1, "{unfinished} and {unnamed} of {kills}");
}

#[test]
fn kill_9_loses_nothing_on_one_rank() {
    kill_and_go_on("--batch 2", 1);
}

#[test]
fn kill_9_loses_nothing_on_four_ranks() {
    kill_and_go_on("--batch 1 --dp 2 --tp 2 --use-zero-1", 2);
}
