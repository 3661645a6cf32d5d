//! `--device`: the steps of a run on a device that runs modules.
//!
//! The device holds the state of the run while it trains. The host has a trainer of the same model, which receives that
//! state where somebody looks: to save, to export, to find out why a step was not finite. So all of that is the CPU's own
//! code, and a checkpoint does not know where it came from.

mod arrays;
mod modules;
mod trainer;

use std::sync::{Arc, Mutex};

use elapid_xla::driver::neuron::{self, Compiler, NeuronDevice, Place, Settings};
use elapid_xla::driver::pjrt::Client;
use elapid_xla::driver::{Driver, Fault};

pub(crate) use self::arrays::{literal, rows, write_batch};
use self::modules::Modules;
pub(super) use self::trainer::DeviceTrainer;
use super::evaluate::HeldOut;
use crate::Error;
use crate::config::run::{Device, DeviceArgs, Run};
use crate::data::Dataset;
use crate::error::say;
use crate::parallel::{self, Mesh};

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::new(fault.message).with_hint(fault.hint)
    }
}

/// The devices of the ranks of this process.
pub(crate) enum Devices {
    /// A core, of the one rank.
    Core(Mutex<Option<Box<NeuronDevice>>>),
    /// What a plugin drives, a device a rank.
    Plugin(Arc<Client>),
}

impl Devices {
    /// Opens those of a run on this mesh; None: it computes on the CPU. It may set environment
    /// variables, so it must come before other threads.
    ///
    /// # Errors
    /// There is no such device, what drives it is missing, or the ranks are no processes where they have to be.
    pub(super) fn open(device: Device, on: &DeviceArgs, mesh: Mesh) -> Result<Option<Self>, Error> {
        Ok(match (device, &on.plugin) {
            (Device::Pjrt, Some(plugin)) => Some(Self::Plugin(Client::open(plugin)?)),
            (Device::Neuron, _) => {
                let place = match parallel::place()? {
                    None if mesh.size() > 1 => return Err(one_of(mesh.size())),
                    place => place.unwrap_or_else(Place::alone),
                };
                let settings = Settings { compiler: compiler(on)?, place, tp: Some(mesh.tp) };
                let core = NeuronDevice::open(settings)?;
                Some(Self::Core(Mutex::new(Some(Box::new(core)))))
            }
            _ => None,
        })
    }

    /// That of rank `number` of so many. To be asked for once.
    ///
    /// # Errors
    /// There are not so many.
    pub(super) fn of(&self, number: usize, ranks: usize) -> Result<Box<dyn Driver>, Error> {
        Ok(match self {
            Self::Core(core) => {
                let core = core.lock().expect("nothing panics with it").take();
                core.expect("a process has one rank, which asks once")
            }
            Self::Plugin(client) => Box::new(client.device(number, ranks)?),
        })
    }
}

fn one_of(ranks: usize) -> Error {
    Error::new(format!("{ranks} ranks on Trainium, and this process is none of several")).with_hint(
        "a core has a process of its own: start as many with launch/trainium.sh, torchrun, srun or mpirun",
    )
}

/// Opens a device for a process alone; None: the CPU. It must come before other threads.
///
/// # Errors
/// There is no such device, or what drives it is missing.
pub(crate) fn open(device: Device, on: &DeviceArgs) -> Result<Option<Box<dyn Driver>>, Error> {
    Devices::open(device, on, Mesh::SINGLE)?.map(|devices| devices.of(0, 1)).transpose()
}

fn compiler(on: &DeviceArgs) -> Result<Compiler, Error> {
    let target = on.target.map(Into::into).or_else(neuron::Target::here).ok_or_else(|| {
        Error::new("this is no Trainium instance, and --target is not given")
            .with_hint("give --target trn1, trn2 or trn3")
    })?;
    let cache = on.compile_cache.clone().unwrap_or_else(neuron::default_cache);
    Ok(Compiler::new(target, &cache, |line| say(line))?)
}

/// Fills the cache with the modules of `run`: no device is needed.
///
/// # Errors
/// The compiler is missing or refuses a module.
pub(super) fn compile(run: &Run, data: &Dataset, held_out: Option<&HeldOut<'_>>) -> Result<(), Error> {
    let compiler = compiler(&run.args.on)?;
    compiler.target().check_tp(run.mesh.tp)?;
    Modules::record(run, data, held_out)?
        .all()
        .try_for_each(|module| Ok(compiler.compile(module).map(drop)?))
}
