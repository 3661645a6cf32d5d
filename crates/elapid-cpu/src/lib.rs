//! The CPU backend: every op of the contract on the cores of one machine.
//!
//! Results are the same bits with any number of threads (see `parallel`); the instruction set is chosen at run time
//! (see [`Isa`]).

pub mod comm;
mod courier;
mod embedding;
mod head;
mod isa;
mod linear;
mod mamba2;
mod math;
mod matmul;
mod memory;
mod norm;
mod parallel;
mod peaks;
mod ranks;
mod tensor;
mod update;

use crate::isa::vectorize;
use std::sync::{Arc, OnceLock};

use elapid_tensor::{
    AdamW, Backend, Clipping, DType, Decayed, FlatShape, Group, Mamba2Grads, Mamba2Inputs, Mamba2Output,
    Mamba2Sinks, Mamba2Spec, Mamba2Weights, Row, Sink, Slot, State,
};
use half::bf16;

pub use isa::{Isa, features};
pub use matmul::tile_extents;
pub use peaks::Peaks;
pub use tensor::{Buffer, Tensor};

use comm::{Communicator, FloatsMut, Groups, Reduce};
use courier::Courier;
pub use courier::Pending;
use memory::Pool;
use parallel::{ROWS, Workers};
use tensor::Floats;

/// How a [`CpuBackend`] works. But for the instruction set of matrix products, none of what concerns one rank changes
/// results.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Worker threads; None: one a core.
    pub threads: Option<usize>,
    /// Path of the elementwise kernels; None: the best the machine can run.
    pub isa: Option<Isa>,
    /// Fill every piece of memory with NaN before it is used. For tests: finds reads of what was never written.
    pub poison: bool,
    /// The ranks it works with.
    pub groups: Groups,
}

/// Why a [`CpuBackend`] could not be made.
#[derive(Debug)]
pub enum CpuError {
    /// The threads could not be started.
    Threads(std::io::Error),
    /// This machine cannot run that path.
    Isa(Isa),
}

impl std::fmt::Display for CpuError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Threads(e) => write!(f, "worker threads could not be started: {e}"),
            Self::Isa(isa) => write!(f, "this machine has no {isa:?} instructions"),
        }
    }
}

impl std::error::Error for CpuError {}

/// The CPU as a device.
pub struct CpuBackend {
    workers: Workers,
    isa: Isa,
    pool: Arc<Pool>,
    groups: Groups,
    courier: OnceLock<Courier>,
}

impl CpuBackend {
    /// A backend with worker threads of its own.
    ///
    /// # Errors
    /// When threads cannot be started or the machine lacks the instruction set asked for.
    pub fn new(options: &CpuOptions) -> Result<Self, CpuError> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        if !Isa::available().contains(&isa) {
            return Err(CpuError::Isa(isa));
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or_else(cores).max(1);
        let workers = Workers::new(threads).map_err(CpuError::Threads)?;
        Ok(Self {
            workers,
            isa,
            pool: Pool::new(options.poison),
            groups: options.groups.clone(),
            courier: OnceLock::new(),
        })
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// The instruction-set path in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Measured rate of matrix products of `dtype` on this machine with these threads, in FLOP/s: what model FLOPs
    /// utilisation is a share of. Takes a few hundred milliseconds at most.
    pub fn measure_peak(&self, dtype: DType) -> f64 {
        const N: usize = 1024;
        let (wide, narrow);
        let operand = match dtype {
            DType::Bf16 => {
                narrow = vec![bf16::from_f32(0.5); N * N];
                Floats::Bf16(&narrow)
            }
            _ => {
                wide = vec![0.5f32; N * N];
                Floats::F32(&wide)
            }
        };
        let operand = matmul::Mat::new(operand, N, N);
        let mut c = vec![0.0f32; N * N];
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            let start = std::time::Instant::now();
            matmul::matmul(self, matmul::Into::Set, &mut c, N, operand, operand);
            best = best.min(start.elapsed().as_secs_f64());
        }
        2.0 * (N * N * N) as f64 / best
    }

    /// The ranks of a group.
    fn group(&self, group: Group) -> &Arc<dyn Communicator> {
        match group {
            Group::Tp => &self.groups.tp,
            Group::Dp => &self.groups.dp,
        }
    }

    /// A tensor made row by row: `f(row, output row, scratch of `scratch` numbers)`. Output rows are fp32 and hold
    /// anything at first; they are rounded where `dtype` is bf16.
    fn build(
        &self,
        shape: &[usize],
        dtype: DType,
        scratch: usize,
        f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) -> Tensor {
        let width = shape.last().copied().unwrap_or(1);
        let len = shape.iter().product();
        match dtype {
            DType::F32 => {
                let mut block = self.pool.take::<f32>(len);
                self.workers.rows(block.as_mut_slice::<f32>(len), width, ROWS, |first, rows| {
                    let mut spare = self.pool.take::<f32>(scratch);
                    let spare = spare.as_mut_slice(scratch);
                    for (row, out) in (first..).zip(rows.chunks_exact_mut(width)) {
                        f(row, out, spare);
                    }
                });
                Tensor::new(block, shape, dtype)
            }
            DType::Bf16 => {
                let mut block = self.pool.take::<bf16>(len);
                self.workers.rows(block.as_mut_slice::<bf16>(len), width, ROWS, |first, rows| {
                    let mut spare = self.pool.take::<f32>(scratch + width);
                    let (spare, wide) = spare.as_mut_slice::<f32>(scratch + width).split_at_mut(scratch);
                    for (row, out) in (first..).zip(rows.chunks_exact_mut(width)) {
                        f(row, wide, spare);
                        vectorize!(self.isa, || tensor::narrow(wide, out));
                    }
                });
                Tensor::new(block, shape, dtype)
            }
            DType::I32 => panic!("rows of floats cannot be built into an integer tensor"),
        }
    }

    /// `x` in `dtype`: shared where it has it already.
    fn cast_to(&self, x: &Tensor, dtype: DType) -> Tensor {
        if x.dtype() == dtype {
            return x.clone();
        }
        const WIDTH: usize = 4096;
        let len = x.len();
        match dtype {
            DType::F32 => {
                let mut block = self.pool.take::<f32>(len);
                self.workers.rows(block.as_mut_slice::<f32>(len), 1, WIDTH, |first, part| {
                    vectorize!(self.isa, || x.floats().load(first, part));
                });
                Tensor::new(block, x.shape(), dtype)
            }
            DType::Bf16 => {
                let mut block = self.pool.take::<bf16>(len);
                self.workers.rows(block.as_mut_slice::<bf16>(len), 1, WIDTH, |first, part| {
                    vectorize!(self.isa, || x.floats().load_bf16(first, part));
                });
                Tensor::new(block, x.shape(), dtype)
            }
            DType::I32 => panic!("floats are never cast to integers"),
        }
    }

    /// A small fp32 tensor from host values.
    fn scalars(&self, values: &[f32], shape: &[usize]) -> Tensor {
        let mut block = self.pool.take::<f32>(values.len());
        block.as_mut_slice::<f32>(values.len()).copy_from_slice(values);
        Tensor::new(block, shape, DType::F32)
    }

    /// Sums `values` with those of the neighbouring tensor-parallel ranks: `ranks` of them together, from a multiple of
    /// that number on.
    fn sum_over_neighbours(&self, values: &mut [f32], ranks: usize) {
        let tp = &self.groups.tp;
        if ranks == tp.size() {
            tp.all_reduce(FloatsMut::F32(values), Reduce::Sum);
            return;
        }
        // One sum over all ranks, in which each fills in the place of its own neighbourhood.
        let mut all = vec![0.0; tp.size() / ranks * values.len()];
        let own = tp.rank() / ranks * values.len();
        let own = own..own + values.len();
        all[own.clone()].copy_from_slice(values);
        tp.all_reduce(FloatsMut::F32(&mut all), Reduce::Sum);
        values.copy_from_slice(&all[own]);
    }

    /// Σ over rows of `x` `[rows, width]`.
    fn sum_rows(&self, x: &[f32], width: usize) -> Vec<f32> {
        const COLUMNS: usize = 64;
        let mut sums = vec![0.0; width];
        self.workers.rows(&mut sums, 1, COLUMNS, |first, part| {
            for row in x.chunks_exact(width) {
                part.iter_mut().zip(&row[first..]).for_each(|(s, x)| *s += x);
            }
        });
        sums
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Buffer = Buffer;
    type Pending = Pending;

    fn tensor(&self, values: &[f32], shape: &[usize], dtype: DType) -> Tensor {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        self.cast_to(&self.scalars(values, shape), dtype)
    }

    fn tensor_i32(&self, values: &[i32], shape: &[usize]) -> Tensor {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let mut block = self.pool.take::<i32>(values.len());
        block.as_mut_slice::<i32>(values.len()).copy_from_slice(values);
        Tensor::new(block, shape, DType::I32)
    }

    fn values(&self, tensor: &Tensor) -> Vec<f32> {
        let mut values = vec![0.0; tensor.len()];
        tensor.floats().load(0, &mut values);
        values
    }

    fn shape(&self, tensor: &Tensor) -> Vec<usize> {
        tensor.shape().to_vec()
    }

    fn buffer(&self, shape: FlatShape, dtype: DType) -> Buffer {
        let block = match dtype {
            DType::F32 => self.pool.zeros::<f32>(shape.len()),
            DType::Bf16 => self.pool.zeros::<bf16>(shape.len()),
            DType::I32 => panic!("flat buffers hold floats"),
        };
        Buffer::new(block, shape, dtype)
    }

    fn write_slot(&self, buffer: &mut Buffer, slot: &Slot, values: &[f32]) {
        let range = buffer.shape().range(slot);
        match buffer.dtype() {
            DType::F32 => buffer.f32_mut()[range].copy_from_slice(values),
            _ => tensor::narrow(values, &mut buffer.slice_mut::<bf16>()[range]),
        }
    }

    fn view(&self, buffer: &Buffer, slot: &Slot) -> Tensor {
        buffer.view(slot)
    }

    fn cast_buffer(&self, from: &Buffer, to: &mut Buffer) {
        const PIECE: usize = 1 << 16;
        assert_eq!(from.shape(), to.shape());
        let from = from.floats();
        match to.dtype() {
            DType::F32 => self.workers.rows(to.f32_mut(), 1, PIECE, |first, part| {
                vectorize!(self.isa, || from.load(first, part));
            }),
            _ => self.workers.rows(to.slice_mut::<bf16>(), 1, PIECE, |first, part| {
                vectorize!(self.isa, || from.load_bf16(first, part));
            }),
        }
    }

    fn zero_buffer(&self, buffer: &mut Buffer) {
        const PIECE: usize = 1 << 18;
        match buffer.dtype() {
            DType::F32 => self.workers.rows(buffer.f32_mut(), 1, PIECE, |_, part| part.fill(0.0)),
            _ => self.workers.rows(buffer.slice_mut::<bf16>(), 1, PIECE, |_, part| part.fill(bf16::ZERO)),
        }
    }

    fn embedding(&self, table: &Tensor, ids: &Tensor, out: DType) -> Tensor {
        embedding::forward(self, table, ids, out)
    }

    fn embedding_adjoint(&self, ids: &Tensor, dy: &Tensor, d_table: Sink<'_, Self>) {
        embedding::adjoint(self, ids, dy, d_table);
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32, out: DType) -> Tensor {
        norm::forward(self, x, weight, eps, out)
    }

    fn rms_norm_adjoint(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        dy: &Tensor,
        d_weight: Sink<'_, Self>,
    ) -> Tensor {
        norm::adjoint(self, x, weight, eps, dy, d_weight)
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        linear::forward(self, x, weight, bias)
    }

    fn linear_adjoint(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        d_weight: Sink<'_, Self>,
        d_bias: Option<&Slot>,
    ) -> Tensor {
        linear::adjoint(self, x, weight, dy, d_weight, d_bias)
    }

    fn add_bias(&self, x: &Tensor, bias: &Tensor) -> Tensor {
        let width = x.last();
        assert_eq!(bias.shape(), [width]);
        self.build(x.shape(), x.dtype(), width, |row, out, scratch| {
            vectorize!(self.isa, || {
                x.floats().load(row * width, out);
                let bias = bias.floats().row(0, scratch);
                out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
            })
        })
    }

    fn add_bias_adjoint(&self, dy: &Tensor, d_bias: Sink<'_, Self>) {
        let dy = self.cast_to(dy, DType::F32);
        let sums = self.sum_rows(dy.f32(), dy.last());
        d_bias.buffer.slot_mut(d_bias.slot).iter_mut().zip(&sums).for_each(|(g, s)| *g += s);
    }

    fn resize(&self, x: &Tensor, len: usize) -> Tensor {
        let mut shape = x.shape().to_vec();
        let old = std::mem::replace(&mut shape[1], len);
        if old == len {
            return x.clone();
        }
        let width = shape[2..].iter().product::<usize>();
        // Rows of a sequence are the last axis here, whatever they are made of.
        let rows = self.build(&[shape[0] * len, width], x.dtype(), 0, |row, out, _| {
            let (b, l) = (row / len, row % len);
            if l < old {
                vectorize!(self.isa, || x.floats().load((b * old + l) * width, out));
            } else {
                out.fill(0.0);
            }
        });
        rows.reshaped(&shape)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        assert_eq!(a.shape(), b.shape());
        let width = a.last();
        self.build(a.shape(), a.dtype(), width, |row, out, scratch| {
            vectorize!(self.isa, || {
                a.floats().load(row * width, out);
                let b = b.floats().row(row * width, scratch);
                out.iter_mut().zip(b).for_each(|(o, b)| *o += b);
            })
        })
    }

    fn cast(&self, x: &Tensor, dtype: DType) -> Tensor {
        self.cast_to(x, dtype)
    }

    fn dtype(&self, x: &Tensor) -> DType {
        x.dtype()
    }

    fn mamba2(
        &self,
        spec: &Mamba2Spec,
        inputs: Mamba2Inputs<Tensor>,
        weights: &Mamba2Weights<Tensor>,
        save: bool,
    ) -> Mamba2Output<Tensor> {
        mamba2::forward(self, spec, inputs, weights, save)
    }

    fn mamba2_adjoint(
        &self,
        spec: &Mamba2Spec,
        inputs: &Mamba2Inputs<Tensor>,
        weights: &Mamba2Weights<Tensor>,
        saved: &[Tensor],
        dy: &Tensor,
        d_state: Option<&State<Tensor>>,
        grads: &mut Buffer,
        sinks: &Mamba2Sinks<'_>,
    ) -> Mamba2Grads<Tensor> {
        mamba2::adjoint(self, spec, inputs, weights, saved, dy, d_state, grads, sinks)
    }

    fn head_loss(&self, x: &Tensor, weight: &Tensor, labels: &Tensor, vocab: usize) -> Tensor {
        head::forward(self, x, weight, labels, vocab)
    }

    fn head_loss_adjoint(
        &self,
        x: &Tensor,
        weight: &Tensor,
        labels: &Tensor,
        vocab: usize,
        d_weight: Sink<'_, Self>,
    ) -> (Tensor, Tensor) {
        head::adjoint(self, x, weight, labels, vocab, d_weight)
    }

    fn logits(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        linear::product(self, x, weight, None)
    }

    fn group_size(&self, group: Group) -> usize {
        self.group(group).size()
    }

    fn group_rank(&self, group: Group) -> usize {
        self.group(group).rank()
    }

    fn all_reduce(&self, x: &Tensor, group: Group) -> Tensor {
        ranks::all_reduce(self, x, Reduce::Sum, group)
    }

    fn all_reduce_max(&self, x: &Tensor, group: Group) -> Tensor {
        assert_eq!(x.dtype(), DType::F32);
        ranks::all_reduce(self, x, Reduce::Max, group)
    }

    fn all_gather(&self, x: &Tensor, axis: usize, group: Group) -> Tensor {
        ranks::all_gather(self, x, axis, group)
    }

    fn reduce_scatter(&self, x: &Tensor, axis: usize, group: Group) -> Tensor {
        ranks::reduce_scatter(self, x, axis, group)
    }

    fn all_reduce_slot(&self, buffer: &mut Buffer, slot: &Slot, group: Group) {
        ranks::all_reduce_slot(self, buffer, slot, group);
    }

    fn sum_slot_over_neighbours(&self, buffer: &mut Buffer, slot: &Slot, ranks: usize) {
        self.sum_over_neighbours(buffer.slot_mut(slot), ranks);
    }

    fn reduce_scatter_row(&self, whole: &mut Buffer, row: Row, shard: &mut Buffer, group: Group) {
        ranks::reduce_scatter_row(self, whole, row, shard, group);
    }

    fn start_sum(&self, buffer: &Buffer, row: Row, scatter: bool, group: Group) -> Pending {
        self.courier.get_or_init(Courier::new).start(self, buffer, row, scatter, group)
    }

    fn finish_sum(&self, pending: Pending, to: &mut Buffer) {
        pending.finish(to);
    }

    fn all_gather_row(&self, shard: &Buffer, row: Row, whole: &mut Buffer, group: Group) {
        ranks::all_gather_row(self, shard, row, whole, group);
    }

    fn clip(&self, grads: &Buffer, loss: &Tensor, clipping: &Clipping<'_>) -> Tensor {
        update::clip(self, grads, loss, clipping)
    }

    fn adamw(
        &self,
        hyper: &AdamW,
        decayed: Decayed,
        clip: &Tensor,
        grads: &mut Buffer,
        params: &mut Buffer,
        m: &mut Buffer,
        v: &mut Buffer,
        copy: Option<&mut Buffer>,
    ) {
        update::adamw(self, hyper, decayed, clip, grads, params, m, v, copy);
    }
}
