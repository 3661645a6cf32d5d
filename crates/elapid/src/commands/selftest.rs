//! `elapid selftest`.

use std::io::IsTerminal;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use elapid_tensor::suite::{self, Report};
use elapid_xla::driver::{Driver, OnDevice, widen_limits};
use elapid_xla::{Executor, Literal, Module, Options, XlaBackend};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::show::show;
use crate::Error;
use crate::config::run::{Device, DeviceArgs};
use crate::doctor::row;
use crate::error::say;
use crate::train::open_device;

/// Flags of `elapid selftest`.
#[derive(clap::Args)]
pub(super) struct SelftestArgs {
    /// What to check
    #[arg(long, value_enum)]
    device: Device,
    #[command(flatten)]
    on: DeviceArgs,
    /// Check these only, separated by commas
    #[arg(long, value_name = "OP,…", value_delimiter = ',')]
    ops: Vec<String>,
    /// Check the mixer in all combinations of sizes and features, five times as many: takes minutes of a fast compiler
    #[arg(long)]
    all_cases: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

type Op = fn(&XlaBackend) -> Vec<Report>;

/// The ops of the contract, simple ones first.
const OPS: [(&str, Op); 11] = [
    ("flat_buffers", suite::flat_buffers),
    ("add_and_cast", suite::add_and_cast),
    ("add_bias", suite::add_bias),
    ("linear", suite::linear),
    ("resize", suite::resize),
    ("rms_norm", suite::rms_norm),
    ("embedding", suite::embedding),
    ("head_loss", suite::head_loss),
    ("clip", suite::clip),
    ("adamw", suite::adamw),
    ("mamba2", suite::mamba2_core),
];

impl SelftestArgs {
    /// The ops that are asked for.
    ///
    /// # Errors
    /// There is no op of that name.
    fn ops(&self) -> Result<Vec<(&'static str, Op)>, Error> {
        if let Some(other) = self.ops.iter().find(|op| !OPS.iter().any(|(name, _)| name == op)) {
            let names = OPS.map(|(name, _)| name).join(", ");
            return Err(
                Error::new(format!("there is no op {other}")).with_hint(format!("the ops are {names}"))
            );
        }
        let wanted = |name: &str| self.ops.is_empty() || self.ops.iter().any(|op| op == name);
        let all_of = |(name, op): (&'static str, Op)| match name {
            "mamba2" if self.all_cases => (name, suite::mamba2 as Op),
            _ => (name, op),
        };
        Ok(OPS.into_iter().filter(|(name, _)| wanted(name)).map(all_of).collect())
    }
}

pub(super) fn run(args: &SelftestArgs) -> Result<(), Error> {
    args.on.check(args.device)?;
    let ops = args.ops()?;
    let Some(driver) = open_device(args.device, &args.on)? else {
        return Err(Error::new("--device cpu is checked by another command").with_hint("use `elapid doctor`"));
    };
    let what = driver.describe();
    let mut device = Some(driver);
    let progress = Progress::new(ops.len());
    let (mut checks, mut red) = (Vec::new(), Vec::new());
    let started = Instant::now();
    for (name, op) in ops {
        progress.begin(name);
        let (begun, before) = (Instant::now(), progress.modules());
        let verdict = match check(&mut device, &progress, op) {
            Ok(mut reports) => {
                widen_limits(&mut reports);
                checks.extend(suite::findings(&reports).iter().map(|finding| row("device", finding)));
                let failed = reports.iter().filter(|report| !report.passes()).count();
                if failed > 0 {
                    red.push(name.to_owned());
                    format!("{failed} of {} comparisons FAILED", reports.len())
                } else {
                    format!("{} comparisons ok", reports.len())
                }
            }
            Err(why) => {
                red.push(format!("{name} (it does not run)"));
                checks.push(json!({ "path": "device", "kernel": name, "ok": false, "worst": why }));
                why
            }
        };
        let (modules, time) = (progress.modules() - before, begun.elapsed().as_secs_f64());
        progress.end(&format!("  {name:<12}  {verdict}  ({modules} modules, {time:.1} s)"));
    }
    progress.finish();
    let ok = red.is_empty();
    let summary = json!({
        "device": what,
        "checks": Value::Array(checks),
        "modules": progress.modules(),
        "time_s": started.elapsed().as_secs_f64(),
        "ok": ok,
    });
    show(&summary, args.json)?;
    if ok {
        return Ok(());
    }
    Err(Error::new(format!("ops that do not compute what they should on this device: {}", red.join(", ")))
        .with_hint("do not train on it; please report this with the versions of driver and compiler"))
}

/// What a person sees meanwhile: a bar on a terminal, a line an op elsewhere.
#[derive(Clone)]
struct Progress {
    bar: Option<ProgressBar>,
    /// How many have been compiled and run.
    modules: Arc<AtomicUsize>,
}

impl Progress {
    fn new(ops: usize) -> Self {
        let style = ProgressStyle::with_template("{pos}/{len} ops {bar:24} {msg}  {elapsed}")
            .expect("the template is constant");
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(ops as u64).with_style(style.progress_chars("━╸ "));
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { bar, modules: Arc::default() }
    }

    fn modules(&self) -> usize {
        self.modules.load(Ordering::Relaxed)
    }

    fn begin(&self, op: &'static str) {
        match &self.bar {
            Some(bar) => bar.set_message(op),
            None => say(format_args!("checking {op} against its f64 definition")),
        }
    }

    fn count(&self) {
        let modules = self.modules.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(bar) = &self.bar {
            let message = bar.message();
            let op = message.split(',').next().unwrap_or_default();
            bar.set_message(format!("{op}, module {modules}"));
        }
    }

    fn end(&self, line: &str) {
        match &self.bar {
            Some(bar) => {
                bar.suspend(|| say(line));
                bar.inc(1);
            }
            None => say(line),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A device whose modules are counted.
struct Counted(OnDevice, Progress);

impl Executor for Counted {
    fn run(&self, module: &Module, inputs: &[Literal]) -> Result<Vec<Literal>, String> {
        self.1.count();
        self.0.run(module, inputs)
    }
}

/// What an op comes to on the device, which is handed back afterwards; or why it does not run.
fn check(device: &mut Option<Box<dyn Driver>>, progress: &Progress, op: Op) -> Result<Vec<Report>, String> {
    let shared = OnDevice::new(device.take().expect("every check hands it back"));
    let counted = Counted(shared.clone(), progress.clone());
    let backend = XlaBackend::new(Options::default(), Some(Box::new(counted)));
    // A module that the device refuses unwinds: ops give no error. That is said in one line, not as a panic.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let end = catch_unwind(AssertUnwindSafe(|| op(&backend)));
    std::panic::set_hook(hook);
    drop(backend);
    *device = shared.into_driver();
    end.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map_or("it failed without a word", String::as_str);
        text.split("\nHloModule").next().unwrap_or_default().trim().to_owned()
    })
}
