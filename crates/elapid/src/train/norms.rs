//! `--log-norms`: the norm of every gradient, update and parameter, step by step.

use elapid_tensor::{Backend, DType, Slot};
use serde_json::{Map, Value, json};

use super::Trainer;
use super::folder::Log;
use crate::Error;
use crate::parallel::Rank;

/// Elements that are read back at a time: a large tensor needs no second copy.
const STRETCH: usize = 1 << 16;

/// `norms.jsonl` of a run. It reads and never writes what the run computes with. Every rank has one, and all call it
/// together.
pub(super) struct Norms<B: Backend> {
    /// On the first rank.
    log: Option<Log>,
    /// The masters before the update.
    before: B::Buffer,
    /// Norms of the gradients of this step, by name.
    gradients: Map<String, Value>,
}

impl<B: Backend> Norms<B> {
    pub(super) fn new(backend: &B, trainer: &Trainer<'_, B>, log: Option<Log>) -> Self {
        let model = trainer.model();
        let before = backend.buffer(model.layout().flat.shard(model.part(backend).0), DType::F32);
        Self { log, before, gradients: Map::new() }
    }

    /// Looks at the gradients of the mean loss over `valid` labels, before they are clipped.
    pub(super) fn before_update(
        &mut self,
        rank: &Rank,
        backend: &B,
        trainer: &mut Trainer<'_, B>,
        valid: usize,
    ) {
        trainer.sum_gradients();
        let scale = f64::from(1.0 / valid as f32);
        let gradient = |part: &Slot| backend.values(&backend.view(trainer.summed_gradients(), part));
        self.gradients = norms(rank, backend, trainer, scale, gradient);
        backend.cast_buffer(trainer.model().masters(), &mut self.before);
    }

    /// Adds the line of `step`. The norm of an update is that of the parameters' change, decay and rounding included.
    ///
    /// # Errors
    /// The line cannot be written.
    pub(super) fn after_update(
        &mut self,
        step: u64,
        rank: &Rank,
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
            "updates": norms(rank, backend, trainer, 1.0, update),
            "parameters": norms(rank, backend, trainer, 1.0, now),
        });
        self.log.as_mut().map_or(Ok(()), |log| log.push(&line))
    }

    /// Its file; the first rank has it.
    pub(super) fn log(&self) -> Option<&Log> {
        self.log.as_ref()
    }
}

/// Euclidean norm, times `scale`, of every parameter over all ranks. `values` gives any stretch of the part of the
/// parameters that this rank updates.
fn norms<B: Backend>(
    rank: &Rank,
    backend: &B,
    trainer: &Trainer<'_, B>,
    scale: f64,
    values: impl Fn(&Slot) -> Vec<f32>,
) -> Map<String, Value> {
    let layout = trainer.model().layout();
    let (parts, part) = trainer.model().part(backend);
    // What all data-parallel ranks hold counts once.
    let counts = parts > 1 || rank.dp_rank() == 0;
    let squares = |slot: &Slot| -> f64 {
        let counted = if counts { layout.counted(slot, parts, part) } else { Vec::new() };
        counted.iter().flat_map(stretches).map(|part| squares(&values(&part))).sum()
    };
    let mut sums: Vec<f64> = layout.iter().map(|(_, slot, _)| squares(&slot)).collect();
    rank.sum(&mut sums);
    let names = layout.iter().map(|(name, ..)| name);
    names.zip(sums).map(|(name, sum)| (name, (scale * sum.sqrt()).into())).collect()
}

fn stretches(slot: &Slot) -> impl Iterator<Item = Slot> {
    let (row, offset, len) = (slot.row, slot.offset, slot.len());
    (0..len).step_by(STRETCH).map(move |start| Slot {
        row,
        offset: offset + start,
        shape: vec![STRETCH.min(len - start)],
    })
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x).powi(2)).sum()
}
