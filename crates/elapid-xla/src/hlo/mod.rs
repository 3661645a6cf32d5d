//! HLO: XLA's own program format, as recorded graph, protocol buffer and text.

pub(crate) mod graph;
mod module;
pub mod proto;
mod shape;
mod text;

pub use module::{Module, Port};
pub(crate) use module::{Output, emit};
pub use shape::{Literal, Shape, Type};
