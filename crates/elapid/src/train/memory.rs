//! Peak memory of a training run, known before it starts.
//!
//! The CPU backend keeps blocks of memory by size and hands them out again (`elapid-cpu`, `memory`), so what stays
//! resident follows from the sizes that the ops ask for and from how long they keep them. Two micro-steps are played
//! through on a model of that pool (`play`), op by op, and the peak is read off; nothing is computed or allocated.
//! `tests/memory.rs` compares with a real run.

mod play;

use std::fmt;

use elapid_tensor::{Checkpointing, DType};

use super::trainer::UNDER_WAY;
use crate::Error;
use crate::config::ModelConfig;
use crate::memory::available;
use crate::model::layout::Layout;
use crate::model::shard::Share;
use crate::parallel::Mesh;
use play::Play;

/// What the program holds apart from tensors on each thread: stack, and the packed operands of matrix products.
const THREAD: u64 = 2 << 20;
/// Beyond this share of the memory that is free a run is warned of, or refused, by what the prediction may be off.
pub(super) const MARGIN: f64 = 0.1;

/// The run that is about to start.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// B of a micro-step.
    pub batch: usize,
    /// L.
    pub length: usize,
    /// Compute dtype.
    pub dtype: DType,
    /// What layers keep.
    pub checkpointing: Checkpointing,
    /// Worker threads of a rank.
    pub threads: usize,
    /// The ranks of the run.
    pub mesh: Mesh,
    /// How many of them are threads of this process.
    pub ranks_here: usize,
    /// Whether masters and moments are cut over the data-parallel ranks.
    pub zero1: bool,
    /// Whether the residual stream is cut along the sequence, over the tensor-parallel ranks.
    pub sequence_parallel: bool,
    /// B and L of the batches of an evaluation: a last, smaller batch has blocks of sizes of its own.
    pub evaluation: &'a [(usize, usize)],
    /// Whether the masters before each update are kept, to compare.
    pub log_norms: bool,
    /// Whether masters and moments are copied, to be written while the run goes on.
    pub saves: bool,
    /// Whether each layer's state is carried from micro-step to micro-step.
    pub carries: bool,
}

/// Predicted memory of a run at its peak, in bytes: of all its ranks in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// fp32 masters, their bf16 copy where the model computes in bf16, their fp32 copy where norms are logged.
    pub parameters: u64,
    /// fp32 sums over micro-steps.
    pub gradients: u64,
    /// AdamW's two moments, fp32.
    pub moments: u64,
    /// Copies of masters and moments that are written while the run goes on.
    pub copies: u64,
    /// What all layers keep between forward and backward.
    pub activations: u64,
    /// What single ops and the export need while they run, and blocks that wait for their next use.
    pub transient: u64,
    /// The program itself and its threads.
    pub program: u64,
}

impl<'a> Demand<'a> {
    /// That of one rank on its own, with micro-steps of `batch` sequences of `length`, nothing to evaluate on, no norms to
    /// log and no states to carry.
    pub fn alone(
        config: &'a ModelConfig,
        (batch, length): (usize, usize),
        dtype: DType,
        checkpointing: Checkpointing,
        threads: usize,
    ) -> Self {
        Self {
            config,
            batch,
            length,
            dtype,
            checkpointing,
            threads,
            mesh: Mesh::SINGLE,
            ranks_here: 1,
            zero1: false,
            sequence_parallel: false,
            evaluation: &[],
            log_norms: false,
            saves: false,
            carries: false,
        }
    }

    /// That of the first rank; no other has more.
    pub(super) fn layout(&self) -> Layout {
        Layout::sharded(self.config, Share { ranks: self.mesh.tp, rank: 0 }).dealt_to(self.mesh.dp)
    }
}

impl Memory {
    /// The prediction for `demand`. With n the elements of a rank's flat buffers, of which m are not decayed, and dp
    /// data-parallel ranks, in bytes:
    ///
    /// | | fp32 | bf16 | ZeRO-1, fp32 | ZeRO-1, bf16 |
    /// |---|---|---|---|---|
    /// | parameters | 4·n | 6·n | 4·n + 4·n/dp | 2·n + 4·m + 4·n/dp |
    /// | gradients | 4·n | 4·n | 4·n + 4·n/dp | 4·n + 4·n/dp |
    /// | moments | 8·n | 8·n | 8·n/dp | 8·n/dp |
    /// | copies | 12·n | 12·n | 12·n/dp | 12·n/dp |
    ///
    /// where copies are made only of what no other rank writes, and only where the run saves as it goes on;
    /// and with several data-parallel ranks copies of two layers' gradients, which travel while the backward pass goes
    /// on.
    pub fn predict(demand: &Demand<'_>) -> Self {
        let layout = demand.layout();
        let elements = layout.flat.len() as u64;
        let compute = if demand.dtype == DType::F32 { 4 } else { 2 };
        let shards = if demand.zero1 { demand.mesh.dp as u64 } else { 1 };
        // With shards the copy in compute dtype is there in any case, and of fp32 parameters an fp32 one.
        let copy = match (shards, demand.dtype) {
            (1, DType::F32) => 0,
            (1, _) | (_, DType::F32) => compute * elements,
            _ => {
                let flat = layout.flat;
                let decayed = flat.layers * layout.decayed.0 + layout.decayed.1;
                compute * elements + 4 * (flat.len() - decayed) as u64
            }
        };
        // Copies of the rows that travel while the backward pass goes on.
        let sending =
            if demand.mesh.dp > 1 { UNDER_WAY.min(layout.flat.layers) * layout.flat.row } else { 0 } as u64;
        let ranks = demand.ranks_here as u64;
        let before = if demand.log_norms { 4 } else { 0 };
        // Where data-parallel ranks hold the same, the first of them writes.
        let writers = if shards > 1 { ranks } else { ranks.min(demand.mesh.tp as u64) };
        let mut play = Play::new(demand);
        let held = play.micro_step();
        play.micro_step();
        for &(batch, length) in demand.evaluation {
            let mut evaluation = Play::new(&Demand { batch, length, ..*demand });
            std::mem::swap(&mut evaluation.pool, &mut play.pool);
            evaluation.inference();
            std::mem::swap(&mut evaluation.pool, &mut play.pool);
        }
        // The export gathers the largest tensor on the first rank, while all else is still there.
        let gathered = match demand.mesh.tp {
            1 => 0,
            _ => {
                4 * Layout::new(demand.config).iter().map(|(_, slot, _)| slot.len()).max().unwrap_or(0) as u64
            }
        };
        let within = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX).min(1 << 60);
        Self {
            parameters: ranks * ((4 + before) * elements / shards + copy),
            gradients: ranks
                * (4 * (elements + sending) + if shards > 1 { 4 * elements / shards } else { 0 }),
            moments: ranks * (8 * elements / shards),
            copies: if demand.saves { writers * (12 * elements / shards) } else { 0 },
            activations: within(held * u128::from(ranks)),
            transient: within((play.pool.peak - held) * u128::from(ranks)).saturating_add(gathered),
            program: status("VmRSS").unwrap_or(16 << 20) + THREAD * demand.threads as u64 * ranks,
        }
    }

    /// That of so many processes like this one.
    pub(super) fn of_processes(self, count: usize) -> Self {
        let times = |bytes: u64| bytes.saturating_mul(count as u64);
        Self {
            parameters: times(self.parameters),
            gradients: times(self.gradients),
            moments: times(self.moments),
            copies: times(self.copies),
            activations: times(self.activations),
            transient: times(self.transient),
            program: times(self.program),
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let Self { parameters, gradients, moments, copies, activations, transient, program } = self;
        parameters + gradients + moments + copies + activations + transient + program
    }

    /// Compares with what this machine has left, before anything of it is taken: refuses what will not fit, unless
    /// `anyway`, and gives a warning where it may not. Where the system does not say what is left, everything fits.
    ///
    /// # Errors
    /// The run needs at least a tenth more than there is.
    pub fn check(&self, anyway: bool) -> Result<Option<String>, Error> {
        match available() {
            Some(available) => self.fits(available, anyway),
            None => Ok(None),
        }
    }

    fn fits(&self, available: u64, anyway: bool) -> Result<Option<String>, Error> {
        let needed = self.total();
        let share = needed as f64 / available as f64;
        let message = format!(
            "the run needs about {} of memory ({self}), and {} are free",
            bytes(needed),
            bytes(available)
        );
        match share {
            _ if share < 1.0 - MARGIN => Ok(None),
            _ if share < 1.0 + MARGIN || anyway => {
                Ok(Some(format!("{message}: the system may end it, or slow down")))
            }
            _ => Err(Error::new(message).with_hint(
                "--activation-checkpointing block and a smaller --batch (with more --grad-accum-usteps) need less \
                 memory, as does --no-async-save; --ignore-memory-limit tries it all the same",
            )),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parameters, gradients, moments, copies, activations, transient, program } = *self;
        let parts = [
            ("parameters", parameters),
            ("gradients", gradients),
            ("moments", moments),
            ("copies", copies),
            ("activations", activations),
            ("transient", transient),
            ("program", program),
        ];
        let parts = parts.iter().filter(|(_, n)| *n > 0);
        let parts: Vec<String> = parts.map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
        f.write_str(&parts.join(", "))
    }
}

/// Bytes for people.
pub fn bytes(count: u64) -> String {
    match count as f64 / f64::from(1 << 20) {
        mebi if mebi < 10.0 => format!("{mebi:.1} MiB"),
        mebi if mebi < 10_000.0 => format!("{mebi:.0} MiB"),
        mebi => format!("{:.1} GiB", mebi / 1024.0),
    }
}

/// The most memory that this process has held so far, in bytes; None where the system does not say.
pub fn peak_resident() -> Option<u64> {
    status("VmHWM")
}

/// A line `field:  123 kB` of Linux's account of this process.
fn status(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(config: &ModelConfig) -> Demand<'_> {
        Demand::alone(config, (3, 64), DType::F32, Checkpointing::None, 2)
    }

    /// What a layer of `demand` keeps from forward to backward.
    fn layer(demand: Demand<'_>) -> u64 {
        let of = |num_hidden_layers| {
            let config = ModelConfig { num_hidden_layers, ..demand.config.clone() };
            Memory::predict(&Demand { config: &config, ..demand }).activations
        };
        (of(7) - of(3)) / 4
    }

    /// The formulas in the table of docs/guide.md, in its order.
    fn kept(demand: &Demand<'_>) -> [u64; 7] {
        let (spec, s) = (demand.config.spec(), if demand.dtype == DType::F32 { 4 } else { 2 });
        let (rows, d, e) = (demand.batch * demand.length, demand.config.hidden_size, spec.inner());
        let state = e * spec.state + (spec.conv_kernel - 1) * spec.conv_channels();
        let [first, carried] = [4 * rows * d, if demand.carries { 8 * demand.batch * state } else { 0 }];
        let chunks = demand.length.div_ceil(spec.chunk.min(128));
        let states = s * demand.batch * chunks * e * spec.state;
        [first, s * rows * d, s * rows * spec.projection(), 4 * rows * e, states, s * rows * e, carried]
            .map(|n| n as u64)
    }

    #[test]
    fn layers_keep_what_the_guide_says() {
        let config = ModelConfig { residual_in_fp32: true, ..ModelConfig::preset("tiny").unwrap() };
        for (dtype, carries) in
            [(DType::F32, false), (DType::F32, true), (DType::Bf16, false), (DType::Bf16, true)]
        {
            let demand = Demand { dtype, carries, ..demand(&config) };
            let all = kept(&demand);
            assert_eq!(layer(demand), all.iter().sum::<u64>(), "{dtype:?}");
            let again = Demand { checkpointing: Checkpointing::Block, ..demand };
            assert_eq!(layer(again), all[0] + all[6], "{dtype:?}");
        }
    }

    /// The figures in that table.
    #[test]
    fn a_layer_of_130m_keeps_the_bytes_of_the_guide() {
        let config = ModelConfig::preset("mamba2-130m").unwrap();
        let guide = include_str!("../../../../docs/guide.md");
        let number = |cell: &str| cell.replace(' ', "").parse::<u64>().ok();
        let rows: Vec<_> = guide
            .lines()
            .skip_while(|line| !line.starts_with("| kept by"))
            .skip(2)
            .map_while(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
            .map(|line| line.split('|').skip(3).map(number).collect::<Option<Vec<_>>>().unwrap())
            .collect();
        for (column, dtype) in [DType::F32, DType::Bf16].into_iter().enumerate() {
            let demand = Demand::alone(&config, (1, 2048), dtype, Checkpointing::None, 2);
            let all = kept(&Demand { carries: true, ..demand });
            let sum = layer(demand);
            let want: Vec<_> = all.into_iter().chain([sum, 24 * sum]).collect();
            assert_eq!(rows.iter().map(|row| row[column]).collect::<Vec<_>>(), want, "{dtype:?}");
        }
    }

    #[test]
    fn only_batches_of_another_size_add_to_the_memory() {
        let config = ModelConfig::preset("tiny").unwrap();
        let peak = |evaluation: &[(usize, usize)]| {
            Memory::predict(&Demand { evaluation, ..demand(&config) }).transient
        };
        assert_eq!(peak(&[(3, 64)]), peak(&[]));
        assert!(peak(&[(3, 64), (2, 64)]) > peak(&[]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let config = ModelConfig::preset("mamba2-130m").unwrap();
        let memory = Memory::predict(&demand(&config));
        assert_eq!(memory.parameters, 4 * Layout::new(&config).flat.len() as u64);
        let total = memory.total();
        assert_eq!(memory.fits(total * 2, false).unwrap(), None);
        for free in [total + total / 50, total - total / 50] {
            assert!(memory.fits(free, false).unwrap().unwrap().contains("may end it"));
        }
        let error = memory.fits(total / 2, false).unwrap_err();
        assert!(error.to_string().contains("activations"), "{error}");
        for flag in ["--activation-checkpointing block", "--batch", "--ignore-memory-limit"] {
            assert!(error.hint().unwrap().contains(flag));
        }
        assert!(memory.fits(total / 2, true).unwrap().is_some());
    }

    /// What is cut in the model is cut in the prediction, too.
    #[test]
    fn ranks_share_the_memory() {
        let config = ModelConfig { num_heads: 8, n_groups: 4, ..ModelConfig::preset("tiny").unwrap() };
        let on = |dp, tp, zero1, sequence_parallel, dtype| {
            let mesh = Mesh { dp, tp };
            Memory::predict(&Demand { mesh, zero1, sequence_parallel, dtype, ..demand(&config) })
        };
        let one = on(1, 1, false, false, DType::F32);
        let four = on(1, 4, false, false, DType::F32);
        assert!(four.moments < one.moments / 3 && four.activations < one.activations * 2 / 3);
        assert!(on(1, 4, false, true, DType::F32).activations < four.activations);
        // Nothing is cut without a neighbour to cut it with.
        let apart_from_program = |memory| Memory { program: 0, ..memory };
        assert_eq!(apart_from_program(on(1, 1, true, true, DType::F32)), apart_from_program(one));
        for (dtype, copy) in [(DType::F32, 4), (DType::Bf16, 2)] {
            let (whole, zero1) = (on(4, 1, false, false, dtype), on(4, 1, true, false, dtype));
            let n = whole.moments / 8;
            // Beside them, rows on their way to the other ranks, in either case.
            assert_eq!((zero1.moments, zero1.gradients), (2 * n, whole.gradients + n));
            assert!(whole.gradients > 4 * n);
            let ends = zero1.parameters - (copy + 1) * n;
            assert!(if dtype == DType::F32 { ends == 0 } else { ends > 0 && ends < n / 4 }, "{ends} of {n}");
        }
        let mesh = Mesh { dp: 1, tp: 4 };
        let here = Memory::predict(&Demand { mesh, ranks_here: 4, ..demand(&config) });
        assert_eq!((here.moments, here.activations), (4 * four.moments, 4 * four.activations));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_what_is_used() {
        let now = status("VmRSS").unwrap();
        assert!(peak_resident().unwrap() >= now);
        assert!(available().unwrap() > 1 << 20);
        assert_eq!(status("Vm"), None);
    }

    #[test]
    fn bytes_are_written_for_people() {
        assert_eq!(bytes(1_572_864), "1.5 MiB");
        assert_eq!(bytes(3000 << 20), "3000 MiB");
        assert_eq!(bytes(50 << 30), "50.0 GiB");
    }
}
