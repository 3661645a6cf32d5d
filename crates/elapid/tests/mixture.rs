//! Training on several datasets, as a program.
#![allow(missing_docs)]

mod common;

use common::{Room, stderr};

const TRAIN: &str =
    "train --model tiny.json --data-dir data:0.7,more:0.3 --shuffle --batch 2 --grad-accum-usteps 3";

fn room() -> Room {
    let room = Room::with_data();
    room.write("more.txt", &"Another text, of other words altogether. ".repeat(20));
    room.ok("tokenize --dataset more.txt --tokenizer bytes --seq-len 32 --save-path more --append-eos");
    room
}

#[test]
fn a_mixture_trains_and_goes_on_to_the_bit() {
    let room = room();
    room.ok(&format!("{TRAIN} --lr-schedule constant --max-steps 6 --output-dir whole"));
    room.ok(&format!("{TRAIN} --lr-schedule constant --max-steps 3 --save-last-step --output-dir part"));
    room.ok(&format!(
        "{TRAIN} --lr-schedule constant --max-steps 6 --resume part/checkpoints --output-dir part"
    ));
    assert_eq!(room.losses("whole"), room.losses("part"));
    // Other weights are other data.
    let other = TRAIN.replace("0.7", "0.6");
    let line = format!("{other} --max-steps 9 --resume part/checkpoints --output-dir other");
    let said = stderr(&room.run(&line));
    assert!(said.contains("another dataset, read from its beginning"), "{said}");
}

#[test]
fn what_a_mixture_cannot_do_is_refused() {
    let room = room();
    for (flags, expected) in [
        ("--eval-fraction 0.1", "--eval-fraction with weights"),
        ("--eval-data-dir data:1,more:1", "--eval-data-dir data:1,more:1 has weights"),
        ("--data-dir data:1,nowhere:1", "nowhere does not exist"),
        ("--data-dir data:1,more", "some parts have weights"),
    ] {
        room.refuses(&format!("{TRAIN} --max-steps 1 --output-dir run {flags}"), &[expected]);
    }
    assert!(!room.path("run").exists());
    let line =
        "train --model tiny.json --data-dir data,more --eval-fraction 0.1 --max-steps 2 --output-dir run";
    room.ok(line);
    assert!(room.json("eval --model run/hf --data-dir data,more --json")["tokens"].as_u64().unwrap() > 1000);
}
