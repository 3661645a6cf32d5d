//! The ops as HLO, each with its adjoint.

pub(crate) mod embedding;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod mamba2;
pub(crate) mod norm;
pub(crate) mod ranks;
pub(crate) mod update;
