//! `elapid train` on several ranks, as threads of the program, against one rank: losses, checkpoints that go from mesh
//! to mesh, the exported model, and what is refused.
#![allow(missing_docs)]

mod common;

use std::process::Stdio;

use common::{Room, failed_in_order, stderr};
use serde_json::Value;

/// Four steps of four sequences each.
const FOUR: &str =
    "train --model tiny.json --data-dir data --lr 1e-2 --warmup-steps 2 --max-grad-norm 0.5 --threads 1";

fn close(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got / want - 1.0).abs() < 2e-5, "{what}: {got} for {want}");
    }
}

impl Room {
    fn norms(&self, run: &str) -> Vec<f64> {
        self.metrics(run).iter().map(|line| line["grad_norm"].as_f64().unwrap()).collect()
    }
}

const MESHES: [&str; 6] = [
    "--batch 2 --dp 2",
    "--batch 1 --dp 4 --use-zero-1",
    "--batch 4 --tp 4",
    "--batch 2 --tp 2 --dp 2 --use-zero-1 --sequence-parallel-enabled",
    "--batch 1 --grad-accum-usteps 2 --tp 2 --dp 2 --use-zero-1",
    "--batch 2 --grad-accum-usteps 2 --tp 2 --sequence-parallel-enabled --activation-checkpointing block",
];

#[test]
fn t24_every_mesh_trains_alike() {
    let room = Room::with_data();
    room.ok(&format!("{FOUR} --max-steps 4 --batch 4 --eval-fraction 0.1 --output-dir one"));
    for (i, mesh) in MESHES.iter().enumerate() {
        let said = room.run(&format!("{FOUR} --max-steps 4 {mesh} --eval-fraction 0.1 --output-dir run{i}"));
        assert!(said.status.success(), "{}", stderr(&said));
        let run = format!("run{i}");
        close(&room.losses(&run), &room.losses("one"), mesh);
        close(&room.norms(&run), &room.norms("one"), mesh);
        let last = |run: &str| room.metrics(run).last().unwrap()["eval_loss"].as_f64().unwrap();
        close(&[last(&run)], &[last("one")], mesh);
        let tokens = |run: &str| room.metrics(run).last().unwrap()["tokens"].as_u64();
        assert_eq!(tokens(&run), tokens("one"));
        // One rank speaks.
        assert_eq!(stderr(&said).matches("step 4/4").count(), 1);
        assert_eq!(String::from_utf8_lossy(&said.stdout).matches("model in").count(), 1);
        let loss = |run: &str| {
            room.json(&format!("eval --model {run}/hf --data-dir data --json"))["loss"].as_f64().unwrap()
        };
        close(&[loss(&run)], &[loss("one")], mesh);
    }
}

/// Any mesh goes on from the checkpoint of any other; on the same one the bits are the same.
#[test]
fn checkpoints_go_from_mesh_to_mesh() {
    let room = Room::with_data();
    let save = "--save-last-step --shuffle --lr-schedule constant";
    room.ok(&format!("{FOUR} {save} --max-steps 4 --batch 4 --output-dir one"));
    room.ok(&format!("{FOUR} {save} --max-steps 2 --batch 4 --output-dir half"));
    for (i, mesh) in MESHES.iter().enumerate() {
        // From one rank to the mesh.
        room.ok(&format!(
            "{FOUR} {save} --max-steps 4 {mesh} --output-dir to{i} --resume half/checkpoints/step-00000002"
        ));
        close(&room.losses(&format!("to{i}")), &room.losses("one")[2..], mesh);
        // From the mesh to one rank, and to another mesh.
        room.ok(&format!("{FOUR} {save} --max-steps 2 {mesh} --output-dir from{i}"));
        let checkpoint = format!("--resume from{i}/checkpoints/step-00000002");
        room.ok(&format!("{FOUR} {save} --max-steps 4 --batch 4 --output-dir back{i} {checkpoint}"));
        close(&room.losses(&format!("back{i}")), &room.losses("one")[2..], mesh);
        let other = MESHES[(i + 1) % MESHES.len()];
        room.ok(&format!("{FOUR} {save} --max-steps 4 {other} --output-dir other{i} {checkpoint}"));
        close(&room.losses(&format!("other{i}")), &room.losses("one")[2..], mesh);
        // On the same mesh the bits are those of the run that never stopped.
        room.ok(&format!("{FOUR} {save} --max-steps 4 {mesh} --output-dir whole{i}"));
        room.ok(&format!("{FOUR} {save} --max-steps 4 {mesh} --output-dir from{i} --resume auto"));
        assert_eq!(room.losses(&format!("from{i}")), room.losses(&format!("whole{i}")), "{mesh}");
        let weights =
            |run: &str| std::fs::read(room.path(&format!("{run}{i}/hf/model.safetensors"))).unwrap();
        assert!(weights("from") == weights("whole"), "{mesh}");
    }
}

/// Carried states belong to rows, which other ranks read after a change of the mesh.
#[test]
fn carried_states_go_from_mesh_to_mesh() {
    let room = Room::with_data();
    let carry = "--carry-state --save-last-step --lr-schedule constant";
    room.ok(&format!("{FOUR} {carry} --max-steps 4 --batch 4 --output-dir one"));
    let meshes = ["--batch 2 --dp 2 --use-zero-1", "--batch 2 --tp 2 --dp 2", "--batch 4 --tp 4"];
    for (i, mesh) in meshes.iter().enumerate() {
        room.ok(&format!("{FOUR} {carry} --max-steps 2 {mesh} --output-dir from{i}"));
        let other = meshes[(i + 1) % meshes.len()];
        let checkpoint = format!("--resume from{i}/checkpoints/step-00000002");
        room.ok(&format!("{FOUR} {carry} --max-steps 4 {other} --output-dir other{i} {checkpoint}"));
        close(&room.losses(&format!("other{i}")), &room.losses("one")[2..], mesh);
    }
}

/// The norm of every tensor is that of one rank: copies count once, shares add up.
#[test]
fn norms_of_all_ranks_are_those_of_one() {
    let room = Room::with_data();
    let train = format!("{FOUR} --max-steps 2 --log-norms");
    room.ok(&format!("{train} --batch 4 --output-dir one"));
    let norms = |run: &str| -> Vec<Value> {
        let lines = room.read(&format!("{run}/norms.jsonl"));
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let one = norms("one");
    for (i, mesh) in MESHES.iter().enumerate() {
        room.ok(&format!("{train} {mesh} --output-dir run{i}"));
        room.ok(&format!("{} {mesh} --output-dir plain{i}", train.replace("--log-norms", "")));
        assert_eq!(room.losses(&format!("run{i}")), room.losses(&format!("plain{i}")), "{mesh}");
        let run = norms(&format!("run{i}"));
        assert_eq!(run.len(), 2);
        for (run, one) in run.iter().zip(&one) {
            for kind in ["gradients", "updates", "parameters"] {
                let (run, one) = (run[kind].as_object().unwrap(), one[kind].as_object().unwrap());
                assert_eq!(run.len(), one.len());
                for (name, value) in one {
                    let (got, want) = (run[name].as_f64().unwrap(), value.as_f64().unwrap());
                    assert!((got / want - 1.0).abs() < 1e-4, "{mesh}: {kind} of {name}: {got} for {want}");
                }
            }
        }
    }
}

/// Ranks share the blocks of an evaluation, and the result is that of one rank to the bit: also where ranks have
/// nothing to do in a round, and where the last batch is smaller.
#[test]
fn ranks_share_an_evaluation() {
    let room = Room::with_data();
    for (i, (batch, dp)) in [(1, 2), (1, 3), (2, 3), (3, 4)].into_iter().enumerate() {
        let flags = "--max-steps 2 --eval-fraction 0.3";
        room.ok(&format!("{FOUR} {flags} --batch {batch} --dp {dp} --output-dir run{i}"));
        let line = &room.metrics(&format!("run{i}"))[1];
        let line_of = format!(
            "eval --model run{i}/hf --data-dir data --eval-fraction 0.3 --batch {batch} --threads 1 --json"
        );
        let alone = room.json(&line_of);
        assert_eq!(line["eval_loss"], alone["loss"], "batch {batch}, dp {dp}");
        assert_eq!(line["eval_bits_per_byte"], alone["bits_per_byte"]);
    }
}

/// A step that is finite, and an update after which nothing is.
#[test]
fn an_evaluation_that_is_not_finite_is_named() {
    let room = Room::with_data();
    for mesh in ["--batch 2", "--dp 2"] {
        let line =
            format!("train --model tiny.json --data-dir data --max-steps 3 {mesh} --lr 1e30 --threads 1");
        let line = format!("{line} --eval-fraction 0.2 --eval-freq 1 --output-dir run");
        let expected = ["evaluation after step 1: the loss is not finite", "among blocks", "lower --lr"];
        let output = room.run(&line);
        let said = failed_in_order(&output);
        assert!(expected.iter().all(|part| said.contains(part)), "{said}");
    }
}

/// Where the data ends in the middle of a batch all ranks go on with the next epoch alike: nothing is left out, and none
/// of them has less to do.
#[test]
fn t24_data_that_ends_in_a_batch_ends_for_all_ranks_alike() {
    let room = Room::with_data();
    let blocks = room.json("inspect data --json")["blocks"].as_u64().unwrap();
    assert!(!blocks.is_multiple_of(12), "{blocks}");
    let train = format!("{FOUR} --shuffle --max-steps {}", 2 * blocks / 12 + 2);
    room.ok(&format!("{train} --batch 12 --output-dir one"));
    room.ok(&format!("{train} --batch 3 --dp 4 --use-zero-1 --output-dir run"));
    close(&room.losses("run"), &room.losses("one"), "dp 4");
    let tokens = |run: &str| room.metrics(run).last().unwrap()["tokens"].as_u64();
    assert_eq!(tokens("run"), tokens("one"));
    assert!(tokens("run").unwrap() > 2 * blocks * 32, "the data ends twice");
}

#[test]
fn what_ranks_cannot_do_is_refused() {
    let room = Room::with_data();
    let train = format!("{FOUR} --max-steps 2");
    room.refuses(&format!("{train} --tp 3"), &["--tp is 3", "n_groups = 2", "1, 2, 4"]);
    room.refuses(&format!("{train} --tp 0"), &["--tp is 0"]);
    room.refuses(&format!("{train} --dp 0"), &["--dp is 0"]);
    room.refuses(&format!("{train} --dp 99999999"), &["--dp is 99999999"]);
    room.refuses(&format!("{train} --comm-timeout 0"), &["--comm-timeout is 0"]);
    room.refuses(&format!("{train} --dp 8 --batch 64 --carry-state"), &["each of the 512 rows"]);
    // An error that all ranks meet is said once.
    room.write("data/dataset_card.json", "{");
    let said = room.refuses(&format!("{train} --dp 3"), &["dataset_card.json"]);
    assert_eq!(said.matches("error:").count(), 1, "{said}");
}

/// Ranks as processes without MPI come to the bits of ranks as threads.
#[test]
fn processes_that_sockets_connect_are_as_threads() {
    let room = Room::with_data();
    let flags = "--max-steps 3 --tp 2 --dp 2 --use-zero-1 --sequence-parallel-enabled --eval-fraction 0.1";
    room.ok(&format!("{FOUR} {flags} --output-dir threads"));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let line = format!("{FOUR} {flags} --output-dir processes");
    let line: Vec<_> = line.split_whitespace().collect();
    let start = |rank: usize| {
        let (mut command, rank) = (room.command(&line), rank.to_string());
        command.envs([("RANK", &*rank), ("LOCAL_RANK", &rank), ("WORLD_SIZE", "4"), ("MASTER_PORT", &port)]);
        command.env("MASTER_ADDR", "localhost").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..4).map(start).collect();
    for (rank, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("step 3/3"), rank == 0);
    }
    assert_eq!(room.losses("processes"), room.losses("threads"));
    assert_eq!(room.norms("processes"), room.norms("threads"));
    let model = |run: &str| std::fs::read(room.path(&format!("{run}/hf/model.safetensors"))).unwrap();
    assert!(model("processes") == model("threads"));
}

#[test]
fn launchers_that_cannot_help_are_named() {
    let room = Room::with_data();
    let line: Vec<_> = FOUR.split_whitespace().chain(["--max-steps", "2"]).collect();
    let output =
        room.command(&line).env("RANK", "0").env("WORLD_SIZE", "2").env("LOCAL_RANK", "0").output().unwrap();
    assert!(failed_in_order(&output).contains("MASTER_ADDR"));
    if cfg!(not(feature = "mpi")) {
        let output = room.command(&line).env("SLURM_PROCID", "0").output().unwrap();
        assert!(failed_in_order(&output).contains("--features mpi"));
    }
}
