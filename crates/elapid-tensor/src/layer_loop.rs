//! How a backend that records runs layers as a loop over one traced body.

use crate::backend::{Backend, State};

/// What the traced body of a layer has come to.
pub struct Traced<T> {
    /// The layer's output.
    pub out: T,
    /// State after its last position, where states are carried.
    pub after: Option<State<T>>,
    /// Cotangent of its input; None: no gradients are wanted.
    pub dx: Option<T>,
}

/// What the whole loop gives.
pub struct Looped<T> {
    /// The last layer's output.
    pub out: T,
    /// The states after each layer; empty where none are carried.
    pub states: Vec<State<T>>,
    /// The loop's number, for [`LayerLoop::adjoint`].
    pub id: usize,
}

/// A recording backend's side of [`Tape::layers`](crate::Tape::layers). The tape runs the body once, as layer 0, and
/// its adjoint once; the backend makes loops of both. Inside of the body, layer 0 stands for the layer that runs: views
/// of row 0 of a flat buffer are views of that layer's row.
pub trait LayerLoop<B: Backend> {
    /// Starts the body of `n` layers: what is recorded from now on is part of it. Gives, inside, its input and, where
    /// `states` are given, the state before it.
    fn begin(
        &self,
        n: usize,
        x: &B::Tensor,
        states: Option<&[State<B::Tensor>]>,
    ) -> (B::Tensor, Option<State<B::Tensor>>);

    /// Starts the adjoint of the body that has given `out`. Gives the cotangent of `out`.
    fn turn(&self, out: &B::Tensor) -> B::Tensor;

    /// Ends body and adjoint and runs the layers. `grads` has got the parameter gradients of the traced layer.
    fn end(&self, traced: Traced<B::Tensor>, grads: Option<&mut B::Buffer>) -> Looped<B::Tensor>;

    /// Runs the adjoints of all layers, the last one first: adds to `grads` and gives the cotangent of the first input.
    fn adjoint(&self, id: usize, dy: &B::Tensor, grads: &mut B::Buffer) -> B::Tensor;
}
