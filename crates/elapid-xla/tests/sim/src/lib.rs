//! For tests: an evaluator of HLO, and a Neuron runtime that runs on it.
//!
//! The runtime is the shared library that this crate is built as, with the public signatures of `libnrt.so.1`. Nothing but
//! tests depends on it, and no run finds it unless it is pointed there.

mod array;
mod eval;
mod install;
mod nrt;
mod world;

pub use array::{Array, Data};
pub use eval::{Alone, Exchange, evaluate};
pub use install::install;
