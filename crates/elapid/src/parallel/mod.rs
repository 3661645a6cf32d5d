//! Several ranks that train one model: how they are arranged, started, and how they speak with each other.

mod launch;
mod mesh;

pub use launch::{Launch, Rank, launch, world_size};
pub use mesh::{MAX_RANKS, Mesh};
