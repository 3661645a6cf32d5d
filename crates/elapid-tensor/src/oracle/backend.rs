//! A device that computes with the oracle: the suite and the tape are tested on it.

use std::sync::Arc;

use super::Clip;
use crate::backend::{
    AdamW, Backend, Clipping, DType, Decayed, Group, Mamba2Grads, Mamba2Inputs, Mamba2Output, Mamba2Sinks,
    Mamba2Spec, Mamba2Weights, Sink, State,
};
use crate::flat::{FlatShape, Row, Slot};

/// Computes every op in f64 by its definition. F32 tensors and buffers are not rounded, Bf16 ones are.
#[derive(Clone, Copy, Debug, Default)]
pub struct OracleBackend;

/// A tensor of [`OracleBackend`]; integers are whole numbers.
#[derive(Clone, Debug)]
pub struct OracleTensor {
    /// Row-major.
    pub values: Arc<Vec<f64>>,
    /// Extents.
    pub shape: Vec<usize>,
    /// What it stands for.
    pub dtype: DType,
}

/// A flat buffer of [`OracleBackend`].
#[derive(Clone, Debug)]
pub struct OracleBuffer {
    /// All elements.
    pub values: Vec<f64>,
    /// Extents.
    pub shape: FlatShape,
    /// What it stands for.
    pub dtype: DType,
}

/// `x` rounded to the nearest bfloat16, ties to even: adding half of the last kept place to the bits of the f32,
/// less one where the kept part is even, carries exactly when that rounds up.
pub fn round_to_bf16(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

fn rounded(values: Vec<f64>, dtype: DType) -> Vec<f64> {
    match dtype {
        DType::Bf16 => values.into_iter().map(|x| f64::from(round_to_bf16(x as f32))).collect(),
        _ => values,
    }
}

fn make(values: Vec<f64>, shape: &[usize], dtype: DType) -> OracleTensor {
    assert_eq!(values.len(), shape.iter().product::<usize>(), "values for shape {shape:?}");
    OracleTensor { values: Arc::new(rounded(values, dtype)), shape: shape.to_vec(), dtype }
}

impl OracleTensor {
    fn ids(&self) -> Vec<i32> {
        assert_eq!(self.dtype, DType::I32, "ids are integers");
        self.values.iter().map(|&id| id as i32).collect()
    }

    /// Length of the last axis.
    fn width(&self) -> usize {
        *self.shape.last().expect("an op's input has at least one axis")
    }

    /// This shape with another last axis.
    fn shape_to(&self, width: usize) -> Vec<usize> {
        [&self.shape[..self.shape.len() - 1], &[width]].concat()
    }

    /// A tensor of the same shape and dtype.
    fn like(&self, values: Vec<f64>) -> OracleTensor {
        make(values, &self.shape, self.dtype)
    }
}

impl OracleBuffer {
    fn add(&mut self, slot: &Slot, gradient: &[f64]) {
        let range = self.shape.range(slot);
        assert_eq!(range.len(), gradient.len(), "gradient of {slot:?}");
        super::add_scaled(&mut self.values[range], 1.0, gradient);
    }
}

/// Fills a row of `to` with the end of that row of `from`.
fn copy_end(from: &OracleBuffer, row: Row, to: &mut OracleBuffer) {
    let (from_row, to_row) = (from.shape.whole(row), to.shape.whole(row));
    let source = &from.values[from.shape.range(&from_row)];
    let end = source[from_row.len() - to_row.len()..].to_vec();
    to.values.splice(to.shape.range(&to_row), rounded(end, to.dtype));
}

fn slices(inputs: &Mamba2Inputs<OracleTensor>) -> Mamba2Inputs<&[f64]> {
    Mamba2Inputs {
        projected: &inputs.projected.values,
        documents: inputs.documents.as_ref().map(|d| d.values.as_slice()),
        initial: inputs
            .initial
            .as_ref()
            .map(|s| State { conv: s.conv.values.as_slice(), ssm: &s.ssm.values }),
    }
}

fn state(spec: &Mamba2Spec, batch: usize, state: State<Vec<f64>>) -> State<OracleTensor> {
    State {
        conv: make(state.conv, &[batch, spec.conv_kernel - 1, spec.conv_channels()], DType::F32),
        ssm: make(state.ssm, &[batch, spec.heads, spec.head_dim, spec.state], DType::F32),
    }
}

impl Backend for OracleBackend {
    type Tensor = OracleTensor;
    type Buffer = OracleBuffer;
    type Pending = (Row, OracleBuffer);

    fn tensor(&self, values: &[f32], shape: &[usize], dtype: DType) -> OracleTensor {
        make(values.iter().copied().map(f64::from).collect(), shape, dtype)
    }

    fn tensor_i32(&self, values: &[i32], shape: &[usize]) -> OracleTensor {
        make(values.iter().copied().map(f64::from).collect(), shape, DType::I32)
    }

    fn values(&self, tensor: &OracleTensor) -> Vec<f32> {
        tensor.values.iter().map(|&x| x as f32).collect()
    }

    fn shape(&self, tensor: &OracleTensor) -> Vec<usize> {
        tensor.shape.clone()
    }

    fn buffer(&self, shape: FlatShape, dtype: DType) -> OracleBuffer {
        OracleBuffer { values: vec![0.0; shape.len()], shape, dtype }
    }

    fn write_slot(&self, buffer: &mut OracleBuffer, slot: &Slot, values: &[f32]) {
        let values = rounded(values.iter().copied().map(f64::from).collect(), buffer.dtype);
        buffer.values[buffer.shape.range(slot)].copy_from_slice(&values);
    }

    fn view(&self, buffer: &OracleBuffer, slot: &Slot) -> OracleTensor {
        make(buffer.values[buffer.shape.range(slot)].to_vec(), &slot.shape, buffer.dtype)
    }

    fn cast_buffer(&self, from: &OracleBuffer, to: &mut OracleBuffer) {
        assert_eq!(from.shape, to.shape, "buffers of one shape");
        to.values = rounded(from.values.clone(), to.dtype);
    }

    fn zero_buffer(&self, buffer: &mut OracleBuffer) {
        buffer.values.fill(0.0);
    }

    fn embedding(&self, table: &OracleTensor, ids: &OracleTensor, out: DType) -> OracleTensor {
        let shape = [ids.shape.as_slice(), &[table.width()]].concat();
        make(super::embedding(&table.values, table.width(), &ids.ids()), &shape, out)
    }

    fn embedding_adjoint(&self, ids: &OracleTensor, dy: &OracleTensor, d_table: Sink<'_, Self>) {
        let [rows, width] = d_table.slot.shape[..] else { panic!("an embedding table has two axes") };
        d_table.buffer.add(d_table.slot, &super::embedding_adjoint(rows, width, &ids.ids(), &dy.values));
    }

    fn rms_norm(&self, x: &OracleTensor, weight: &OracleTensor, eps: f32, out: DType) -> OracleTensor {
        make(super::rms_norm(&x.values, &weight.values, f64::from(eps)), &x.shape, out)
    }

    fn rms_norm_adjoint(
        &self,
        x: &OracleTensor,
        weight: &OracleTensor,
        eps: f32,
        dy: &OracleTensor,
        d_weight: Sink<'_, Self>,
    ) -> OracleTensor {
        let (dx, dw) = super::rms_norm_adjoint(&x.values, &weight.values, f64::from(eps), &dy.values);
        d_weight.buffer.add(d_weight.slot, &dw);
        x.like(dx)
    }

    fn linear(&self, x: &OracleTensor, weight: &OracleTensor, bias: Option<&OracleTensor>) -> OracleTensor {
        let bias = bias.map(|b| b.values.as_slice());
        let y = super::linear(&x.values, &weight.values, bias, x.width());
        make(y, &x.shape_to(weight.shape[0]), x.dtype)
    }

    fn linear_adjoint(
        &self,
        x: &OracleTensor,
        weight: &OracleTensor,
        dy: &OracleTensor,
        d_weight: Sink<'_, Self>,
        d_bias: Option<&Slot>,
    ) -> OracleTensor {
        let (dx, dw, db) = super::linear_adjoint(&x.values, &weight.values, &dy.values, x.width());
        d_weight.buffer.add(d_weight.slot, &dw);
        if let Some(slot) = d_bias {
            d_weight.buffer.add(slot, &db);
        }
        x.like(dx)
    }

    fn add_bias(&self, x: &OracleTensor, bias: &OracleTensor) -> OracleTensor {
        x.like(x.values.iter().zip(bias.values.iter().cycle()).map(|(x, b)| x + b).collect())
    }

    fn add_bias_adjoint(&self, dy: &OracleTensor, d_bias: Sink<'_, Self>) {
        let mut sums = vec![0.0; dy.width()];
        dy.values.chunks(dy.width()).for_each(|row| super::add_scaled(&mut sums, 1.0, row));
        d_bias.buffer.add(d_bias.slot, &sums);
    }

    fn resize(&self, x: &OracleTensor, len: usize) -> OracleTensor {
        let mut shape = x.shape.clone();
        let old = std::mem::replace(&mut shape[1], len);
        let width: usize = shape[2..].iter().product();
        let cut = |row: &[f64]| {
            let mut row = row.to_vec();
            row.resize(len * width, 0.0);
            row
        };
        make(x.values.chunks(old * width).flat_map(cut).collect(), &shape, x.dtype)
    }

    fn add(&self, a: &OracleTensor, b: &OracleTensor) -> OracleTensor {
        a.like(a.values.iter().zip(b.values.iter()).map(|(a, b)| a + b).collect())
    }

    fn cast(&self, x: &OracleTensor, dtype: DType) -> OracleTensor {
        make(x.values.to_vec(), &x.shape, dtype)
    }

    fn dtype(&self, x: &OracleTensor) -> DType {
        x.dtype
    }

    fn mamba2(
        &self,
        spec: &Mamba2Spec,
        inputs: Mamba2Inputs<OracleTensor>,
        weights: &Mamba2Weights<OracleTensor>,
        _save: bool,
    ) -> Mamba2Output<OracleTensor> {
        assert_eq!(spec.norm_ranks, 1, "the oracle is one rank");
        let batch = inputs.projected.shape[0];
        let weights = weights.as_ref().map(|w| w.values.as_slice());
        let (y, last) = super::mamba2(spec, batch, &slices(&inputs), &weights);
        let y = make(y, &inputs.projected.shape_to(spec.inner()), inputs.projected.dtype);
        Mamba2Output { y, state: state(spec, batch, last), saved: Vec::new() }
    }

    fn mamba2_adjoint(
        &self,
        spec: &Mamba2Spec,
        inputs: &Mamba2Inputs<OracleTensor>,
        weights: &Mamba2Weights<OracleTensor>,
        _saved: &[OracleTensor],
        dy: &OracleTensor,
        d_state: Option<&State<OracleTensor>>,
        grads: &mut OracleBuffer,
        sinks: &Mamba2Sinks<'_>,
    ) -> Mamba2Grads<OracleTensor> {
        let batch = inputs.projected.shape[0];
        let weights = weights.as_ref().map(|w| w.values.as_slice());
        let d_state = d_state.map(|d| State { conv: d.conv.values.as_slice(), ssm: d.ssm.values.as_slice() });
        let d = super::mamba2_adjoint(spec, batch, &slices(inputs), &weights, &dy.values, d_state.as_ref());
        grads.add(sinks.conv_weight, &d.weights.conv_weight);
        if let (Some(slot), Some(d_bias)) = (sinks.conv_bias, &d.weights.conv_bias) {
            grads.add(slot, d_bias);
        }
        grads.add(sinks.dt_bias, &d.weights.dt_bias);
        grads.add(sinks.a_log, &d.weights.a_log);
        grads.add(sinks.d, &d.weights.d);
        grads.add(sinks.norm_weight, &d.weights.norm_weight);
        Mamba2Grads {
            projected: inputs.projected.like(d.projected),
            initial: inputs.initial.is_some().then(|| state(spec, batch, d.initial)),
        }
    }

    fn head_loss(
        &self,
        x: &OracleTensor,
        weight: &OracleTensor,
        labels: &OracleTensor,
        vocab: usize,
    ) -> OracleTensor {
        let width = x.width();
        let loss = super::head_loss(&x.values, &weight.values[..vocab * width], &labels.ids(), width);
        make(vec![loss], &[], DType::F32)
    }

    fn head_loss_adjoint(
        &self,
        x: &OracleTensor,
        weight: &OracleTensor,
        labels: &OracleTensor,
        vocab: usize,
        d_weight: Sink<'_, Self>,
    ) -> (OracleTensor, OracleTensor) {
        let width = x.width();
        let (loss, dx, mut dw) =
            super::head_loss_adjoint(&x.values, &weight.values[..vocab * width], &labels.ids(), width);
        dw.resize(weight.values.len(), 0.0);
        d_weight.buffer.add(d_weight.slot, &dw);
        (make(vec![loss], &[], DType::F32), x.like(dx))
    }

    fn logits(&self, x: &OracleTensor, weight: &OracleTensor) -> OracleTensor {
        let logits = super::linear(&x.values, &weight.values, None, x.width());
        make(logits, &x.shape_to(weight.shape[0]), DType::F32)
    }

    fn group_size(&self, _: Group) -> usize {
        1
    }

    fn group_rank(&self, _: Group) -> usize {
        0
    }

    fn all_reduce(&self, x: &OracleTensor, _: Group) -> OracleTensor {
        x.clone()
    }

    fn all_reduce_max(&self, x: &OracleTensor, _: Group) -> OracleTensor {
        x.clone()
    }

    fn all_gather(&self, x: &OracleTensor, _: usize, _: Group) -> OracleTensor {
        x.clone()
    }

    fn reduce_scatter(&self, x: &OracleTensor, _: usize, _: Group) -> OracleTensor {
        x.clone()
    }

    fn all_reduce_slot(&self, _: &mut OracleBuffer, _: &Slot, _: Group) {}

    fn sum_slot_over_neighbours(&self, _: &mut OracleBuffer, _: &Slot, ranks: usize) {
        assert_eq!(ranks, 1, "the oracle is one rank");
    }

    fn reduce_scatter_row(&self, whole: &mut OracleBuffer, row: Row, shard: &mut OracleBuffer, _: Group) {
        copy_end(whole, row, shard);
    }

    fn start_sum(&self, buffer: &OracleBuffer, row: Row, _: bool, _: Group) -> (Row, OracleBuffer) {
        (row, buffer.clone())
    }

    fn finish_sum(&self, (row, sum): (Row, OracleBuffer), to: &mut OracleBuffer) {
        copy_end(&sum, row, to);
    }

    fn all_gather_row(&self, shard: &OracleBuffer, row: Row, whole: &mut OracleBuffer, _: Group) {
        copy_end(shard, row, whole);
    }

    fn clip(&self, grads: &OracleBuffer, loss: &OracleTensor, clipping: &Clipping<'_>) -> OracleTensor {
        let (scale, max_norm) = (f64::from(clipping.scale), f64::from(clipping.max_norm));
        let clip = super::clip(&grads.values, loss.values[0], scale, max_norm);
        make(vec![clip.norm, clip.factor, f64::from(u8::from(clip.finite))], &[3], DType::F32)
    }

    fn adamw(
        &self,
        hyper: &AdamW,
        decayed: Decayed,
        clip: &OracleTensor,
        grads: &mut OracleBuffer,
        params: &mut OracleBuffer,
        m: &mut OracleBuffer,
        v: &mut OracleBuffer,
        copy: Option<&mut OracleBuffer>,
    ) {
        let clip = Clip { norm: clip.values[0], factor: clip.values[1], finite: clip.values[2] != 0.0 };
        let (of, ends) = (params.shape, (decayed.layer, decayed.shared));
        super::adamw(hyper, of, ends, clip, &grads.values, &mut params.values, &mut m.values, &mut v.values);
        if clip.finite {
            self.zero_buffer(grads);
        }
        if let Some(copy) = copy {
            self.cast_buffer(params, copy);
        }
    }
}
