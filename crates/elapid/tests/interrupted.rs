//! Runs that are killed, asked to stop, or out of disk lose nothing that a checkpoint holds.
#![cfg(unix)]

mod run;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use run::{checkpoints, command, fail, leftovers, metrics, model, place, run, signal, succeed, wait_for};

fn same_as_straight(dir: &Path, name: &str) {
    let (run, straight) = (dir.join(name), dir.join("straight"));
    assert_eq!(metrics(&run), metrics(&straight));
    assert!(model(&run) == model(&straight));
    assert!(leftovers(&run).is_empty());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn lines(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

#[test]
fn ctrl_c_and_sigterm_in_a_step_save_and_leave() {
    let dir = place();
    let flags = "--max-steps 3000 --shuffle";
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    for (name, sent, code, word) in [("int", "-INT", 130, "Ctrl-C"), ("term", "-TERM", 143, "SIGTERM")] {
        let run = dir.path().join(name);
        let flags = format!("{flags} --output-dir {name}");
        let child = command(dir.path(), &flags).spawn().unwrap();
        assert!(wait_for(|| lines(&run) >= 5));
        signal(&child, sent);
        let output = child.wait_with_output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        let step = lines(&run);
        assert!(text.contains(&format!("stopped: {word} after step {step}, saved in")), "{text}");
        assert!(step < 3000 && !run.join("hf").exists());
        assert_eq!(checkpoints(&run).len(), 1);
        let text = succeed(dir.path(), &format!("{flags} --resume auto"));
        assert!(text.contains(&format!("going on after step {step}")), "{text}");
        same_as_straight(dir.path(), name);
    }
}

#[test]
fn a_second_ctrl_c_leaves_at_once() {
    let dir = place();
    // A step that takes minutes.
    let flags = "--max-steps 2 --grad-accum-usteps 1000000 --output-dir r";
    let mut child = command(dir.path(), flags).spawn().unwrap();
    assert!(wait_for(|| dir.path().join("r/metrics.jsonl").exists()));
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, "-INT");
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the first one waits for the step");
    let start = Instant::now();
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(checkpoints(&dir.path().join("r")).is_empty());
}

/// From the first instruction on, and in every phase of saving: the run goes on to the same end.
#[test]
fn ctrl_c_in_start_and_in_saves() {
    let dir = place();
    let flags = "--max-steps 25 --shuffle";
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    let on = format!("{flags} --checkpoint-freq 1 --num-kept-checkpoint 1 --resume auto --output-dir r");
    let mut stops = 0;
    for delay in (0..).step_by(11) {
        let child = command(dir.path(), &on).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay % 330));
        signal(&child, "-INT");
        let output = child.wait_with_output().unwrap();
        match output.status.code() {
            Some(0) => {}
            Some(130) => stops += 1,
            // Before the first step there is nothing to save, and the signal ends the process itself.
            None => stops += 1,
            code => panic!("{code:?}: {}", stderr(&output)),
        }
        let newest = checkpoints(&dir.path().join("r")).pop();
        assert!(newest.is_none_or(|path| elapid::checkpoint::Checkpoint::open(&path).is_ok()));
        if dir.path().join("r/finished.json").exists() || delay > 600 {
            break;
        }
    }
    assert!(stops > 0);
    succeed(dir.path(), &on);
    same_as_straight(dir.path(), "r");
}

#[test]
fn ctrl_c_in_export_completes_it_and_a_second_does_no_harm() {
    let dir = place();
    // Large enough that the export takes a while.
    let flags = "--max-steps 1 --vocab-size 500000 --save-last-step";
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    for (name, signals) in [("once", 1), ("twice", 2)] {
        let run = dir.path().join(name);
        let flags = format!("{flags} --output-dir {name}");
        let child = command(dir.path(), &flags).spawn().unwrap();
        assert!(wait_for(|| run.join("hf/.model.safetensors.partial").exists()));
        for _ in 0..signals {
            signal(&child, "-INT");
            std::thread::sleep(Duration::from_millis(2));
        }
        let output = child.wait_with_output().unwrap();
        if signals == 1 {
            assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
            assert!(
                stderr(&output).contains("after the last step, the model is whole"),
                "{}",
                stderr(&output)
            );
            assert!(run.join("finished.json").exists());
        } else {
            assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
            assert!(!run.join("hf/model.safetensors").exists() && !run.join("finished.json").exists());
        }
        succeed(dir.path(), &format!("{flags} --resume auto"));
        same_as_straight(dir.path(), name);
    }
}

/// A disk that takes no more: writes beyond a limit on the size of files fail.
#[test]
fn a_full_disk_while_saving_is_an_error_and_earlier_checkpoints_stay() {
    let dir = place();
    let flags = "--max-steps 9 --checkpoint-freq 3";
    succeed(dir.path(), &format!("{flags} --output-dir straight"));
    let run = dir.path().join("r");
    let child = command(dir.path(), "--max-steps 9 --checkpoint-freq 3 --output-dir r");
    let whole = command(dir.path(), "--max-steps 3 --checkpoint-freq 3 --output-dir short").output().unwrap();
    assert!(whole.status.success(), "{}", stderr(&whole));

    // 8 blocks of 512 bytes: enough for the lines of metrics, not for a piece.
    let limited = |arguments: &Command| {
        Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""])
            .arg(arguments.get_program())
            .args(arguments.get_args())
            .current_dir(dir.path())
            .output()
            .unwrap()
    };
    let output = limited(&child);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: cannot write") && text.contains("rank-00000.safetensors"), "{text}");
    assert!(text.contains("hint: ") && text.contains("--resume auto"), "{text}");
    assert!(leftovers(&run).is_empty() && checkpoints(&run).is_empty());

    // With a checkpoint there already: it stays, and the run goes on from it once there is room.
    fs::remove_dir_all(&run).unwrap();
    run::copy(&dir.path().join("straight"), &run);
    for name in ["checkpoints/step-00000006", "checkpoints/step-00000009"] {
        fs::remove_dir_all(run.join(name)).unwrap();
    }
    fs::remove_file(run.join("finished.json")).unwrap();
    let on = format!("{flags} --resume auto --output-dir r");
    let output = limited(&command(dir.path(), &on));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(checkpoints(&run).len(), 1);
    succeed(dir.path(), &on);
    same_as_straight(dir.path(), "r");
}

#[test]
#[cfg(target_os = "linux")]
fn a_folder_that_cannot_be_written_is_an_error_before_the_first_step() {
    let dir = place();
    let text = fail(dir.path(), "--max-steps 2 --checkpoint-dir /sys/kernel/elapid --output-dir r");
    assert!(text.contains("cannot create /sys/kernel/elapid"), "{text}");
    assert!(!dir.path().join("r/metrics.jsonl").exists());
    // A file where the folder should be.
    fs::write(dir.path().join("file"), "").unwrap();
    let text = fail(dir.path(), "--max-steps 2 --checkpoint-dir file/below --output-dir r");
    assert!(text.contains("file/below"), "{text}");
}

#[test]
fn a_run_folder_has_one_process() {
    let dir = place();
    let flags = "--max-steps 1000000 --output-dir r";
    let mut child = command(dir.path(), flags).spawn().unwrap();
    assert!(wait_for(|| lines(&dir.path().join("r")) >= 1));
    let output = run(dir.path(), &format!("{flags} --resume auto"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("another process is training into r"), "{}", stderr(&output));
    let output = run(dir.path(), "--max-steps 1 --checkpoint-dir r/checkpoints --output-dir r2");
    assert!(
        stderr(&output).contains("another process is training into r/checkpoints"),
        "{}",
        stderr(&output)
    );
    child.kill().unwrap();
    child.wait().unwrap();
}
