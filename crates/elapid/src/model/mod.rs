//! The model: its layout in memory, its initial values, and pretrained folders.

mod causal_lm;
pub mod init;
pub mod layout;
pub mod pretrained;
pub mod shard;
mod table;
pub(crate) mod weights;

pub use causal_lm::Mamba2ForCausalLM;
pub use layout::{LayerSlots, Layout, ParamInfo, Replica, Role, Segment, Shard, SharedSlots};
pub use shard::Share;
