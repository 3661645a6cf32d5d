//! The op contract: what a device must be able to do, and no more.
//!
//! Ops are few and coarse. Each has its adjoint beside it. An adjoint returns the cotangents of activations and
//! *adds* the gradients of parameters to a place in a flat buffer ([`Sink`]), because the buffer already holds
//! what earlier micro-steps left there. Nothing is read back to the host inside an op, so that a backend may
//! record instead of computing.

use std::ops::Range;

use crate::flat::{FlatShape, Row, Slot};
use crate::layer_loop::LayerLoop;

/// A label that takes no part in the loss.
pub const IGNORE_LABEL: i32 = -100;

/// Element type of an activation or of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// 32-bit integers: token ids, labels, document ids.
    I32,
}

/// Over which channels the gated RMS norm takes its mean square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormGroup {
    /// One mean per group of E/G channels: what state-spaces and transformers compute.
    PerGroup,
    /// One mean over all E channels (`--rmsnorm-across-groups`).
    Across,
}

/// The constants of the `mamba2` op. Where tensor-parallel ranks share a model, heads and groups are those of one rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mamba2Spec {
    /// H.
    pub heads: usize,
    /// P.
    pub head_dim: usize,
    /// G; divides H. The H/G heads of a group are neighbours.
    pub groups: usize,
    /// N.
    pub state: usize,
    /// K, 1 to 4.
    pub conv_kernel: usize,
    /// Q, the chunk length of the scan. The result does not depend on it beyond rounding.
    pub chunk: usize,
    /// Δt after softplus is clamped to this closed interval; the upper end may be infinite.
    pub dt_limit: (f32, f32),
    /// Width of the gated norm's mean.
    pub norm: NormGroup,
    /// So many neighbouring tensor-parallel ranks share each mean of the gated norm, the first of them at a multiple of
    /// that number; 1: each mean is a rank's own.
    pub norm_ranks: usize,
    /// Added to the mean square of the gated norm.
    pub norm_eps: f32,
}

impl Mamba2Spec {
    /// E = H·P, channels of x, z and of the output.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// C = E + 2·G·N, channels of the convolution `[x|B|C]`.
    pub fn conv_channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    /// Width of the fused projection `[z|x|B|C|dt]`: E + C + H.
    pub fn projection(&self) -> usize {
        self.inner() + self.conv_channels() + self.heads
    }

    /// Channels of this rank that share one mean of the gated norm.
    pub fn norm_width(&self) -> usize {
        match self.norm {
            NormGroup::PerGroup => self.inner() / self.groups,
            NormGroup::Across => self.inner(),
        }
    }
}

/// What a layer carries from one stretch of a sequence to the next, always fp32.
#[derive(Clone, Debug)]
pub struct State<T> {
    /// `[B, K−1, C]`: the last inputs of the convolution, before bias and SiLU, oldest first.
    pub conv: T,
    /// `[B, H, P, N]`: the state of the scan.
    pub ssm: T,
}

/// Activations that go into `mamba2`.
#[derive(Clone, Debug)]
pub struct Mamba2Inputs<T> {
    /// `[B, L, E + C + H]`, in the order `[z|x|B|C|dt]`.
    pub projected: T,
    /// `[B, L]` i32 document ids: where two neighbours differ, conv and scan start afresh. None: one document.
    /// An initial state belongs to the document of position 0.
    pub documents: Option<T>,
    /// State before position 0. None: zeros.
    pub initial: Option<State<T>>,
}

/// Parameters of `mamba2`: tensors in the forward op, sinks in the adjoint.
#[derive(Clone, Debug)]
pub struct Mamba2Weights<T> {
    /// `[C, 1, K]`; the last tap multiplies the current position.
    pub conv_weight: T,
    /// `[C]`.
    pub conv_bias: Option<T>,
    /// `[H]`, added to dt before softplus. fp32.
    pub dt_bias: T,
    /// `[H]`; A = −exp(A_log). fp32.
    pub a_log: T,
    /// `[H]`: y += D·x. fp32.
    pub d: T,
    /// `[E]`, weight of the gated norm. fp32.
    pub norm_weight: T,
}

impl<T> Mamba2Weights<T> {
    /// The same record of references.
    pub fn as_ref(&self) -> Mamba2Weights<&T> {
        Mamba2Weights {
            conv_weight: &self.conv_weight,
            conv_bias: self.conv_bias.as_ref(),
            dt_bias: &self.dt_bias,
            a_log: &self.a_log,
            d: &self.d,
            norm_weight: &self.norm_weight,
        }
    }

    /// Applies `f` to every parameter.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Mamba2Weights<U> {
        Mamba2Weights {
            conv_weight: f(self.conv_weight),
            conv_bias: self.conv_bias.map(&mut f),
            dt_bias: f(self.dt_bias),
            a_log: f(self.a_log),
            d: f(self.d),
            norm_weight: f(self.norm_weight),
        }
    }
}

/// Where `mamba2_adjoint` adds parameter gradients; shapes as in [`Mamba2Weights`].
pub type Mamba2Sinks<'a> = Mamba2Weights<&'a Slot>;

/// What `mamba2` gives back.
#[derive(Clone, Debug)]
pub struct Mamba2Output<T> {
    /// `[B, L, E]` in the dtype of the projection.
    pub y: T,
    /// State after the last position.
    pub state: State<T>,
    /// What the adjoint wants to see again; empty unless asked for.
    pub saved: Vec<T>,
}

/// Cotangents that `mamba2_adjoint` gives back.
#[derive(Clone, Debug)]
pub struct Mamba2Grads<T> {
    /// `[B, L, E + C + H]`.
    pub projected: T,
    /// Present exactly when an initial state was given.
    pub initial: Option<State<T>>,
}

/// A place to which a parameter gradient is added.
pub struct Sink<'a, B: Backend> {
    /// The flat gradient buffer, fp32.
    pub buffer: &'a mut B::Buffer,
    /// The parameter's place in it.
    pub slot: &'a Slot,
}

/// Ranks that work together. Every rank belongs to one of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Ranks that share a batch and cut the parameters among themselves.
    Tp,
    /// Ranks that hold the same parameters and share the samples.
    Dp,
}

/// How gradients become one norm, and what they are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Clipping<'a> {
    /// 1 / number of labels that count, over the whole global batch.
    pub scale: f32,
    /// The norm that the gradients keep to; 0 or less: any.
    pub max_norm: f32,
    /// What several ranks hold of (a layer row, the shared region), and the first of them alone counts: in order, without
    /// overlaps.
    pub copies: (&'a [Copies], &'a [Copies]),
    /// The squares are summed over the ranks of these groups. Where [`Group::Dp`] is one of them, the buffer holds this
    /// rank's part of every row, one of as many equal ones, in rank order.
    pub over: &'a [Group],
}

/// Elements of a row that several neighbouring tensor-parallel ranks hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copies {
    /// Which, counted from the start of the whole row.
    pub range: Range<usize>,
    /// How many ranks; the first of them is at a multiple of this number.
    pub ranks: usize,
}

/// To what of a buffer weight decay applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decayed {
    /// To the first elements of every layer row, counted in the whole row.
    pub layer: usize,
    /// To the first elements of the shared region, counted as well.
    pub shared: usize,
    /// The buffers hold this data-parallel rank's part of every row, one of as many equal ones, in rank order; else whole
    /// rows.
    pub dealt: bool,
}

impl Clipping<'_> {
    /// For a rank that holds all gradients.
    pub fn alone(scale: f32, max_norm: f32) -> Self {
        Self { scale, max_norm, copies: (&[], &[]), over: &[] }
    }
}

/// Host scalars of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, applied where the layout says so.
    pub weight_decay: f32,
    /// Optimizer step, counted from 1, for the bias correction.
    pub step: u64,
}

/// A device. See the module's text for the rules that all ops follow.
///
/// Shapes and dtypes that an op cannot take are a programming error of the caller and panic; user input is
/// checked before it gets here.
pub trait Backend: Sized + Sync + 'static {
    /// An immutable value on the device; cloning shares it.
    type Tensor: Clone + Send + Sync + 'static;
    /// A flat buffer of [`FlatShape`]: parameters, gradients or moments.
    type Buffer: Send + Sync;
    /// A row on its way between the ranks.
    type Pending: Send;

    // --- host and device ---

    /// A tensor of `dtype` (F32 or Bf16) with the given row-major values.
    fn tensor(&self, values: &[f32], shape: &[usize], dtype: DType) -> Self::Tensor;

    /// An i32 tensor with the given row-major values.
    fn tensor_i32(&self, values: &[i32], shape: &[usize]) -> Self::Tensor;

    /// The values of an F32 or Bf16 tensor, row-major. Waits for the device.
    fn values(&self, tensor: &Self::Tensor) -> Vec<f32>;

    /// Extents of a tensor.
    fn shape(&self, tensor: &Self::Tensor) -> Vec<usize>;

    // --- flat buffers ---

    /// A buffer of zeros.
    fn buffer(&self, shape: FlatShape, dtype: DType) -> Self::Buffer;

    /// Copies `values` into the place `slot`.
    fn write_slot(&self, buffer: &mut Self::Buffer, slot: &Slot, values: &[f32]);

    /// The tensor at `slot`, sharing the buffer's memory where the device can.
    fn view(&self, buffer: &Self::Buffer, slot: &Slot) -> Self::Tensor;

    /// `to` = `from`, rounded to the dtype of `to`. Both have the same extents.
    fn cast_buffer(&self, from: &Self::Buffer, to: &mut Self::Buffer);

    /// Sets a buffer to zero.
    fn zero_buffer(&self, buffer: &mut Self::Buffer);

    // --- ops ---

    /// Rows of `table` `[V, D]` at `ids` `[B, L]`: `[B, L, D]` in `out` dtype. Where tensor-parallel ranks share the
    /// vocabulary, rank r holds the rows from r·V on, and a token of another rank gives zeros.
    fn embedding(&self, table: &Self::Tensor, ids: &Self::Tensor, out: DType) -> Self::Tensor;

    /// Adds the rows of `dy` `[B, L, D]` to the rows `ids` of the table's gradient `[V, D]`, as far as they are this
    /// rank's.
    fn embedding_adjoint(&self, ids: &Self::Tensor, dy: &Self::Tensor, d_table: Sink<'_, Self>);

    /// `x / sqrt(mean(x²) + eps) · weight` over the last axis D, in `out` dtype; the mean in fp32.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32, out: DType) -> Self::Tensor;

    /// Cotangent of `x`, in the dtype of `x`; adds to the gradient of `weight`.
    fn rms_norm_adjoint(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        eps: f32,
        dy: &Self::Tensor,
        d_weight: Sink<'_, Self>,
    ) -> Self::Tensor;

    /// `x [.., I] · weight [O, I]ᵀ + bias [O]`: `[.., O]` in the dtype of `x`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Tensor, bias: Option<&Self::Tensor>) -> Self::Tensor;

    /// Cotangent of `x`; adds to the gradients of `weight` and, where a slot is given, of `bias`.
    fn linear_adjoint(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        dy: &Self::Tensor,
        d_weight: Sink<'_, Self>,
        d_bias: Option<&Slot>,
    ) -> Self::Tensor;

    /// `x [.., O] + bias [O]` in the dtype of `x`.
    fn add_bias(&self, x: &Self::Tensor, bias: &Self::Tensor) -> Self::Tensor;

    /// Adds the sum of the rows of `dy` to the gradient of the bias. The cotangent of `x` is `dy` itself.
    fn add_bias_adjoint(&self, dy: &Self::Tensor, d_bias: Sink<'_, Self>);

    /// `x [B, L, ..]` with axis 1 made `len` long: cut off at its end, or filled up with zeros there. The adjoint is the
    /// same op with the old length.
    fn resize(&self, x: &Self::Tensor, len: usize) -> Self::Tensor;

    /// `a + b` in the dtype of `a`. Its adjoint is [`Backend::cast`] to either side.
    fn add(&self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;

    /// `x` rounded to `dtype`; the same value when it has that dtype already.
    fn cast(&self, x: &Self::Tensor, dtype: DType) -> Self::Tensor;

    /// Element type of a tensor.
    fn dtype(&self, x: &Self::Tensor) -> DType;

    /// Everything between in_proj and out_proj of a Mamba-2 mixer: causal depthwise conv + SiLU over `[x|B|C]`,
    /// Δt = clamp(softplus(dt + dt_bias)), the selective scan
    /// `S_t = exp(Δt·A)·S_{t−1} + Δt·x_t B_tᵀ`, `y_t = S_t C_t + D·x_t`, then `rms_norm(y · silu(z)) · weight`.
    /// Source: Dao & Gu 2024, "Transformers are SSMs", section 7 and listing 1.
    ///
    /// An initial state that nobody else holds may become the final one in place.
    fn mamba2(
        &self,
        spec: &Mamba2Spec,
        inputs: Mamba2Inputs<Self::Tensor>,
        weights: &Mamba2Weights<Self::Tensor>,
        save: bool,
    ) -> Mamba2Output<Self::Tensor>;

    /// Adjoint of [`Backend::mamba2`]: `dy` `[B, L, E]`, `d_state` the cotangent of the final state (None: zero),
    /// `saved` what the forward op saved.
    fn mamba2_adjoint(
        &self,
        spec: &Mamba2Spec,
        inputs: &Mamba2Inputs<Self::Tensor>,
        weights: &Mamba2Weights<Self::Tensor>,
        saved: &[Self::Tensor],
        dy: &Self::Tensor,
        d_state: Option<&State<Self::Tensor>>,
        grads: &mut Self::Buffer,
        sinks: &Mamba2Sinks<'_>,
    ) -> Mamba2Grads<Self::Tensor>;

    /// Sum over positions of the cross entropy of `softmax(x · weightᵀ)` against `labels`, fp32, shape `[]`.
    /// `x` `[B, L, D]`, `weight` `[V, D]`, `labels` `[B, L]` with [`IGNORE_LABEL`] where there is none.
    /// Works in blocks of positions: the `[B, L, V]` logits never exist at once.
    ///
    /// Where tensor-parallel ranks share the vocabulary, rank r holds the rows from r·V on, and the softmax is over the
    /// first `vocab` tokens of all ranks together: rows beyond are padding (trap T11). Every rank gets the same loss.
    fn head_loss(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        labels: &Self::Tensor,
        vocab: usize,
    ) -> Self::Tensor;

    /// [`Backend::head_loss`] and its adjoint in one pass over the blocks: (loss, cotangent of `x`). The loss is the
    /// end of every training graph, so its own cotangent is 1; adds to the gradient of `weight`. The cotangent of `x` is
    /// the share of this rank's rows.
    fn head_loss_adjoint(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        labels: &Self::Tensor,
        vocab: usize,
        d_weight: Sink<'_, Self>,
    ) -> (Self::Tensor, Self::Tensor);

    /// fp32 logits `x [.., D] · weight [V, D]ᵀ`, for decoding.
    fn logits(&self, x: &Self::Tensor, weight: &Self::Tensor) -> Self::Tensor;

    // --- ranks ---
    // All ranks of a group call the same of these in the same order. Sums are in fp32 and in rank order: the same bits
    // on every rank. In a group of one they give back what they are given.

    /// Ranks in this rank's group.
    fn group_size(&self, group: Group) -> usize;

    /// This rank's number in its group, from 0.
    fn group_rank(&self, group: Group) -> usize;

    /// Σ of `x` over the ranks, in the dtype of `x`.
    fn all_reduce(&self, x: &Self::Tensor, group: Group) -> Self::Tensor;

    /// The largest of `x` over the ranks, by element. fp32.
    fn all_reduce_max(&self, x: &Self::Tensor, group: Group) -> Self::Tensor;

    /// The `x` of all ranks one after the other along `axis`, in rank order.
    fn all_gather(&self, x: &Self::Tensor, axis: usize, group: Group) -> Self::Tensor;

    /// This rank's part of Σ of `x` over the ranks, cut along `axis` into equal parts; the conjugate of
    /// [`Backend::all_gather`].
    fn reduce_scatter(&self, x: &Self::Tensor, axis: usize, group: Group) -> Self::Tensor;

    /// The rows to visit where [`Backend::all_reduce_slot`], [`Backend::sum_slot_over_neighbours`],
    /// [`Backend::reduce_scatter_row`] or [`Backend::all_gather_row`] do the same to every row of a buffer. A backend that
    /// records gives one layer, which stands for all in these ops.
    fn every_row(&self, flat: FlatShape) -> Vec<Row> {
        flat.rows().collect()
    }

    /// Replaces what lies at `slot` by its sum over the ranks.
    fn all_reduce_slot(&self, buffer: &mut Self::Buffer, slot: &Slot, group: Group);

    /// Replaces what lies at `slot` by its sum over `ranks` neighbouring tensor-parallel ranks, the first of them at a
    /// multiple of that number. fp32.
    fn sum_slot_over_neighbours(&self, buffer: &mut Self::Buffer, slot: &Slot, ranks: usize);

    /// Replaces a row of `shard` by this rank's part of Σ of that row of `whole` over the ranks. The rows of `whole`
    /// are as many times longer as there are ranks. What the row of `whole` holds afterwards is not specified.
    fn reduce_scatter_row(&self, whole: &mut Self::Buffer, row: Row, shard: &mut Self::Buffer, group: Group);

    /// Begins to sum a row of `buffer` over the ranks while this one goes on computing. `scatter`: only this rank's part
    /// of the sum is wanted. Until [`Backend::finish_sum`] the rank uses `group` for nothing but further rows.
    fn start_sum(&self, buffer: &Self::Buffer, row: Row, scatter: bool, group: Group) -> Self::Pending;

    /// Waits for the sum and replaces by it the row of `to`: a buffer of the same extents, or of this rank's parts.
    fn finish_sum(&self, pending: Self::Pending, to: &mut Self::Buffer);

    /// Replaces a row of `whole` by the ranks' rows of `shard`, rounded to the dtype of `whole`. The rows of `whole` may
    /// be shorter than all ranks' together: then they hold the last elements, in fp32.
    fn all_gather_row(&self, shard: &Self::Buffer, row: Row, whole: &mut Self::Buffer, group: Group);

    // --- recording ---

    /// A backend that records may run layers as a loop over one traced body; None: one after the other.
    fn layer_loop(&self) -> Option<&dyn LayerLoop<Self>> {
        None
    }

    /// `x` and the cotangent `dy`, for what is computed from `x` a second time instead of being kept: a backend that
    /// records keeps its compiler from merging the two, and from the second before `dy` is there.
    fn again(&self, x: &Self::Tensor, dy: Self::Tensor) -> (Self::Tensor, Self::Tensor) {
        (x.clone(), dy)
    }

    // --- the update ---

    /// From the accumulated gradients of the token-loss sum: `[norm, factor, finite]`, fp32. `norm` is the global
    /// norm of the gradients times `scale`; `factor` = scale · min(1, max_norm / (norm + 1e-6)), what a gradient is
    /// multiplied by (`max_norm` ≤ 0: no clipping); `finite` is 1 where norm and `loss` are finite, else 0. The same on
    /// all ranks of the groups that it sums over, if `loss` is.
    fn clip(&self, grads: &Self::Buffer, loss: &Self::Tensor, clipping: &Clipping<'_>) -> Self::Tensor;

    /// One decoupled AdamW update of fp32 `params` and moments `m`, `v` with gradients `grads · clip.factor`. `grads` are
    /// zeros afterwards. `copy`, where there is one, must be `params` rounded to its dtype, and is so afterwards as well. Nothing
    /// changes where `clip.finite` is 0. Source: Loshchilov & Hutter 2019, algorithm 2.
    fn adamw(
        &self,
        hyper: &AdamW,
        decayed: Decayed,
        clip: &Self::Tensor,
        grads: &mut Self::Buffer,
        params: &mut Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
        copy: Option<&mut Self::Buffer>,
    );
}
