//! The flags that say where a model runs.

use std::path::PathBuf;

use clap::ValueEnum;
use elapid_xla::LoopKind;
use elapid_xla::driver::neuron;
use serde::Serialize;

use crate::Error;

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The cores of this machine.
    Cpu,
    /// What a PJRT plugin drives: a GPU, a TPU (--plugin)
    Pjrt,
    /// A core of AWS Trainium (docs/trainium.md)
    Neuron,
}

/// Generation of Trainium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Trainium.
    Trn1,
    /// Trainium 2.
    Trn2,
    /// Trainium 3.
    Trn3,
}

impl From<Target> for neuron::Target {
    fn from(target: Target) -> Self {
        match target {
            Target::Trn1 => Self::Trn1,
            Target::Trn2 => Self::Trn2,
            Target::Trn3 => Self::Trn3,
        }
    }
}

/// Which device, and what it takes to find it.
#[derive(Clone, Debug, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceArgs {
    /// Of --device pjrt: the plugin's library, or cuda, tpu or neuron to find it by name
    #[arg(long, value_name = "NAME|PATH")]
    pub plugin: Option<String>,
    /// Of --device neuron: Trainium generation [default: that of this instance]
    #[arg(long, value_enum)]
    pub target: Option<Target>,
    /// Of --device neuron: folder of compiled modules [default: elapid/neff in the user's cache]
    #[arg(long, value_name = "DIR")]
    pub compile_cache: Option<PathBuf>,
}

/// How a recorded module writes layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LayerLoop {
    /// One body, called once a layer
    Call,
    /// One body in a loop with a constant number of turns
    While,
    /// Every layer by itself
    Unrolled,
}

impl From<LayerLoop> for LoopKind {
    fn from(layers: LayerLoop) -> Self {
        match layers {
            LayerLoop::Call => Self::Call,
            LayerLoop::While => Self::While,
            LayerLoop::Unrolled => Self::Unrolled,
        }
    }
}

impl DeviceArgs {
    /// Refuses what belongs to another device.
    ///
    /// # Errors
    /// A flag is missing, or given for nothing.
    pub(crate) fn check(&self, device: Device) -> Result<(), Error> {
        if device == Device::Pjrt && self.plugin.is_none() {
            return Err(Error::new("--device pjrt without --plugin")
                .with_hint("give --plugin cuda, tpu or neuron, or the path of a plugin's library"));
        }
        let (plugin, target, cache) =
            (self.plugin.is_some(), self.target.is_some(), self.compile_cache.is_some());
        for (flag, given, of) in [
            ("--plugin", plugin, Device::Pjrt),
            ("--target", target, Device::Neuron),
            ("--compile-cache", cache, Device::Neuron),
        ] {
            if given && device != of {
                let name = if of == Device::Pjrt { "pjrt" } else { "neuron" };
                return Err(Error::new(format!("{flag} means nothing without --device {name}"))
                    .with_hint(format!("leave it out, or add --device {name}")));
            }
        }
        Ok(())
    }
}
