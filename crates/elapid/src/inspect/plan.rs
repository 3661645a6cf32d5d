//! What a rank of a training run holds and sends, mesh by mesh.

use serde_json::{Value, json};

use crate::Error;
use crate::config::ModelConfig;
use crate::config::run::{ActivationCheckpointing, Dtype};
use crate::model::Layout;
use crate::model::shard::check_ranks;
use crate::parallel::{Arrangement, Mesh};
use crate::train::memory::{Demand, Memory};
use crate::train::plan::Traffic;

/// One rank, eight of either kind, and 32 of both, as far as the model allows.
fn usual(config: &ModelConfig) -> Vec<Arrangement> {
    let all = [(1, 1), (8, 1), (1, 8), (4, 8)].map(|(dp, tp)| Arrangement {
        mesh: Mesh { dp, tp },
        zero1: dp > 1,
        sequence_parallel: tp > 1,
    });
    all.into_iter().filter(|arrangement| check_ranks(config, arrangement.mesh.tp).is_ok()).collect()
}

/// What a micro-step of a rank is.
#[derive(Clone, Copy, Debug)]
pub struct MicroStep {
    /// B.
    pub batch: usize,
    /// L.
    pub seq_len: usize,
    /// Compute dtype.
    pub dtype: Dtype,
    /// What layers keep.
    pub checkpointing: ActivationCheckpointing,
}

/// Predicts what a rank with one worker thread holds ([`Memory::predict`]) and sends ([`Traffic::predict`]) on each of
/// `meshes`, or on the usual ones where there are none: the object that `elapid inspect PATH --plan --json` prints.
///
/// # Errors
/// There is no such model, or it cannot be shared out to such a mesh.
pub fn plan(model: &str, micro_step: &MicroStep, meshes: &[Arrangement]) -> Result<Value, Error> {
    let config = ModelConfig::find(model)?;
    let MicroStep { batch, seq_len, dtype, checkpointing } = *micro_step;
    let meshes = if meshes.is_empty() { usual(&config) } else { meshes.to_vec() };
    let alone = Demand::alone(&config, (batch, seq_len), dtype.compute(), checkpointing.into(), 1);
    let row = |Arrangement { mesh, zero1, sequence_parallel }: Arrangement| {
        Mesh::new(mesh.tp, Some(mesh.dp), None)?;
        check_ranks(&config, mesh.tp)?;
        let demand = Demand { mesh, zero1, sequence_parallel, ..alone };
        let (memory, traffic) = (Memory::predict(&demand), Traffic::predict(&demand));
        Ok(json!({
            "dp": mesh.dp,
            "tp": mesh.tp,
            "zero_1": zero1,
            "sp": sequence_parallel,
            "parameters_bytes": memory.parameters,
            "gradients_bytes": memory.gradients,
            "moments_bytes": memory.moments,
            "activations_bytes": memory.activations,
            "transient_bytes": memory.transient,
            "all_bytes": memory.total() - memory.program,
            "sent_a_micro_step_bytes": traffic.micro_step,
            "sent_an_update_bytes": traffic.update + traffic.replicas,
        }))
    };
    Ok(json!({
        "kind": "plan",
        "path": model,
        "parameters": Layout::new(&config).parameter_count(),
        "batch": batch,
        "seq_len": seq_len,
        "dtype": dtype,
        "activation_checkpointing": checkpointing,
        "meshes": meshes.into_iter().map(row).collect::<Result<Vec<_>, Error>>()?,
    }))
}
