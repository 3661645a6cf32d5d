//! What a rank holds and sends, for any model on any mesh, without running it.

use elapid_tensor::{Checkpointing, DType, NormGroup};

use super::memory::{Demand, MARGIN, Memory, bytes};
use crate::parallel::Mesh;

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

/// What in `demand` does nothing on its mesh, or makes ranks hold what another setting would spare them, each with the
/// reason. A saving below a tenth is not worth a word.
pub fn waste(demand: &Demand<'_>) -> Vec<String> {
    let Mesh { dp, tp } = demand.mesh;
    // Without the program itself: that is what this process happens to have, and no setting changes it.
    let held = |demand: &Demand<'_>| {
        let memory = Memory::predict(demand);
        memory.total() - memory.program
    };
    let total = held(demand);
    let spared = |other: Demand<'_>| {
        let spared = total.saturating_sub(held(&other));
        (spared as f64 > MARGIN * total as f64).then(|| format!("{} of {}", bytes(spared), bytes(total)))
    };
    let mut lines = Vec::new();
    if demand.zero1 && dp == 1 {
        lines.push("--use-zero-1 does nothing: there is no other data-parallel rank to share with".into());
    }
    if demand.sequence_parallel && tp == 1 {
        lines.push(
            "--sequence-parallel-enabled does nothing: there is no other tensor-parallel rank to share with"
                .into(),
        );
    }
    if !demand.zero1
        && dp > 1
        && let Some(spared) = spared(Demand { zero1: true, ..*demand })
    {
        lines.push(format!(
            "each of {dp} data-parallel ranks holds all masters and moments; --use-zero-1 would spare {spared}"
        ));
    }
    if !demand.sequence_parallel
        && tp > 1
        && let Some(spared) = spared(Demand { sequence_parallel: true, ..*demand })
    {
        lines.push(format!(
            "each of {tp} tensor-parallel ranks holds what lies between the blocks as a whole; \
             --sequence-parallel-enabled would spare {spared}"
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn what_is_wasted_is_named() {
        let config = ModelConfig::preset("mamba2-130m").unwrap();
        let alone = Demand::alone(&config, (1, 2048), DType::Bf16, Checkpointing::None, 1);
        // However large the process is that asks: tests beside this one make it anything.
        let ballast = std::hint::black_box(vec![1_u8; 1 << 30]);
        let on = |dp, tp, zero1, sequence_parallel| {
            waste(&Demand { mesh: Mesh { dp, tp }, zero1, sequence_parallel, ..alone })
        };
        assert!(on(1, 1, false, false).is_empty() && on(4, 4, true, true).is_empty());
        let one = |lines: Vec<String>, start: &str, end: &str| {
            assert!(lines.len() == 1 && lines[0].starts_with(start) && lines[0].contains(end), "{lines:?}");
        };
        one(on(1, 1, true, false), "--use-zero-1 does nothing", "data-parallel");
        one(on(1, 1, false, true), "--sequence-parallel-enabled does nothing", "tensor-parallel");
        one(on(8, 1, false, false), "each of 8 data-parallel ranks", "--use-zero-1 would spare");
        one(
            on(1, 8, false, false),
            "each of 8 tensor-parallel ranks",
            "--sequence-parallel-enabled would spare",
        );
        // With two ranks in fp32 the shards' own buffers are as large as what they spare.
        assert!(waste(&Demand { mesh: Mesh { dp: 2, tp: 1 }, dtype: DType::F32, ..alone }).is_empty());
        drop(ballast);
    }
}
