//! The recipes in `launch/`: what they start is a command line that the program takes, and means what they say.
#![cfg(unix)]
#![allow(missing_docs)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{Room, stderr};
use yaml_rust2::{Yaml, YamlLoader};

fn recipe(name: &str) -> String {
    format!("{}/../../launch/{name}", env!("CARGO_MANIFEST_DIR"))
}

impl Room {
    /// Runs a recipe with launchers, and a program, that only write down their command lines.
    fn launch(&self, name: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
        for launcher in ["scontrol", "srun", "mpirun", "elapid"] {
            self.write(launcher, "#!/bin/sh\nbasename \"$0\" > said; printf '%s\\n' \"$@\" >> said\n");
            let program = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(self.path(launcher), program).unwrap();
        }
        let path = format!("{}:{}", self.0.path().display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("bash");
        command.arg(recipe(name)).args(args).current_dir(self.0.path()).env("PATH", path);
        command.env_remove("SLURM_NTASKS").envs(env.iter().copied()).output().unwrap()
    }

    /// What was written down: the words before `train`, and the settings that the program makes of the others.
    fn launched(&self, output: &Output) -> (Vec<String>, toml::Table) {
        assert!(output.status.success(), "{}", stderr(output));
        let words: Vec<String> = self.read("said").lines().map(str::to_owned).collect();
        self.settings(&words)
    }

    fn settings(&self, words: &[String]) -> (Vec<String>, toml::Table) {
        let train = words.iter().position(|word| word == "train").unwrap();
        let mut line: Vec<&str> = words[train..].iter().map(String::as_str).collect();
        line.push("--print-config");
        let output = self.command(&line).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        (words[..train].to_vec(), String::from_utf8(output.stdout).unwrap().parse().unwrap())
    }
}

fn number(settings: &toml::Table, name: &str) -> i64 {
    settings[name].as_integer().unwrap()
}

/// Sequences of a step on so many data-parallel ranks.
fn global_batch(settings: &toml::Table, dp: i64) -> i64 {
    number(settings, "batch") * number(settings, "grad-accum-usteps") * dp
}

#[test]
fn slurm() {
    let room = Room::new();
    let name = "tp_zero1_mamba2_7B_pretrain.sbatch";
    let args = ["my data", "my run", "--max-steps", "2000"];
    for (tasks, dp) in [("32", 4), ("2048", 256)] {
        let output = room.launch(name, &args, &[("SLURM_NTASKS", tasks), ("SLURM_CPUS_PER_TASK", "8")]);
        let (before, settings) = room.launched(&output);
        assert_eq!(before, ["srun", "--mpi=pmix", "--cpus-per-task=8", "elapid"]);
        assert_eq!(global_batch(&settings, dp), 1024);
        assert_eq!((number(&settings, "tp"), number(&settings, "max-steps")), (8, 2000));
        for (name, value) in
            [("model", "Mamba7B"), ("data-dir", "my data"), ("output-dir", "my run"), ("resume", "auto")]
        {
            assert_eq!(settings[name].as_str(), Some(value));
        }
        for name in ["use-zero-1", "sequence-parallel-enabled"] {
            assert_eq!(settings[name].as_bool(), Some(true), "{name}");
        }
    }
    for (args, tasks, expected) in [
        (&args[..1], "32", "usage: sbatch"),
        (&args, "12", "12 tasks are no multiple of 8"),
        (&args, "24", "3 groups do not share 1024 evenly"),
        (&args, "", "to be started by sbatch"),
    ] {
        let output = room.launch(name, args, &[("SLURM_NTASKS", tasks)]);
        assert!(!output.status.success() && stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[test]
fn slurm_on_trainium() {
    let room = Room::new();
    let name = "tp_zero1_mamba2_7B_trn1.sbatch";
    let args = ["my data", "my run", "--max-steps", "2000"];
    for (tasks, dp) in [("32", 4), ("512", 64)] {
        let output = room.launch(name, &args, &[("SLURM_NTASKS", tasks), ("SLURM_JOB_NODELIST", "n[1-4]")]);
        let (before, settings) = room.launched(&output);
        assert_eq!(before, ["srun", "elapid"]);
        assert_eq!(global_batch(&settings, dp), 1024);
        assert_eq!((number(&settings, "tp"), number(&settings, "max-steps")), (8, 2000));
        assert_eq!(settings["device"].as_str(), Some("neuron"));
        assert_eq!(settings["compile-cache"].as_str(), Some("my run/neuron-cache"));
    }
    let output = room.launch(name, &args, &[("SLURM_NTASKS", "12")]);
    assert!(!output.status.success() && stderr(&output).contains("12 tasks are no multiple of 8"));
}

#[test]
fn mpirun() {
    let room = Room::new();
    room.write("hosts", "# two machines\nalpha slots=4\nbeta slots = 12 max_slots=16 # the larger one\n");
    let output =
        room.launch("mpirun.sh", &["hosts", "data", "run", "--lr", "1e-3"], &[("TP", "2"), ("CORES", "3")]);
    let (before, settings) = room.launched(&output);
    assert_eq!(before.join(" "), "mpirun --hostfile hosts -n 16 --map-by slot:PE=3 --bind-to core elapid");
    assert_eq!(
        (global_batch(&settings, 8), number(&settings, "tp"), number(&settings, "threads")),
        (64, 2, 3)
    );
    assert_eq!(settings["lr"].as_float(), Some(1e-3));
    let output = room.launch("mpirun.sh", &["hosts", "data", "run"], &[("TP", "3")]);
    assert!(
        !output.status.success() && stderr(&output).contains("the 16 slots of hosts are no multiple of TP 3")
    );
    let output = room.launch("mpirun.sh", &["hosts"], &[]);
    assert!(!output.status.success() && stderr(&output).contains("usage: "));
}

#[test]
fn trainium() {
    let room = Room::new();
    let args = ["4", "data", "run", "--lr", "1e-3"];
    // Each process writes down who it is.
    let said = "#!/bin/sh\necho $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR >> ranks\n\
                [ $LOCAL_RANK = 0 ] && printf '%s\\n' elapid \"$@\" > said; exit 0\n";
    for (env, first, dp) in [
        (&[("TP", "2")][..], "0 0 4 4 127.0.0.1", 2),
        (&[("NODES", "2"), ("NODE", "1"), ("MASTER_ADDR", "one")], "4 0 8 4 one", 8),
    ] {
        room.write("program", said);
        let may_run = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(room.path("program"), may_run).unwrap();
        let program = room.path("program").display().to_string();
        let output = room.launch("trainium.sh", &args, &[env, &[("ELAPID", &program)]].concat());
        let (_, settings) = room.launched(&output);
        assert_eq!(global_batch(&settings, dp), 64);
        assert_eq!((settings["device"].as_str(), settings["lr"].as_float()), (Some("neuron"), Some(1e-3)));
        let ranks = room.read("ranks");
        let mut ranks: Vec<_> = ranks.lines().collect();
        ranks.sort_unstable();
        assert_eq!((ranks.len(), ranks[0]), (4, first));
        std::fs::remove_file(room.path("ranks")).unwrap();
    }
    for (env, expected) in [
        (&[("TP", "3")][..], "4 cores are no multiple of TP 3"),
        (&[("NODES", "2")], "MASTER_ADDR does not name"),
    ] {
        let output = room.launch("trainium.sh", &args, env);
        assert!(!output.status.success() && stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[test]
fn threads() {
    let room = Room::new();
    let output = room.launch("threads.sh", &["data", "run", "--model", "tiny.json"], &[("RANKS", "4")]);
    let (before, settings) = room.launched(&output);
    assert_eq!(before, ["elapid"]);
    assert_eq!((number(&settings, "dp"), global_batch(&settings, 4)), (4, 64));
    assert_eq!(settings["model"].as_str(), Some("tiny.json"));
    let output = room.launch("threads.sh", &["data", "run"], &[("RANKS", "3")]);
    assert!(!output.status.success() && stderr(&output).contains("no multiple of BATCH 4 times RANKS 3"));
}

#[test]
fn kubernetes() {
    let room = Room::new();
    let text = std::fs::read_to_string(Path::new(&recipe("mpijob.yaml"))).unwrap();
    let job = &YamlLoader::load_from_str(&text).unwrap()[0];
    assert_eq!(
        (job["apiVersion"].as_str(), job["kind"].as_str()),
        (Some("kubeflow.org/v2beta1"), Some("MPIJob"))
    );
    let roles = &job["spec"]["mpiReplicaSpecs"];
    let container = |role: &str| &roles[role]["template"]["spec"]["containers"][0];
    let launcher = container("Launcher");
    assert_eq!(launcher["command"][0].as_str(), Some("mpirun"));
    let words: Vec<String> =
        launcher["args"].as_vec().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect();
    let (before, settings) = room.settings(&words);
    let ranks: i64 = before[1].parse().unwrap();
    assert_eq!((before[0].as_str(), before.last().unwrap().as_str()), ("-n", "elapid"));
    let slots = job["spec"]["slotsPerWorker"].as_i64().unwrap();
    assert_eq!(slots * roles["Worker"]["replicas"].as_i64().unwrap(), ranks);
    let tp = number(&settings, "tp");
    assert_eq!(global_batch(&settings, ranks / tp), 128);
    // The folders are on the storage that the workers mount, and the ranks there have the cores that they ask for.
    let mount = container("Worker")["volumeMounts"][0]["mountPath"].as_str().unwrap();
    for name in ["data-dir", "output-dir"] {
        assert!(settings[name].as_str().unwrap().starts_with(mount));
    }
    let cores: i64 = container("Worker")["resources"]["limits"]["cpu"].as_str().unwrap().parse().unwrap();
    assert_eq!(cores, slots * number(&settings, "threads"));
    assert!(!matches!(container("Worker")["image"], Yaml::BadValue));
}
