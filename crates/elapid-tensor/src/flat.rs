//! Flat buffers: one row a layer, plus one shared region.
//!
//! Parameters, gradients and optimizer moments each live in one buffer of the same [`FlatShape`]. A tensor is a
//! [`Slot`]: a place inside a row. The rows of all layers are identical, so a row is at once the layer, the
//! bucket of a reduction and the slice that a recorded layer loop reads.

use std::ops::Range;

/// Which row of a flat buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// The region of embedding, head and final norm.
    Shared,
    /// The row of one layer, counted from 0.
    Layer(usize),
}

/// Extents of a flat buffer, in elements: `layers` rows of `row`, then the shared region of `shared`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlatShape {
    /// Number of layer rows.
    pub layers: usize,
    /// Elements a layer row.
    pub row: usize,
    /// Elements of the shared region.
    pub shared: usize,
}

impl FlatShape {
    /// Elements of the whole buffer.
    pub fn len(&self) -> usize {
        self.layers * self.row + self.shared
    }

    /// True when the buffer holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// First element of a row.
    pub fn start(&self, row: Row) -> usize {
        match row {
            Row::Shared => self.layers * self.row,
            Row::Layer(layer) => {
                assert!(layer < self.layers, "layer {layer} of {}", self.layers);
                layer * self.row
            }
        }
    }

    /// All rows, in the order in which they lie.
    pub fn rows(&self) -> impl DoubleEndedIterator<Item = Row> + use<> {
        (0..self.layers).map(Row::Layer).chain([Row::Shared])
    }

    /// The slot that covers a row.
    pub fn whole(&self, row: Row) -> Slot {
        let len = match row {
            Row::Shared => self.shared,
            Row::Layer(_) => self.row,
        };
        Slot { row, offset: 0, shape: vec![len] }
    }

    /// Extents of one of `ranks` equal parts of every row.
    ///
    /// # Panics
    /// If a row cannot be dealt out evenly.
    pub fn shard(&self, ranks: usize) -> Self {
        assert!(self.row.is_multiple_of(ranks) && self.shared.is_multiple_of(ranks), "{self:?} / {ranks}");
        Self { layers: self.layers, row: self.row / ranks, shared: self.shared / ranks }
    }

    /// How many of the first `end` elements of a whole row lie in part number `rank` of it, where every part has `len`.
    pub fn in_part(end: usize, len: usize, rank: usize) -> usize {
        end.saturating_sub(rank * len).min(len)
    }

    /// Elements of `slot` inside the whole buffer.
    pub fn range(&self, slot: &Slot) -> Range<usize> {
        let start = self.start(slot.row) + slot.offset;
        start..start + slot.len()
    }
}

/// A tensor's place in a flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The row it lies in.
    pub row: Row,
    /// First element, counted from the start of the row.
    pub offset: usize,
    /// Its extents; row-major.
    pub shape: Vec<usize>,
}

impl Slot {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a slot without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
