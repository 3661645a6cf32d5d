//! Data: text → packed token blocks → batches.

mod dataset;
mod sampler;
mod writer;

pub use dataset::{Card, Dataset, Sample};
pub use sampler::Sampler;
pub use writer::DatasetWriter;
