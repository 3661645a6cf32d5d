//! The predicted traffic between ranks beside what they hand to their communicators, and `elapid inspect --plan`.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::Room;
use elapid::config::ModelConfig;
use elapid::data::Sample;
use elapid::model::Mamba2ForCausalLM;
use elapid::model::init::Init;
use elapid::parallel::Mesh;
use elapid::train::memory::{Demand, Memory};
use elapid::train::plan::Traffic;
use elapid::train::{Batch, Trainer};
use elapid_cpu::comm::{Abort, Communicator, FloatsMut, Groups, Reduce, threads};
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{AdamW, Checkpointing, DType, NormGroup};
use serde_json::{Value, json};

/// Counts what a rank of a ring would send: bytes times the number of ranks, which is a whole number.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn Communicator>,
    sent: Arc<AtomicU64>,
}

impl Counting {
    fn count(&self, times: usize, bytes: usize) {
        self.sent.fetch_add((times * bytes * (self.size() - 1)) as u64, Ordering::Relaxed);
    }
}

fn bytes(data: &FloatsMut<'_>) -> usize {
    data.len() * if matches!(data, FloatsMut::F32(_)) { 4 } else { 2 }
}

impl Communicator for Counting {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce(&self, data: FloatsMut<'_>, reduce: Reduce) {
        self.count(2, bytes(&data));
        self.inner.all_reduce(data, reduce);
    }

    fn reduce_scatter(&self, data: FloatsMut<'_>) {
        self.count(1, bytes(&data));
        self.inner.reduce_scatter(data);
    }

    fn all_gather(&self, data: &mut [u8]) {
        self.count(1, data.len());
        self.inner.all_gather(data);
    }

    fn broadcast(&self, data: &mut [u8], root: usize) {
        self.inner.broadcast(data, root);
    }

    fn barrier(&self) {
        self.inner.barrier();
    }
}

/// What the first rank sends: (tensor-parallel in a micro-step, tensor-parallel and data-parallel in an update).
fn sent(demand: &Demand<'_>) -> [u64; 3] {
    let Mesh { dp, tp } = demand.mesh;
    let abort = Abort::default();
    let wait = Duration::from_secs(20);
    // Only one of the two kinds of groups has more than one rank.
    let groups = threads(&(0..dp * tp).collect::<Vec<_>>(), wait, &abort);
    std::thread::scope(|scope| {
        let start = |inner| {
            scope.spawn(move || {
                let sent = Arc::new(AtomicU64::new(0));
                let counting = Arc::new(Counting { inner, sent: sent.clone() });
                let take = || sent.swap(0, Ordering::Relaxed) / (dp * tp) as u64;
                let groups = match tp {
                    1 => Groups { dp: counting, ..Groups::default() },
                    _ => Groups { tp: counting, ..Groups::default() },
                };
                let options = CpuOptions { threads: Some(1), groups, ..CpuOptions::default() };
                let backend = CpuBackend::new(&options).unwrap();
                let model =
                    Mamba2ForCausalLM::new(&backend, demand.config, demand.dtype, Init::StateSpaces, 1)
                        .with_sequence_parallel(demand.sequence_parallel);
                let model = if demand.zero1 { model.with_zero1(&backend) } else { model };
                let mut trainer = Trainer::new(&backend, model, demand.checkpointing);
                let ids: Vec<u32> = (0..demand.length as u32).map(|i| i % 7).collect();
                let batch = Batch::new(&vec![Sample::new(&ids); demand.batch]);
                take();
                trainer.micro_step(&batch);
                let micro_step = take();
                let hyper =
                    AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };
                trainer.update(&hyper, 1.0, batch.valid());
                let update = take();
                if tp == 1 { [0, 0, update] } else { [micro_step, update, 0] }
            })
        };
        let running: Vec<_> = groups.into_iter().map(start).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()[0]
    })
}

fn demand(config: &ModelConfig) -> Demand<'_> {
    Demand::alone(config, (2, 13), DType::F32, Checkpointing::None, 1)
}

#[test]
fn traffic_is_what_the_ranks_send() {
    let base = ModelConfig { vocab_size: 37, ..ModelConfig::preset("tiny").unwrap() };
    for (n_groups, norm_group) in [(1, NormGroup::PerGroup), (2, NormGroup::PerGroup), (8, NormGroup::Across)]
    {
        let config = ModelConfig { n_groups, norm_group, ..base.clone() };
        for (mesh, sequence_parallel, zero1) in [
            (Mesh { dp: 1, tp: 2 }, false, false),
            (Mesh { dp: 1, tp: 4 }, false, false),
            (Mesh { dp: 1, tp: 4 }, true, false),
            (Mesh { dp: 2, tp: 1 }, false, false),
            (Mesh { dp: 3, tp: 1 }, false, true),
        ] {
            for dtype in [DType::F32, DType::Bf16] {
                for checkpointing in [Checkpointing::None, Checkpointing::Block] {
                    let demand =
                        Demand { mesh, sequence_parallel, zero1, dtype, checkpointing, ..demand(&config) };
                    let Traffic { micro_step, replicas, update } = Traffic::predict(&demand);
                    let [a, b, c] = sent(&demand);
                    // Whole bytes are cut off in other places; an update also sums the loss and the norm.
                    for (got, want, few) in [(a, micro_step, 8), (b, replicas, 64), (c, update, 128)] {
                        let off = got.abs_diff(want);
                        assert!(
                            off <= few,
                            "{got} {want} {mesh:?} {sequence_parallel} {dtype:?} {checkpointing:?}"
                        );
                    }
                }
            }
        }
    }
}

/// The tables of docs/distributed.md are what the commands above them print.
#[test]
fn the_documented_plans_are_those_that_are_printed() {
    let room = Room::new();
    let page = include_str!("../../../docs/distributed.md");
    let lines: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("    $ elapid ")).collect();
    assert_eq!(lines.len(), 3);
    for line in lines {
        let printed = room.ok(line);
        let printed: String = printed.lines().map(|line| format!("    {line}\n")).collect();
        assert!(page.contains(&format!("    $ elapid {line}\n{printed}\n")), "{line} prints\n{printed}");
    }
}

#[test]
fn a_plan_says_what_ranks_hold_and_send() {
    let room = Room::new();
    let found = room.json("inspect Mamba7B --plan --dtype bfloat16 --batch 2 --seq-len 512 --json");
    assert_eq!(
        (&found["kind"], &found["batch"], &found["dtype"]),
        (&json!("plan"), &json!(2), &json!("bfloat16"))
    );
    let meshes = found["meshes"].as_array().unwrap();
    let mesh = |mesh: &Value| [&mesh["dp"], &mesh["tp"]].map(|n| n.as_u64().unwrap());
    assert_eq!(meshes.iter().map(mesh).collect::<Vec<_>>(), [[1, 1], [8, 1], [1, 8], [4, 8]]);
    let config = ModelConfig::preset("Mamba7B").unwrap();
    let checkpointing = Checkpointing::None;
    let alone = Demand::alone(&config, (2, 512), DType::Bf16, checkpointing, 1);
    for row in meshes {
        let [dp, tp] = mesh(row).map(|n| n as usize);
        let demand = Demand { mesh: Mesh { dp, tp }, zero1: dp > 1, sequence_parallel: tp > 1, ..alone };
        let (memory, traffic) = (Memory::predict(&demand), Traffic::predict(&demand));
        let number = |name: &str| row[name].as_u64().unwrap();
        assert_eq!(
            (number("parameters_bytes"), number("moments_bytes")),
            (memory.parameters, memory.moments)
        );
        assert_eq!(number("all_bytes"), memory.total() - memory.program);
        assert_eq!(number("sent_a_micro_step_bytes"), traffic.micro_step);
        assert_eq!(number("sent_an_update_bytes"), traffic.update + traffic.replicas);
    }

    // Meshes of one's own, and those that a model cannot have.
    let found = room.json("inspect tiny.json --plan --mesh dp=3,zero-1 --mesh tp=2 --json");
    assert_eq!(found["meshes"].as_array().unwrap().iter().map(mesh).collect::<Vec<_>>(), [[3, 1], [1, 2]]);
    let all = room.json("inspect tiny.json --plan --json");
    assert_eq!(all["meshes"].as_array().unwrap().len(), 2, "four heads are not for eight ranks");
    room.refuses("inspect tiny.json --plan --mesh tp=3", &["--tp is 3"]);
    room.refuses("inspect tiny.json --plan --mesh dp=0", &["--dp is 0"]);
    for mesh in ["tp=x", "pp=2", ""] {
        let output = room.command(&["inspect", "tiny.json", "--plan", "--mesh", mesh]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{mesh}");
    }
}
