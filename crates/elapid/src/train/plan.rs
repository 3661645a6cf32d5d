//! What a rank holds and sends, for any model on any mesh, without running it.

use elapid_tensor::{Checkpointing, DType, NormGroup};

use super::memory::Demand;

/// Bytes that a rank sends to its neighbours in a ring. With r ranks, a sum of n bytes over all of them makes each send
/// 2·n·(r − 1)/r, and a gather or a scattered sum of n bytes in all n·(r − 1)/r.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Between tensor-parallel ranks, a micro-step.
    pub micro_step: u64,
    /// Between tensor-parallel ranks, an update: gradients of weights that several of them hold.
    pub replicas: u64,
    /// Between data-parallel ranks, an update: gradients, and with ZeRO-1 parameters.
    pub update: u64,
}

impl Traffic {
    /// The prediction for `demand`. With T = B·L positions (B·⌈L/tp⌉·tp with sequence parallelism), s bytes of a number in
    /// compute dtype, t of the residual stream, f = (tp − 1)/tp and n elements of a rank's flat buffers:
    ///
    /// - a layer sums its output over the ranks, 2·f·T·D·s, and in the adjoint the cotangent of its input, as much again;
    ///   with sequence parallelism each of the two is a gather and a scattered sum, which together send the same. Where
    ///   layers run again for their adjoint, the first half happens twice;
    /// - the embedding's output, 2·f·T·D·t, and the cotangent of the head's input, 2·f·T·D·s;
    /// - of the softmax three numbers a position and rank, f·12·T·tp; of a gated norm whose means ranks share, k sums of
    ///   squares a position forward and 2·k backward, where k counts all means of a position;
    /// - an update sums gradients, 2·f·4·n over dp ranks; with ZeRO-1 it scatters their sum, f·4·n, and gathers
    ///   parameters in compute dtype, f·s·n, with those that stay fp32.
    pub fn predict(demand: &Demand<'_>) -> Self {
        let Demand { config, mesh, .. } = *demand;
        let layout = demand.layout();
        let (dp, tp) = (mesh.dp as u64, mesh.tp as u64);
        let over = |n: u64, ranks: u64| n * (ranks - 1) / ranks;

        let (batch, length) = (demand.batch as u64, demand.length as u64);
        let parallel = demand.sequence_parallel && tp > 1;
        let positions = batch * if parallel { length.next_multiple_of(tp) } else { length };
        let compute = if demand.dtype == DType::F32 { 4 } else { 2 };
        let residual = if config.residual_in_fp32 { 4 } else { compute };
        let layers = config.num_hidden_layers as u64;
        let passes = if demand.checkpointing == Checkpointing::Block { 2 } else { 1 };
        let stream = positions * config.hidden_size as u64;
        let sums = layers * (passes + 1) * stream * compute + stream * (residual + compute);
        let means = match (layout.spec.norm_ranks, config.norm_group) {
            (1, _) => 0,
            (_, NormGroup::PerGroup) => config.n_groups as u64,
            (_, NormGroup::Across) => 1,
        };
        let norms = layers * (passes + 2) * batch * length * means * 4;
        let micro_step = over(2 * sums, tp) + over(2 * norms, tp) + over(12 * batch * length * tp, tp);

        let partial = |row| {
            let replicas = layout.replicas(row, parallel).into_iter().filter(|replica| replica.partial);
            replicas.map(|r| (r.range.len() * mesh.tp / r.copies) as u64).sum::<u64>()
        };
        let replicas = over(2 * 4 * layout.flat.rows().map(partial).sum::<u64>(), tp);

        let n = layout.flat.len() as u64;
        let update = if demand.zero1 && dp > 1 {
            let ends = layout.flat.len() - layout.flat.layers * layout.decayed.0 - layout.decayed.1;
            let fp32 = if demand.dtype == DType::F32 { 0 } else { 2 * 4 * ends as u64 };
            over(4 * n + compute * n + fp32, dp)
        } else {
            over(2 * 4 * n, dp)
        };
        Self { micro_step, replicas, update }
    }
}
