//! The folder of a step that was not finite: all that it takes to repeat it.
//!
//! It is a checkpoint of the state before the step, with two more files: `batch.safetensors` (`ids.M`, `labels.M` and,
//! where there are documents, `documents.M` of each micro-step M, `[B, L]` i32) and `step.json` ([`NonFinite::step`]).

use std::fs;
use std::path::{Path, PathBuf};

use elapid_tensor::{Backend, IGNORE_LABEL};
use safetensors::tensor::{Dtype as Element, TensorView};
use safetensors::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::diagnose::{Diagnosis, Recorded, diagnose};
use super::{Batch, Trainer, resume};
use crate::Error;
use crate::checkpoint::{Checkpoint, put, write};
use crate::config::run::{ActivationCheckpointing, Dtype, TrainArgs};
use crate::model::Mamba2ForCausalLM;
use crate::parallel::Rank;

const STEP: &str = "step.json";
const BATCH: &str = "batch.safetensors";

/// Samples that a message names; `step.json` has them all.
const NAMED: usize = 16;

/// A step that was not finite.
#[derive(Debug)]
pub struct NonFinite {
    /// What was to be computed, and what came of it.
    pub step: Step,
    recorded: Recorded,
    checkpoint: Checkpoint,
}

/// `step.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// The optimizer step, from 1.
    pub step: u64,
    /// Compute dtype.
    pub dtype: Dtype,
    /// What layers kept.
    pub activation_checkpointing: ActivationCheckpointing,
    /// Whether states were carried into it.
    pub carry_state: bool,
    /// Seed of the run.
    pub seed: u64,
    /// The dataset.
    pub data_dir: PathBuf,
    /// Its batches.
    pub micro_steps: Vec<MicroStep>,
    /// As [`Diagnosis::to_json`] gives it.
    pub diagnosis: Value,
}

/// The rows of one batch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MicroStep {
    /// Their places in the dataset.
    pub samples: Vec<usize>,
    /// See [`Batch::continued`].
    pub continued: Vec<bool>,
}

impl NonFinite {
    /// Writes the folder `nonfinite-step-…` into `dir`, at once or not at all; `checkpoint` writes the state before the
    /// step.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn write(
        dir: &Path,
        step: u64,
        args: &TrainArgs,
        recorded: &Recorded,
        diagnosis: &Diagnosis,
        checkpoint: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let rows = recorded.batches.iter().zip(&recorded.samples);
        let step = Step {
            step,
            dtype: args.dtype,
            activation_checkpointing: args.activation_checkpointing,
            carry_state: args.carry_state,
            seed: args.seed,
            data_dir: args.data_dir.clone(),
            micro_steps: rows
                .map(|(batch, samples)| MicroStep {
                    samples: samples.clone(),
                    continued: batch.continued.clone(),
                })
                .collect(),
            diagnosis: diagnosis.to_json(),
        };
        let json = serde_json::to_string_pretty(&step).expect("plain data") + "\n";
        put(&Rank::single(None), dir, &format!("nonfinite-step-{:08}", step.step), |aside| {
            write(&aside.join(STEP), |out| out.write_all(json.as_bytes()))?;
            let path = aside.join(BATCH);
            let tensors = to_safetensors(&recorded.batches)
                .map_err(|cause| Error::new(format!("cannot make {}: {cause}", path.display())))?;
            write(&path, |out| out.write_all(&tensors))?;
            checkpoint(aside)
        })
    }

    /// Reads the folder that a run has left.
    ///
    /// # Errors
    /// Something is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(STEP);
        let text = fs::read_to_string(&path).map_err(|cause| {
            Error::io("read", &path, &cause)
                .with_hint("give a folder nonfinite-step-…, which `elapid train` leaves in its run folder")
        })?;
        let damaged = |path: &Path, what: String| {
            Error::new(format!("{}: {what}", path.display()))
                .with_hint("the folder is damaged; run the training again to get another")
        };
        let step: Step = serde_json::from_str(&text).map_err(|cause| damaged(&path, cause.to_string()))?;
        let checkpoint = Checkpoint::open(dir)?;
        let path = dir.join(BATCH);
        let bytes = fs::read(&path).map_err(|cause| Error::io("read", &path, &cause))?;
        let vocab_size = checkpoint.config()?.vocab_size;
        let batches =
            from_safetensors(&bytes, &step.micro_steps, vocab_size).map_err(|what| damaged(&path, what))?;
        let samples = step.micro_steps.iter().map(|micro| micro.samples.clone()).collect();
        Ok(Self { step, recorded: Recorded { batches, samples }, checkpoint })
    }

    /// Repeats the step, computing in `dtype`.
    ///
    /// # Errors
    /// The state before it cannot be read.
    pub fn replay<B: Backend>(&self, backend: &B, dtype: Dtype) -> Result<Diagnosis, Error> {
        let config = self.checkpoint.config()?;
        let mut model = Mamba2ForCausalLM::empty(backend, &config, dtype.compute());
        resume::read_weights(&self.checkpoint, backend, &mut model)?;
        let mut trainer = Trainer::new(backend, model, self.step.activation_checkpointing.into());
        if self.step.carry_state {
            trainer = trainer.with_carried_states();
            resume::restore_carried(&self.checkpoint, backend, &mut trainer, self.recorded.batches[0].size)?;
        }
        let before = trainer.states().map(<[_]>::to_vec);
        Ok(diagnose(backend, &mut trainer, &self.recorded, before))
    }
}

/// The samples of a step in words.
pub(super) fn list(samples: &[Vec<usize>]) -> String {
    let all: Vec<_> = samples.iter().flatten().map(usize::to_string).collect();
    let named = all[..all.len().min(NAMED)].join(", ");
    match all.len() {
        1 => format!("sample {named}"),
        count if count > NAMED => format!("{count} samples: {named}, …"),
        _ => format!("samples {named}"),
    }
}

fn to_safetensors(batches: &[Batch]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let mut tensors = Vec::new();
    for (micro, batch) in batches.iter().enumerate() {
        let parts = [("ids", Some(&batch.ids)), ("labels", Some(&batch.labels))];
        for (name, values) in parts.into_iter().chain([("documents", batch.documents.as_ref())]) {
            let Some(values) = values else { continue };
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((format!("{name}.{micro}"), [batch.size, batch.length], bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Element::I32, shape.to_vec(), bytes)?)));
    serialize(views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?, None)
}

fn from_safetensors(
    bytes: &[u8],
    micro_steps: &[MicroStep],
    vocab_size: usize,
) -> Result<Vec<Batch>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|cause| cause.to_string())?;
    let read = |name: &str, micro: usize, shape: Option<&[usize]>| {
        let name = format!("{name}.{micro}");
        let tensor = file.tensor(&name).map_err(|cause| format!("{name}: {cause}"))?;
        if tensor.dtype() != Element::I32 || shape.is_some_and(|shape| shape != tensor.shape()) {
            return Err(format!("{name} is {:?} {:?}", tensor.dtype(), tensor.shape()));
        }
        let values = tensor.data().as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
        Ok((tensor.shape().to_vec(), values.collect::<Vec<_>>()))
    };
    let token = |id: &i32| usize::try_from(*id).is_ok_and(|id| id < vocab_size);
    let batch = |(micro, rows): (usize, &MicroStep)| {
        let (shape, ids) = read("ids", micro, None)?;
        let &[size, length] = shape.as_slice() else { return Err(format!("ids.{micro} is {shape:?}")) };
        let (_, labels) = read("labels", micro, Some(&shape))?;
        let has_documents = file.tensor(&format!("documents.{micro}")).is_ok();
        let documents = if has_documents { Some(read("documents", micro, Some(&shape))?.1) } else { None };
        if ids.is_empty() || rows.samples.len() != size || rows.continued.len() != size {
            return Err(format!("ids.{micro} has {size} rows of {length}, not those of {STEP}"));
        }
        if !ids.iter().all(token) || !labels.iter().all(|id| *id == IGNORE_LABEL || token(id)) {
            return Err(format!(
                "micro-step {micro} holds a token outside of the vocabulary of {vocab_size}"
            ));
        }
        Ok(Batch { size, length, ids, labels, documents, continued: rows.continued.clone() })
    };
    if micro_steps.is_empty() {
        return Err(format!("{STEP} names no micro-step"));
    }
    micro_steps.iter().enumerate().map(batch).collect()
}
