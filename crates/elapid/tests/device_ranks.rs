//! Runs on several devices: a process a core on the simulated Neuron runtime, and a thread a device on XLA's own plugin for
//! CPUs. Both come to what one rank of the CPU backend comes to, and end as a user can understand.
#![cfg(target_os = "linux")]
#![allow(missing_docs)]

mod devices;
mod run;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use devices::{Device, curve, same_curve};
use run::{checkpoints, place, wait_for};
use serde_json::Value;

/// Four sequences a step for four ranks, that many for one.
const STEPS: &str = "--max-steps 8 --grad-accum-usteps 2 --eval-fraction 0.2 --eval-freq 4";

/// (flags of one rank, flags of four).
const MESHES: [(&str, &str); 2] = [
    ("--batch 4", "--tp 2 --dp 2 --batch 2 --use-zero-1 --sequence-parallel-enabled"),
    ("--batch 4", "--dp 4 --batch 1"),
];

/// Variables of rank `rank` of `ranks`, as torchrun sets them.
fn variables(rank: usize, ranks: usize, port: u16) -> Vec<(&'static str, String)> {
    let (rank, ranks) = (rank.to_string(), ranks.to_string());
    vec![
        ("RANK", rank.clone()),
        ("WORLD_SIZE", ranks.clone()),
        ("LOCAL_RANK", rank),
        ("LOCAL_WORLD_SIZE", ranks),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string()),
        ("NEURON_RT_EXEC_TIMEOUT", "20".into()),
    ]
}

/// Two free ports side by side: the second is the runtime's. Below those that the system gives to whoever asks for any.
fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let number = NEXT.fetch_add(2, Ordering::SeqCst) % 2000;
        let port = 10_000 + (std::process::id() % 10) as u16 * 2000 + number;
        let free = |port| TcpListener::bind(("0.0.0.0", port)).is_ok();
        if free(port) && free(port + 1) {
            return port;
        }
    }
}

/// Ranks of a run, each a process.
struct Ranks {
    children: Vec<Child>,
}

impl Ranks {
    /// Starts `ranks` processes; `adjust` may make one of them different, or leave it out.
    fn start(
        device: &Device,
        dir: &Path,
        ranks: usize,
        flags: &str,
        adjust: impl Fn(usize, &mut Command) -> bool,
    ) -> Self {
        let port = port();
        let start = |rank: usize| {
            let mut command = device.command(dir, flags);
            command.envs(variables(rank, ranks, port));
            adjust(rank, &mut command).then(|| command.spawn().unwrap())
        };
        Self { children: (0..ranks).filter_map(start).collect() }
    }

    fn all(device: &Device, dir: &Path, ranks: usize, flags: &str) -> Self {
        Self::start(device, dir, ranks, flags, |_, _| true)
    }

    fn kill(&mut self) {
        self.children.iter_mut().for_each(|child| child.kill().unwrap());
    }

    fn outputs(self) -> Vec<Output> {
        self.children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
    }

    /// They run to the end; what the first says.
    #[track_caller]
    fn succeed(self) -> String {
        let outputs = self.outputs();
        let said: Vec<_> = outputs.iter().map(stderr).collect();
        assert!(outputs.iter().all(|output| output.status.success()), "{}", said.join("\n"));
        // One rank speaks.
        assert!(said[1..].iter().all(|said| !said.contains("step ")), "{}", said.join("\n"));
        said.into_iter().next().unwrap()
    }

    /// They end with an error; what each says.
    #[track_caller]
    fn fail(self) -> Vec<String> {
        let outputs = self.outputs();
        let said: Vec<_> = outputs.iter().map(stderr).collect();
        assert!(outputs.iter().all(|output| output.status.code() == Some(1)), "{}", said.join("\n"));
        assert!(!said.iter().any(|said| said.contains("panicked")), "{}", said.join("\n"));
        said
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Losses from `step` on are those of the CPU.
#[track_caller]
fn goes_on(run: &Path, expected: &Path, step: usize) {
    let (got, want) = (curve(run), curve(expected));
    assert_eq!(got.len(), want.len() - step);
    for (got, want) in got.iter().zip(&want[step..]) {
        assert!((got[0] - want[0]).abs() < 1e-4 * want[0], "{}: {got:?} instead of {want:?}", run.display());
    }
}

/// The extents of `elapid quickstart`'s model, on one process and on four, which are killed and go on.
#[test]
fn the_quickstarts_model_trains_on_a_simulated_runtime() {
    let dir = place();
    let dir = dir.path();
    let config = serde_json::json!({
        "model_type": "mamba2", "num_heads": 8, "head_dim": 32, "hidden_size": 128, "expand": 2, "state_size": 32,
        "n_groups": 1, "num_hidden_layers": 4, "vocab_size": 257, "chunk_size": 64, "tie_word_embeddings": true,
    });
    fs::write(dir.join("model.json"), config.to_string()).unwrap();
    let device = Device::simulated(dir);
    let steps = "--max-steps 6 --checkpoint-freq 2 --no-async-save";
    let (one, four) = MESHES[0];
    run::succeed(dir, &format!("{steps} {one} --output-dir cpu"));
    device.succeeds(dir, &format!("{steps} {one} --output-dir alone"));
    same_curve(&dir.join("alone"), &dir.join("cpu"));

    let flags = format!("{steps} {four} --resume auto --output-dir killed");
    let mut ranks = Ranks::all(&device, dir, 4, &flags);
    assert!(wait_for(|| !checkpoints(&dir.join("killed")).is_empty()));
    ranks.kill();
    ranks.outputs();
    Ranks::all(&device, dir, 4, &flags).succeed();
    same_curve(&dir.join("killed"), &dir.join("cpu"));
}

#[test]
fn four_processes_train_on_a_simulated_runtime() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    for (number, (one, four)) in MESHES.iter().enumerate() {
        let name = |what: &str| format!("{what}{number}");
        let steps = format!("{STEPS} --checkpoint-freq 2 --no-async-save");
        run::succeed(dir, &format!("{steps} {one} --output-dir {}", name("cpu")));
        let cpu = dir.join(name("cpu"));
        let said =
            Ranks::all(&device, dir, 4, &format!("{steps} {four} --output-dir {}", name("whole"))).succeed();
        assert!(said.contains("4 = dp"), "{said}");
        same_curve(&dir.join(name("whole")), &cpu);

        // All killed after a checkpoint, and resumed: on the mesh the bits are those of the run that never stopped.
        let flags = format!("{steps} {four} --resume auto --output-dir {}", name("killed"));
        let mut ranks = Ranks::all(&device, dir, 4, &flags);
        let killed = dir.join(name("killed"));
        assert!(wait_for(|| checkpoints(&killed).len() > 1));
        ranks.kill();
        ranks.outputs();
        let said = Ranks::all(&device, dir, 4, &flags).succeed();
        assert!(said.contains("going on after step") || said.contains("is finished"), "{said}");
        assert_eq!(run::metrics(&killed), run::metrics(&dir.join(name("whole"))));
        assert!(run::model(&killed) == run::model(&dir.join(name("whole"))));

        // Checkpoints move: four devices to one CPU, one CPU to four devices, four devices to one.
        let from = |from: &str, to: &str| {
            run::copy(&dir.join(name(from)).join("checkpoints/step-00000004"), &dir.join(to));
            format!("{STEPS} --resume {to} --checkpoint-dir {to}-more --output-dir {to}-run")
        };
        let (to_cpu, to_four, to_one) = (name("to-cpu"), name("to-four"), name("to-one"));
        run::succeed(dir, &format!("{} {one}", from("whole", &to_cpu)));
        Ranks::all(&device, dir, 4, &format!("{} {four}", from("cpu", &to_four))).succeed();
        device.succeeds(dir, &format!("{} {one}", from("whole", &to_one)));
        for to in [to_cpu, to_four, to_one] {
            goes_on(&dir.join(format!("{to}-run")), &cpu, 4);
        }
    }
}

/// A state goes to the devices and comes back with its bits, whoever wrote the checkpoint.
#[test]
fn checkpoints_keep_their_bits_on_every_mesh() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    for (number, (one, four)) in MESHES.iter().enumerate() {
        let steps = "--max-steps 2 --save-last-step";
        run::succeed(dir, &format!("{steps} {one} --output-dir cpu{number}"));
        Ranks::all(&device, dir, 4, &format!("{steps} {four} --output-dir four{number}")).succeed();
        // Resumed at its end: nothing is left but to read, to hold, and to export.
        let at_its_end = |from: &str, to: &str| {
            let checkpoint = format!("{from}{number}/checkpoints/step-00000002");
            format!("--max-steps 2 --resume {checkpoint} --output-dir {to}{number}")
        };
        Ranks::all(&device, dir, 4, &format!("{} {four}", at_its_end("cpu", "cpu-four"))).succeed();
        run::succeed(dir, &format!("{} {one}", at_its_end("four", "four-cpu")));
        device.succeeds(dir, &format!("{} {one}", at_its_end("four", "four-one")));
        let model = |run: &str| run::model(&dir.join(format!("{run}{number}")));
        assert!(model("cpu-four") == model("cpu"), "{four}");
        assert!(model("four-cpu") == model("four") && model("four-one") == model("four"), "{four}");
    }
}

/// States are carried from batch to batch, in training and evaluation, and through checkpoints from and to any mesh.
#[test]
fn states_are_carried_on_devices() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    run::dataset(&dir.join("documents"), 3, 37, true);
    let steps = "--data-dir documents --carry-state --max-steps 6 --grad-accum-usteps 2 --checkpoint-freq 3";
    let (one, four) = MESHES[0];
    let evaluated = "--eval-fraction 0.2 --eval-freq 2";
    run::succeed(dir, &format!("{steps} {one} {evaluated} --output-dir cpu-one"));
    device.succeeds(dir, &format!("{steps} {one} {evaluated} --output-dir one"));
    same_curve(&dir.join("one"), &dir.join("cpu-one"));
    let apart = steps.replace("--carry-state ", "");
    run::succeed(dir, &format!("{apart} {one} {evaluated} --output-dir apart"));
    assert!((curve(&dir.join("apart"))[5][0] - curve(&dir.join("one"))[5][0]).abs() > 1e-3);

    run::succeed(dir, &format!("{steps} {one} --output-dir cpu"));
    Ranks::all(&device, dir, 4, &format!("{steps} {four} --output-dir four")).succeed();
    same_curve(&dir.join("four"), &dir.join("cpu"));
    let from = |from: &str, to: &str| {
        run::copy(&dir.join(from).join("checkpoints/step-00000003"), &dir.join(to));
        format!("{steps} --resume {to} --checkpoint-dir {to}-more --output-dir {to}-run")
    };
    run::succeed(dir, &format!("{} {one}", from("four", "to-cpu")));
    Ranks::all(&device, dir, 4, &format!("{} {four}", from("cpu", "to-four"))).succeed();
    Ranks::all(&device, dir, 4, &format!("{} {four}", from("four", "again"))).succeed();
    for to in ["to-cpu-run", "to-four-run", "again-run"] {
        goes_on(&dir.join(to), &dir.join("cpu"), 3);
    }
    // On the same mesh to the bit.
    assert_eq!(run::metrics(&dir.join("again-run")), run::metrics(&dir.join("four"))[3..]);
}

/// The norm of every tensor is that of the CPU.
#[test]
fn norms_are_those_of_the_cpu() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let (one, four) = MESHES[0];
    let steps = "--max-steps 3 --log-norms";
    run::succeed(dir, &format!("{steps} {one} --output-dir cpu"));
    device.succeeds(dir, &format!("{steps} {one} --output-dir one"));
    Ranks::all(&device, dir, 4, &format!("{steps} {four} --output-dir four")).succeed();
    let norms = |run: &str| -> Vec<Value> {
        let text = fs::read_to_string(dir.join(run).join("norms.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for run in ["one", "four"] {
        for (got, want) in norms(run).iter().zip(norms("cpu")) {
            for kind in ["gradients", "updates", "parameters"] {
                for (name, want) in want[kind].as_object().unwrap() {
                    let (got, want) = (got[kind][name].as_f64().unwrap(), want.as_f64().unwrap());
                    assert!((got / want - 1.0).abs() < 1e-3, "{run}: {kind} of {name}: {got} for {want}");
                }
            }
        }
        assert_eq!(norms(run).len(), 3);
    }
}

/// In bf16 with groups of layers, without sharing memory, over ranks: the losses of the CPU.
#[test]
fn groups_of_layers_and_memory_of_its_own() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let (one, four) = MESHES[0];
    run::dataset(&dir.join("documents"), 3, 37, true);
    let steps = "--data-dir documents --max-steps 3 --dtype bfloat16 --eval-fraction 0.2";
    run::succeed(dir, &format!("{steps} {one} --output-dir cpu"));
    let ways =
        ["--layer-groups 2", "--not-in-place", "--layer-groups 2 --not-in-place --layer-loop unrolled"];
    for (number, way) in ways.iter().enumerate() {
        let said =
            Ranks::all(&device, dir, 4, &format!("{steps} {four} {way} --output-dir run{number}")).succeed();
        assert_eq!(said.contains("backward.0"), way.contains("groups"), "{said}");
        let (got, want) = (curve(&dir.join(format!("run{number}"))), curve(&dir.join("cpu")));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert!((got[0] - want[0]).abs() < 2e-2 * want[0], "{way}: {got:?} instead of {want:?}");
        }
    }
}

#[test]
fn a_signal_stops_all_ranks_after_a_checkpoint() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let flags = "--dp 2 --batch 2 --max-steps 10000 --output-dir run";
    let ranks = Ranks::all(&device, dir, 2, flags);
    assert!(wait_for(|| curve(&dir.join("run")).len() > 1));
    run::signal(&ranks.children[1], "-TERM");
    let outputs = ranks.outputs();
    for output in &outputs {
        assert_eq!(output.status.code(), Some(143), "{}", stderr(output));
    }
    assert!(stderr(&outputs[0]).contains("stopped: SIGTERM after step"), "{}", stderr(&outputs[0]));
    assert!(!stderr(&outputs[1]).contains("stopped"), "{}", stderr(&outputs[1]));
    assert_eq!(checkpoints(&dir.join("run")).len(), 1);
}

/// `launch/trainium.sh` on the simulated runtime: a process a core, and SIGTERM for all of them.
#[test]
fn the_recipe_trains_and_stops() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../launch/trainium.sh");
    let start = |steps: &str| {
        let flags = format!("--target trn1 --model model.json --dtype float32 --max-steps {steps}");
        let mut command = Command::new("bash");
        command.current_dir(dir).arg(recipe).args(["4", "data", "run"]).args(flags.split(' '));
        command.envs(device.variables.iter().map(|(name, value)| (name, value)));
        command.envs([("ELAPID", env!("CARGO_BIN_EXE_elapid")), ("TP", "2"), ("GLOBAL_BATCH", "4")]);
        command.env("MASTER_PORT", port().to_string()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let child = start("100000 --warmup-steps 1");
    assert!(wait_for(|| curve(&dir.join("run")).len() > 2));
    run::signal(&child, "-TERM");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("stopped: SIGTERM").count(), 1, "{}", stderr(&output));
    let done = curve(&dir.join("run")).len();
    let output = start(&format!("{} --warmup-steps 1", done + 2)).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(curve(&dir.join("run")).len(), done + 2);
}

#[test]
fn a_rank_that_never_arrives_is_named() {
    let dir = place();
    let device = Device::simulated(dir.path());
    let flags = "--dp 3 --max-steps 2 --comm-timeout 2 --output-dir run";
    let said = Ranks::start(&device, dir.path(), 3, flags, |rank, _| rank != 1).fail();
    assert!(
        said[0].contains("error: rank 1 of 3 did not come in 2 s") && said[0].contains("--comm-timeout"),
        "{said:?}"
    );
    assert!(!dir.path().join("run").exists());
}

#[test]
fn a_killed_rank_ends_the_others() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let flags = "--dp 3 --max-steps 100000 --output-dir run";
    let mut ranks = Ranks::all(&device, dir, 3, flags);
    assert!(wait_for(|| curve(&dir.join("run")).len() > 1));
    ranks.children[1].kill().unwrap();
    let start = Instant::now();
    let killed = ranks.children.remove(1).wait_with_output().unwrap();
    assert!(!killed.status.success());
    let said = ranks.fail();
    assert!(start.elapsed() < Duration::from_secs(20), "{said:?}");
    assert!(said[0].contains("rank 1 is gone") && said[0].contains("hint: "), "{said:?}");
    // The first rank has said it.
    assert!(!said[1].contains("error: "), "{said:?}");
}

/// A rank that waits inside of the runtime, which does not notice, is not left there.
#[test]
fn a_rank_that_waits_without_end_is_ended() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    // The runtime of rank 0 cannot listen where the others look for it, and so they load for ever.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let start = Instant::now();
    let flags = "--dp 3 --max-steps 2 --comm-timeout 10 --output-dir run";
    let said = Ranks::start(&device, dir, 3, flags, |_, command| {
        command.env("NEURON_RT_ROOT_COMM_ID", &address);
        true
    })
    .fail();
    assert!(said[0].contains("cannot load micro_step"), "{said:?}");
    assert!(!said[1].contains("error: ") && !said[2].contains("error: "), "{said:?}");
    assert!(start.elapsed() < Duration::from_secs(60));
}

/// The first one is missed by all, and each says so.
#[test]
fn the_death_of_the_first_rank_is_said_by_the_others() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let mut ranks = Ranks::all(&device, dir, 2, "--dp 2 --max-steps 100000 --output-dir run");
    assert!(wait_for(|| curve(&dir.join("run")).len() > 1));
    ranks.children[0].kill().unwrap();
    ranks.children.remove(0).wait().unwrap();
    let said = ranks.fail();
    assert!(said[0].contains("error: rank 1: ") && said[0].contains("rank 0 is gone"), "{said:?}");
}

#[test]
fn ranks_that_differ_are_told() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    run::dataset(&dir.join("documents"), 3, 37, true);
    for (flag, expected) in [
        ("--lr 2e-2", "rank 1 has other settings than rank 0: lr 0.01 → 0.02"),
        ("--batch 3", "rank 1 has other settings than rank 0: batch 1 → 3"),
        ("--tp 2 --dp 1", "rank 0 has --tp 1 --dp 2, rank 1 has --tp 2 --dp 1"),
        // The same flags and another dataset: its blocks know documents, and so do the modules.
        ("--data-dir documents", "rank 1 and rank 0 do not have the same micro_step"),
    ] {
        let differ = |rank: usize, command: &mut Command| {
            if rank == 1 {
                command.args(flag.split(' '));
            }
            true
        };
        let ranks = Ranks::start(&device, dir, 2, "--dp 2 --max-steps 2 --output-dir run", differ);
        let said = ranks.fail();
        assert!(said[0].contains(expected), "{flag}: {said:?}");
        assert!(!said[1].contains("error: "), "{flag}: {said:?}");
        assert!(!dir.join("run/metrics.jsonl").exists());
    }
}

/// An error that one rank alone meets is said by the first, with its number.
#[test]
fn the_error_of_another_rank_is_said() {
    let dir = place();
    let dir = dir.path();
    let device = Device::simulated(dir);
    let no_memory = |rank: usize, command: &mut Command| {
        if rank == 1 {
            command.env("ELAPID_SIM_MEMORY", "5000");
        }
        true
    };
    let said = Ranks::start(&device, dir, 2, "--dp 2 --max-steps 2 --output-dir run", no_memory).fail();
    assert!(said[0].contains("error: rank 1: ") && said[0].contains("status 4"), "{said:?}");
}

#[test]
fn devices_of_one_client_train_as_threads() {
    let dir = place();
    let dir = dir.path();
    let Some(mut device) = Device::xla() else { return };
    device.variables.push(("XLA_FLAGS", "--xla_force_host_platform_device_count=4".into()));
    for (number, (one, four)) in MESHES.iter().enumerate() {
        let name = |what: &str| format!("{what}{number}");
        run::succeed(dir, &format!("{STEPS} --checkpoint-freq 4 {one} --output-dir {}", name("cpu")));
        let cpu = dir.join(name("cpu"));
        device.succeeds(dir, &format!("{STEPS} --checkpoint-freq 4 {four} --output-dir {}", name("whole")));
        same_curve(&dir.join(name("whole")), &cpu);
        run::copy(&dir.join(name("whole")).join("checkpoints/step-00000004"), &dir.join(name("to-cpu")));
        run::succeed(
            dir,
            &format!(
                "{STEPS} {one} --resume {0} --checkpoint-dir more{number} --output-dir {0}-run",
                name("to-cpu")
            ),
        );
        goes_on(&dir.join(format!("{}-run", name("to-cpu"))), &cpu, 4);
    }
    let said = device.fails(dir, "--max-steps 1 --dp 5 --output-dir many");
    assert!(said.contains("5 ranks need as many devices"), "{said}");
}

#[test]
fn ranks_are_started_as_their_devices_need_it() {
    let dir = place();
    let device = Device::simulated(dir.path());
    let said = device.fails(dir.path(), "--max-steps 1 --dp 2 --output-dir run");
    assert!(said.contains("2 ranks on Trainium") && said.contains("torchrun"), "{said}");
    // Modules for them are compiled anywhere.
    device.succeeds(dir.path(), "--max-steps 1 --tp 2 --dp 2 --compile-only");
    let said = device.fails(dir.path(), "--max-steps 1 --tp 4 --compile-only");
    assert!(said.contains("do not serve 4 tensor-parallel ranks"), "{said}");
    let pjrt = Device { flags: "--device pjrt --plugin cuda".into(), variables: variables(0, 2, 41_000) };
    let said = pjrt.fails(dir.path(), "--max-steps 1 --output-dir run");
    assert!(said.contains("threads of one process"), "{said}");
    assert!(!fs::exists(dir.path().join("run")).unwrap());
}
