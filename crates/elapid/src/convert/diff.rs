//! Two models of any formats, tensor by tensor.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::open::{self, Dimensions};
use crate::Error;
use crate::model::weights::{EMBEDDING, HEAD, PIECE, Stored, Weights, for_each_stretch};

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Nothing differs.
    pub equal: bool,
    /// All tensors that either model has, by Hugging Face name.
    pub tensors: Vec<TensorComparison>,
}

/// One tensor in both models; of a tensor that only one has there is nothing for the other.
#[derive(Clone, Debug, Serialize)]
pub struct TensorComparison {
    /// Hugging Face name.
    pub name: String,
    /// Same extents, element type and values.
    pub equal: bool,
    /// Extents in A and in B.
    pub shape: [Option<Vec<usize>>; 2],
    /// Element types in A and in B.
    pub dtype: [Option<&'static str>; 2],
    /// Number of elements that differ in any bit once both are fp32; None where the extents differ.
    pub different: Option<usize>,
    /// Largest difference; NaN, in JSON null, where one of the two is not a number.
    pub max_abs: Option<f64>,
    /// The same in units of the largest element of B.
    pub relative: Option<f64>,
}

/// Compares two models: folders of any format, or single files of tensors. `dimensions` are for files of ranks that do not
/// describe themselves.
///
/// # Errors
/// One of them cannot be read.
pub fn compare(a: &Path, b: &Path, dimensions: &Dimensions) -> Result<Comparison, Error> {
    let (a, b) = (open_any(a, dimensions)?, open_any(b, dimensions)?);
    let names: BTreeSet<&String> = a.0.keys().chain(b.0.keys()).collect();
    let tensors = names.into_iter().map(|name| {
        let pair = [&a, &b].map(|weights| weights.0.get(name).map(|tensor| &**tensor));
        compare_tensors(name, pair)
    });
    let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
    Ok(Comparison { equal: tensors.iter().all(|tensor| tensor.equal), tensors })
}

fn open_any(path: &Path, dimensions: &Dimensions) -> Result<Weights, Error> {
    if path.is_file() {
        return open::open_file(path);
    }
    let format = open::detect(path)?;
    let dimensions = if format == super::Format::NeuronTp { dimensions } else { &Dimensions::default() };
    let model = open::open(format, path, dimensions)?;
    let mut weights = model.weights;
    // T14: a tied head is the embedding by another name.
    if model.config.tie_word_embeddings {
        let pair = [HEAD, EMBEDDING].map(|name| weights.0.get(name).map(|tensor| &**tensor));
        if compare_tensors(HEAD, pair)?.equal {
            weights.0.remove(HEAD);
        }
    }
    Ok(weights)
}

fn compare_tensors(name: &str, pair: [Option<&dyn Stored>; 2]) -> Result<TensorComparison, Error> {
    let mut found = TensorComparison {
        name: name.to_owned(),
        equal: false,
        shape: pair.map(|tensor| tensor.map(|tensor| tensor.shape().to_vec())),
        dtype: pair.map(|tensor| tensor.map(|tensor| tensor.dtype().name())),
        different: None,
        max_abs: None,
        relative: None,
    };
    let [Some(a), Some(b)] = pair else { return Ok(found) };
    if a.shape() != b.shape() {
        return Ok(found);
    }
    let (mut different, mut max_abs, mut largest) = (0, 0.0_f64, 0.0_f64);
    let mut other = vec![0.0; PIECE.min(b.len())];
    for_each_stretch(a, |first, ours| {
        let theirs = &mut other[..ours.len()];
        b.read(first, theirs)?;
        for (x, y) in ours.iter().zip(&*theirs) {
            largest = largest.max(f64::from(y.abs()));
            if x.to_bits() != y.to_bits() {
                different += 1;
                let distance = if x == y { 0.0 } else { (f64::from(*x) - f64::from(*y)).abs() };
                // Unlike max, which passes over a NaN.
                max_abs = if distance <= max_abs || max_abs.is_nan() { max_abs } else { distance };
            }
        }
        Ok(())
    })?;
    found.equal = different == 0 && a.dtype() == b.dtype();
    found.different = Some(different);
    found.max_abs = Some(max_abs);
    found.relative = Some(if max_abs == 0.0 { 0.0 } else { max_abs / largest });
    Ok(found)
}
