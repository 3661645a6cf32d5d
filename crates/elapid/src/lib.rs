//! Elapid trains Mamba-2 language models: text → tokens → batches → model → gradients → parameters → checkpoint.

pub mod config;
pub mod error;
pub mod model;

pub use error::Error;
