//! Several ranks that train one model: how they are arranged, started, and how they speak with each other.

mod launch;
mod mesh;
mod processes;

pub use launch::{Launch, Rank, engine, finish, launch, let_the_first_speak, world_size};
pub use mesh::{Arrangement, MAX_RANKS, Mesh};
pub(crate) use processes::place;
