//! `linear` and `logits`.

use elapid_tensor::{DType, Sink, Slot};
use half::bf16;

use crate::CpuBackend;
use crate::matmul::{Into, Mat, dots, matmul, rounded};
use crate::parallel::ROWS;
use crate::tensor::Tensor;

/// Rows below which a product is done by dot products: then every weight is read once and packing would cost more.
const FEW_ROWS: usize = 4;

pub(crate) fn forward(backend: &CpuBackend, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (input, output) = (x.last(), weight.shape()[0]);
    let rows = x.len() / input;
    if x.dtype() == DType::F32 || rows < FEW_ROWS {
        return backend.cast_to(&product(backend, x, weight, bias), x.dtype());
    }
    assert_eq!(weight.shape(), [output, input]);
    let bias = bias.map(|bias| backend.cast_to(bias, DType::F32));
    let weight = Mat::new(weight.floats(), output, input).t();
    let mut y = backend.pool.take::<bf16>(rows * output);
    let (out, x_mat) = (y.as_mut_slice(rows * output), Mat::new(x.floats(), rows, input));
    rounded(backend, out, x_mat, weight, bias.as_ref().map(Tensor::f32));
    Tensor::new(y, &with_last(x, output), x.dtype())
}

/// The shape of `x` with another last axis.
fn with_last(x: &Tensor, width: usize) -> Vec<usize> {
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("not a scalar") = width;
    shape
}

/// `x [.., I] · weight [O, I]ᵀ + bias` in fp32.
pub(crate) fn product(backend: &CpuBackend, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (input, output) = (x.last(), weight.shape()[0]);
    assert_eq!(weight.shape(), [output, input]);
    let rows = x.len() / input;
    let mut y = backend.pool.take::<f32>(rows * output);
    let out = y.as_mut_slice::<f32>(rows * output);
    if rows < FEW_ROWS {
        few_rows(backend, backend.cast_to(x, DType::F32).f32(), weight, out, rows);
    } else {
        let weight = Mat::new(weight.floats(), output, input).t();
        matmul(backend, Into::Set, out, output, Mat::new(x.floats(), rows, input), weight);
    }
    if let Some(bias) = bias {
        let bias = backend.cast_to(bias, DType::F32);
        backend.workers.rows(out, output, ROWS, |_, chunk| {
            for row in chunk.chunks_exact_mut(output) {
                row.iter_mut().zip(bias.f32()).for_each(|(y, b)| *y += b);
            }
        });
    }
    Tensor::new(y, &with_last(x, output), DType::F32)
}

/// The product as one dot product an output, in pieces of outputs.
fn few_rows(backend: &CpuBackend, x: &[f32], weight: &Tensor, out: &mut [f32], rows: usize) {
    let (output, input) = (weight.shape()[0], weight.shape()[1]);
    // Pieces of several rows stay in the caches from row to row. Those of one row are long, since memory is slow where a stream begins, but
    // enough for equal shares.
    let longest = if rows == 1 { 4096 } else { 64 };
    let most = (output / (4 * backend.threads())).clamp(64, longest).next_multiple_of(4);
    let shared = crate::parallel::Shared::new(out);
    backend.workers.each(output.div_ceil(most), |piece| {
        let first = piece * most;
        let outputs = most.min(output - first);
        let weight = weight.floats().part(first * input, outputs * input);
        for row in 0..rows {
            // SAFETY: each output belongs to one piece.
            let out = unsafe { shared.slice(row * output + first, outputs) };
            dots(backend, &x[row * input..][..input], weight, rows == 1, out);
        }
    });
}

pub(crate) fn adjoint(
    backend: &CpuBackend,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    d_weight: Sink<'_, CpuBackend>,
    d_bias: Option<&Slot>,
) -> Tensor {
    let Sink { buffer, slot } = d_weight;
    backend.linear_d_weight(x, dy, Sink { buffer, slot });
    if let Some(slot) = d_bias {
        let sums = backend.sum_rows(backend.cast_to(dy, DType::F32).f32(), dy.last());
        buffer.slot_mut(slot).iter_mut().zip(&sums).for_each(|(g, s)| *g += s);
    }
    backend.linear_d_input(weight, dy)
}

/// The two products of the adjoint of `linear`, for those who time them.
impl CpuBackend {
    /// Adds `dyᵀ [O, ..] · x [.., I]` to the gradient of the weight.
    pub fn linear_d_weight(&self, x: &Tensor, dy: &Tensor, d_weight: Sink<'_, Self>) {
        let (input, output) = (x.last(), dy.last());
        let rows = x.len() / input;
        let (dy, x) = (Mat::new(dy.floats(), rows, output), Mat::new(x.floats(), rows, input));
        matmul(self, Into::Add, d_weight.buffer.slot_mut(d_weight.slot), input, dy.t(), x);
    }

    /// The cotangent of the input, `dy [.., O] · weight [O, I]`, in the dtype of `dy`.
    pub fn linear_d_input(&self, weight: &Tensor, dy: &Tensor) -> Tensor {
        let (input, output) = (weight.shape()[1], dy.last());
        let rows = dy.len() / output;
        let (dy_mat, weight) =
            (Mat::new(dy.floats(), rows, output), Mat::new(weight.floats(), output, input));
        let shape = with_last(dy, input);
        if dy.dtype() == DType::F32 {
            let mut dx = self.pool.take::<f32>(rows * input);
            matmul(self, Into::Set, dx.as_mut_slice(rows * input), input, dy_mat, weight);
            Tensor::new(dx, &shape, DType::F32)
        } else {
            let mut dx = self.pool.take::<bf16>(rows * input);
            rounded(self, dx.as_mut_slice(rows * input), dy_mat, weight, None);
            Tensor::new(dx, &shape, DType::Bf16)
        }
    }
}
