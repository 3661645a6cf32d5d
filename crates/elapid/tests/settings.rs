//! `train --config`: settings from a file.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;

use common::{Room, stderr};

/// What `train` would run with.
fn printed(room: &Room, flags: &str) -> String {
    room.ok(&format!("train {flags} --print-config"))
}

/// Every flag, each with a value that is not its default. Several cases, since some exclude each other.
const ALL: [&str; 4] = [
    "--model tiny.json --vocab-size 300 --n-groups 1 --rmsnorm-across-groups --init transformers --data-dir data \
     --eval-fraction 0.25 --eval-freq 2 --seq-len 32 --shuffle --seed 9223372036854775807 --dtype bfloat16 --batch 3 \
     --grad-accum-usteps 2 --max-steps 12 --lr 1.7e-3 --min-lr 1e-30 --warmup-steps 2 --lr-schedule wsd \
     --decay-steps 5 --beta1 0.8 --beta2 0.99 --eps 1e-7 --weight-decay 0 --max-grad-norm 0.3 \
     --activation-checkpointing block --checkpoint-dir ck --checkpoint-freq 4 --tag -x.1 --num-kept-checkpoint 2 \
     --save-last-step --resume auto --checkpoint-load --checkpoint-load-dir from --checkpoint-load-tag t \
     --ignore-memory-limit --logging-interval 3 --log-norms --output-dir out --device cpu --threads 2",
    "--init-from run/hf --data-dir data --eval-data-dir data --max-steps 2 --carry-state --num-kept-checkpoint -1 \
     --tp 2 --dp 2 --use-zero-1 --sequence-parallel-enabled --comm-timeout 5",
    "--model tiny.json --data-dir data --max-steps 2 --device neuron --target trn2 --compile-cache neff --compile-only \
     --layer-loop unrolled --layer-groups 2",
    "--model tiny.json --data-dir data --max-steps 2 --device pjrt --plugin cuda",
];

#[test]
fn settings_come_back_as_they_were_printed() {
    let room = Room::with_model();
    let mut keys = BTreeSet::new();
    for flags in ALL {
        let toml = printed(&room, &flags.replace("--tag -x.1", "--tag=-x.1"));
        room.write("settings.toml", &toml);
        assert_eq!(printed(&room, "--config settings.toml"), toml);
        let lines: Vec<_> = toml.lines().map(|line| line.split_once(" = ").unwrap()).collect();
        let underscores = lines.iter().map(|(key, value)| format!("{} = {value}\n", key.replace('-', "_")));
        room.write("settings.toml", &underscores.collect::<String>());
        assert_eq!(printed(&room, "--config settings.toml"), toml);
        keys.extend(lines.into_iter().map(|(key, _)| key.to_owned()));
    }
    assert!(!room.path("out").exists(), "nothing is run");
    let help = room.ok("train --help");
    let flags = help
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--").or(line.trim_start().strip_prefix("-h, --")));
    let flags: BTreeSet<_> = flags.map(|rest| rest.split([' ', '[']).next().unwrap().to_owned()).collect();
    let not_in_a_file = BTreeSet::from(["config", "help", "print-config"].map(str::to_owned));
    assert_eq!(flags.difference(&keys).cloned().collect::<BTreeSet<_>>(), not_in_a_file);
    assert!(keys.is_subset(&flags));
}

#[test]
fn a_run_is_repeated_from_its_run_toml() {
    let room = Room::with_data();
    room.ok(&format!("{} --shuffle --seed 3 --lr 1e-2 --save-last-step --output-dir first", common::TRAIN));
    room.ok("train --config first/run.toml --output-dir second");
    assert_eq!(room.losses("first"), room.losses("second"));
    assert_eq!(room.names("second/checkpoints"), room.names("first/checkpoints"));
    let settings = |run: &str| room.read(&format!("{run}/run.toml")).replace(run, "");
    assert_eq!(settings("first"), settings("second"));
}

#[test]
fn flags_override_the_file_wherever_they_stand() {
    let room = Room::with_data();
    room.write(
        "a.toml",
        "model = \"tiny.json\"\ndata_dir = \"data\"\nmax-steps = 7\nlr = 1\nshuffle = true\nnum-kept-checkpoint = -1\n",
    );
    let toml = printed(&room, "--lr 2e-3 --config a.toml --max_steps 5 --shuffle=false");
    for line in ["lr = 0.002", "max-steps = 5", "shuffle = false", "num-kept-checkpoint = -1"] {
        assert!(toml.lines().any(|found| found == line), "no {line} in\n{toml}");
    }
    // Of two files the last one counts, and nothing of the other.
    room.write("b.toml", "model = \"tiny.json\"\ndata-dir = \"data\"\nmax-steps = 3\n");
    assert!(printed(&room, "--config a.toml --config=b.toml").contains("lr = 0.0003\n"));
}

#[test]
fn faults_of_the_file_are_named_with_their_line() {
    let room = Room::with_data();
    let refuses = |line: &str, expected: &[&str]| {
        room.write("s.toml", &format!("# settings\nmodel = \"tiny.json\"\ndata-dir = \"data\"\n{line}\n"));
        let said = room.refuses("train --config s.toml", expected);
        assert!(said.contains("s.toml:4: "), "{said}");
    };
    refuses("max-step = 3", &["no setting max-step", "did you mean max-steps?"]);
    refuses("grad_acum_usteps = 3", &["no setting grad_acum_usteps", "did you mean grad-accum-usteps?"]);
    refuses("config = \"other.toml\"", &["no setting config"]);
    refuses("max-steps = \"3\"", &["max-steps is \"3\"", "an integer, not a string"]);
    refuses("max_steps = 1.5", &["max_steps is 1.5", "an integer, not a float"]);
    refuses("max-steps = -3", &["max-steps is -3", "0 or more"]);
    refuses("max-steps = true", &["an integer, not a boolean"]);
    refuses("max-steps = [3]", &["max-steps is [3]", "not an array"]);
    refuses("lr = \"small\"", &["lr is \"small\"", "a number"]);
    refuses("shuffle = 1", &["shuffle is 1", "true or false"]);
    refuses("tag = 3", &["tag is 3", "a text in quotes"]);
    refuses("dtype = \"float16\"", &["dtype is \"float16\"", "float32, bfloat16"]);
    refuses("seed = 99999999999999999999", &["seed is 99999999999999999999"]);
    refuses("lr", &["hint"]);
    refuses("batch = 3 3", &["hint"]);
    room.write("s.toml", "min-lr = 1\nmin_lr = 2\n");
    room.refuses("train --config s.toml", &["s.toml:2", "min-lr stands there twice"]);
    room.refuses("train --config none.toml", &["none.toml"]);
    // What is missing in both is what clap says of flags.
    room.write("s.toml", "lr = 1e-3\n");
    let output = room.run("train --config s.toml");
    assert!(!output.status.success() && stderr(&output).contains("--data-dir"), "{}", stderr(&output));
    // A value that no flag may have is found as if it had been typed.
    room.write("s.toml", "model = \"tiny.json\"\ndata-dir = \"data\"\nmax-steps = 3\nlr = inf\n");
    room.refuses("train --config s.toml", &["--lr is inf"]);
}
