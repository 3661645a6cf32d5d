//! Data: text → packed token blocks → batches.

mod aside;
mod dataset;
mod hub;
mod pack;
mod pipeline;
mod progress;
mod sampler;
mod sources;
mod tokenize;
mod tokenizer;
mod units;
mod words;
mod writer;

pub use dataset::{Card, Dataset, PAD_DOCUMENT, Sample};
pub(crate) use dataset::{DICT, STATE};
pub(crate) use pipeline::count_tokens;
pub use sampler::{Order, Place, Sampler};
pub use sources::{Documents, Part, Source, SourceOptions};
pub use tokenize::{TokenizeOptions, Tokenized, tokenize};
pub use tokenizer::Tokenizer;
pub use writer::{DatasetWriter, IdType, MAX_SHARD_SIZE};
