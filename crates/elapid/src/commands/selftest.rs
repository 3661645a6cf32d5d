//! `elapid selftest`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use elapid_tensor::suite::{self, Report};
use elapid_xla::driver::{Driver, OnDevice, widen_limits};
use elapid_xla::{Options, XlaBackend};
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
    ("mamba2", suite::mamba2),
];

pub(super) fn run(args: &SelftestArgs) -> Result<(), Error> {
    args.on.check(args.device)?;
    let names = || OPS.map(|(name, _)| name).join(", ");
    if let Some(other) = args.ops.iter().find(|op| !OPS.iter().any(|(name, _)| name == op)) {
        return Err(
            Error::new(format!("there is no op {other}")).with_hint(format!("the ops are {}", names()))
        );
    }
    let Some(driver) = open_device(args.device, &args.on)? else {
        return Err(Error::new("--device cpu is checked by another command").with_hint("use `elapid doctor`"));
    };
    let what = driver.describe();
    let mut device = Some(driver);
    let (mut checks, mut red) = (Vec::new(), Vec::new());
    for (name, op) in
        OPS.into_iter().filter(|(name, _)| args.ops.is_empty() || args.ops.iter().any(|op| op == name))
    {
        say(format_args!("checking {name} against its f64 definition"));
        match check(&mut device, op) {
            Ok(mut reports) => {
                widen_limits(&mut reports);
                let rows = suite::findings(&reports)
                    .iter()
                    .map(|finding| row("device", finding))
                    .collect::<Vec<_>>();
                if rows.iter().any(|row| row["ok"] != true) {
                    red.push(name.to_owned());
                }
                checks.extend(rows);
            }
            Err(why) => {
                say(format_args!("  {name}: {why}"));
                red.push(format!("{name} (it does not run)"));
                checks.push(json!({ "path": "device", "kernel": name, "ok": false, "worst": why }));
            }
        }
    }
    let ok = red.is_empty();
    show(&json!({ "device": what, "checks": Value::Array(checks), "ok": ok }), args.json)?;
    if ok {
        return Ok(());
    }
    Err(Error::new(format!("ops that do not compute what they should on this device: {}", red.join(", ")))
        .with_hint("do not train on it; please report this with the versions of driver and compiler"))
}

/// What an op comes to on the device, which is handed back afterwards; or why it does not run.
fn check(device: &mut Option<Box<dyn Driver>>, op: Op) -> Result<Vec<Report>, String> {
    let shared = OnDevice::new(device.take().expect("every check hands it back"));
    let backend = XlaBackend::new(Options::default(), Some(Box::new(shared.clone())));
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
