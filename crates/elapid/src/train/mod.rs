//! Training: micro-steps, updates, and the loop round them.

mod batch;
mod device;
mod diagnose;
mod evaluate;
mod folder;
mod host;
pub mod memory;
mod nonfinite;
mod norms;
mod outcome;
pub mod plan;
mod progress;
mod resume;
mod run;
pub mod schedule;
mod session;
mod start;
mod stop;
mod trainer;

pub use batch::Batch;
pub(crate) use device::{literal, open as open_device, rows, write_batch};
pub use diagnose::{Diagnosis, Extent, Extents, Finding, Recorded, diagnose};
pub use evaluate::{Evaluation, evaluate, evaluate_by, last_blocks};
pub(crate) use folder::{FINISHED, METRICS};
pub use host::cpu;
pub(crate) use host::cpu_on;
pub use nonfinite::{MicroStep, NonFinite, Step};
pub use outcome::Outcome;
pub use run::{compile_only, train};
pub use trainer::{StepReport, Trainer};
