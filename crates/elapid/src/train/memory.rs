//! Peak memory of a training run, known before it starts.
//!
//! The CPU backend keeps blocks of memory by size and hands them out again (`elapid-cpu`, `memory`), so what stays
//! resident follows from the sizes that the ops ask for and from how long they keep them. Two micro-steps are played
//! through on a model of that pool, op by op, and the peak is read off; nothing is computed or allocated. Each
//! function below stands for the op of its name and changes with it; `tests/memory.rs` compares with a real run.

use std::collections::BTreeMap;
use std::fmt;

use elapid_tensor::{Checkpointing, DType};

use crate::Error;
use crate::config::ModelConfig;
use crate::memory::available;
use crate::model::layout::Layout;

/// What the program holds apart from tensors on each thread: stack, and the packed operands of matrix products.
const THREAD: u64 = 2 << 20;
/// Beyond this share of the memory that is free a run is warned of, or refused, by what the prediction may be off.
const MARGIN: f64 = 0.1;

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
    /// Worker threads.
    pub threads: usize,
    /// B and L of the batches of an evaluation: a last, smaller batch has blocks of sizes of its own.
    pub evaluation: &'a [(usize, usize)],
    /// Whether the masters before each update are kept, to compare.
    pub log_norms: bool,
}

/// Predicted memory of a run at its peak, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// fp32 masters, their bf16 copy where the model computes in bf16, their fp32 copy where norms are logged.
    pub parameters: u64,
    /// fp32 sums over micro-steps.
    pub gradients: u64,
    /// AdamW's two moments, fp32.
    pub moments: u64,
    /// What all layers keep between forward and backward.
    pub activations: u64,
    /// What single ops need while they run, and blocks that wait for their next use.
    pub transient: u64,
    /// The program itself and its threads.
    pub program: u64,
}

impl Memory {
    /// The prediction for `demand`.
    pub fn predict(demand: &Demand<'_>) -> Self {
        let elements = Layout::new(demand.config).flat.len() as u64;
        let copy = if demand.dtype == DType::F32 { 0 } else { 2 };
        let before = if demand.log_norms { 4 } else { 0 };
        let mut play = Play::new(demand);
        let held = play.micro_step();
        play.micro_step();
        for &(batch, length) in demand.evaluation {
            let mut evaluation = Play::new(&Demand { batch, length, ..*demand });
            std::mem::swap(&mut evaluation.pool, &mut play.pool);
            evaluation.inference();
            std::mem::swap(&mut evaluation.pool, &mut play.pool);
        }
        let within = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX).min(1 << 60);
        Self {
            parameters: (4 + copy + before) * elements,
            gradients: 4 * elements,
            moments: 8 * elements,
            activations: within(held),
            transient: within(play.pool.peak - held),
            program: status("VmRSS").unwrap_or(16 << 20) + THREAD * demand.threads as u64,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let Self { parameters, gradients, moments, activations, transient, program } = self;
        parameters + gradients + moments + activations + transient + program
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
                 memory; --ignore-memory-limit tries it all the same",
            )),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parameters, gradients, moments, activations, transient, program } = *self;
        let parts = [
            ("parameters", parameters),
            ("gradients", gradients),
            ("moments", moments),
            ("activations", activations),
            ("transient", transient),
            ("program", program),
        ];
        let parts: Vec<String> = parts.iter().map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
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

/// Free blocks beyond this are returned to the system when none of them fits: `MAX_IDLE_LINES` of the backend.
const MAX_IDLE: u128 = 1 << 30;

/// The backend's memory pool, without the memory. A block is its size; 128 bits, so that no --batch wraps it around.
#[derive(Default)]
struct Pool {
    free: BTreeMap<u128, u128>,
    idle: u128,
    live: u128,
    peak: u128,
}

impl Pool {
    fn take(&mut self, size: u128) -> u128 {
        let size = size.next_multiple_of(64);
        match self.free.get_mut(&size) {
            Some(count) if *count > 0 => {
                *count -= 1;
                self.idle -= size;
            }
            _ if self.idle > MAX_IDLE => {
                self.free.clear();
                self.idle = 0;
            }
            _ => {}
        }
        self.live += size;
        self.peak = self.peak.max(self.live + self.idle);
        size
    }

    fn give(&mut self, blocks: impl IntoIterator<Item = u128>) {
        for size in blocks {
            self.live -= size;
            self.idle += size;
            *self.free.entry(size).or_default() += 1;
        }
    }
}

/// One run, played through.
struct Play {
    pool: Pool,
    /// B·L.
    rows: u128,
    batch: u128,
    threads: u128,
    /// Bytes of an activation's element, and of the residual stream's.
    compute: u128,
    residual: u128,
    layers: usize,
    checkpointing: Checkpointing,
    /// D, E, C, H, V.
    d: u128,
    e: u128,
    c: u128,
    h: u128,
    v: u128,
    /// E + C + H.
    proj: u128,
    /// P, N, K.
    p: u128,
    n: u128,
    k: u128,
    /// Chunk length and chunks of a sequence.
    q: u128,
    chunks: u128,
    /// Blocks of heads over all groups.
    blocks: u128,
}

const F32: u128 = 4;

impl Play {
    fn new(demand: &Demand<'_>) -> Self {
        let spec = demand.config.spec();
        let compute = if demand.dtype == DType::F32 { 4 } else { 2 };
        // The CPU scan's own limits: `MAX_CHUNK` and `HEAD_BLOCK` of its `mamba2`.
        let q = spec.chunk.min(128).min(demand.length).max(1);
        Self {
            pool: Pool::default(),
            rows: (demand.batch * demand.length) as u128,
            batch: demand.batch as u128,
            threads: demand.threads as u128,
            compute,
            residual: if demand.config.residual_in_fp32 { F32 } else { compute },
            layers: demand.config.num_hidden_layers,
            checkpointing: demand.checkpointing,
            d: demand.config.hidden_size as u128,
            e: spec.inner() as u128,
            c: spec.conv_channels() as u128,
            h: spec.heads as u128,
            v: demand.config.vocab_size as u128,
            proj: spec.projection() as u128,
            p: spec.head_dim as u128,
            n: spec.state as u128,
            k: spec.conv_kernel as u128,
            q: q as u128,
            chunks: demand.length.div_ceil(q) as u128,
            blocks: (spec.groups * (spec.heads / spec.groups).div_ceil(8)) as u128,
        }
    }

    /// Forward and backward of one batch. Gives the bytes that are held between the two.
    fn micro_step(&mut self) -> u128 {
        let Self { rows, d, compute, residual, .. } = *self;
        let mut x = self.pool.take(rows * d * residual); // embedding
        let mut kept = Vec::new();
        for _ in 0..self.layers {
            let (out, mut saved) = self.layer(self.checkpointing == Checkpointing::None);
            saved.push(x);
            kept.push(saved);
            x = out;
        }
        let hidden = self.pool.take(rows * d * compute); // final norm

        // head_loss computes value and adjoint at once.
        let dx = self.pool.take(rows * d * F32);
        self.head();
        let dy = self.round(dx, rows * d);
        self.pool.give([hidden]);
        let held = self.pool.live;

        let mut cotangent = self.pool.take(rows * d * residual); // final norm
        self.pool.give([dy, x]);
        for saved in kept.into_iter().rev() {
            cotangent = self.layer_adjoint(saved, cotangent);
        }
        let dy = self.cast(rows * d, residual, F32); // embedding
        self.pool.give(dy.into_iter().chain([cotangent]));
        held
    }

    /// The loss of one batch, for an evaluation.
    fn inference(&mut self) {
        let Self { rows, d, compute, residual, .. } = *self;
        let mut x = self.pool.take(rows * d * residual); // embedding
        for _ in 0..self.layers {
            let (out, _) = self.layer(false);
            self.pool.give([x]);
            x = out;
        }
        let hidden = self.pool.take(rows * d * compute); // final norm
        self.head();
        self.pool.give([x, hidden]);
    }

    /// What head_loss needs for a moment: the logits of a block of positions, and fp32 copies of its operands.
    fn head(&mut self) {
        let Self { rows, d, v, compute, .. } = *self;
        let x32 = self.cast(rows * d, compute, F32);
        let weight = self.cast(v * d, compute, F32);
        let block = ((8 << 20) / v).max(16).min(rows);
        let logits = self.pool.take(block * v * F32);
        self.pool.give([logits].into_iter().chain(weight).chain(x32));
    }

    /// One layer: its output and what the ops save. The last of what is saved, the layer's input, is the caller's.
    fn layer(&mut self, save: bool) -> (u128, Vec<u128>) {
        let Self { rows, d, e, proj, compute, residual, .. } = *self;
        let normed = self.pool.take(rows * d * compute);
        let projected = self.linear(d, proj);
        let (y, mut saved) = self.mamba2(save);
        let out = self.linear(e, d);
        let sum = self.pool.take(rows * d * residual);
        self.pool.give([out]);
        // The order in which the adjoints let go of them.
        saved = [vec![normed, projected], saved, vec![y]].concat();
        if !save {
            self.pool.give(saved.drain(..));
        }
        (sum, saved)
    }

    /// The adjoint of one layer: from the cotangent of its output to that of its input.
    fn layer_adjoint(&mut self, mut saved: Vec<u128>, dy: u128) -> u128 {
        let Self { rows, d, e, proj, compute, residual, .. } = *self;
        let x = saved.pop().expect("a layer saves its input");
        let again = match self.checkpointing {
            Checkpointing::None => None,
            Checkpointing::Block => {
                let (out, inside) = self.layer(true);
                saved = inside;
                Some(out)
            }
        };
        let y = saved.pop().expect("the mixer's output");
        // add: the residual's share is dy itself.
        let d_out = self.cast(rows * d, residual, compute);
        let dy_mixer = self.linear_adjoint(e, d);
        self.pool.give(d_out.into_iter().chain([y]));
        let d_projected = self.mamba2_adjoint();
        let normed = saved.remove(0);
        self.pool.give(saved.into_iter().chain([dy_mixer]));
        let d_normed = self.linear_adjoint(d, proj);
        self.pool.give([d_projected, normed]);
        let dx_norm = self.pool.take(rows * d * residual);
        let dx = self.pool.take(rows * d * residual); // sum of the two ways
        self.pool.give([d_normed, dx_norm, dy, x].into_iter().chain(again));
        dx
    }

    /// `[rows, input]` → `[rows, output]`: the product is fp32 and rounded afterwards.
    fn linear(&mut self, input: u128, output: u128) -> u128 {
        let y = self.pool.take(self.rows * output * F32);
        let x32 = self.cast(self.rows * input, self.compute, F32);
        let weight = self.cast(output * input, self.compute, F32);
        self.pool.give(weight.into_iter().chain(x32));
        self.round(y, self.rows * output)
    }

    fn linear_adjoint(&mut self, input: u128, output: u128) -> u128 {
        let dy = self.cast(self.rows * output, self.compute, F32);
        let x = self.cast(self.rows * input, self.compute, F32);
        let weight = self.cast(output * input, self.compute, F32);
        let dx = self.pool.take(self.rows * input * F32);
        let dx = self.round(dx, self.rows * input);
        self.pool.give(weight.into_iter().chain(x).chain(dy));
        dx
    }

    /// The mixer: its output `[rows, E]`, and what it saves: the scan's output in fp32 and the final state.
    fn mamba2(&mut self, save: bool) -> (u128, Vec<u128>) {
        let Self { rows, batch, threads, compute, e, c, p, n, k, q, .. } = *self;
        let front = self.front(false);
        let states = self.states();
        self.scratch(threads, q * p);
        let last = self.pool.take(batch * e * n * F32);
        let y = self.pool.take(rows * e * F32);
        self.scratch(threads, 2 * q * q + q * p);
        self.pool.give(front.into_iter().chain([states]));
        let out = self.pool.take(rows * e * compute);
        let conv = self.pool.take(batch * (k - 1) * c * F32);
        if !save {
            self.pool.give([y]);
            return (out, vec![last, conv]);
        }
        (out, vec![y, last, conv])
    }

    fn mamba2_adjoint(&mut self) -> u128 {
        let Self { rows, batch, threads, e, c, h, proj, p, n, k, q, chunks, blocks, .. } = *self;
        let front = self.front(true);
        let states = self.states();
        self.scratch(threads, q * p);
        self.scratch(1, batch * e * n); // state after the last chunk
        let projected = self.pool.take(rows * proj * F32);
        let d_scan = self.pool.take(rows * e * F32);
        self.scratch(1, rows.div_ceil(16) * e); // partial sums of the gated norm's weight
        let d_states = self.states();
        self.scratch(threads, q * p);
        let d_initial = self.pool.take(batch * e * n * F32);
        let act = self.pool.take(rows * c * F32);
        let per_block = self.pool.take(blocks * rows * 2 * n * F32);
        let steps = [(); 2].map(|()| self.pool.take(h * rows * F32));
        self.scratch(threads, 4 * q * q + 2 * q * p + q * n);
        self.pool.give([d_scan, states, d_states]);
        let partial = self.pool.take(batch * chunks * (k + 1) * c * F32);
        self.scratch(threads, (q + k - 1) * c);
        self.pool.give([partial]);
        let d_projected = self.round(projected, rows * proj);
        self.pool.give(front.into_iter().chain([d_initial, act, per_block]).chain(steps));
        d_projected
    }

    /// Conv output (for the adjoint before SiLU too), Δt and its cumulative sum.
    fn front(&mut self, before_silu: bool) -> Vec<u128> {
        let Self { rows, threads, c, h, k, q, .. } = *self;
        let conv = (0..1 + u128::from(before_silu)).map(|_| rows * c);
        let blocks = conv.chain([h * rows, h * rows]).map(|len| self.pool.take(len * F32)).collect();
        self.scratch(threads, (q + k - 1) * c + c);
        blocks
    }

    /// `[B, chunks, H, P, N]`.
    fn states(&mut self) -> u128 {
        self.pool.take(self.batch * self.chunks * self.e * self.n * F32)
    }

    /// `count` pieces of `len` numbers at a time, for a moment.
    fn scratch(&mut self, count: u128, len: u128) {
        let blocks: Vec<u128> = (0..count).map(|_| self.pool.take(len * F32)).collect();
        self.pool.give(blocks);
    }

    /// A copy in another element size; None where it is that size already.
    fn cast(&mut self, len: u128, from: u128, to: u128) -> Option<u128> {
        (from != to).then(|| self.pool.take(len * to))
    }

    /// An fp32 result in the compute dtype.
    fn round(&mut self, block: u128, len: u128) -> u128 {
        match self.cast(len, F32, self.compute) {
            None => block,
            Some(rounded) => {
                self.pool.give([block]);
                rounded
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(config: &ModelConfig) -> Demand<'_> {
        let checkpointing = Checkpointing::None;
        Demand {
            config,
            batch: 3,
            length: 64,
            dtype: DType::F32,
            checkpointing,
            threads: 2,
            evaluation: &[],
            log_norms: false,
        }
    }

    /// The table of docs/guide.md.
    #[test]
    fn layers_keep_what_the_guide_says() {
        let mut config = ModelConfig { residual_in_fp32: true, ..ModelConfig::preset("tiny").unwrap() };
        let spec = config.spec();
        let (rows, d, e) = (3 * 64, 128, 256);
        let held = |config: &ModelConfig, dtype, checkpointing| {
            Memory::predict(&Demand { dtype, checkpointing, ..demand(config) }).activations
        };
        for (dtype, s) in [(DType::F32, 4), (DType::Bf16, 2)] {
            let state = 3 * (e * spec.state + 3 * spec.conv_channels()) * 4;
            let layer = rows * (4 * d + s * d + s * spec.projection() + s * e + 4 * e) + state;
            for (checkpointing, layer) in [(Checkpointing::None, layer), (Checkpointing::Block, rows * 4 * d)]
            {
                config.num_hidden_layers = 7;
                let seven = held(&config, dtype, checkpointing);
                config.num_hidden_layers = 3;
                let three = held(&config, dtype, checkpointing);
                assert_eq!(seven - three, 4 * layer as u64, "{dtype:?}, {checkpointing:?}");
            }
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

    #[test]
    fn the_pool_is_that_of_the_backend() {
        let mut pool = Pool::default();
        let blocks = [pool.take(100), pool.take(100), pool.take(64)];
        assert_eq!(blocks, [128, 128, 64]);
        pool.give(blocks);
        assert_eq!(pool.take(120), 128);
        assert_eq!((pool.peak, pool.live, pool.idle), (320, 128, 192));
        // Another size finds nothing among the free ones, which stay.
        pool.take(256);
        assert_eq!(pool.peak, 576);
        // Above 1 GiB they go.
        let large = pool.take(2 << 30);
        pool.give([large]);
        pool.take(4096);
        assert_eq!(pool.idle, 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_what_is_used() {
        assert!(peak_resident().unwrap() >= status("VmRSS").unwrap());
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
