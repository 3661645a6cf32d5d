//! The steps of a run on a device.

use std::collections::BTreeMap;

use elapid_cpu::{Buffer, CpuBackend, Tensor};
use elapid_tensor::{AdamW, Backend, DType, Row, State};
use elapid_xla::driver::{Driver, Fault, Kind, Program, array_name};
use elapid_xla::{Literal, Shape, Type, XlaBackend};

use super::arrays::{literal, rows, write_batch};
use super::modules::{Form, Modules};
use crate::Error;
use crate::config::run::Run;
use crate::data::Dataset;
use crate::parallel::Rank;
use crate::train::evaluate::HeldOut;
use crate::train::{Batch, StepReport, Trainer};

/// The state of a rank on its device, and the modules that change it, which all ranks run together.
pub(in crate::train) struct DeviceTrainer {
    driver: Box<dyn Driver>,
    /// (data-parallel rank, tensor-parallel rank).
    place: (usize, usize),
    form: Form,
    /// To be run in this order.
    micro_step: Vec<Program>,
    update: Program,
    /// Names of the inputs of all modules, with their shapes.
    inputs: BTreeMap<String, Shape>,
    eval: Option<(Program, Form)>,
    /// The device has met a number that is not finite since the last update.
    not_finite: Option<Fault>,
}

/// Names of what [`Trainer::state`] gives.
const STATE: [&str; 3] = ["masters", "m", "v"];

impl DeviceTrainer {
    /// Records the modules of `run`, has them compiled, and loads them once all ranks are known to have the same.
    ///
    /// # Errors
    /// The compiler refuses one, a rank has another, or the device has no room.
    pub(in crate::train) fn new(
        mut driver: Box<dyn Driver>,
        rank: &Rank,
        run: &Run,
        data: &Dataset,
        held_out: Option<&HeldOut<'_>>,
    ) -> Result<Self, Error> {
        let modules = Modules::record(run, data, held_out)?;
        let name = |name: &str| name.to_owned();
        let prepared = modules.all().map(|module| Ok((name(&module.proto.name), driver.prepare(module)?)));
        let prepared = prepared.collect::<Result<Vec<_>, Fault>>()?;
        agree(&rank.gather(prepared))?;
        let ports = modules.all().flat_map(|module| &module.inputs);
        let inputs = ports.map(|port| (name(array_name(port)), port.shape.clone())).collect();
        let Modules { micro_step, update, eval, form, eval_form } = modules;
        let micro_step = micro_step.iter().map(|module| driver.load(module)).collect::<Result<_, _>>()?;
        let update = driver.load(&update)?;
        let eval = eval.map(|eval| Ok::<_, Fault>((driver.load(&eval)?, eval_form))).transpose()?;
        let place = rank.mesh().place(rank.number());
        Ok(Self { driver, place, form, micro_step, update, inputs, eval, not_finite: None })
    }

    /// Puts the state of `trainer` on the device, with zero gradients.
    ///
    /// # Errors
    /// The device has no room.
    pub(in crate::train) fn upload(
        &mut self,
        backend: &CpuBackend,
        trainer: &Trainer<'_, CpuBackend>,
    ) -> Result<(), Error> {
        let [masters, m, v] = trainer.state();
        let (compute, ends) = (trainer.model().compute(), trainer.model().ends());
        for (name, shape) in &self.inputs {
            let (array, part) = name.split_once('.').unwrap_or((name, ""));
            let zeros = || literal(shape.ty, vec![0.0; shape.elements()]);
            let held = |buffer: Option<&Buffer>| {
                rows(backend, buffer.expect("the model that was recorded"), part, shape.ty)
            };
            let value = match array {
                "masters" => held(Some(masters)),
                "compute" => held(compute),
                "ends" => held(ends),
                "m" => held(Some(m)),
                "v" => held(Some(v)),
                "grads" | "loss" | "eval" => zeros(),
                "states" => match trainer.states() {
                    // Before the first micro-step.
                    None | Some([]) => zeros(),
                    Some(states) => literal(
                        shape.ty,
                        states.iter().flat_map(|s| backend.values(carried(s, part))).collect(),
                    ),
                },
                "rank" => Literal::S32(vec![self.place.0 as i32, self.place.1 as i32]),
                // A batch, what a step tells, and what one module hands on to the next.
                _ => continue,
            };
            self.driver.write(name, shape, &value)?;
        }
        Ok(())
    }

    /// Brings the state back into `trainer`, whose model is then to be brought up to date where it computes.
    ///
    /// # Errors
    /// The device is gone.
    pub(in crate::train) fn download(
        &mut self,
        backend: &CpuBackend,
        trainer: &mut Trainer<'_, CpuBackend>,
    ) -> Result<(), Error> {
        let arrays = STATE.map(|name| self.read(name));
        let arrays = arrays.into_iter().collect::<Result<Vec<_>, _>>()?;
        trainer.replace_rows(|which, row, len| row_of(&arrays[which], row, len));
        if trainer.states().is_some() {
            let states = self.states(backend, trainer)?;
            trainer.set_states(states);
        }
        Ok(())
    }

    /// Brings the gradients of this step, of this rank alone, into `trainer`.
    ///
    /// # Errors
    /// The device is gone.
    pub(in crate::train) fn download_gradients(
        &mut self,
        trainer: &mut Trainer<'_, CpuBackend>,
    ) -> Result<(), Error> {
        let arrays = self.read("grads")?;
        trainer.replace_gradients(|row, len| row_of(&arrays, row, len));
        Ok(())
    }

    /// The two arrays of a flat buffer.
    fn read(&mut self, name: &str) -> Result<[Literal; 2], Fault> {
        let mut part = |part: &str| {
            let name = format!("{name}.{part}");
            let there = self.inputs.contains_key(&name);
            if there { self.driver.read(&name) } else { Ok(Literal::F32(Vec::new())) }
        };
        Ok([part("layers")?, part("shared")?])
    }

    /// The carried states by layer.
    fn states(
        &mut self,
        backend: &CpuBackend,
        trainer: &Trainer<'_, CpuBackend>,
    ) -> Result<Vec<State<Tensor>>, Error> {
        let (spec, rows) = (trainer.model().layout().spec, self.form.size);
        let mut layers = |part: &str, shape: &[usize]| {
            let name = format!("states.{part}");
            // A convolution of width 1 carries nothing.
            let none = Literal::F32(Vec::new());
            let values = if self.inputs.contains_key(&name) { self.driver.read(&name)? } else { none };
            let (all, len) = (values.floats(), shape.iter().product::<usize>());
            let layer = |layer| backend.tensor(&all[layer * len..][..len], shape, DType::F32);
            Ok::<Vec<_>, Fault>((0..trainer.model().config().num_hidden_layers).map(layer).collect())
        };
        let conv = layers("conv", &[rows, spec.conv_kernel - 1, spec.conv_channels()])?;
        let ssm = layers("ssm", &[rows, spec.heads, spec.head_dim, spec.state])?;
        Ok(conv.into_iter().zip(ssm).map(|(conv, ssm)| State { conv, ssm }).collect())
    }

    fn write(&mut self, batch: &Batch, form: Form) -> Result<(), Error> {
        write_batch(&mut *self.driver, batch, [form.size, form.length], form.documents)?;
        if form.carried {
            let rows = (0..form.size).map(|row| i32::from(batch.continued.get(row) == Some(&true)));
            let rows = Literal::S32(rows.collect());
            self.driver.write("continued", &Shape::new(Type::S32, &[form.size]), &rows)?;
        }
        Ok(())
    }

    /// Forward and adjoints of one batch.
    ///
    /// # Errors
    /// The device fails.
    pub(in crate::train) fn micro_step(&mut self, batch: &Batch) -> Result<(), Error> {
        self.write(batch, self.form)?;
        self.micro_step.clone().into_iter().try_for_each(|program| self.run(program))
    }

    /// Runs a module. A number that is not finite is the update's to judge: it has kept the old state then, and says so.
    fn run(&mut self, program: Program) -> Result<(), Error> {
        match self.driver.run(program) {
            Err(fault) if fault.kind == Kind::NotFinite => self.not_finite = Some(fault),
            result => result?,
        }
        Ok(())
    }

    /// One optimizer step; as [`Trainer::update`].
    ///
    /// # Errors
    /// The device fails.
    pub(in crate::train) fn update(&mut self, hyper: &AdamW, valid: usize) -> Result<StepReport, Error> {
        for (name, value) in XlaBackend::step_inputs(hyper, 1.0 / valid as f32) {
            self.driver.write(name, &Shape::new(Type::F32, &[]), &Literal::F32(vec![value]))?;
        }
        self.run(self.update)?;
        let loss = f64::from(self.driver.read("loss_sum")?.floats()[0]) / valid as f64;
        let outcome = self.driver.read("outcome")?;
        let &[norm, _, finite] = outcome.floats() else { panic!("an outcome is three numbers") };
        match self.not_finite.take() {
            Some(fault) if finite != 0.0 => Err(fault.into()),
            _ => Ok(StepReport { loss, grad_norm: f64::from(norm), finite: finite != 0.0 }),
        }
    }

    /// Sum of the token losses of a batch of the evaluation, which may be smaller than others, or empty. All ranks call this
    /// together.
    ///
    /// # Errors
    /// The device fails.
    pub(in crate::train) fn loss(&mut self, batch: &Batch) -> Result<f64, Error> {
        let (program, form) = self.eval.expect("there is something to evaluate on");
        self.write(batch, form)?;
        self.run(program)?;
        self.not_finite = None;
        Ok(f64::from(self.driver.read("loss_sum")?.floats()[0]))
    }
}

/// Whether all ranks are about to load the same modules; `of_ranks` names them by rank, with what they came to.
fn agree(of_ranks: &[Vec<(String, String)>]) -> Result<(), Error> {
    for (rank, modules) in of_ranks.iter().enumerate() {
        let other = modules.iter().zip(&of_ranks[0]).find(|(theirs, first)| theirs != first);
        if other.is_some() || modules.len() != of_ranks[0].len() {
            let name = other.map_or("list of modules", |((name, _), _)| name);
            return Err(Error::new(format!("rank {rank} and rank 0 do not have the same {name}")).with_hint(
                "start all ranks with the same flags and data, the same elapid, and compilers of the same version",
            ));
        }
    }
    Ok(())
}

/// A part of a layer's state, by its name.
fn carried<'s>(state: &'s State<Tensor>, part: &str) -> &'s Tensor {
    if part == "conv" { &state.conv } else { &state.ssm }
}

/// A row of a flat buffer's two arrays.
fn row_of([layers, shared]: &[Literal; 2], row: Row, len: usize) -> &[f32] {
    match row {
        Row::Layer(layer) => &layers.floats()[layer * len..][..len],
        Row::Shared => shared.floats(),
    }
}
