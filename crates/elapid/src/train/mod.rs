//! Training: micro-steps, updates, and the loop round them.

mod batch;
mod evaluate;
mod folder;
pub mod memory;
mod progress;
mod resume;
mod run;
pub mod schedule;
mod start;
mod stop;
mod trainer;

pub use batch::Batch;
pub use evaluate::{Evaluation, evaluate, last_blocks};
pub use run::{Outcome, cpu, train};
pub use trainer::{StepReport, Trainer};
