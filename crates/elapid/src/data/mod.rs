//! Text → tokens → packed blocks → batches.

mod dataset;
mod pack;
mod sampler;
mod text;
mod tokenize;
mod tokenizer;

pub use dataset::{Card, Dataset, DatasetWriter};
pub use pack::{Counts, pack};
pub use sampler::Sampler;
pub use text::{Document, Documents, documents};
pub use tokenize::{TokenizeOptions, tokenize};
pub use tokenizer::Tokenizer;
