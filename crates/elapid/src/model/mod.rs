//! The model: its layout in memory, its initial values, and pretrained folders.

pub mod init;
pub mod layout;
pub mod pretrained;

pub use layout::{LayerSlots, Layout, ParamInfo, Role, Segment, Shard, SharedSlots};
