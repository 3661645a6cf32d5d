//! Where the first value that is not finite comes from: a step, run again from the same parameters, its tensors looked
//! at one by one.

use std::cell::RefCell;
use std::fmt;

use elapid_tensor::{Backend, Kind, Row, Seen, Site, Slot, State};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Batch, StepReport, Trainer};
use crate::model::Layout;

/// The micro-steps of an optimizer step, and which samples of the dataset they hold.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The batches.
    pub batches: Vec<Batch>,
    /// `[micro-step][row]`: the sample's place in the dataset.
    pub samples: Vec<Vec<usize>>,
}

/// The first value that is not finite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// From 0.
    pub micro_step: usize,
    /// None: before, after or between all layers.
    pub layer: Option<usize>,
    /// The op that made it: `embedding`, in a layer `norm`, `in_proj`, `mamba2`, `out_proj`, `add`, then `norm_f`,
    /// `head_loss`. None: no op did, it is a parameter.
    pub op: Option<String>,
    /// `parameter`, or what of the op: `output`, `cotangent` (what it gives back to its input), `gradient`.
    pub tensor: &'static str,
    /// The parameter that it stands in or that the op reads.
    pub parameter: Option<String>,
    /// Where in the tensor.
    pub index: Vec<usize>,
    /// `NaN`, `inf` or `-inf`.
    pub value: String,
    /// The sample of the dataset that it belongs to, where it belongs to one.
    pub sample: Option<usize>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { micro_step, layer, op, tensor, parameter, index, value, sample } = self;
        let op = op.as_deref().unwrap_or_default();
        let place = layer.map_or(op.to_owned(), |layer| format!("{op} of layer {layer}"));
        let parameter = parameter.as_deref().unwrap_or_default();
        match *tensor {
            "parameter" => write!(f, "{value} in the parameter {parameter}")?,
            "gradient" => write!(f, "{value} in the gradient of {parameter}, from {place}")?,
            "cotangent" => write!(f, "{value} in the cotangent that {place} gives back to its input")?,
            _ => write!(f, "{value} in the output of {place}")?,
        }
        if !index.is_empty() {
            write!(f, ", at {index:?}")?;
        }
        if *micro_step > 0 {
            write!(f, ", in micro-step {micro_step}")?;
        }
        sample.map_or(Ok(()), |sample| write!(f, ", sample {sample}"))
    }
}

/// How large values become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Extent {
    /// The largest absolute value of those that are finite.
    pub largest: f32,
    /// How many are not.
    pub not_finite: u64,
}

impl Extent {
    fn add(&mut self, values: &[f32]) {
        for value in values {
            if value.is_finite() {
                self.largest = self.largest.max(value.abs());
            } else {
                self.not_finite += 1;
            }
        }
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.not_finite {
            0 => f.pad(&format!("{:.3e}", self.largest)),
            count => f.pad(&format!("{:.3e} ({count} not finite)", self.largest)),
        }
    }
}

/// The tensors of a layer, over all micro-steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Extents {
    /// What its ops compute.
    pub activation: Extent,
    /// What their adjoints give back.
    pub cotangent: Extent,
    /// The gradients of its parameters, of the sum of token losses.
    pub gradient: Extent,
}

/// What a step came to, and how.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    /// Loss and norm.
    pub report: StepReport,
    /// None: every single tensor is finite.
    pub first: Option<Finding>,
    /// Parameters that hold a value that is not finite.
    pub parameters: Vec<String>,
    /// By layer; the last is what stands outside of the layers: embedding, final norm, head.
    pub layers: Vec<Extents>,
}

impl Diagnosis {
    /// One object; numbers that are not finite are null.
    pub fn to_json(&self) -> Value {
        let (outside, layers) = self.layers.split_last().expect("what stands outside is always there");
        json!({
            "loss": self.report.loss,
            "grad_norm": self.report.grad_norm,
            "finite": self.report.finite,
            "first": self.first,
            "parameters": self.parameters,
            "layers": layers,
            "outside": outside,
        })
    }
}

impl fmt::Display for Diagnosis {
    /// The finding in a sentence.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.first {
            Some(finding) => write!(f, "the first value that is not finite is {finding}")?,
            None if self.report.finite => write!(f, "every value is finite")?,
            None => write!(f, "every tensor is finite; only their sum, or their norm, is beyond fp32")?,
        }
        match self.parameters.len() {
            0 | 1 => Ok(()),
            count => write!(f, " ({count} parameters hold such values)"),
        }
    }
}

/// Runs the micro-steps of `step` again, with the carried states before them. Parameters and moments stay as they are;
/// gradients and states are those after the step.
///
/// # Panics
/// Without a micro-step.
pub fn diagnose<B: Backend>(
    backend: &B,
    trainer: &mut Trainer<'_, B>,
    step: &Recorded,
    before: Option<Vec<State<B::Tensor>>>,
) -> Diagnosis {
    let layout = trainer.model().layout().clone();
    let mut look = Look { names: names(&layout), first: None, layers: Vec::new() };
    look.layers.resize(layout.flat.layers + 1, Extents::default());
    let mut parameters = Vec::new();
    for (slot, name) in look.names.clone() {
        let values = trainer.model().parameter(backend, &slot);
        if let Some((place, value)) = not_finite(&values) {
            look.first.get_or_insert_with(|| Finding {
                micro_step: 0,
                layer: match slot.row {
                    Row::Shared => None,
                    Row::Layer(layer) => Some(layer),
                },
                op: None,
                tensor: "parameter",
                parameter: Some(name.clone()),
                index: index(place, &slot.shape),
                value: value.to_string(),
                sample: None,
            });
            parameters.push(name);
        }
    }
    trainer.restart(before);
    let look = RefCell::new(look);
    for (micro_step, (batch, samples)) in step.batches.iter().zip(&step.samples).enumerate() {
        let watch = |seen: Seen<'_, B::Tensor>| {
            look.borrow_mut().at(backend, seen, micro_step, samples);
        };
        trainer.watched_micro_step(batch, Some(&watch));
    }
    let report = trainer.report(step.batches.iter().map(Batch::valid).sum());
    let Look { first, layers, .. } = look.into_inner();
    Diagnosis { report, first, parameters, layers }
}

fn names(layout: &Layout) -> Vec<(Slot, String)> {
    layout.iter().map(|(name, slot, _)| (slot, name)).collect()
}

/// What has been seen.
struct Look {
    names: Vec<(Slot, String)>,
    first: Option<Finding>,
    layers: Vec<Extents>,
}

impl Look {
    fn at<B: Backend>(
        &mut self,
        backend: &B,
        seen: Seen<'_, B::Tensor>,
        micro_step: usize,
        samples: &[usize],
    ) {
        let values = backend.values(seen.value);
        let outside = self.layers.len() - 1;
        let extents = &mut self.layers[seen.site.layer.unwrap_or(outside)];
        let (extent, tensor) = match seen.kind {
            Kind::Output => (&mut extents.activation, "output"),
            Kind::Cotangent => (&mut extents.cotangent, "cotangent"),
            Kind::Gradient => (&mut extents.gradient, "gradient"),
        };
        extent.add(&values);
        if self.first.is_some() {
            return;
        }
        let Some((place, value)) = not_finite(&values) else { return };
        let index = index(place, &backend.shape(seen.value));
        // The first axis of activations and states is that of the batch's rows.
        let row = index.first().filter(|_| seen.kind != Kind::Gradient);
        let parameter = self.name(seen.site);
        self.first = Some(Finding {
            micro_step,
            layer: seen.site.layer,
            op: Some(op(seen.site, parameter.as_deref())),
            tensor,
            sample: row.and_then(|row| samples.get(*row)).copied(),
            parameter,
            index,
            value: value.to_string(),
        });
    }

    fn name(&self, site: &Site) -> Option<String> {
        let slot = site.weight.as_ref()?;
        self.names.iter().find(|(other, _)| other == slot).map(|(_, name)| name.clone())
    }
}

/// Where several ops of a kind stand in a layer, the module of their parameter tells them apart.
fn op(site: &Site, parameter: Option<&str>) -> String {
    match parameter {
        Some(name) if matches!(site.op, "linear" | "rms_norm") => {
            name.rsplit('.').nth(1).unwrap_or(site.op).to_owned()
        }
        _ => site.op.to_owned(),
    }
}

/// Place and value of the first that is not finite.
fn not_finite(values: &[f32]) -> Option<(usize, f32)> {
    values.iter().copied().enumerate().find(|(_, value)| !value.is_finite())
}

/// The place `flat` of a row-major tensor by axis.
fn index(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, extent) in index.iter_mut().zip(shape).rev() {
        *place = flat % extent;
        flat /= extent;
    }
    index
}
