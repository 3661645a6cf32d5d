//! Data on both sides, and their comparison.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Report;
use crate::backend::{Backend, DType};
use crate::flat::{FlatShape, Row, Slot};
use crate::oracle::round_to_bf16;

/// Sums of a few hundred fp32 products: some √n · 2⁻²⁴.
pub(super) const FP32: f64 = 1e-5;

/// What a dtype costs a result that is computed in fp32 and rounded once: bf16 keeps 8 bits, so that no element is
/// off by more than 2⁻⁸ of itself.
pub(super) fn rounded_once(dtype: DType) -> f64 {
    if dtype == DType::Bf16 { 4e-3 } else { FP32 }
}

/// The same where intermediate results may be rounded to the compute dtype, too.
pub(super) fn rounded_inside(dtype: DType) -> f64 {
    if dtype == DType::Bf16 { 1e-2 } else { FP32 }
}

/// The same values on the device and, exactly, on the host.
pub(super) struct Data<T> {
    pub(super) device: T,
    pub(super) host: Vec<f64>,
}

/// A parameter gradient that an adjoint has to add to its buffer.
pub(super) struct Gradient<'a> {
    pub(super) name: &'a str,
    pub(super) shape: &'a [usize],
    pub(super) want: &'a [f64],
    pub(super) tolerance: f64,
}

/// One case of one op. Every case draws from the same stream, so that adding a case leaves the others as they are.
pub(super) struct Check<'a, B: Backend> {
    pub(super) backend: &'a B,
    op: &'static str,
    case: String,
    rng: ChaCha8Rng,
    reports: Vec<Report>,
}

impl<'a, B: Backend> Check<'a, B> {
    pub(super) fn new(backend: &'a B, op: &'static str, case: impl Into<String>) -> Self {
        Self { backend, op, case: case.into(), rng: ChaCha8Rng::seed_from_u64(1), reports: Vec::new() }
    }

    pub(super) fn finish(self) -> Vec<Report> {
        self.reports
    }

    /// `len` numbers in `from..to`.
    pub(super) fn uniform(&mut self, len: usize, from: f32, to: f32) -> Vec<f32> {
        (0..len).map(|_| self.rng.random_range(from..to)).collect()
    }

    /// `len` whole numbers in `from..to`.
    pub(super) fn whole(&mut self, len: usize, from: i32, to: i32) -> Vec<i32> {
        (0..len).map(|_| self.rng.random_range(from..to)).collect()
    }

    /// An activation of these values, rounded to `dtype`.
    pub(super) fn activation(&self, values: &[f32], shape: &[usize], dtype: DType) -> Data<B::Tensor> {
        let values = rounded(values, dtype);
        Data { device: self.backend.tensor(&values, shape, dtype), host: widened(&values) }
    }

    /// A random activation in ±`scale`.
    pub(super) fn random(&mut self, shape: &[usize], dtype: DType, scale: f32) -> Data<B::Tensor> {
        let values = self.uniform(shape.iter().product(), -scale, scale);
        self.activation(&values, shape, dtype)
    }

    /// A parameter of these values, as the model holds it: a view into a buffer, at an odd place.
    pub(super) fn parameter(&self, values: &[f32], shape: &[usize], dtype: DType) -> Data<B::Tensor> {
        let values = rounded(values, dtype);
        let flat = FlatShape { layers: 2, row: values.len() + 3, shared: 0 };
        let slot = Slot { row: Row::Layer(1), offset: 1, shape: shape.to_vec() };
        let mut buffer = self.backend.buffer(flat, dtype);
        self.backend.write_slot(&mut buffer, &slot, &values);
        Data { device: self.backend.view(&buffer, &slot), host: widened(&values) }
    }

    /// A random parameter in ±`scale`.
    pub(super) fn random_parameter(&mut self, shape: &[usize], dtype: DType, scale: f32) -> Data<B::Tensor> {
        let values = self.uniform(shape.iter().product(), -scale, scale);
        self.parameter(&values, shape, dtype)
    }

    /// Compares a tensor, its shape and its dtype with what they should be.
    pub(super) fn compare(
        &mut self,
        name: &str,
        got: &B::Tensor,
        want: &[f64],
        shape: &[usize],
        dtype: DType,
        tolerance: f64,
    ) {
        let (found, kind) = (self.backend.shape(got), self.backend.dtype(got));
        if found != shape || kind != dtype {
            let name = format!("{name}: {kind:?} {found:?} instead of {dtype:?} {shape:?}");
            self.report(&name, f64::INFINITY, tolerance);
        } else {
            let got = widened(&self.backend.values(got));
            self.report(name, relative_error(&got, want, want), tolerance);
        }
    }

    /// Compares host values.
    pub(super) fn compare_values(&mut self, name: &str, got: &[f64], want: &[f64], tolerance: f64) {
        self.report(name, relative_error(got, want, want), tolerance);
    }

    /// Notes whether something holds exactly.
    pub(super) fn holds(&mut self, name: &str, holds: bool) {
        self.report(name, if holds { 0.0 } else { f64::INFINITY }, 0.0);
    }

    fn report(&mut self, tensor: &str, error: f64, tolerance: f64) {
        let (op, case, tensor) = (self.op, self.case.clone(), tensor.to_owned());
        self.reports.push(Report { op, case, tensor, error, tolerance });
    }

    /// Lets `run` add the wanted gradients to slots (in the order given) of a buffer that already holds values as
    /// large as the gradients, and compares what it finds there afterwards, inside the slots and around them.
    pub(super) fn gradients<R>(
        &mut self,
        wanted: &[Gradient<'_>],
        run: impl FnOnce(&mut B::Buffer, &[Slot]) -> R,
    ) -> R {
        let mut row = 1;
        let slots: Vec<Slot> = wanted
            .iter()
            .map(|w| {
                let slot = Slot { row: Row::Layer(1), offset: row, shape: w.shape.to_vec() };
                row += slot.len() + 3;
                slot
            })
            .collect();
        let shape = FlatShape { layers: 2, row, shared: 5 };
        let mut before = self.uniform(shape.len(), -1.0, 1.0);
        for (w, slot) in wanted.iter().zip(&slots) {
            let size = norm(w.want) / (w.want.len() as f64).sqrt();
            if size > 0.0 {
                before[shape.range(slot)].iter_mut().for_each(|x| *x *= size as f32);
            }
        }
        let mut buffer = self.backend.buffer(shape, DType::F32);
        write_all(self.backend, &mut buffer, shape, &before);
        let out = run(&mut buffer, &slots);
        let mut after = read_all(self.backend, &buffer, shape);
        for (w, slot) in wanted.iter().zip(&slots) {
            let range = shape.range(slot);
            let want: Vec<f64> =
                w.want.iter().zip(&before[range.clone()]).map(|(g, &b)| g + f64::from(b)).collect();
            let error = relative_error(&widened(&after[range.clone()]), &want, w.want);
            self.report(&format!("gradient of {}", w.name), error, w.tolerance);
            after[range.clone()].copy_from_slice(&before[range]);
        }
        self.holds("rest of the gradient buffer", same_bits(&after, &before));
        out
    }
}

pub(super) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()))
}

pub(super) fn rounded(values: &[f32], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => values.iter().map(|&x| round_to_bf16(x)).collect(),
        _ => values.to_vec(),
    }
}

pub(super) fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// The slots that cover a whole buffer.
pub(super) fn rows(shape: FlatShape) -> impl Iterator<Item = Slot> {
    let layers = (0..shape.layers).map(move |l| (Row::Layer(l), shape.row));
    let all = layers.chain([(Row::Shared, shape.shared)]);
    all.filter(|(_, len)| *len > 0).map(|(row, len)| Slot { row, offset: 0, shape: vec![len] })
}

pub(super) fn write_all<B: Backend>(backend: &B, buffer: &mut B::Buffer, shape: FlatShape, values: &[f32]) {
    for slot in rows(shape) {
        backend.write_slot(buffer, &slot, &values[shape.range(&slot)]);
    }
}

pub(super) fn read_all<B: Backend>(backend: &B, buffer: &B::Buffer, shape: FlatShape) -> Vec<f32> {
    // All views first: a backend that computes on demand computes together what somebody holds.
    let views: Vec<B::Tensor> = rows(shape).map(|slot| backend.view(buffer, &slot)).collect();
    views.iter().flat_map(|view| backend.values(view)).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// ‖got − want‖ / ‖measure‖; where the measure is zero, ‖got − want‖.
fn relative_error(got: &[f64], want: &[f64], measure: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let off: Vec<f64> = got.iter().zip(want).map(|(a, b)| a - b).collect();
    let measure = norm(measure);
    if measure > 0.0 { norm(&off) / measure } else { norm(&off) }
}
