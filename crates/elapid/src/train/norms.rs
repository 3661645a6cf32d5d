//! `--log-norms`: the norm of every gradient, update and parameter, step by step.

use elapid_tensor::{Backend, DType, Slot};
use serde_json::{Map, Value, json};

use super::Trainer;
use super::folder::Log;
use crate::Error;

/// Elements that are read back at a time: a large tensor needs no second copy.
const STRETCH: usize = 1 << 16;

/// `norms.jsonl` of a run. It reads and never writes what the run computes with.
pub(super) struct Norms<B: Backend> {
    log: Log,
    /// The masters before the update.
    before: B::Buffer,
    /// Norms of the gradients of this step, by name.
    gradients: Map<String, Value>,
}

impl<B: Backend> Norms<B> {
    pub(super) fn new(backend: &B, trainer: &Trainer<'_, B>, log: Log) -> Self {
        let before = backend.buffer(trainer.model().layout().flat, DType::F32);
        Self { log, before, gradients: Map::new() }
    }

    /// Looks at the gradients of the mean loss over `valid` labels, before they are clipped.
    pub(super) fn before_update(&mut self, backend: &B, trainer: &Trainer<'_, B>, valid: usize) {
        let scale = f64::from(1.0 / valid as f32);
        let gradient = |part: &Slot| backend.values(&backend.view(trainer.grads(), part));
        self.gradients = by_name(trainer, |slot| scale * norm(slot, gradient));
        backend.cast_buffer(trainer.model().masters(), &mut self.before);
    }

    /// Adds the line of `step`. The norm of an update is that of the parameters' change, decay and rounding included.
    ///
    /// # Errors
    /// The line cannot be written.
    pub(super) fn after_update(
        &mut self,
        step: u64,
        backend: &B,
        trainer: &Trainer<'_, B>,
    ) -> Result<(), Error> {
        let now = |part: &Slot| trainer.model().parameter(backend, part);
        let update = |part: &Slot| {
            let before = backend.values(&backend.view(&self.before, part));
            now(part).iter().zip(before).map(|(now, before)| now - before).collect()
        };
        let line = json!({
            "step": step,
            "gradients": self.gradients,
            "updates": by_name(trainer, |slot| norm(slot, update)),
            "parameters": by_name(trainer, |slot| norm(slot, now)),
        });
        self.log.push(&line)
    }

    /// Its file.
    pub(super) fn log(&self) -> &Log {
        &self.log
    }
}

/// `f` of every parameter.
fn by_name<B: Backend>(trainer: &Trainer<'_, B>, f: impl Fn(&Slot) -> f64) -> Map<String, Value> {
    trainer.model().layout().iter().map(|(name, slot, _)| (name, f(&slot).into())).collect()
}

/// Euclidean norm of the tensor at `slot`, of which `values` gives any stretch.
fn norm(slot: &Slot, values: impl Fn(&Slot) -> Vec<f32>) -> f64 {
    let stretches = (0..slot.len()).step_by(STRETCH).map(|start| Slot {
        row: slot.row,
        offset: slot.offset + start,
        shape: vec![STRETCH.min(slot.len() - start)],
    });
    let squares = |part: Slot| values(&part).iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    stretches.map(squares).sum::<f64>().sqrt()
}
