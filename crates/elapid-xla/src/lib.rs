//! A backend that records instead of computing: every op of the contract as HLO, the program format of XLA compilers.
//!
//! [`XlaBackend`] builds a graph as ops are called. [`XlaBackend::module`] makes a [`Module`] of what was recorded, for a
//! compiler to read; where an [`Executor`] is given, the values of a tensor can be asked for as on every other device.
//! docs/trainium.md says which rules the modules keep, and why.

mod backend;
mod buffer;
pub mod driver;
mod estimate;
mod evaluate;
mod hlo;
mod lint;
mod ops;
mod tensor;
mod trace;

pub use backend::{LoopKind, Options, Result, XlaBackend};
pub use buffer::XlaBuffer;
pub use estimate::{Estimate, Work, estimate};
pub use evaluate::Executor;
pub use hlo::{Literal, Module, Port, Shape, Type, proto};
pub use lint::lint;
pub use tensor::XlaTensor;
