//! HLO: XLA's own program format, as recorded graph, protocol buffer and text.

pub(crate) mod graph;
mod module;
pub mod proto;
mod shape;
mod text;

pub(crate) use module::{ALIAS, Output, emit};
pub use module::{Module, Port};
pub use shape::{Literal, Shape, Type};
