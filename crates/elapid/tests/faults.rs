//! Signals in every phase of a run, disks that are full and folders that cannot be written: the exit code, what is left,
//! and that the run goes on to the same end.
#![cfg(target_os = "linux")]

mod run;

use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::time::Duration;

use elapid::checkpoint::Checkpoint;
use run::{checkpoints, command, dataset, leftovers, metrics, model, place, run, signal, succeed, wait_for};

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// As a shell reports it: 128 + the signal where that ended the process itself.
fn code(status: ExitStatus) -> i32 {
    status.code().or(status.signal().map(|signal| 128 + signal)).unwrap()
}

fn lines(run: &Path) -> usize {
    metrics(run).len()
}

fn writes_a_checkpoint(run: &Path) -> bool {
    leftovers(run).iter().any(|name| name.ends_with(".partial"))
}

/// A phase, when a run in this folder is in it, and which step it has saved when it is gone (0: none).
type Phase = (&'static str, fn(&Path) -> bool, RangeInclusive<u64>);

/// Everything before the first step, a step, an evaluation, a save and the export. A step and an evaluation cannot be
/// seen from outside: each begins when the line of the step before is written. What is short may be over before the signal is
/// there.
const PHASES: [Phase; 5] = [
    ("start", |run| run.join(".lock").exists(), 0..=0),
    ("step", |run| run.join("metrics.jsonl").exists() && after(10), 1..=1),
    ("evaluation", |run| lines(run) == 1 && after(60), 2..=3),
    ("save", |run| lines(run) == 2 && writes_a_checkpoint(run), 2..=3),
    ("export", |run| run.join("hf/.model.safetensors.partial").exists(), 4..=4),
];

fn after(milliseconds: u64) -> bool {
    std::thread::sleep(Duration::from_millis(milliseconds));
    true
}

#[test]
fn signals_in_every_phase_leave_what_can_be_gone_on_from() {
    let dir = place();
    dataset(&dir.path().join("held-out"), 3, 60, false);
    // A vocabulary large enough that every phase takes a while.
    let flags = "--max-steps 4 --grad-accum-usteps 2 --shuffle --vocab-size 100000 --eval-data-dir held-out --eval-freq 2 \
                 --checkpoint-freq 2 --save-last-step";
    let flags = flags.split_whitespace().collect::<Vec<_>>().join(" ");
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    let straight = dir.path().join("straight");
    for (sent, expected) in [("-INT", 130), ("-TERM", 143)] {
        for (phase, is_in, saved) in PHASES {
            let name = format!("{phase}{sent}");
            let run = dir.path().join(&name);
            let flags = format!("{flags} --output-dir {name}");
            let child = command(dir.path(), &flags).spawn().unwrap();
            assert!(wait_for(|| is_in(&run)), "{name}");
            signal(&child, sent);
            let output = child.wait_with_output().unwrap();
            assert_eq!(code(output.status), expected, "{name}: {}", stderr(&output));
            assert!(leftovers(&run).is_empty(), "{name}");
            let step = checkpoints(&run).pop().map_or(0, |path| {
                let checkpoint = Checkpoint::open(&path).unwrap();
                checkpoint.manifest().progress.step
            });
            assert!(saved.contains(&step) && lines(&run) as u64 == step, "{name}: {step}");

            let said = succeed(dir.path(), &format!("{flags} --resume auto"));
            let expected = match (phase, step) {
                ("export", _) => "is finished".to_owned(),
                (_, 0) => "starting at step 1".to_owned(),
                (_, step) => format!("going on after step {step}"),
            };
            assert!(said.contains(&expected), "{name}: {said}");
            assert!(metrics(&run) == metrics(&straight) && model(&run) == model(&straight), "{name}");
            fs::remove_dir_all(&run).unwrap();
        }
    }
}

/// A tmpfs of some KiB, gone when dropped. Mounting needs root.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(at: PathBuf, kib: usize) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        if mount(&format!("size={kib}k"), &at) {
            return Some(Self(at));
        }
        eprintln!("skipped: no right to mount a tmpfs");
        None
    }

    fn again(&self, options: &str) {
        assert!(mount(&format!("remount,{options}"), &self.0), "{options}");
    }
}

fn mount(options: &str, at: &Path) -> bool {
    let output = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(at).output();
    output.is_ok_and(|output| output.status.success())
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Without root: `a_full_disk_while_saving_is_an_error_and_earlier_checkpoints_stay` of interrupted.rs.
#[test]
fn a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved() {
    let dir = place();
    let flags = "--max-steps 9 --checkpoint-freq 1 --num-kept-checkpoint -1";
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    // A checkpoint is some 210 KiB: three fit.
    let Some(disk) = SmallDisk::new(dir.path().join("disk"), 800) else { return };
    let name = "disk/run";
    let output = run(dir.path(), &format!("{flags} --output-dir {name}"));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("No space left") && said.contains("free some space"), "{said}");
    assert!(
        said.contains("error: cannot write disk/run/checkpoints/") && said.contains("--resume auto"),
        "{said}"
    );
    let run_dir = dir.path().join(name);
    let saved = checkpoints(&run_dir);
    assert!((1..9).contains(&saved.len()) && leftovers(&run_dir).is_empty(), "{saved:?}");
    for path in &saved {
        Checkpoint::open(path).unwrap();
    }
    // Full still: the same error, and the same checkpoints.
    let output = run(dir.path(), &format!("{flags} --resume auto --output-dir {name}"));
    assert_eq!((output.status.code(), checkpoints(&run_dir)), (Some(1), saved), "{}", stderr(&output));

    disk.again("size=8m");
    let said = succeed(dir.path(), &format!("{flags} --resume auto --output-dir {name}"));
    assert!(said.contains("going on after step"), "{said}");
    let straight = dir.path().join("straight");
    assert!(metrics(&run_dir) == metrics(&straight) && model(&run_dir) == model(&straight));
}

/// Not even root writes there. Without root: `a_folder_that_cannot_be_written_is_an_error_before_the_first_step`.
#[test]
fn a_disk_that_is_read_only_is_an_error_before_the_first_step() {
    let dir = place();
    let Some(disk) = SmallDisk::new(dir.path().join("disk"), 8192) else { return };
    succeed(dir.path(), "--max-steps 2 --save-last-step --output-dir disk/run");
    disk.again("ro");
    for flags in [
        "--output-dir disk/new",
        "--checkpoint-dir disk/new --output-dir run",
        "--output-dir disk/run --resume auto",
        "--checkpoint-dir disk/run/checkpoints --resume auto --output-dir run",
    ] {
        let output = run(dir.path(), &format!("--max-steps 4 {flags}"));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{flags}: {said}");
        assert!(
            said.contains("Read-only file system") && said.contains("who may read and write there"),
            "{said}"
        );
        assert!(!said.contains("step 1/") && !said.contains("step 3/"), "{said}");
        assert!(!dir.path().join("run/metrics.jsonl").exists());
    }
    // A model there can still be read.
    disk.again("rw");
    succeed(dir.path(), "--max-steps 4 --resume auto --output-dir disk/run");
}
