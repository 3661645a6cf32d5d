//! Tensors, dtypes, the op contract [`Backend`], the [`Tape`] and the f64 [`oracle`].
//!
//! Shape letters, here and everywhere in Elapid: B batch, L sequence length, D hidden size, E inner width
//! (expand·D = H·P), H heads, P head dimension, G groups, N state size, Q chunk length, K conv width,
//! V vocabulary, C = E + 2·G·N conv channels.

pub mod backend;
pub mod flat;
pub mod layer_loop;
pub mod oracle;
pub mod suite;
pub mod tape;

pub use backend::{
    AdamW, Backend, Clipping, Copies, DType, Decayed, Group, IGNORE_LABEL, Mamba2Grads, Mamba2Inputs,
    Mamba2Output, Mamba2Sinks, Mamba2Spec, Mamba2Weights, NormGroup, Sink, State,
};
pub use flat::{FlatShape, Row, Slot};
pub use layer_loop::{LayerLoop, Looped, Traced};
pub use tape::{Checkpointing, Kind, Seen, Site, Tape, Var, Watch, Weight};
