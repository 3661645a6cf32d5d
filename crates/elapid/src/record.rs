//! The functions of a training run as HLO modules: the same model, tape and trainer, on a backend that records.

use elapid_tensor::{AdamW, Backend, Checkpointing, DType, Group, State, Tape};
use elapid_xla::{Module, Options, Result, Shape, Type, XlaBackend, XlaBuffer, XlaTensor};

use crate::config::ModelConfig;
use crate::model::Mamba2ForCausalLM;
use crate::train::{Batch, Trainer};

/// What is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recording<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Compute dtype.
    pub dtype: DType,
    /// B of a micro-step.
    pub batch: usize,
    /// L.
    pub length: usize,
    /// Batches say where documents begin.
    pub documents: bool,
    /// What layers keep for their adjoint.
    pub checkpointing: Checkpointing,
    /// AdamW. Learning rate and step are inputs of the module; what they are here does not matter.
    pub hyper: AdamW,
    /// Gradients are clipped to this norm.
    pub max_norm: f32,
    /// The residual stream is cut along the sequence.
    pub sequence_parallel: bool,
    /// Each data-parallel rank keeps its part of the masters and moments only.
    pub zero1: bool,
    /// How the backend records, and for how many ranks.
    pub options: Options,
}

/// The outputs of a module: (name, value, input whose memory and name it takes over).
#[derive(Default)]
struct Outputs {
    results: Vec<(String, XlaTensor, Option<usize>)>,
}

impl Outputs {
    /// Names the arrays of a buffer as inputs: `{name}.layers`, `{name}.shared`.
    fn inputs(backend: &XlaBackend, name: &str, buffer: &XlaBuffer) -> [Option<usize>; 2] {
        let [layers, shared] = backend.arrays(buffer);
        let number = |array: Option<XlaTensor>, part| {
            array.and_then(|array| backend.input_number(&array, &format!("{name}.{part}")))
        };
        [number(layers, "layers"), number(shared, "shared")]
    }

    /// The arrays take over the memory of `inputs`.
    fn arrays(&mut self, inputs: [Option<usize>; 2], arrays: [Option<XlaTensor>; 2]) {
        for (input, array) in inputs.into_iter().zip(arrays) {
            if let (Some(input), Some(array)) = (input, array) {
                self.results.push((String::new(), array, Some(input)));
            }
        }
    }

    fn output(&mut self, name: &str, tensor: XlaTensor) {
        self.results.push((name.to_owned(), tensor, None));
    }

    fn module(&self, backend: &XlaBackend, name: &str) -> Module {
        let results: Vec<Result<'_>> = self
            .results
            .iter()
            .map(|(name, tensor, replaces)| Result { name: name.clone(), tensor, replaces: *replaces })
            .collect();
        backend.module(name, &results)
    }
}

impl Recording<'_> {
    /// The parameters as a rank holds them: `masters`, `compute` and `ends`, as far as the model has them.
    fn model(&self, backend: &XlaBackend) -> Mamba2ForCausalLM<XlaBackend> {
        let model = Mamba2ForCausalLM::empty(backend, self.config, self.dtype);
        let model = if self.zero1 { model.with_empty_zero1(backend) } else { model };
        Outputs::inputs(backend, "masters", model.masters());
        for (name, buffer) in [("compute", model.compute()), ("ends", model.ends())] {
            buffer.map(|buffer| Outputs::inputs(backend, name, buffer));
        }
        model.with_sequence_parallel(self.sequence_parallel)
    }

    fn trainer<'b>(&self, backend: &'b XlaBackend) -> (Trainer<'b, XlaBackend>, usize) {
        let mut trainer = Trainer::new(backend, self.model(backend), self.checkpointing);
        let loss = backend.declare(Shape::new(Type::F32, &[]), "loss");
        let number = backend.input_number(&loss, "loss").expect("declared as an input");
        trainer.set_loss(loss);
        (trainer, number)
    }

    /// A batch of the right shape; its values are inputs of the module.
    fn batch(&self, backend: &XlaBackend) -> Batch {
        backend.name_next(&["ids", "labels"]);
        if self.documents {
            backend.name_next(&["documents"]);
        }
        let zeros = || vec![0; self.batch * self.length];
        Batch {
            size: self.batch,
            length: self.length,
            ids: zeros(),
            labels: zeros(),
            documents: self.documents.then(zeros),
            continued: vec![false; self.batch],
        }
    }

    /// Forward and adjoints of one batch: adds to `grads` and to `loss`, the sum of token losses.
    pub fn micro_step(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        let (mut trainer, loss) = self.trainer(&backend);
        let grads = Outputs::inputs(&backend, "grads", trainer.grads());
        trainer.micro_step(&self.batch(&backend));
        let mut outputs = Outputs::default();
        outputs.arrays(grads, backend.arrays(trainer.grads()));
        let sum = trainer.loss().expect("a micro-step has a loss").clone();
        outputs.results.push((String::new(), sum, Some(loss)));
        outputs.module(&backend, "micro_step")
    }

    /// One optimizer step from `grads` and `loss`. Gives `outcome` `[norm, factor, finite]` and `loss_sum`; unless the
    /// step was not finite, `grads` and `loss` are zeros afterwards.
    pub fn update(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        let (mut trainer, loss) = self.trainer(&backend);
        let grads = Outputs::inputs(&backend, "grads", trainer.grads());
        let compute = trainer.model().compute().map(|compute| Outputs::inputs(&backend, "compute", compute));
        let ends = trainer.model().ends().map(|ends| Outputs::inputs(&backend, "ends", ends));
        let names = ["masters", "m", "v"];
        let state: Vec<_> = names
            .iter()
            .zip(trainer.state())
            .map(|(name, buffer)| Outputs::inputs(&backend, name, buffer))
            .collect();
        let [outcome, sum] = trainer.enqueue_update(&self.hyper, self.max_norm, 1);
        let mut outputs = Outputs::default();
        for (inputs, buffer) in state.into_iter().zip(trainer.state()) {
            outputs.arrays(inputs, backend.arrays(buffer));
        }
        let model = trainer.model();
        for (inputs, buffer) in [(compute, model.compute()), (ends, model.ends())] {
            if let (Some(inputs), Some(buffer)) = (inputs, buffer) {
                outputs.arrays(inputs, backend.arrays(buffer));
            }
        }
        let zeroed = backend
            .arrays(trainer.grads())
            .map(|array| array.map(|array| backend.zero_where_finite(&array, &outcome)));
        outputs.arrays(grads, zeroed);
        outputs.results.push((String::new(), backend.zero_where_finite(&sum, &outcome), Some(loss)));
        outputs.output("outcome", outcome);
        outputs.output("loss_sum", sum);
        outputs.module(&backend, "update")
    }

    /// `loss_sum` of one batch, over all data-parallel ranks.
    pub fn eval(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        let model = self.model(&backend);
        let batch = self.batch(&backend);
        let loss = batch.loss(&mut Tape::inference(&backend), &model, None, Checkpointing::None);
        let mut outputs = Outputs::default();
        outputs.output("loss_sum", backend.all_reduce(&loss, Group::Dp));
        outputs.module(&backend, "eval")
    }

    /// `logits` `[B, V]` after one more token a sequence, `ids` `[B, 1]`; the layers' states `states.conv` and
    /// `states.ssm`, of a rank's heads, move on.
    pub fn decode(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        // A single position is not cut up.
        let model = self.model(&backend).with_sequence_parallel(false);
        let (spec, layers, batch) = (model.layout().spec, self.config.num_hidden_layers, self.batch);
        let conv = [batch, spec.conv_kernel - 1, spec.conv_channels()];
        let ssm = [batch, spec.heads, spec.head_dim, spec.state];
        let declare = |name: &str, shape: &[usize]| {
            let shape = Shape::new(Type::F32, &[layers, shape.iter().product()]);
            backend.declare(shape, name)
        };
        // A convolution of width 1 carries nothing.
        let conv_stack = (spec.conv_kernel > 1).then(|| declare("states.conv", &conv));
        let ssm_stack = declare("states.ssm", &ssm);
        let conv_rows = match &conv_stack {
            Some(stack) => backend.rows(stack, &conv),
            None => vec![backend.declare(Shape::new(Type::F32, &conv), "nothing"); layers],
        };
        let states = conv_rows.into_iter().zip(backend.rows(&ssm_stack, &ssm));
        let mut states: Vec<_> = states.map(|(conv, ssm)| State { conv, ssm }).collect();
        let ids = backend.declare(Shape::new(Type::S32, &[batch, 1]), "ids");
        let logits = model.device_logits(&backend, &ids, Some(&mut states));

        let mut outputs = Outputs::default();
        let (conv, ssm): (Vec<_>, Vec<_>) = states.into_iter().map(|s| (s.conv, s.ssm)).unzip();
        let stacks = [(conv_stack, conv, "states.conv"), (Some(ssm_stack), ssm, "states.ssm")];
        for (stack, rows, name) in stacks {
            if let Some(stack) = stack {
                let number = backend.input_number(&stack, name);
                outputs.results.push((String::new(), backend.stack(&stack, &rows), number));
            }
        }
        let padded = backend.shape(&logits)[2];
        let logits = backend.reshaped(&logits, &[batch, padded]);
        outputs.output("logits", backend.resize(&logits, self.config.vocab_size));
        outputs.module(&backend, "decode")
    }
}
