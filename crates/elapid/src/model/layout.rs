//! The places of the parameters in the flat buffers: [`Layout`] puts the lines of the table (`table.rs`) there.

use std::fmt;

use std::ops::Range;

use elapid_tensor::{Copies, FlatShape, Mamba2Spec, NormGroup, Row, Slot};

use super::shard::Share;
use super::table::table;
pub use super::table::{ParamInfo, Role, Segment, Shard, conv_segments, projection_segments};
use crate::config::ModelConfig;

/// Rows are padded to a multiple of this many elements: one cache line of fp32.
const ROW_MULTIPLE: usize = 16;

/// A parameter and where its part lies in the row.
#[derive(Clone, Debug)]
struct Placed {
    offset: usize,
    /// Extents on this rank.
    shape: Vec<usize>,
    info: ParamInfo,
}

impl Placed {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Parameters in the order of their row, and its length.
fn place(params: Vec<ParamInfo>, share: Share) -> (Vec<Placed>, usize) {
    let mut end = 0;
    let placed = params.into_iter().map(|info| {
        let placed = Placed { offset: end, shape: info.cuts(share).shape(), info };
        end += placed.len();
        placed
    });
    (placed.collect(), end.next_multiple_of(ROW_MULTIPLE))
}

/// A range of a row that several neighbouring tensor-parallel ranks hold copies of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Elements, counted from the start of the row.
    pub range: Range<usize>,
    /// How many ranks; the first of them is at a multiple of this number.
    pub copies: usize,
    /// Each rank has a part of its gradient, so these must be summed (trap T12). Else they are the same already.
    pub partial: bool,
}

/// Where a layer's parameters lie.
#[derive(Clone, Debug)]
pub struct LayerSlots {
    /// Norm before the mixer, `[D]`.
    pub norm: Slot,
    /// `[2E + 2GN + H, D]`.
    pub in_proj: Slot,
    /// `[2E + 2GN + H]`.
    pub in_proj_bias: Option<Slot>,
    /// `[C, 1, K]`.
    pub conv_weight: Slot,
    /// `[C]`.
    pub conv_bias: Option<Slot>,
    /// `[H]`.
    pub dt_bias: Slot,
    /// `[H]`.
    pub a_log: Slot,
    /// `[H]`.
    pub d: Slot,
    /// Gated norm, `[E]`.
    pub norm_weight: Slot,
    /// `[D, E]`.
    pub out_proj: Slot,
    /// `[D]`.
    pub out_proj_bias: Option<Slot>,
}

/// Where the parameters outside the layers lie.
#[derive(Clone, Debug)]
pub struct SharedSlots {
    /// `[V, D]`.
    pub embedding: Slot,
    /// Final norm, `[D]`.
    pub norm_f: Slot,
    /// `[V, D]`; None: the head is the embedding table.
    pub head: Option<Slot>,
}

/// All parameters of a model and their places in the flat buffers of one rank.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Extents of the flat buffers.
    pub flat: FlatShape,
    /// Weight decay applies to the first elements of each row: (of a layer row, of the shared region).
    pub decayed: (usize, usize),
    /// Whose layout this is.
    pub share: Share,
    /// The constants of the `mamba2` op on this rank.
    pub spec: Mamba2Spec,
    layer: Vec<Placed>,
    shared: Vec<Placed>,
}

impl Layout {
    /// The layout of a valid configuration on a single rank.
    pub fn new(config: &ModelConfig) -> Self {
        Self::sharded(config, Share::WHOLE)
    }

    /// The layout on one of several tensor-parallel ranks, as many as [`check_ranks`](super::shard::check_ranks)
    /// allows.
    pub fn sharded(config: &ModelConfig, share: Share) -> Self {
        let (layer, shared) = table(config);
        let ((layer, row), (shared, shared_len)) = (place(layer, share), place(shared, share));
        let decayed =
            |params: &[Placed]| params.iter().filter(|p| p.info.role.decayed()).map(Placed::len).sum();
        let decayed = (decayed(&layer), decayed(&shared));
        let flat = FlatShape { layers: config.num_hidden_layers, row, shared: shared_len };
        let spec = config.spec();
        let norm_ranks = match spec.norm {
            NormGroup::PerGroup => (share.ranks / spec.groups).max(1),
            NormGroup::Across => share.ranks,
        };
        let (heads, groups) = (spec.heads / share.ranks, (spec.groups / share.ranks).max(1));
        let spec = Mamba2Spec { heads, groups, norm_ranks, ..spec };
        Self { flat, decayed, share, spec, layer, shared }
    }

    /// The same layout with rows that can be dealt out evenly to `ranks`.
    pub fn dealt_to(mut self, ranks: usize) -> Self {
        let multiple = ROW_MULTIPLE * ranks;
        self.flat.row = self.flat.row.next_multiple_of(multiple);
        self.flat.shared = self.flat.shared.next_multiple_of(multiple);
        self
    }

    /// The elements of `slot` that lie in one of `ranks` equal parts of its row, and where in that part the first of them
    /// is.
    pub fn within_part(&self, slot: &Slot, ranks: usize, rank: usize) -> (Range<usize>, usize) {
        let len = self.flat.whole(slot.row).len() / ranks;
        let within = |end: usize| end.clamp(slot.offset, slot.offset + slot.len()) - slot.offset;
        let range = within(rank * len)..within((rank + 1) * len);
        let at = (slot.offset + range.start).saturating_sub(rank * len);
        (range, at)
    }

    /// What of `slot` lies in one of `ranks` equal parts of its row and counts in a norm over all ranks: as slots of that
    /// part.
    pub fn counted(&self, slot: &Slot, ranks: usize, rank: usize) -> Vec<Slot> {
        let (start, end) = (slot.offset, slot.offset + slot.len());
        let mut at = start;
        let mut counted = Vec::new();
        let replicas = self.replicas(slot.row, false).into_iter();
        let uncounted = replicas.filter(|replica| !self.share.rank.is_multiple_of(replica.copies));
        for gap in uncounted.map(|replica| replica.range).chain(std::iter::once(end..end)) {
            let stretch = at..gap.start.clamp(at, end);
            at = gap.end.clamp(at, end);
            let whole = Slot { row: slot.row, offset: stretch.start, shape: vec![stretch.len()] };
            let (range, offset) = self.within_part(&whole, ranks, rank);
            counted.push(Slot { row: slot.row, offset, shape: vec![range.len()] });
        }
        counted.retain(|slot| !slot.is_empty());
        counted
    }

    /// What tensor-parallel ranks hold in copies, of (a layer row, the shared region): a norm over all ranks counts it once
    /// (trap T21).
    pub fn copies(&self) -> (Vec<Copies>, Vec<Copies>) {
        let of_row = |row| {
            let replicas = self.replicas(row, false).into_iter();
            replicas.map(|replica| Copies { range: replica.range, ranks: replica.copies }).collect()
        };
        (if self.flat.layers == 0 { Vec::new() } else { of_row(Row::Layer(0)) }, of_row(Row::Shared))
    }

    fn row(&self, row: Row) -> &[Placed] {
        match row {
            Row::Shared => &self.shared,
            Row::Layer(_) => &self.layer,
        }
    }

    /// The table of a layer, or of the shared region, in memory order. A slot has the extents of this rank's part.
    pub fn params(&self, row: Row) -> impl Iterator<Item = (Slot, &ParamInfo)> {
        self.row(row).iter().map(move |placed| {
            (Slot { row, offset: placed.offset, shape: placed.shape.clone() }, &placed.info)
        })
    }

    /// The ranges of a row that other tensor-parallel ranks hold, too. With `sequence_parallel` each rank has seen
    /// only its part of the sequence where a whole tensor was used.
    pub fn replicas(&self, row: Row, sequence_parallel: bool) -> Vec<Replica> {
        let replicas = self.row(row).iter().flat_map(|placed| {
            let cuts = placed.info.cuts(self.share);
            // What is cut by segment belongs to heads, and each rank has seen only its own.
            let partial = sequence_parallel || placed.info.shard != Shard::Replicated;
            let at = |range: Range<usize>| placed.offset + range.start..placed.offset + range.end;
            cuts.replicated()
                .map(|(range, copies)| Replica { range: at(range), copies, partial })
                .collect::<Vec<_>>()
        });
        let mut joined = Vec::<Replica>::new();
        for replica in replicas {
            match joined.last_mut() {
                Some(last)
                    if last.range.end == replica.range.start
                        && (last.copies, last.partial) == (replica.copies, replica.partial) =>
                {
                    last.range.end = replica.range.end;
                }
                _ => joined.push(replica),
            }
        }
        joined
    }

    /// Every parameter of the model with its Hugging Face name, in memory order.
    pub fn iter(&self) -> impl Iterator<Item = (String, Slot, &ParamInfo)> {
        let rows = (0..self.flat.layers).map(Row::Layer).chain([Row::Shared]);
        rows.flat_map(|row| self.params(row).map(move |(slot, info)| (info.name(row), slot, info)))
    }

    /// The slots of layer `layer`.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> LayerSlots {
        assert!(layer < self.flat.layers, "layer {layer} of {}", self.flat.layers);
        let row = Row::Layer(layer);
        LayerSlots {
            norm: self.slot(row, ".{i}.norm.weight"),
            in_proj: self.slot(row, ".in_proj.weight"),
            in_proj_bias: self.find(row, ".in_proj.bias"),
            conv_weight: self.slot(row, ".conv1d.weight"),
            conv_bias: self.find(row, ".conv1d.bias"),
            dt_bias: self.slot(row, ".dt_bias"),
            a_log: self.slot(row, ".A_log"),
            d: self.slot(row, ".D"),
            norm_weight: self.slot(row, ".mixer.norm.weight"),
            out_proj: self.slot(row, ".out_proj.weight"),
            out_proj_bias: self.find(row, ".out_proj.bias"),
        }
    }

    /// The slots outside the layers.
    pub fn shared(&self) -> SharedSlots {
        SharedSlots {
            embedding: self.slot(Row::Shared, ".embeddings.weight"),
            norm_f: self.slot(Row::Shared, ".norm_f.weight"),
            head: self.find(Row::Shared, "lm_head.weight"),
        }
    }

    /// Number of parameters of the whole model.
    pub fn parameter_count(&self) -> usize {
        self.iter().map(|(_, _, info)| info.elements()).sum()
    }

    fn find(&self, row: Row, ending: &str) -> Option<Slot> {
        self.params(row).find(|(_, info)| info.pattern.ends_with(ending)).map(|(slot, _)| slot)
    }

    fn slot(&self, row: Row, ending: &str) -> Slot {
        self.find(row, ending).expect("the table holds every parameter that is not optional")
    }
}

/// The table that a run prints at its start: each parameter with its shape and count over all layers, in the two
/// groups of weight decay.
impl fmt::Display for Layout {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_layers = self.layer.iter().map(|placed| (self.flat.layers, &placed.info));
        let all: Vec<_> = of_layers.chain(self.shared.iter().map(|placed| (1, &placed.info))).collect();
        for (title, decayed) in [("weight decay", true), ("no weight decay", false)] {
            let group = || all.iter().filter(|(_, info)| info.role.decayed() == decayed);
            let total: usize = group().map(|(times, info)| times * info.elements()).sum();
            writeln!(out, "{:<62}{:>16}", title, grouped(total))?;
            for (times, info) in group() {
                let name = info.pattern.replace("{i}", "*");
                let shape = format!("{:?}", info.shape);
                let dtype = if info.role.fp32() { "fp32" } else { "" };
                let count = grouped(times * info.elements());
                writeln!(out, "  {name:<40}{shape:<16}{dtype:<4}{count:>16}")?;
            }
        }
        write!(out, "{:<62}{:>16}", "parameters", grouped(self.parameter_count()))
    }
}

/// A number with its digits in threes.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let threes: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    threes.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            use_bias: true,
            tie_word_embeddings: false,
            n_groups: 4,
            vocab_size: 37,
            ..ModelConfig::preset("tiny").unwrap()
        }
    }

    #[test]
    fn slots_tile_every_row() {
        let layout = Layout::new(&config());
        let mut owner = vec![0_u8; layout.flat.len()];
        for (_, slot, _) in layout.iter() {
            owner[layout.flat.range(&slot)].iter_mut().for_each(|owners| *owners += 1);
        }
        assert!(owner.iter().all(|owners| *owners <= 1), "slots overlap");
        let free = owner.iter().filter(|owners| **owners == 0).count();
        assert_eq!(owner.len() - free, layout.parameter_count());
        assert!(free < ROW_MULTIPLE * (layout.flat.layers + 1), "only the ends are padding");
        assert!(
            layout.flat.row.is_multiple_of(ROW_MULTIPLE) && layout.flat.shared.is_multiple_of(ROW_MULTIPLE)
        );
    }

    #[test]
    fn t22_decay_is_a_prefix_of_matrices() {
        let layout = Layout::new(&config());
        for (name, slot, info) in layout.iter() {
            let decayed = match slot.row {
                Row::Layer(_) => layout.decayed.0,
                Row::Shared => layout.decayed.1,
            };
            assert_eq!(slot.offset + slot.len() <= decayed, info.role.decayed(), "{name}");
            // A matrix has two axes; A_log, D, dt_bias, norms and biases have one, the convolution three.
            assert_eq!(info.role.decayed(), info.shape.len() == 2, "{name}");
        }
    }

    #[test]
    fn ranges_of_a_row_are_contiguous() {
        let layout = Layout::new(&config());
        for row in [Row::Layer(0), Row::Shared] {
            let ranks: Vec<_> = layout.params(row).map(|(_, info)| info.rank()).collect();
            assert!(ranks.is_sorted(), "{ranks:?}");
        }
    }

    #[test]
    fn t10_segments_fill_the_sharded_axis() {
        let layout = Layout::new(&config());
        for (name, slot, info) in layout.iter() {
            let (axis, segments) = match &info.shard {
                Shard::Column(segments) => (0, segments),
                Shard::Row(segments) => (1, segments),
                Shard::Replicated | Shard::Vocabulary => continue,
            };
            assert_eq!(segments.iter().map(Segment::len).sum::<usize>(), slot.shape[axis], "{name}");
        }
        let names = |segments: Vec<Segment>| segments.iter().map(|s| s.name).collect::<Vec<_>>();
        assert_eq!(names(projection_segments(&config().spec())), ["z", "x", "B", "C", "dt"]);
        assert_eq!(names(conv_segments(&config().spec())), ["x", "B", "C"]);
    }

    #[test]
    fn typed_access_finds_the_right_tensors() {
        let layout = Layout::new(&config());
        let name_of = |wanted: &Slot| layout.iter().find(|(_, slot, _)| slot == wanted).unwrap().0;
        let layer = layout.layer(2);
        for (slot, name) in [
            (&layer.norm, "norm.weight"),
            (&layer.in_proj, "mixer.in_proj.weight"),
            (layer.in_proj_bias.as_ref().unwrap(), "mixer.in_proj.bias"),
            (&layer.conv_weight, "mixer.conv1d.weight"),
            (layer.conv_bias.as_ref().unwrap(), "mixer.conv1d.bias"),
            (&layer.dt_bias, "mixer.dt_bias"),
            (&layer.a_log, "mixer.A_log"),
            (&layer.d, "mixer.D"),
            (&layer.norm_weight, "mixer.norm.weight"),
            (&layer.out_proj, "mixer.out_proj.weight"),
            (layer.out_proj_bias.as_ref().unwrap(), "mixer.out_proj.bias"),
        ] {
            assert_eq!(name_of(slot), format!("backbone.layers.2.{name}"));
        }
        let shared = layout.shared();
        assert_eq!(name_of(&shared.embedding), "backbone.embeddings.weight");
        assert_eq!(name_of(&shared.norm_f), "backbone.norm_f.weight");
        assert_eq!(name_of(shared.head.as_ref().unwrap()), "lm_head.weight");
    }

    #[test]
    fn t14_a_tied_head_is_no_parameter() {
        let plain = ModelConfig { use_conv_bias: false, ..ModelConfig::preset("tiny").unwrap() };
        let layout = Layout::new(&plain);
        assert!(layout.shared().head.is_none());
        assert!(layout.layer(0).conv_bias.is_none() && layout.layer(0).in_proj_bias.is_none());
        assert_eq!(layout.iter().count(), 8 * plain.num_hidden_layers + 2);
    }

    #[test]
    fn known_sizes() {
        // From transformers 5.23: sum of p.numel() of Mamba2ForCausalLM with the same configuration.
        let count = |name| Layout::new(&ModelConfig::preset(name).unwrap()).parameter_count();
        for (name, parameters) in [
            ("mamba2-130m", 128_989_632),
            ("mamba2-370m", 368_346_624),
            ("mamba2-780m", 780_161_280),
            ("mamba2-1.3b", 1_343_757_312),
            ("mamba2-2.7b", 2_702_599_680),
            ("Mamba130M", 152_514_144),
            ("Mamba370M", 456_068_352),
            ("Mamba780M", 910_939_008),
            ("Mamba1B", 1_517_197_824),
            ("Mamba3B", 2_990_213_120),
            ("Mamba7B", 7_206_158_336),
        ] {
            assert_eq!(count(name), parameters, "{name}");
        }
    }

    #[test]
    fn the_printed_table_adds_up() {
        let text = Layout::new(&config()).to_string();
        println!("{text}");
        assert!(text.starts_with("weight decay"));
        assert!(text.contains("backbone.layers.*.mixer.A_log"));
        assert!(text.ends_with(&grouped(Layout::new(&config()).parameter_count())));
        assert_eq!(grouped(1234567), "1,234,567");
    }
}
