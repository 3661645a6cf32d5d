//! Tensors: places in the graph.

use std::sync::{Arc, OnceLock};

use crate::hlo::graph::Place;
use crate::hlo::{Literal, Shape};

/// A recorded value; cloning shares it.
#[derive(Clone, Debug)]
pub struct XlaTensor(pub(crate) Arc<Recorded>);

#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) shape: Shape,
    pub(crate) source: Source,
    /// Its values, once somebody has asked, and the input that stands for them from then on.
    pub(crate) known: OnceLock<(Arc<Literal>, Place)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// The result of an instruction.
    Node(Place),
    /// Elements from `offset` on, of a row of an array `[rows, len]` or of an array `[len]`. Recorded where it is used:
    /// in the body of a layer loop, row 0 stands for the row of the layer that runs.
    Part { of: Place, row: Option<usize>, offset: usize },
}

impl XlaTensor {
    pub(crate) fn new(shape: Shape, source: Source) -> Self {
        Self(Arc::new(Recorded { shape, source, known: OnceLock::new() }))
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// The row of a layer that it is cut from.
    pub(crate) fn layer(&self) -> Option<usize> {
        match self.0.source {
            Source::Part { row, .. } => row,
            Source::Node(_) => None,
        }
    }
}
