//! The layout table: every parameter once, with its name, shape, role, segments and shard axis.
//!
//! Initialisation, weight decay, conversion, checkpoints and tensor parallelism read this table; none of them knows
//! an offset or a segment size of its own.

use elapid_tensor::{DType, Mamba2Spec, Row};

use super::shard::{Cuts, Share};
use crate::config::ModelConfig;

/// What a parameter is: decides its initial values, its dtype and whether it is decayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Embedding table `[V, D]`.
    Embedding,
    /// Vocabulary head `[V, D]`, where it is not the embedding table.
    Head,
    /// Input projection `[2E + 2GN + H, D]`.
    InProj,
    /// Output projection `[D, E]`.
    OutProj,
    /// Bias of a projection.
    LinearBias,
    /// Depthwise convolution `[C, 1, K]`.
    ConvWeight,
    /// Its bias `[C]`.
    ConvBias,
    /// `[H]`.
    DtBias,
    /// `[H]`.
    ALog,
    /// The skip `[H]`.
    D,
    /// Weight of an RMS norm, `[D]` or `[E]`.
    Norm,
}

impl Role {
    /// Whether weight decay applies: to what multiplies activations as a matrix, and to nothing else.
    pub fn decayed(self) -> bool {
        matches!(self, Self::Embedding | Self::Head | Self::InProj | Self::OutProj)
    }

    /// Whether the parameter is fp32 even when the model computes in bf16.
    pub fn fp32(self) -> bool {
        matches!(self, Self::DtBias | Self::ALog | Self::D | Self::Norm)
    }
}

/// A named stretch of a fused axis: `units` equal pieces of `width`. Tensor parallelism deals out whole units
/// (heads, groups), so a stretch of fewer units than ranks is replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// `z`, `x`, `B`, `C` or `dt`.
    pub name: &'static str,
    /// Number of heads or groups.
    pub units: usize,
    /// Elements of one head or group along the axis.
    pub width: usize,
}

impl Segment {
    /// Elements along the axis.
    pub fn len(&self) -> usize {
        self.units * self.width
    }

    /// True for a segment without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How tensor parallelism cuts a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shard {
    /// Whole on every rank.
    Replicated,
    /// Axis 0, each segment by itself.
    Column(Vec<Segment>),
    /// Axis 1, each segment by itself.
    Row(Vec<Segment>),
    /// Axis 0, over the vocabulary.
    Vocabulary,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamInfo {
    /// The Hugging Face name; `{i}` stands for the layer.
    pub pattern: &'static str,
    /// What it is.
    pub role: Role,
    /// Logical extents.
    pub shape: Vec<usize>,
    /// How it is cut.
    pub shard: Shard,
}

impl ParamInfo {
    /// The Hugging Face name in a row.
    pub fn name(&self, row: Row) -> String {
        match row {
            Row::Shared => self.pattern.to_owned(),
            Row::Layer(layer) => self.pattern.replace("{i}", &layer.to_string()),
        }
    }

    /// Number of elements of the logical tensor.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The part of it that lies on a rank.
    pub fn cuts(&self, share: Share) -> Cuts {
        Cuts::new(self, share)
    }

    /// Element type in a model that computes in `compute`.
    pub fn dtype(&self, compute: DType) -> DType {
        if self.role.fp32() { DType::F32 } else { compute }
    }

    /// Place in a row: decayed before not decayed, sharded before replicated, compute dtype before fp32, so that
    /// each of these is one range.
    pub(super) fn rank(&self) -> (bool, bool, bool) {
        (!self.role.decayed(), self.shard == Shard::Replicated, self.role.fp32())
    }
}

/// Segments of in_proj, `[z|x|B|C|dt]`.
pub fn projection_segments(spec: &Mamba2Spec) -> Vec<Segment> {
    let z = Segment { name: "z", units: spec.heads, width: spec.head_dim };
    let dt = Segment { name: "dt", units: spec.heads, width: 1 };
    [vec![z], conv_segments(spec), vec![dt]].concat()
}

/// Segments of the convolution, `[x|B|C]`.
pub fn conv_segments(spec: &Mamba2Spec) -> Vec<Segment> {
    let group = |name| Segment { name, units: spec.groups, width: spec.state };
    vec![Segment { name: "x", units: spec.heads, width: spec.head_dim }, group("B"), group("C")]
}

/// The table: parameters of a layer, parameters of the shared region.
pub(super) fn table(config: &ModelConfig) -> (Vec<ParamInfo>, Vec<ParamInfo>) {
    use Shard::{Column, Replicated, Row, Vocabulary};
    let spec = config.spec();
    let (hidden, inner, heads) = (config.hidden_size, spec.inner(), spec.heads);
    let (projection, channels) = (spec.projection(), spec.conv_channels());
    let (in_proj, conv) = (projection_segments(&spec), conv_segments(&spec));
    let per_channel = vec![Segment { name: "x", units: heads, width: spec.head_dim }];
    let per_head = || Column(vec![Segment { name: "dt", units: heads, width: 1 }]);

    let line =
        |pattern, role, shape: &[usize], shard| ParamInfo { pattern, role, shape: shape.to_vec(), shard };
    #[rustfmt::skip]
    let mut layer = vec![
        line("backbone.layers.{i}.norm.weight", Role::Norm, &[hidden], Replicated),
        line("backbone.layers.{i}.mixer.in_proj.weight", Role::InProj, &[projection, hidden], Column(in_proj.clone())),
        line("backbone.layers.{i}.mixer.in_proj.bias", Role::LinearBias, &[projection], Column(in_proj)),
        line("backbone.layers.{i}.mixer.conv1d.weight", Role::ConvWeight, &[channels, 1, config.conv_kernel], Column(conv.clone())),
        line("backbone.layers.{i}.mixer.conv1d.bias", Role::ConvBias, &[channels], Column(conv)),
        line("backbone.layers.{i}.mixer.dt_bias", Role::DtBias, &[heads], per_head()),
        line("backbone.layers.{i}.mixer.A_log", Role::ALog, &[heads], per_head()),
        line("backbone.layers.{i}.mixer.D", Role::D, &[heads], per_head()),
        line("backbone.layers.{i}.mixer.norm.weight", Role::Norm, &[inner], Column(per_channel.clone())),
        line("backbone.layers.{i}.mixer.out_proj.weight", Role::OutProj, &[hidden, inner], Row(per_channel)),
        line("backbone.layers.{i}.mixer.out_proj.bias", Role::LinearBias, &[hidden], Replicated),
    ];
    layer.retain(|info| match info.role {
        Role::LinearBias => config.use_bias,
        Role::ConvBias => config.use_conv_bias,
        _ => true,
    });
    let mut shared = vec![
        line("backbone.embeddings.weight", Role::Embedding, &[config.vocab_size, hidden], Vocabulary),
        line("backbone.norm_f.weight", Role::Norm, &[hidden], Replicated),
        line("lm_head.weight", Role::Head, &[config.vocab_size, hidden], Vocabulary),
    ];
    shared.retain(|info| info.role != Role::Head || !config.tie_word_embeddings);
    layer.sort_by_key(ParamInfo::rank);
    shared.sort_by_key(ParamInfo::rank);
    (layer, shared)
}
