//! Going on from a checkpoint equals never having stopped, to the bit.

mod run;

use std::fs;

use clap::Parser;
use elapid::checkpoint::Checkpoint;
use elapid::config::run::TrainArgs;
use elapid::train::train;
use run::{checkpoints, copy, fail, leftovers, metrics, model, place, succeed};

#[derive(Parser)]
#[command(args_override_self = true)]
struct Train {
    #[command(flatten)]
    args: TrainArgs,
}

/// Stopped after every one of 30 steps and gone on with in another folder.
fn exact(flags: &str) {
    let dir = place();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let in_process = |flags: String| {
        let flags = run::words(&flags).into_iter().map(|word| match word.as_str() {
            "model.json" | "data" | "other" => path(&word),
            _ => word,
        });
        train(&Train::try_parse_from(flags).unwrap().args.resolve().unwrap()).unwrap();
    };
    let straight = dir.path().join("straight");
    in_process(format!(
        "{flags} --max-steps 30 --checkpoint-freq 1 --num-kept-checkpoint -1 --output-dir {}",
        straight.display()
    ));
    let (lines, weights, saved) = (metrics(&straight), model(&straight), checkpoints(&straight));
    assert_eq!((lines.len(), saved.len()), (30, 30));
    let evaluated = lines.iter().filter(|line| !line.ends_with(" null")).count();
    // After every fourth step and the last.
    assert_eq!(evaluated, if flags.contains("--eval-freq 4") { 8 } else { 0 });

    // Saving itself changes nothing.
    let unsaved = dir.path().join("unsaved");
    in_process(format!("{flags} --max-steps 30 --output-dir {}", unsaved.display()));
    assert!(checkpoints(&unsaved).is_empty());
    assert!(metrics(&unsaved) == lines && model(&unsaved) == weights);

    for (step, checkpoint) in (1..).zip(saved) {
        let output = dir.path().join(format!("from-{step}"));
        in_process(format!(
            "{flags} --max-steps 30 --resume {} --output-dir {}",
            checkpoint.display(),
            output.display()
        ));
        assert_eq!(metrics(&output), lines[step..], "after step {step}");
        assert!(model(&output) == weights, "after step {step}");
    }
}

#[test]
fn t24_every_step_of_a_run_is_a_place_to_go_on_from_in_fp32() {
    exact("--batch 2 --grad-accum-usteps 2 --shuffle --seed 5 --eval-fraction 0.2 --eval-freq 4");
}

#[test]
fn t24_every_step_of_a_run_is_a_place_to_go_on_from_in_bf16() {
    exact(
        "--batch 3 --grad-accum-usteps 2 --shuffle --dtype bfloat16 --activation-checkpointing block \
         --eval-fraction 0.2 --eval-freq 4",
    );
}

#[test]
fn t24_with_carried_states() {
    exact("--batch 2 --grad-accum-usteps 2 --carry-state --eval-fraction 0.2 --eval-freq 4");
}

#[test]
fn t24_with_carried_states_in_bf16() {
    exact(
        "--batch 3 --grad-accum-usteps 2 --carry-state --dtype bfloat16 --eval-data-dir other --eval-freq 4",
    );
}

#[test]
fn t24_in_the_order_of_the_dataset_with_more_threads() {
    exact("--batch 4 --lr-schedule constant --threads 2");
}

#[test]
fn the_newest_are_kept_and_latest_names_the_last() {
    let dir = place();
    let run = dir.path().join("r");
    succeed(
        dir.path(),
        "--max-steps 11 --checkpoint-freq 2 --num-kept-checkpoint 2 --save-last-step --tag a --output-dir r",
    );
    let names: Vec<_> =
        checkpoints(&run).iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["step-00000010-a", "step-00000011-a"]);
    assert_eq!(fs::read_to_string(run.join("checkpoints/latest")).unwrap(), "step-00000011-a\n");
    let found = Checkpoint::find(&run.join("checkpoints")).unwrap();
    assert_eq!(found.manifest().progress.step, 11);
    assert_eq!(found.manifest().progress.tokens, 11 * 16);
    assert!(leftovers(&run).is_empty());
}

#[test]
fn auto_starts_fresh_goes_on_and_ends() {
    let dir = place();
    let run = dir.path().join("r");
    succeed(dir.path(), "--max-steps 12 --output-dir straight");
    let auto = "--max-steps 12 --checkpoint-freq 5 --resume auto --output-dir r";
    let stderr = succeed(dir.path(), auto);
    assert!(stderr.contains("starting at step 1"), "{stderr}");
    let whole = (metrics(&run), model(&run));
    assert_eq!(whole, (metrics(&dir.path().join("straight")), model(&dir.path().join("straight"))));

    // A finished run is left alone.
    let before = fs::metadata(run.join("metrics.jsonl")).unwrap().modified().unwrap();
    let stderr = succeed(dir.path(), auto);
    assert!(stderr.contains("finished"), "{stderr}");
    assert_eq!(fs::metadata(run.join("metrics.jsonl")).unwrap().modified().unwrap(), before);

    // One that was killed while it wrote a line of step 12 goes on from step 10.
    fs::remove_file(run.join("finished.json")).unwrap();
    fs::remove_dir_all(run.join("hf")).unwrap();
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    fs::write(run.join("metrics.jsonl"), &text[..text.len() - 9]).unwrap();
    let stderr = succeed(dir.path(), auto);
    assert!(stderr.contains("going on after step 10"), "{stderr}");
    assert_eq!((metrics(&run), model(&run)), whole);

    // Without --resume a run is not touched.
    let stderr = fail(dir.path(), "--max-steps 12 --output-dir r");
    assert!(stderr.contains("already holds a run") && stderr.contains("--resume auto"), "{stderr}");
    // Nor are checkpoints that another run has written.
    let stderr = fail(dir.path(), "--max-steps 12 --checkpoint-dir r/checkpoints --output-dir other-run");
    assert!(stderr.contains("already holds step-00000010"), "{stderr}");
    // An earlier one beside a later one would leave two histories in one folder.
    let stderr = fail(dir.path(), "--max-steps 12 --resume r/checkpoints/step-00000005 --output-dir r");
    assert!(stderr.contains("is at step 5") && stderr.contains("step-00000010"), "{stderr}");
    let stderr = fail(dir.path(), "--max-steps 7 --resume r/checkpoints --output-dir fork");
    assert!(stderr.contains("past --max-steps 7"), "{stderr}");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_or_named() {
    let dir = place();
    succeed(dir.path(), "--max-steps 6 --checkpoint-freq 2 --lr-schedule constant --output-dir r");
    let last = |run: &str| dir.path().join(run).join("checkpoints/step-00000006");
    let piece = "rank-00000.safetensors";
    type Spoil<'a> = &'a dyn Fn(&std::path::Path);
    let shorten = |path: &std::path::Path, by: usize| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - by]).unwrap();
    };
    let cases: [(&str, Spoil); 5] = [
        ("cut off", &|at| shorten(&at.join("manifest.json"), 100)),
        ("manifest.json", &|at| fs::remove_file(at.join("manifest.json")).unwrap()),
        ("bytes instead of", &|at| shorten(&at.join(piece), 1)),
        ("is missing", &|at| fs::remove_file(at.join(piece)).unwrap()),
        // The file ends with the last tensor.
        (": v.backbone.norm_f.weight is damaged", &|at| {
            let mut bytes = fs::read(at.join(piece)).unwrap();
            *bytes.last_mut().unwrap() ^= 0x10;
            fs::write(at.join(piece), bytes).unwrap();
        }),
    ];
    let on = "--max-steps 8 --checkpoint-freq 2 --lr-schedule constant";
    copy(&dir.path().join("r"), &dir.path().join("whole"));
    succeed(dir.path(), &format!("{on} --resume auto --output-dir whole"));
    for (number, (reason, spoil)) in cases.into_iter().enumerate() {
        let name = format!("r{number}");
        let run = dir.path().join(&name);
        copy(&dir.path().join("r"), &run);
        spoil(&last(&name));
        let path = last(&name);
        let stderr = fail(dir.path(), &format!("{on} --resume {} --output-dir fork", path.display()));
        assert!(stderr.contains(reason), "{reason}: {stderr}");
        let stderr =
            succeed(dir.path(), &format!("{on} --resume auto --num-kept-checkpoint 1 --output-dir {name}"));
        assert!(stderr.contains("warning: passing over") && stderr.contains(reason), "{stderr}");
        assert!(stderr.contains("going on after step 4"), "{stderr}");
        assert_eq!(metrics(&run), metrics(&dir.path().join("whole")));
        assert!(model(&run) == model(&dir.path().join("whole")));
        assert!(Checkpoint::open(&run.join("checkpoints/step-00000008")).is_ok());
    }
    // Where there were checkpoints and none is left, a run does not silently begin anew.
    for path in checkpoints(&dir.path().join("r")) {
        shorten(&path.join(piece), 1);
    }
    let stderr = fail(dir.path(), &format!("{on} --resume auto --output-dir r"));
    assert!(stderr.contains("all 3 checkpoints"), "{stderr}");
}

#[test]
fn what_may_change_and_what_may_not() {
    let dir = place();
    let base = "--shuffle --lr-schedule constant";
    succeed(dir.path(), &format!("{base} --batch 4 --max-steps 3 --save-last-step --output-dir r"));
    let on = format!("{base} --max-steps 5 --resume r/checkpoints");
    let stderr =
        succeed(dir.path(), &format!("{on} --batch 2 --grad-accum-usteps 2 --threads 2 --output-dir split"));
    for words in ["batch 4 → 2", "grad-accum-usteps 1 → 2", "max-steps 3 → 5", "threads 1 → 2"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    // The split of a step decides how sums are rounded, and nothing else.
    succeed(dir.path(), &format!("{on} --batch 4 --output-dir whole"));
    let losses = |run: &str| -> Vec<f64> {
        let lines = metrics(&dir.path().join(run));
        lines.iter().map(|line| line.split(' ').nth(1).unwrap().parse().unwrap()).collect()
    };
    let (split, whole) = (losses("split"), losses("whole"));
    assert!(split.len() == 2 && split.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5 * b), "{split:?}");

    // Another number of samples a step, and another dataset: said, and exact to the bit when gone on with in turn.
    for (name, flags, words) in [
        ("batch", "--batch 2", "a step reads 2 samples from here on, 4 before"),
        ("data", "--batch 4 --data-dir other", "another dataset, read from its beginning (fingerprint"),
    ] {
        let more = format!("{base} {flags} --max-steps 9 --lr-schedule cosine");
        let stderr = succeed(
            dir.path(),
            &format!("{more} --resume r/checkpoints --checkpoint-freq 3 --output-dir {name}"),
        );
        assert!(stderr.contains(words) && stderr.contains("lr-schedule"), "{stderr}");
        let from = format!("{name}/checkpoints/step-00000006");
        let stderr = succeed(dir.path(), &format!("{more} --resume {from} --output-dir {name}-again"));
        assert!(!stderr.contains("from here on") && !stderr.contains("another dataset"), "{stderr}");
        let lines = metrics(&dir.path().join(name));
        assert_eq!((lines.len(), &lines[3..]), (6, &metrics(&dir.path().join(format!("{name}-again")))[..]));
    }

    for (flags, words) in [
        ("--batch 4 --seed 9", "was random with seed 0, now it is random with seed 9"),
        ("--batch 4 --n-groups 1", "the model has changed (n_groups 2 → 1)"),
        ("--batch 4 --rmsnorm-across-groups", "norm_group"),
    ] {
        let stderr = fail(dir.path(), &format!("{on} {flags} --output-dir refused"));
        assert!(stderr.contains(words), "{flags}: {stderr}");
    }

    // Carried states belong to their rows.
    let carry = "--carry-state --lr-schedule constant";
    succeed(dir.path(), &format!("{carry} --batch 4 --max-steps 3 --save-last-step --output-dir carried"));
    for (flags, words) in [
        ("--batch 2", "the product --batch × --grad-accum-usteps"),
        ("--batch 4 --data-dir other", "the dataset has changed (fingerprint"),
    ] {
        let on = format!("{carry} --max-steps 5 --resume carried/checkpoints {flags} --output-dir refused");
        let stderr = fail(dir.path(), &on);
        assert!(stderr.contains(words), "{flags}: {stderr}");
    }
}

#[test]
fn weights_alone_can_be_loaded() {
    let dir = place();
    succeed(dir.path(), "--max-steps 4 --save-last-step --tag exp --output-dir r");
    succeed(dir.path(), "--max-steps 3 --init-from r/hf --output-dir from-hf");
    succeed(dir.path(), "--max-steps 3 --init-from r/checkpoints --output-dir from-checkpoints");
    let load = "--max-steps 3 --checkpoint_load --checkpoint_load_dir r/checkpoints";
    succeed(dir.path(), &format!("{load} --checkpoint_load_tag exp --output-dir by-tag"));
    succeed(dir.path(), &format!("{load} --checkpoint_load_tag step-00000004-exp --output-dir by-name"));
    succeed(dir.path(), &format!("{load} --output-dir by-latest"));
    let expected = metrics(&dir.path().join("from-hf"));
    assert!(expected[0].starts_with("1 "));
    for run in ["from-checkpoints", "by-tag", "by-name", "by-latest"] {
        assert_eq!(metrics(&dir.path().join(run)), expected, "{run}");
    }
    let stderr = fail(dir.path(), &format!("{load} --checkpoint_load_tag expp --output-dir none"));
    assert!(stderr.contains("no checkpoint expp"), "{stderr}");
}
