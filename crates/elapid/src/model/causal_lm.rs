//! The language model, written once, forward only, for every device.

use std::path::Path;
use std::rc::Rc;

use elapid_tensor::{
    Backend, Checkpointing, DType, Mamba2Spec, Mamba2Weights, Slot, State, Tape, Var, Weight,
};

use super::init::{Init, initialise};
use super::layout::Layout;
use super::pretrained::{self, FileDType};
use crate::Error;
use crate::config::ModelConfig;
use crate::memory;

/// A Mamba-2 language model and its parameters on a device.
///
/// The masters are fp32, always. A model that computes in bf16 also holds a bf16 copy of them, from which the large
/// parameters are read; what the layout declares fp32 is read from the masters.
pub struct Mamba2ForCausalLM<B: Backend> {
    config: ModelConfig,
    layout: Layout,
    dtype: DType,
    masters: B::Buffer,
    /// The bf16 copy; None where the model computes in fp32.
    compute: Option<B::Buffer>,
}

/// Weights of one block.
struct Block<T> {
    norm: Weight<T>,
    in_proj: Weight<T>,
    in_proj_bias: Option<Weight<T>>,
    mixer: Mamba2Weights<Weight<T>>,
    out_proj: Weight<T>,
    out_proj_bias: Option<Weight<T>>,
}

impl<B: Backend> Mamba2ForCausalLM<B> {
    /// A model of zeros, to be [loaded](Self::load).
    pub fn empty(backend: &B, config: &ModelConfig, dtype: DType) -> Self {
        let layout = Layout::new(config);
        let masters = backend.buffer(layout.flat, DType::F32);
        let compute = (dtype != DType::F32).then(|| backend.buffer(layout.flat, dtype));
        Self { config: config.clone(), layout, dtype, masters, compute }
    }

    /// A model with fresh parameters, computing in `dtype` (F32 or Bf16).
    pub fn new(backend: &B, config: &ModelConfig, dtype: DType, scheme: Init, seed: u64) -> Self {
        let mut model = Self::empty(backend, config, dtype);
        let Self { config, layout, masters, .. } = &mut model;
        initialise(config, layout, scheme, seed, |slot, values| backend.write_slot(masters, slot, values));
        model.refresh(backend);
        model
    }

    /// A model from a Hugging Face folder.
    ///
    /// # Errors
    /// When files are missing, damaged, or do not fit each other.
    pub fn from_pretrained(backend: &B, dir: &Path, dtype: DType) -> Result<Self, Error> {
        let config = ModelConfig::load(dir)?;
        let bytes = if dtype == DType::F32 { 4.0 } else { 6.0 };
        memory::check(
            Layout::new(&config).parameter_count() as f64 * bytes,
            &format!("the parameters that {} describes", dir.join("config.json").display()),
            "is the config.json the right one? Then a larger machine is needed",
        )?;
        let mut model = Self::empty(backend, &config, dtype);
        model.load(backend, dir)?;
        Ok(model)
    }

    /// Replaces all parameters by those of a Hugging Face folder.
    ///
    /// # Errors
    /// As [`Self::from_pretrained`].
    pub fn load(&mut self, backend: &B, dir: &Path) -> Result<(), Error> {
        let Self { layout, masters, .. } = self;
        pretrained::load_weights(dir, layout, |slot, values| backend.write_slot(masters, slot, values))?;
        self.refresh(backend);
        Ok(())
    }

    /// Writes a Hugging Face folder: `config.json`, `generation_config.json` and `model.safetensors`, in several files
    /// and an index above 5 GB. No second copy of the model is made.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save_pretrained(&self, backend: &B, dir: &Path, disk: FileDType) -> Result<(), Error> {
        let source = |slot: &Slot| self.parameter(backend, slot);
        pretrained::save(dir, &self.config, &self.layout, disk, pretrained::MAX_SHARD_SIZE, source)
    }

    /// Brings the compute copy up to date with the masters.
    pub fn refresh(&mut self, backend: &B) {
        if let Some(compute) = &mut self.compute {
            backend.cast_buffer(&self.masters, compute);
        }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layout of the flat buffers.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Compute dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The fp32 masters.
    pub fn masters(&self) -> &B::Buffer {
        &self.masters
    }

    /// The bf16 copy; None where the model computes in fp32.
    pub fn compute(&self) -> Option<&B::Buffer> {
        self.compute.as_ref()
    }

    /// The fp32 masters. After a change, [`Self::refresh`] is due.
    pub fn masters_mut(&mut self) -> &mut B::Buffer {
        &mut self.masters
    }

    /// One parameter, or a stretch of one, fp32, on the host.
    pub fn parameter(&self, backend: &B, slot: &Slot) -> Vec<f32> {
        backend.values(&backend.view(&self.masters, slot))
    }

    fn fp32(&self, backend: &B, slot: Slot) -> Weight<B::Tensor> {
        Weight { value: backend.view(&self.masters, &slot), slot }
    }

    fn weight(&self, backend: &B, slot: Slot) -> Weight<B::Tensor> {
        Weight { value: backend.view(self.compute.as_ref().unwrap_or(&self.masters), &slot), slot }
    }

    fn block(&self, backend: &B, layer: usize) -> Block<B::Tensor> {
        let slots = self.layout.layer(layer);
        let weight = |slot| self.weight(backend, slot);
        let fp32 = |slot| self.fp32(backend, slot);
        Block {
            norm: fp32(slots.norm),
            in_proj: weight(slots.in_proj),
            in_proj_bias: slots.in_proj_bias.map(weight),
            mixer: Mamba2Weights {
                conv_weight: weight(slots.conv_weight),
                conv_bias: slots.conv_bias.map(weight),
                dt_bias: fp32(slots.dt_bias),
                a_log: fp32(slots.a_log),
                d: fp32(slots.d),
                norm_weight: fp32(slots.norm_weight),
            },
            out_proj: weight(slots.out_proj),
            out_proj_bias: slots.out_proj_bias.map(weight),
        }
    }

    /// Head weight: the embedding table where the two are tied (trap T14).
    fn head(&self, backend: &B) -> Weight<B::Tensor> {
        let shared = self.layout.shared();
        self.weight(backend, shared.head.unwrap_or(shared.embedding))
    }

    /// Token ids `[B, L]` → hidden states after the final norm `[B, L, D]`. `documents` `[B, L]` marks documents (see
    /// [`elapid_tensor::Mamba2Inputs`]); `states` carries each layer's state from call to call (empty: from the start),
    /// without a gradient.
    pub fn hidden<'a>(
        &self,
        tape: &mut Tape<'a, B>,
        ids: &B::Tensor,
        documents: Option<&B::Tensor>,
        states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
    ) -> Var<B::Tensor> {
        let backend = tape.backend();
        let eps = self.config.layer_norm_epsilon as f32;
        let compute = self.dtype;
        let residual = if self.config.residual_in_fp32 { DType::F32 } else { compute };
        let shared = self.layout.shared();
        let layers = self.layout.flat.layers;
        let blocks: Vec<_> = (0..layers).map(|layer| self.block(backend, layer)).collect();
        let spec: Mamba2Spec = self.config.spec();
        let documents = documents.cloned();

        let x = tape.embedding(&self.weight(backend, shared.embedding), ids, residual);
        let x = tape.layers(
            layers,
            x,
            states,
            checkpointing,
            Rc::new(move |tape, layer, x, before| {
                let block = &blocks[layer];
                let normed = tape.rms_norm(&x, &block.norm, eps, compute); // [B, L, D]
                let projected = tape.linear(&normed, &block.in_proj, block.in_proj_bias.as_ref()); // [B, L, E+C+H]
                let before = before.map(|state| State {
                    conv: Var::constant(state.conv.clone()),
                    ssm: Var::constant(state.ssm.clone()),
                });
                let (y, after) =
                    tape.mamba2(&spec, &projected, documents.as_ref(), before.as_ref(), &block.mixer); // [B, L, E]
                let out = tape.linear(&y, &block.out_proj, block.out_proj_bias.as_ref()); // [B, L, D]
                (tape.add(&x, &out), State { conv: after.conv.value, ssm: after.ssm.value })
            }),
        );
        tape.rms_norm(&x, &self.fp32(backend, shared.norm_f), eps, compute)
    }

    /// Sum of token losses of `ids` `[B, L]` against `labels` `[B, L]`, where the label of a position is the token
    /// after it, or [`elapid_tensor::IGNORE_LABEL`]. fp32, shape `[]`. `documents` and `states` as in
    /// [`Self::hidden`].
    pub fn loss(
        &self,
        tape: &mut Tape<'_, B>,
        ids: &B::Tensor,
        labels: &B::Tensor,
        documents: Option<&B::Tensor>,
        states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
    ) -> B::Tensor {
        let hidden = self.hidden(tape, ids, documents, states, checkpointing);
        let head = self.head(tape.backend());
        tape.head_loss(&hidden, &head, labels)
    }

    /// fp32 logits `[B, L, V]` of all positions, on the host. For checks; generation asks for one position.
    pub fn logits(&self, backend: &B, ids: &B::Tensor) -> Vec<f32> {
        backend.values(&self.device_logits(backend, ids, None))
    }

    /// fp32 logits `[B, L, V]` of all positions, on the device; `states` as in [`Self::hidden`].
    pub fn device_logits(
        &self,
        backend: &B,
        ids: &B::Tensor,
        states: Option<&mut Vec<State<B::Tensor>>>,
    ) -> B::Tensor {
        let mut tape = Tape::inference(backend);
        let hidden = self.hidden(&mut tape, ids, None, states, Checkpointing::None);
        backend.logits(&hidden.value, &self.head(backend).value)
    }

    /// Reads `ids` `[B, L]` on from `states` (empty: from the start), leaves the new states there, and gives the fp32
    /// logits `[B, V]` after the last position. `documents` as in [`Self::hidden`].
    pub fn next_logits(
        &self,
        backend: &B,
        ids: &B::Tensor,
        documents: Option<&B::Tensor>,
        states: &mut Vec<State<B::Tensor>>,
    ) -> Vec<f32> {
        let shape = backend.shape(ids);
        let mut tape = Tape::inference(backend);
        let hidden = self.hidden(&mut tape, ids, documents, Some(states), Checkpointing::None);
        // Only the last positions meet the vocabulary.
        let d = self.config.hidden_size;
        let rows = backend.values(&hidden.value);
        let last: Vec<f32> =
            rows.chunks_exact(shape[1] * d).flat_map(|row| &row[row.len() - d..]).copied().collect();
        let last = backend.tensor(&last, &[shape[0], d], self.dtype);
        backend.values(&backend.logits(&last, &self.head(backend).value))
    }
}
