//! The model: its layout in memory, initial values, and pretrained folders.
