//! The functions of a training run as HLO modules: the same model, tape and trainer, on a backend that records.

use std::ops::Range;

use elapid_tensor::{AdamW, Backend, Checkpointing, DType, State, Tape, Var};
use elapid_xla::{Module, Options, Result, Shape, Type, XlaBackend, XlaBuffer, XlaTensor, estimate, lint};

use crate::Error;
use crate::config::ModelConfig;
use crate::config::run::check;
use crate::model::Mamba2ForCausalLM;
use crate::train::{Batch, Trainer};

/// More than this after unrolling, and the compiler gives up.
pub(crate) const MAX_INSTRUCTIONS: u64 = 5_000_000;

/// Whether a module is one that its compiler takes.
///
/// # Errors
/// It breaks a rule.
pub(crate) fn keeps_rules(module: &Module) -> std::result::Result<(), Error> {
    let broken = lint(&module.proto);
    let Some(first) = broken.first() else { return Ok(()) };
    Err(Error::new(format!("module {} breaks {} rules: {first}", module.proto.name, broken.len()))
        .with_hint("this is a fault of elapid; please report the command line"))
}

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
    /// States pass from micro-step to micro-step: truncated back-propagation through time.
    pub carried: bool,
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

/// The states of all layers, as stacks `[layers, ..]`.
struct States {
    layers: usize,
    /// Extents of one layer's.
    conv: [usize; 3],
    ssm: [usize; 4],
    /// Of the convolution, where it carries anything, and of the scan; what they came from.
    stacks: (Option<XlaTensor>, XlaTensor),
    numbers: (Option<usize>, Option<usize>),
}

impl States {
    fn rows(&self, backend: &XlaBackend) -> Vec<State<XlaTensor>> {
        let conv = match &self.stacks.0 {
            Some(stack) => backend.rows(stack, &self.conv),
            None => vec![backend.declare(Shape::new(Type::F32, &self.conv), "nothing"); self.layers],
        };
        let states = conv.into_iter().zip(backend.rows(&self.stacks.1, &self.ssm));
        states.map(|(conv, ssm)| State { conv, ssm }).collect()
    }

    /// `states` take the place of what came in.
    fn give(self, backend: &XlaBackend, outputs: &mut Outputs, states: Vec<State<XlaTensor>>) {
        let (conv, ssm): (Vec<_>, Vec<_>) = states.into_iter().map(|s| (s.conv, s.ssm)).unzip();
        let (conv_stack, ssm_stack) = self.stacks;
        for (stack, rows, number) in
            [(conv_stack, conv, self.numbers.0), (Some(ssm_stack), ssm, self.numbers.1)]
        {
            if let Some(stack) = stack {
                outputs.results.push((String::new(), backend.stack(&stack, &rows), number));
            }
        }
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
            // Where states are carried, those that are not wanted are zeros already.
            continued: vec![self.carried; self.batch],
        }
    }

    /// Inputs for the layers' states, of a rank's heads: `{name}.conv` and `{name}.ssm`.
    fn states(&self, backend: &XlaBackend, model: &Mamba2ForCausalLM<XlaBackend>, name: &str) -> States {
        let (spec, batch) = (model.layout().spec, self.batch);
        let conv = [batch, spec.conv_kernel - 1, spec.conv_channels()];
        let ssm = [batch, spec.heads, spec.head_dim, spec.state];
        let layers = self.config.num_hidden_layers;
        let declare = |part: &str, shape: &[usize]| {
            let shape = Shape::new(Type::F32, &[layers, shape.iter().product()]);
            let name = format!("{name}.{part}");
            let stack = backend.declare(shape, &name);
            let number = backend.input_number(&stack, &name);
            (stack, number)
        };
        // A convolution of width 1 carries nothing.
        let conv_stack = (spec.conv_kernel > 1).then(|| declare("conv", &conv));
        let (ssm_stack, ssm_number) = declare("ssm", &ssm);
        let (conv_stack, conv_number) = conv_stack.unzip();
        let numbers = (conv_number.flatten(), ssm_number);
        States { layers, conv, ssm, stacks: (conv_stack, ssm_stack), numbers }
    }

    /// [`Self::states`], zeros in the rows of the batch where the input `continued` `[B]` is 0.
    fn continued_states(
        &self,
        backend: &XlaBackend,
        model: &Mamba2ForCausalLM<XlaBackend>,
        name: &str,
    ) -> States {
        let mut stacks = self.states(backend, model, name);
        let continued = backend.declare(Shape::new(Type::S32, &[self.batch]), "continued");
        let (conv, ssm) = &mut stacks.stacks;
        for stack in conv.iter_mut().chain([ssm]) {
            *stack = backend.keep_rows(stack, &continued);
        }
        stacks
    }

    /// Forward and adjoints of one batch: adds to `grads` and to `loss`, the sum of token losses. Where states are
    /// carried, they start from `states.conv` and `states.ssm` in the rows of the batch that `continued` `[B]` names, from
    /// zeros in those where it is 0, and move on.
    pub fn micro_step(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        let (mut trainer, loss) = self.trainer(&backend);
        let grads = Outputs::inputs(&backend, "grads", trainer.grads());
        let stacks = self.carried.then(|| {
            let stacks = self.continued_states(&backend, trainer.model(), "states");
            trainer.set_states(stacks.rows(&backend));
            stacks
        });
        trainer.micro_step(&self.batch(&backend));
        let mut outputs = Outputs::default();
        outputs.arrays(grads, backend.arrays(trainer.grads()));
        if let (Some(stacks), Some(states)) = (stacks, trainer.states()) {
            stacks.give(&backend, &mut outputs, states.to_vec());
        }
        let sum = trainer.loss().expect("a micro-step has a loss").clone();
        outputs.results.push((String::new(), sum, Some(loss)));
        outputs.module(&backend, "micro_step")
    }

    /// [`Self::micro_step`] as several modules, to be run in order, each of one of `groups` groups of layers: `forward.0`,
    /// `forward.1`, … hand on `stream.1`, `stream.2`, …, the residual stream before each group; then `backward.n`, …,
    /// `backward.0` run their layers again, add to `grads` and hand on `cotangent`. A single group is the whole.
    ///
    /// # Panics
    /// Where states are carried and there are several groups, or more groups than layers.
    pub fn micro_steps(&self, groups: usize) -> Vec<Module> {
        if groups <= 1 {
            return vec![self.micro_step()];
        }
        assert!(!self.carried, "states are carried through the whole model");
        let layers = self.config.num_hidden_layers;
        assert!(groups <= layers, "{groups} groups of {layers} layers");
        let ranges: Vec<Range<usize>> =
            (0..groups).map(|group| group * layers / groups..(group + 1) * layers / groups).collect();
        let forward = (0..groups - 1).map(|group| self.group(&ranges, group, false));
        let backward = (0..groups).rev().map(|group| self.group(&ranges, group, true));
        forward.chain(backward).collect()
    }

    /// [`Self::micro_steps`] of as many groups as `--layer-groups` says; None: as few as keep to [`MAX_INSTRUCTIONS`].
    ///
    /// # Errors
    /// The model has not so many layers, or carries states.
    pub(crate) fn micro_steps_of(&self, groups: Option<usize>) -> std::result::Result<Vec<Module>, Error> {
        let layers = self.config.num_hidden_layers;
        if let Some(groups) = groups {
            let good = (1..=layers.max(1)).contains(&groups);
            check("--layer-groups", groups as f64, good, &format!("the model has {layers} layers"))?;
            if groups > 1 && self.carried {
                return Err(Error::new(format!("--layer-groups {groups} with --carry-state"))
                    .with_hint("states are carried through the whole model: leave one of the two out"));
            }
            return Ok(self.micro_steps(groups));
        }
        let fits = |module: &Module| estimate(&module.proto).work.instructions <= MAX_INSTRUCTIONS;
        let most = if self.carried { 1 } else { layers };
        let mut modules = self.micro_steps(1);
        // Twice as many groups halve what is too large.
        let mut groups = 2;
        while groups <= most && !modules.iter().all(fits) {
            modules = self.micro_steps(groups);
            groups *= 2;
        }
        Ok(modules)
    }

    /// One module of [`Self::micro_steps`].
    fn group(&self, ranges: &[Range<usize>], group: usize, backward: bool) -> Module {
        let backend = &XlaBackend::new(self.options, None);
        let (range, last) = (ranges[group].clone(), group + 1 == ranges.len());
        let mut whole = self.model(backend);
        let config = ModelConfig { num_hidden_layers: range.len(), ..self.config.clone() };
        let part = Recording { config: &config, ..*self };
        let mut model = part.model(backend);
        for (to, from) in model.buffers_mut().into_iter().zip(whole.buffers_mut()) {
            if let (Some(to), Some(from)) = (to, from) {
                *to = backend.of_layers(from, range.clone());
            }
        }
        let mut grads = backend.buffer(whole.layout().flat, DType::F32);
        let numbers = Outputs::inputs(backend, "grads", &grads);
        let mut own = backend.of_layers(&grads, range.clone());

        let tp = if self.sequence_parallel { self.options.tp } else { 1 };
        let stream = [self.batch, self.length.div_ceil(tp), config.hidden_size];
        let input = |name: &str| backend.declare(Shape::new(whole.residual().into(), &stream), name);
        let tokens = |name: &str| backend.declare(Shape::new(Type::S32, &[self.batch, self.length]), name);
        let documents = self.documents.then(|| tokens("documents"));
        let run = |tape: &mut Tape<'_, XlaBackend>, x| {
            model.blocks(tape, x, self.length, documents.as_ref(), None, self.checkpointing)
        };
        let mut outputs = Outputs::default();
        let name = format!("{}.{group}", if backward { "backward" } else { "forward" });
        if !backward {
            let mut tape = Tape::inference(backend);
            let x = match group {
                0 => model.embed(&mut tape, &tokens("ids")),
                _ => Var::constant(input(&format!("stream.{group}"))),
            };
            outputs.output(&format!("stream.{}", group + 1), run(&mut tape, x).value);
            return outputs.module(backend, &name);
        }
        let mut tape = Tape::training(backend, &mut own);
        let x = match group {
            0 => model.embed(&mut tape, &tokens("ids")),
            _ => tape.leaf(input(&format!("stream.{group}"))),
        };
        let y = run(&mut tape, x.clone());
        let (mut loss, mut seeds, mut cotangent) = (None, Vec::new(), None);
        if last {
            let labels = tokens("labels");
            let before = backend.declare(Shape::new(Type::F32, &[]), "loss");
            let number = backend.input_number(&before, "loss");
            let sum = backend.add(&before, &model.stream_loss(&mut tape, &y, &labels));
            loss = Some((sum, number));
        } else {
            let dy = input("cotangent");
            cotangent = backend.input_number(&dy, "cotangent");
            seeds.push((&y, dy));
        }
        let dx = tape.backward(&seeds, &[&x]).remove(0);
        backend.put_layers(&mut grads, range.start, &own);
        outputs.arrays(numbers, backend.arrays(&grads));
        if let Some((sum, number)) = loss {
            outputs.results.push((String::new(), sum, number));
        }
        if let Some(dx) = dx.filter(|_| group > 0) {
            outputs.results.push(("cotangent".into(), dx, cotangent));
        }
        outputs.module(backend, &name)
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
        let mut zeroed = backend.arrays(trainer.grads());
        if model.zero1() {
            zeroed = zeroed.map(|array| array.map(|array| backend.zero_where_finite(&array, &outcome)));
        }
        outputs.arrays(grads, zeroed);
        outputs.results.push((String::new(), backend.zero_where_finite(&sum, &outcome), Some(loss)));
        outputs.output("outcome", outcome);
        outputs.output("loss_sum", sum);
        outputs.module(&backend, "update")
    }

    /// `loss_sum` of the batch of each data-parallel rank. Where states are carried, they start from `eval.conv` and
    /// `eval.ssm` and move on, as those of a micro-step do.
    pub fn eval(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        let model = self.model(&backend);
        let stacks = self.carried.then(|| self.continued_states(&backend, &model, "eval"));
        let mut states = stacks.as_ref().map(|stacks| stacks.rows(&backend));
        let (tape, batch) = (&mut Tape::inference(&backend), self.batch(&backend));
        let loss = batch.loss(tape, &model, states.as_mut(), Checkpointing::None);
        let mut outputs = Outputs::default();
        if let (Some(stacks), Some(states)) = (stacks, states) {
            stacks.give(&backend, &mut outputs, states);
        }
        outputs.output("loss_sum", loss);
        outputs.module(&backend, "eval")
    }

    /// `logits` `[B, V]` after one more token a sequence, `ids` `[B, 1]`; the layers' states `states.conv` and
    /// `states.ssm`, of a rank's heads, move on.
    pub fn decode(&self) -> Module {
        let backend = XlaBackend::new(self.options, None);
        // A single position is not cut up.
        let model = self.model(&backend).with_sequence_parallel(false);
        let batch = self.batch;
        let stacks = self.states(&backend, &model, "states");
        let mut states = stacks.rows(&backend);
        let ids = backend.declare(Shape::new(Type::S32, &[batch, 1]), "ids");
        let logits = model.device_logits(&backend, &ids, Some(&mut states));

        let mut outputs = Outputs::default();
        stacks.give(&backend, &mut outputs, states);
        let padded = backend.shape(&logits)[2];
        let logits = backend.reshaped(&logits, &[batch, padded]);
        outputs.output("logits", backend.resize(&logits, self.config.vocab_size));
        outputs.module(&backend, "decode")
    }
}
