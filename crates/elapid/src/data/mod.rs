//! Data: text → packed token blocks → batches.

mod dataset;
mod pack;
mod sampler;
mod text;
mod tokenize;
mod tokenizer;
mod writer;

pub use dataset::{Card, Dataset, Sample};
pub(crate) use dataset::{DICT, STATE};
pub use pack::{Counts, pack};
pub use sampler::{Order, Place, Sampler};
pub use text::{Document, Documents, documents};
pub use tokenize::{TokenizeOptions, tokenize};
pub use tokenizer::Tokenizer;
pub use writer::DatasetWriter;
