//! A model's forward pass on a device that runs modules: losses of batches, and decoding.

use elapid_cpu::CpuBackend;
use elapid_tensor::{AdamW, Checkpointing, DType};
use elapid_xla::driver::{Driver, Kind, Program, array_name};
use elapid_xla::{Literal, Module, Options, Shape, Type};

use crate::Error;
use crate::config::run::{Device, DeviceArgs};
use crate::model::Mamba2ForCausalLM;
use crate::record::{Recording, keeps_rules};
use crate::train::{Batch, literal, open_device, rows, write_batch};

/// A device, before a model is on it.
pub(crate) struct Forward(Box<dyn Driver>);

impl Forward {
    /// Opens what the flags name; None: the CPU computes. It may set environment variables, so it must come before other
    /// threads.
    ///
    /// # Errors
    /// There is no such device, or what drives it is missing; flags do not belong together.
    pub(crate) fn open(device: Device, on: &DeviceArgs) -> Result<Option<Self>, Error> {
        on.check(device)?;
        Ok(open_device(device, on)?.map(Self))
    }

    /// The sum of the token losses of a batch, of up to `batch` samples of `length` tokens; `documents`: batches may say where
    /// these begin.
    ///
    /// # Errors
    /// The compiler refuses the module, or the device has no room for it; later, the device fails.
    pub(crate) fn losses(
        self,
        backend: &CpuBackend,
        model: &Mamba2ForCausalLM<CpuBackend>,
        batch: usize,
        length: usize,
        documents: bool,
    ) -> Result<impl FnMut(&Batch) -> Result<f64, Error> + use<>, Error> {
        let module = recording(model, batch, length, documents).eval();
        let (mut driver, program) = self.load(backend, model, &module)?;
        Ok(move |given: &Batch| {
            write_batch(&mut *driver, given, [batch, length], documents)?;
            match driver.run(program) {
                // Whoever asked for the loss sees that it is not finite.
                Err(fault) if fault.kind != Kind::NotFinite => Err(fault.into()),
                _ => Ok(f64::from(driver.read("loss_sum")?.floats()[0])),
            }
        })
    }

    /// Takes one more token of each of `batch` sequences at a time, from the beginning on; gives the logits `[batch, V]` that
    /// follow.
    ///
    /// # Errors
    /// As for [`Self::losses`].
    pub(crate) fn decoder(
        self,
        backend: &CpuBackend,
        model: &Mamba2ForCausalLM<CpuBackend>,
        batch: usize,
    ) -> Result<impl FnMut(&[u32]) -> Result<Vec<f32>, Error> + use<>, Error> {
        let module = recording(model, batch, 1, false).decode();
        let (mut driver, program) = self.load(backend, model, &module)?;
        let shape = Shape::new(Type::S32, &[batch, 1]);
        Ok(move |ids: &[u32]| {
            driver.write("ids", &shape, &Literal::S32(ids.iter().map(|&id| id as i32).collect()))?;
            driver.run(program)?;
            Ok(driver.read("logits")?.floats().to_vec())
        })
    }

    /// Loads a module and puts what it needs of `model` on the device, with states of zeros.
    fn load(
        self,
        backend: &CpuBackend,
        model: &Mamba2ForCausalLM<CpuBackend>,
        module: &Module,
    ) -> Result<(Box<dyn Driver>, Program), Error> {
        keeps_rules(module)?;
        let Self(mut driver) = self;
        let program = driver.load(module)?;
        let compute = model.compute().unwrap_or(model.masters());
        for port in &module.inputs {
            let (name, shape) = (array_name(port), &port.shape);
            let value = match name.split_once('.') {
                Some(("masters", part)) => rows(backend, model.masters(), part, shape.ty),
                Some(("compute", part)) => rows(backend, compute, part, shape.ty),
                Some(("states", _)) => literal(shape.ty, vec![0.0; shape.elements()]),
                // What changes from batch to batch is written then.
                _ => continue,
            };
            driver.write(name, shape, &value)?;
        }
        Ok((driver, program))
    }
}

fn recording(
    model: &Mamba2ForCausalLM<CpuBackend>,
    batch: usize,
    length: usize,
    documents: bool,
) -> Recording<'_> {
    Recording {
        config: model.config(),
        dtype: if model.compute().is_some() { DType::Bf16 } else { DType::F32 },
        batch,
        length,
        documents,
        carried: false,
        checkpointing: Checkpointing::None,
        // Nothing is updated.
        hyper: AdamW { lr: 0.0, beta1: 0.0, beta2: 0.0, eps: 1.0, weight_decay: 0.0, step: 1 },
        max_norm: 0.0,
        sequence_parallel: false,
        zero1: false,
        options: Options::default(),
    }
}
