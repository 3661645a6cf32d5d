//! Ranks that are processes, started by mpirun: the bits of ranks that are threads, and runs that end when one fails.
//! Needs an MPI on the system, and the feature `mpi`.
#![cfg(feature = "mpi")]
#![allow(missing_docs)]

mod common;

use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Room, stderr};
use elapid_cpu::comm::mpi::World;
use elapid_cpu::comm::{FloatsMut, Reduce};
use half::bf16;
use serde_json::json;

fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-n", &ranks.to_string()]);
    command
}

impl Room {
    /// `elapid` with this command line on so many processes.
    fn mpirun(&self, ranks: usize, line: &str) -> Command {
        let mut command = mpirun(ranks);
        command.arg(env!("CARGO_BIN_EXE_elapid")).args(line.split_whitespace()).current_dir(self.0.path());
        command
    }
}

fn done(output: &Output) {
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), stderr(output));
}

/// Numbers whose sums depend on the order of the terms.
fn number(rank: usize, place: usize) -> f32 {
    let mixed = (rank * 7919 + place).wrapping_mul(2_654_435_761) % 1_000_003;
    (mixed as f32 - 500_000.0) * 10f32.powi((mixed % 9) as i32 - 4)
}

/// Called by mpirun on every rank.
fn check_collectives() {
    let world = World::start(|failure| eprintln!("{}", failure.message)).unwrap();
    check_collectives_of(&world);
    // The same in many messages, as what is too large for one is sent.
    check_collectives_of(&world.with_messages_of(1000));
    world.finish();
}

fn check_collectives_of(world: &World) {
    let comm = world.all(Duration::from_secs(60));
    let (rank, size) = (comm.rank(), comm.size());
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for len in [1, 7, 24, 2049, 40_000] {
        let own: Vec<_> = (0..len).map(|i| number(rank, i)).collect();
        let sum: Vec<_> =
            (0..len).map(|i| (1..size).fold(number(0, i), |sum, r| sum + number(r, i))).collect();
        let mut data = own.clone();
        comm.all_reduce(FloatsMut::F32(&mut data), Reduce::Sum);
        assert_eq!(bits(&data), bits(&sum));

        let mut data = own.clone();
        comm.all_reduce(FloatsMut::F32(&mut data), Reduce::Max);
        let max: Vec<_> =
            (0..len).map(|i| (0..size).map(|r| number(r, i)).fold(f32::MIN, f32::max)).collect();
        assert_eq!(bits(&data), bits(&max));

        let rounded = |rank, i| bf16::from_f32(number(rank, i)).to_f32();
        let mut data: Vec<_> = own.iter().map(|x| bf16::from_f32(*x)).collect();
        comm.all_reduce(FloatsMut::Bf16(&mut data), Reduce::Sum);
        let sum_bf16 = |i| bf16::from_f32((1..size).fold(rounded(0, i), |sum, r| sum + rounded(r, i)));
        assert!(data.iter().enumerate().all(|(i, x)| *x == sum_bf16(i)));

        if len % size == 0 {
            let mut data = own.clone();
            comm.reduce_scatter(FloatsMut::F32(&mut data));
            let mine = rank * len / size..(rank + 1) * len / size;
            assert_eq!(bits(&data[mine.clone()]), bits(&sum[mine]));
        }
        let mut data = vec![0xee; 5 * size];
        data[5 * rank..][..5].fill(rank as u8);
        comm.all_gather(&mut data);
        assert!(data.iter().enumerate().all(|(i, x)| *x == (i / 5) as u8));
        let mut data = vec![0xee; len * size];
        let mine = |rank: usize, i: usize| (rank * 31 + i) as u8;
        data[len * rank..][..len].iter_mut().enumerate().for_each(|(i, x)| *x = mine(rank, i));
        comm.all_gather(&mut data);
        assert!(data.iter().enumerate().all(|(i, x)| *x == mine(i / len, i % len)));
        for root in 0..size {
            let mut data: Vec<_> = (0..len).map(|i| mine(rank, i)).collect();
            comm.broadcast(&mut data, root);
            assert!(data.iter().enumerate().all(|(i, x)| *x == mine(root, i)));
        }
    }
    // Two groups: even and odd ranks.
    let ranks: Vec<_> = (rank % 2..size).step_by(2).collect();
    let half = world.split(rank % 2, ranks.clone(), Duration::from_secs(60));
    assert_eq!(ranks[half.rank()], rank);
    let mut data = [rank as f32];
    half.all_reduce(FloatsMut::F32(&mut data), Reduce::Sum);
    assert_eq!(data[0], ranks.iter().sum::<usize>() as f32);
    comm.barrier();
}

#[test]
fn collectives_sum_in_rank_order() {
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        return check_collectives();
    }
    for ranks in [2, 4, 8] {
        let mut command = mpirun(ranks);
        command.arg(std::env::current_exe().unwrap()).args(["--exact", "collectives_sum_in_rank_order"]);
        done(&command.output().unwrap());
    }
}

const TRAIN: &str =
    "train --model tiny.json --data-dir data --max-steps 3 --lr 1e-2 --threads 1 --save-last-step";

/// The same bits as on ranks that are threads.
#[test]
fn processes_train_as_threads_do() {
    let room = Room::with_data();
    for (i, (ranks, mesh)) in [
        (2, "--batch 2 --dp 2"),
        (2, "--batch 4 --tp 2 --sequence-parallel-enabled"),
        (4, "--batch 2 --tp 2 --dp 2 --use-zero-1 --dtype bfloat16"),
        (8, "--batch 1 --grad-accum-usteps 2 --tp 2 --dp 4 --use-zero-1 --carry-state"),
    ]
    .into_iter()
    .enumerate()
    {
        room.ok(&format!("{TRAIN} {mesh} --output-dir threads{i}"));
        let output = room.mpirun(ranks, &format!("{TRAIN} {mesh} --output-dir mpi{i}")).output().unwrap();
        done(&output);
        assert_eq!(String::from_utf8_lossy(&output.stdout).matches("model in").count(), 1);
        assert_eq!(room.losses(&format!("mpi{i}")), room.losses(&format!("threads{i}")), "{mesh}");
        let file = |run: &str| std::fs::read(room.path(&format!("{run}{i}/hf/model.safetensors"))).unwrap();
        assert!(file("mpi") == file("threads"), "{mesh}");
        // And on from there.
        let on = TRAIN.replace("--max-steps 3", "--max-steps 4");
        let line = format!("{on} {mesh} --lr-schedule constant --output-dir mpi{i} --resume auto");
        done(&room.mpirun(ranks, &line).output().unwrap());
        assert_eq!(room.losses(&format!("mpi{i}")).len(), 4);
    }
}

/// --dp follows from the number of processes; folders that are not named are those of the first.
#[test]
fn the_world_decides_dp() {
    let room = Room::with_data();
    let output = room
        .mpirun(4, "train --model tiny.json --data-dir data --max-steps 1 --tp 2 --threads 1")
        .output()
        .unwrap();
    done(&output);
    assert!(stderr(&output).contains("4 = dp 2 × tp 2"), "{}", stderr(&output));
    assert_eq!(room.names("runs"), ["tiny"]);
    let output =
        room.mpirun(4, "train --model tiny.json --data-dir data --max-steps 1 --dp 3").output().unwrap();
    assert!(
        !output.status.success() && stderr(&output).contains("3 ranks, but 4 were started"),
        "{}",
        stderr(&output)
    );
}

/// A run whose ranks can be told apart from outside, and that ends with it.
struct Running(Option<Child>);

impl Running {
    fn start(mut command: Command) -> Self {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Self(Some(command.spawn().unwrap()))
    }

    /// The process of a rank: a child of mpirun that has this number.
    fn send(&self, signal: &str, rank: usize) {
        let mpirun = self.0.as_ref().unwrap().id();
        let children = fs::read_to_string(format!("/proc/{mpirun}/task/{mpirun}/children")).unwrap();
        let number = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_rank = |pid: &&str| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == number.as_bytes())
        };
        let process = children.split_whitespace().find(is_rank).unwrap();
        assert!(Command::new("kill").args([signal, process]).status().unwrap().success());
    }

    fn wait_for(&mut self, condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() {
            let ended = self.0.as_mut().unwrap().try_wait().unwrap();
            assert!(begun.elapsed() < Duration::from_secs(60) && ended.is_none(), "it does not come to that");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Two by two ranks, with a vocabulary large enough that steps and saves take a while.
const FAULTY: &str = "train --model tiny.json --vocab-size 60000 --data-dir data --max-steps 12 --lr 1e-2 --threads 1 \
    --lr-schedule constant --batch 2 --tp 2 --dp 2 --use-zero-1 --checkpoint-freq 2";

fn steps(room: &Room, run: &str) -> usize {
    fs::read_to_string(room.path(&format!("{run}/metrics.jsonl"))).map_or(0, |text| text.lines().count())
}

/// Whether a checkpoint is being written, besides those that are whole.
fn saves(room: &Room, run: &str) -> bool {
    room.names(&format!("{run}/checkpoints")).iter().any(|name| name.starts_with('.'))
}

/// In a step, in a collective, in a save: the others end soon with an error that names the rank, and the run goes on from
/// its last checkpoint as if nothing had been.
#[test]
fn a_rank_that_is_killed_is_named_and_the_run_goes_on() {
    let room = Room::with_data();
    done(&room.mpirun(4, &format!("{FAULTY} --output-dir straight")).output().unwrap());
    for (phase, victim) in [("step", 1), ("collective", 2), ("save", 3)] {
        let line = format!("{FAULTY} --output-dir {phase}");
        let mut run = Running::start(room.mpirun(4, &line));
        run.wait_for(|| room.path(&format!("{phase}/checkpoints/step-00000002")).exists());
        match phase {
            "step" => {
                let before = steps(&room, phase);
                run.wait_for(|| steps(&room, phase) > before);
                std::thread::sleep(Duration::from_millis(5));
            }
            "collective" => {
                // The others come as far as the next collective with a rank that is stopped, and wait there.
                run.send("-STOP", 0);
                std::thread::sleep(Duration::from_secs(1));
            }
            _ => run.wait_for(|| saves(&room, phase)),
        }
        run.send("-KILL", victim);
        let killed = Instant::now();
        let output = run.end();
        let said = stderr(&output);
        assert!(!output.status.success() && killed.elapsed() < Duration::from_secs(30), "{phase}: {said}");
        assert!(said.contains(&format!("rank {victim}")), "{phase}: {said}");
        assert!(steps(&room, phase) < 12, "{phase}: it was over");

        let output = room.mpirun(4, &format!("{line} --resume auto")).output().unwrap();
        done(&output);
        assert!(stderr(&output).contains("going on after step"), "{phase}: {}", stderr(&output));
        assert_eq!(room.losses(phase), room.losses("straight"), "{phase}");
        let file = |run: &str| fs::read(room.path(&format!("{run}/hf/model.safetensors"))).unwrap();
        assert!(file(phase) == file("straight"), "{phase}");
    }
}

/// A rank that is slow is waited for as long as --comm-timeout says, and named then.
#[test]
fn a_slow_rank_is_waited_for_and_named_when_it_is_too_late() {
    let room = Room::with_data();
    let line = FAULTY.replace("--checkpoint-freq 2", "--comm-timeout 4");
    done(&room.mpirun(4, &format!("{line} --output-dir straight")).output().unwrap());
    let stop = |name: &str, rank| {
        let mut run = Running::start(room.mpirun(4, &format!("{line} --output-dir {name}")));
        run.wait_for(|| steps(&room, name) >= 2);
        run.send("-STOP", rank);
        run
    };
    let run = stop("slow", 3);
    std::thread::sleep(Duration::from_millis(1500));
    run.send("-CONT", 3);
    done(&run.end());
    assert_eq!(room.losses("slow"), room.losses("straight"));

    let begun = Instant::now();
    let output = stop("late", 1).end();
    let said = stderr(&output);
    assert!(!output.status.success() && begun.elapsed() < Duration::from_secs(30), "{said}");
    assert!(said.contains("waited 4 s in") && said.contains("for rank 1, which did not come"), "{said}");
    assert!(said.contains("hint: ") && said.contains("--comm-timeout"), "{said}");
}

#[test]
fn bench_measures_processes() {
    let room = Room::new();
    for (line, engine) in [
        ("bench comm --max-mib 1 --json", Some("mpi")),
        ("bench train --model tiny --seq-len 64 --steps 2 --threads 1 --json", None),
    ] {
        let output = room.mpirun(2, line).output().unwrap();
        done(&output);
        let report = common::one_object(&String::from_utf8(output.stdout).unwrap());
        match engine {
            Some(engine) => {
                assert_eq!((&report["engine"], &report["ranks"]), (&json!(engine), &json!(2)));
                assert_eq!(report["collectives"].as_array().unwrap().len(), 18);
            }
            None => {
                assert_eq!((&report["ranks"]["dp"], &report["ranks"]["tp"]), (&json!(2), &json!(1)));
                assert!(report["ranks"]["collectives_s"].as_f64().unwrap() > 0.0);
            }
        }
    }
}

/// A rank that is alive and does not come is named.
#[test]
fn a_late_rank_is_named() {
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        let world = World::start(|failure| eprintln!("error: {}", failure.message)).unwrap();
        let comm = world.all(Duration::from_secs(1));
        if comm.rank() == 2 {
            std::thread::sleep(Duration::from_secs(60));
        }
        comm.all_reduce(FloatsMut::F32(&mut [1.0; 64]), Reduce::Sum);
        return;
    }
    let mut command = mpirun(3);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "a_late_rank_is_named", "--nocapture"]);
    let begun = Instant::now();
    let output = command.output().unwrap();
    assert!(!output.status.success() && begun.elapsed() < Duration::from_secs(30));
    let said = stderr(&output);
    assert!(said.contains("waited 1 s in all_reduce for rank 2, which did not come"), "{said}");
}

/// What every rank finds wrong is said once, and quickly.
#[test]
fn a_common_error_is_said_once() {
    let room = Room::with_data();
    let begun = Instant::now();
    let output = room.mpirun(3, "train --model tiny.json --data-dir nowhere --max-steps 1").output().unwrap();
    let said = stderr(&output);
    assert!(!output.status.success());
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

/// Two network namespaces with a cable between them: two hosts, as far as MPI can tell. They go when this is dropped.
struct Hosts {
    names: [String; 2],
}

impl Hosts {
    /// None where this user or this system cannot make them.
    fn new() -> Option<Self> {
        let hosts = Self { names: ["a", "b"].map(|end| format!("el{}{end}", std::process::id())) };
        let [a, b] = &hosts.names;
        let ip = |line: String| {
            let output = Command::new("ip").args(line.split_whitespace()).output();
            output.is_ok_and(|output| output.status.success())
        };
        let up = |name: &str, address: &str| {
            ip(format!("-n {name} addr add {address}/24 dev {name}"))
                && ip(format!("-n {name} link set {name} up"))
                && ip(format!("-n {name} link set lo up"))
        };
        let made = ip(format!("netns add {a}"))
            && ip(format!("netns add {b}"))
            && ip(format!("link add {a} netns {a} type veth peer name {b} netns {b}"))
            && up(a, "10.77.0.1")
            && up(b, "10.77.0.2");
        made.then_some(hosts)
    }

    /// A command on the first host, under a host name of its own.
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("ip");
        let script = format!("hostname {0}; exec {line}", self.names[0]);
        command.args(["netns", "exec", &self.names[0], "unshare", "--uts", "sh", "-c", &script]);
        command
    }

    /// Bytes that the first host has sent to the second.
    fn sent(&self) -> u64 {
        let file = format!("cat /sys/class/net/{}/statistics/tx_bytes", self.names[0]);
        let output = self.command(&file).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

#[test]
fn two_hosts_train_as_one_rank() {
    let Some(hosts) = Hosts::new() else {
        return println!("left out: network namespaces need root and `ip`");
    };
    let room = Room::with_data();
    // How mpirun starts its daemon on the other host; ssh in real life.
    let agent = room.path("agent.sh");
    let other = &hosts.names[1];
    let script = format!(
        "#!/bin/sh\nshift\nexec ip netns exec {other} unshare --uts sh -c \"hostname {other}; $*\"\n"
    );
    room.write("agent.sh", &script);
    assert!(Command::new("chmod").arg("+x").arg(&agent).status().unwrap().success());
    let mesh = "--batch 2 --tp 2 --dp 2 --use-zero-1";
    let line = format!(
        "mpirun --allow-run-as-root --host 10.77.0.1:2,10.77.0.2:2 -n 4 --bind-to none --mca plm_rsh_agent {} \
         --mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 {} {TRAIN} \
         {mesh} --output-dir hosts",
        agent.display(),
        env!("CARGO_BIN_EXE_elapid")
    );
    let before = hosts.sent();
    done(&hosts.command(&line).current_dir(room.0.path()).output().unwrap());
    assert!(hosts.sent() - before > 100_000, "nothing went over the cable");

    room.ok(&format!("{TRAIN} {mesh} --output-dir threads"));
    assert_eq!(room.losses("hosts"), room.losses("threads"));
    let file = |run: &str| std::fs::read(room.path(&format!("{run}/hf/model.safetensors"))).unwrap();
    assert!(file("hosts") == file("threads"));
    room.ok(&format!("{TRAIN} --batch 4 --output-dir one"));
    for (got, want) in room.losses("hosts").iter().zip(room.losses("one")) {
        assert!((got / want - 1.0).abs() < 2e-5, "{got} for {want}");
    }
}
