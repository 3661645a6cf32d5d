//! Elapid trains Mamba-2 language models: text → tokens → batches → model → gradients → parameters → checkpoint.

pub mod bench;
pub mod checkpoint;
pub mod commands;
pub mod config;
pub mod convert;
pub mod data;
mod disk;
pub mod doctor;
pub mod error;
mod forward;
pub mod generate;
pub mod inspect;
mod memory;
pub mod model;
pub mod parallel;
pub mod record;
pub mod train;
mod vacant;

pub use error::Error;
