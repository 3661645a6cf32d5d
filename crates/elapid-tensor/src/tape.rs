//! The tape: runs ops forward, remembers their adjoints, and plays them back.
//!
//! A training tape holds the flat gradient buffer. Activations get cotangents; parameters ([`Weight`]) get their
//! gradients added to the buffer as their op's adjoint runs. An inference tape runs the same model code and
//! remembers nothing. A [watched](Tape::watched) tape shows every tensor that it makes to whoever looks for the first
//! one that is wrong.

use crate::backend::{Backend, DType, Group, Mamba2Inputs, Mamba2Spec, Mamba2Weights, Sink, State};
use crate::flat::{Row, Slot};
use crate::layer_loop::{LayerLoop, Traced};

/// A parameter: its value in compute dtype and the place of its gradient.
#[derive(Clone, Debug)]
pub struct Weight<T> {
    /// View into the parameter buffer.
    pub value: T,
    /// Site in the gradient buffer.
    pub slot: Slot,
}

/// An activation on the tape.
#[derive(Clone, Debug)]
pub struct Var<T> {
    /// Its value.
    pub value: T,
    /// Index of its cotangent; None where no gradient flows.
    id: Option<usize>,
}

impl<T> Var<T> {
    /// A value through which no gradient flows.
    pub fn constant(value: T) -> Self {
        Self { value, id: None }
    }
}

/// What `layers` keeps of each layer for its adjoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// What each op saves.
    #[default]
    None,
    /// The layer's input only; the layer runs again in the adjoint.
    Block,
}

/// What of an op is [`Seen`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What it computed.
    Output,
    /// The cotangent that it gives to its input.
    Cotangent,
    /// The gradient of a parameter, all that has been added to it so far.
    Gradient,
}

/// An op's place in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The op's name in [`Backend`].
    pub op: &'static str,
    /// The layer that it belongs to.
    pub layer: Option<usize>,
    /// Its parameter, or the first of several.
    pub weight: Option<Slot>,
}

/// A tensor that has just been made.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'s, T> {
    /// By which op. With a gradient, `weight` is the parameter that it is of.
    pub site: &'s Site,
    /// What of it.
    pub kind: Kind,
    /// Its values.
    pub value: &'s T,
}

/// Looks at tensors in the order in which they are made.
pub type Watch<'w, T> = dyn Fn(Seen<'_, T>) + 'w;

type Adjoint<'a, B> = Box<dyn FnOnce(&mut Backprop<'_, B>) + 'a>;

/// The state of a backward pass: cotangents of activations, gradients of parameters.
struct Backprop<'g, B: Backend> {
    backend: &'g B,
    grads: &'g mut B::Buffer,
    cotangents: Vec<Option<B::Tensor>>,
    watch: Option<&'g Watch<'g, B::Tensor>>,
    done: Option<&'g mut RowDone<'g, B>>,
}

/// Told of each layer's row of gradients once nothing will be added to it any more.
pub type RowDone<'a, B> = dyn FnMut(&B, &mut <B as Backend>::Buffer, Row) + 'a;

impl<B: Backend> Backprop<'_, B> {
    fn take(&mut self, id: usize) -> Option<B::Tensor> {
        self.cotangents[id].take()
    }

    /// Adds `cotangent` to that of `id`, in the dtype that came first.
    fn give(&mut self, id: Option<usize>, cotangent: B::Tensor) {
        let Some(id) = id else { return };
        self.cotangents[id] = Some(match self.cotangents[id].take() {
            None => cotangent,
            Some(sum) => self.backend.add(&sum, &cotangent),
        });
    }

    /// Shows what the adjoint of the op at `site` has made: the cotangent of its input, then the gradients of
    /// `slots`.
    fn show<'s>(&self, site: &Site, dx: Option<&B::Tensor>, slots: impl IntoIterator<Item = &'s Slot>) {
        let Some(watch) = self.watch else { return };
        if let Some(value) = dx {
            watch(Seen { site, kind: Kind::Cotangent, value });
        }
        for slot in slots {
            let site = Site { weight: Some(slot.clone()), ..site.clone() };
            watch(Seen { site: &site, kind: Kind::Gradient, value: &self.backend.view(self.grads, slot) });
        }
    }

    fn sink<'s>(&'s mut self, slot: &'s Slot) -> Sink<'s, B> {
        Sink { buffer: self.grads, slot }
    }
}

/// Runs ops and remembers how to undo them.
pub struct Tape<'a, B: Backend> {
    backend: &'a B,
    /// Present when gradients are wanted.
    grads: Option<&'a mut B::Buffer>,
    adjoints: Vec<Adjoint<'a, B>>,
    vars: usize,
    watch: Option<&'a Watch<'a, B::Tensor>>,
    done: Option<&'a mut RowDone<'a, B>>,
    /// The layer that is running.
    layer: Option<usize>,
}

/// The body of `layers`: (tape, layer, input, state before) → (output, state after).
pub type LayerBody<'a, B> = dyn for<'t> Fn(
        &mut Tape<'t, B>,
        usize,
        Var<<B as Backend>::Tensor>,
        Option<State<<B as Backend>::Tensor>>,
    ) -> (Var<<B as Backend>::Tensor>, State<<B as Backend>::Tensor>)
    + 'a;

impl<'a, B: Backend> Tape<'a, B> {
    /// A tape that computes and remembers nothing.
    pub fn inference(backend: &'a B) -> Self {
        Self { backend, grads: None, adjoints: Vec::new(), vars: 0, watch: None, done: None, layer: None }
    }

    /// A tape whose [`Tape::backward`] adds parameter gradients to `grads`.
    pub fn training(backend: &'a B, grads: &'a mut B::Buffer) -> Self {
        Self { grads: Some(grads), ..Self::inference(backend) }
    }

    /// Shows to `watch`, where there is one, every tensor that is made from now on, in [`Tape::backward`] too. What is
    /// computed stays the same; reading it back takes its time.
    pub fn watched(self, watch: Option<&'a Watch<'a, B::Tensor>>) -> Self {
        Self { watch, ..self }
    }

    /// Tells `done` of every layer whose gradients are complete, as [`Tape::backward`] comes past it.
    pub fn telling(self, done: Option<&'a mut RowDone<'a, B>>) -> Self {
        Self { done, ..self }
    }

    /// The device this tape runs on.
    pub fn backend(&self) -> &'a B {
        self.backend
    }

    /// An activation whose gradient can be asked for: the input of a layer that is run again.
    fn variable(&mut self, value: B::Tensor) -> Var<B::Tensor> {
        let id = self.grads.is_some().then(|| {
            self.vars += 1;
            self.vars - 1
        });
        Var { value, id }
    }

    /// The op `op` where the tape is now.
    fn site(&self, op: &'static str, weight: Option<&Slot>) -> Site {
        Site { op, layer: self.layer, weight: weight.cloned() }
    }

    /// Shows what the op at `site` has computed.
    fn show(&self, site: &Site, value: &B::Tensor) {
        if let Some(watch) = self.watch {
            watch(Seen { site, kind: Kind::Output, value });
        }
    }

    /// Remembers `adjoint`, which is called with the cotangent of the returned variable unless that is zero.
    fn record(
        &mut self,
        value: B::Tensor,
        adjoint: impl FnOnce(&mut Backprop<'_, B>, B::Tensor) + 'a,
    ) -> Var<B::Tensor> {
        let var = self.variable(value);
        if let Some(id) = var.id {
            self.adjoints.push(Box::new(move |pass| {
                if let Some(cotangent) = pass.take(id) {
                    adjoint(pass, cotangent);
                }
            }));
        }
        var
    }

    /// See [`Backend::embedding`].
    pub fn embedding(&mut self, table: &Weight<B::Tensor>, ids: &B::Tensor, out: DType) -> Var<B::Tensor> {
        let value = self.backend.embedding(&table.value, ids, out);
        let site = self.site("embedding", Some(&table.slot));
        self.show(&site, &value);
        let (ids, slot) = (ids.clone(), table.slot.clone());
        self.record(value, move |pass, dy| {
            let backend = pass.backend;
            backend.embedding_adjoint(&ids, &dy, pass.sink(&slot));
            pass.show(&site, None, [&slot]);
        })
    }

    /// See [`Backend::rms_norm`].
    pub fn rms_norm(
        &mut self,
        x: &Var<B::Tensor>,
        weight: &Weight<B::Tensor>,
        eps: f32,
        out: DType,
    ) -> Var<B::Tensor> {
        let value = self.backend.rms_norm(&x.value, &weight.value, eps, out);
        let site = self.site("rms_norm", Some(&weight.slot));
        self.show(&site, &value);
        let (x, weight) = (x.clone(), weight.clone());
        self.record(value, move |pass, dy| {
            let backend = pass.backend;
            let dx = backend.rms_norm_adjoint(&x.value, &weight.value, eps, &dy, pass.sink(&weight.slot));
            pass.show(&site, Some(&dx), [&weight.slot]);
            pass.give(x.id, dx);
        })
    }

    /// See [`Backend::linear`].
    pub fn linear(
        &mut self,
        x: &Var<B::Tensor>,
        weight: &Weight<B::Tensor>,
        bias: Option<&Weight<B::Tensor>>,
    ) -> Var<B::Tensor> {
        let value = self.backend.linear(&x.value, &weight.value, bias.map(|b| &b.value));
        let site = self.site("linear", Some(&weight.slot));
        self.show(&site, &value);
        let (x, weight, bias) = (x.clone(), weight.clone(), bias.map(|b| b.slot.clone()));
        self.record(value, move |pass, dy| {
            let backend = pass.backend;
            let sink = pass.sink(&weight.slot);
            let dx = backend.linear_adjoint(&x.value, &weight.value, &dy, sink, bias.as_ref());
            pass.show(&site, Some(&dx), [&weight.slot].into_iter().chain(&bias));
            pass.give(x.id, dx);
        })
    }

    /// See [`Backend::add_bias`].
    pub fn add_bias(&mut self, x: &Var<B::Tensor>, bias: &Weight<B::Tensor>) -> Var<B::Tensor> {
        let value = self.backend.add_bias(&x.value, &bias.value);
        let (id, slot) = (x.id, bias.slot.clone());
        self.record(value, move |pass, dy| {
            let backend = pass.backend;
            backend.add_bias_adjoint(&dy, pass.sink(&slot));
            pass.give(id, dy);
        })
    }

    /// An op with one input and no parameter.
    fn unary(
        &mut self,
        x: &Var<B::Tensor>,
        op: impl FnOnce(&B, &B::Tensor) -> B::Tensor,
        adjoint: impl FnOnce(&B, B::Tensor) -> B::Tensor + 'a,
    ) -> Var<B::Tensor> {
        let (value, id) = (op(self.backend, &x.value), x.id);
        self.record(value, move |pass, dy| {
            let dx = adjoint(pass.backend, dy);
            pass.give(id, dx);
        })
    }

    /// True where this rank has no tensor-parallel neighbours, and `x` stands for what an op among them would give.
    fn alone(&self) -> bool {
        self.backend.group_size(Group::Tp) == 1
    }

    /// `x`, which is the same on all tensor-parallel ranks, where each goes on with it in its own way: the cotangents
    /// are summed. Conjugate of [`Self::reduce_from_tp`].
    pub fn copy_to_tp(&mut self, x: &Var<B::Tensor>) -> Var<B::Tensor> {
        if self.alone() {
            return x.clone();
        }
        self.unary(x, |_, x| x.clone(), |backend, dy| backend.all_reduce(&dy, Group::Tp))
    }

    /// The sum of `x` over the tensor-parallel ranks, which go on with it in the same way.
    pub fn reduce_from_tp(&mut self, x: &Var<B::Tensor>) -> Var<B::Tensor> {
        if self.alone() {
            return x.clone();
        }
        self.unary(x, |backend, x| backend.all_reduce(x, Group::Tp), |_, dy| dy)
    }

    /// `[B, L, ..]` from the parts `[B, ⌈L / ranks⌉, ..]` of the sequence that the tensor-parallel ranks hold, of which
    /// the last may be filled up (trap T17); each rank goes on with it in its own way. Conjugate of
    /// [`Self::reduce_scatter_sequence`].
    pub fn gather_sequence(&mut self, x: &Var<B::Tensor>, len: usize) -> Var<B::Tensor> {
        if self.alone() {
            return x.clone();
        }
        self.unary(x, move |backend, x| gather_sequence(backend, x, len), scatter_sequence)
    }

    /// This rank's part `[B, ⌈L / ranks⌉, ..]` of the sum of `x` `[B, L, ..]` over the tensor-parallel ranks.
    pub fn reduce_scatter_sequence(&mut self, x: &Var<B::Tensor>) -> Var<B::Tensor> {
        if self.alone() {
            return x.clone();
        }
        let len = self.backend.shape(&x.value)[1];
        self.unary(
            x,
            |backend, x| scatter_sequence(backend, x.clone()),
            move |backend, dy| gather_sequence(backend, &dy, len),
        )
    }

    /// See [`Backend::add`].
    pub fn add(&mut self, a: &Var<B::Tensor>, b: &Var<B::Tensor>) -> Var<B::Tensor> {
        let value = self.backend.add(&a.value, &b.value);
        self.show(&self.site("add", None), &value);
        let sides = [(a.id, self.backend.dtype(&a.value)), (b.id, self.backend.dtype(&b.value))];
        self.record(value, move |pass, dy| {
            for (id, dtype) in sides {
                let cotangent = pass.backend.cast(&dy, dtype);
                pass.give(id, cotangent);
            }
        })
    }

    /// See [`Backend::mamba2`]. Gives (y, state after the last position).
    pub fn mamba2(
        &mut self,
        spec: &Mamba2Spec,
        projected: &Var<B::Tensor>,
        documents: Option<&B::Tensor>,
        initial: Option<State<Var<B::Tensor>>>,
        weights: &Mamba2Weights<Weight<B::Tensor>>,
    ) -> (Var<B::Tensor>, State<Var<B::Tensor>>) {
        let initial_ids = initial.as_ref().map(|s| (s.conv.id, s.ssm.id));
        let inputs = Mamba2Inputs {
            projected: projected.value.clone(),
            documents: documents.cloned(),
            initial: initial.map(|s| State { conv: s.conv.value, ssm: s.ssm.value }),
        };
        let values = weights.as_ref().map(|w| w.value.clone());
        let save = self.grads.is_some();
        let kept = save.then(|| inputs.clone());
        let out = self.backend.mamba2(spec, inputs, &values, save);
        let site = self.site("mamba2", Some(&weights.conv_weight.slot));
        for value in [&out.y, &out.state.conv, &out.state.ssm] {
            self.show(&site, value);
        }
        let y = self.variable(out.y);
        let state = State { conv: self.variable(out.state.conv), ssm: self.variable(out.state.ssm) };
        if let (Some(inputs), Some(y_id), Some(conv_id), Some(ssm_id)) =
            (kept, y.id, state.conv.id, state.ssm.id)
        {
            let (spec, saved) = (*spec, out.saved);
            let slots = weights.as_ref().map(|w| w.slot.clone());
            let projected_id = projected.id;
            // What is needed of them is their form, not what they hold.
            let [y_form, conv_form, ssm_form] = [&y, &state.conv, &state.ssm]
                .map(|var| (self.backend.shape(&var.value), self.backend.dtype(&var.value)));
            self.adjoints.push(Box::new(move |pass| {
                let backend = pass.backend;
                let (dy, d_conv, d_ssm) = (pass.take(y_id), pass.take(conv_id), pass.take(ssm_id));
                if dy.is_none() && d_conv.is_none() && d_ssm.is_none() {
                    return;
                }
                let dy = dy.unwrap_or_else(|| zeros(backend, y_form));
                let d_state = (d_conv.is_some() || d_ssm.is_some()).then(|| State {
                    conv: d_conv.unwrap_or_else(|| zeros(backend, conv_form)),
                    ssm: d_ssm.unwrap_or_else(|| zeros(backend, ssm_form)),
                });
                let sinks = slots.as_ref();
                let grads = backend.mamba2_adjoint(
                    &spec,
                    &inputs,
                    &values,
                    &saved,
                    &dy,
                    d_state.as_ref(),
                    pass.grads,
                    &sinks,
                );
                let all = [sinks.conv_weight, sinks.dt_bias, sinks.a_log, sinks.d, sinks.norm_weight];
                pass.show(&site, Some(&grads.projected), all.into_iter().chain(sinks.conv_bias));
                pass.give(projected_id, grads.projected);
                if let (Some((conv, ssm)), Some(d)) = (initial_ids, grads.initial) {
                    pass.give(conv, d.conv);
                    pass.give(ssm, d.ssm);
                }
            }));
        }
        (y, state)
    }

    /// See [`Backend::head_loss`]. On a training tape value and adjoint are computed together, here.
    pub fn head_loss(
        &mut self,
        x: &Var<B::Tensor>,
        weight: &Weight<B::Tensor>,
        labels: &B::Tensor,
        vocab: usize,
    ) -> B::Tensor {
        let site = self.site("head_loss", Some(&weight.slot));
        let Some(grads) = self.grads.as_deref_mut() else {
            let loss = self.backend.head_loss(&x.value, &weight.value, labels, vocab);
            self.show(&site, &loss);
            return loss;
        };
        let sink = Sink { buffer: grads, slot: &weight.slot };
        let (loss, dx) = self.backend.head_loss_adjoint(&x.value, &weight.value, labels, vocab, sink);
        self.show(&site, &loss);
        let (id, slot) = (x.id, weight.slot.clone());
        self.adjoints.push(Box::new(move |pass| {
            pass.show(&site, Some(&dx), [&slot]);
            pass.give(id, dx);
        }));
        loss
    }

    /// Runs `body` for layers 0 to `n` − 1, each on the output of the one before. `states`, where given, holds the
    /// state before each layer's first position and is replaced by the state after its last one; no gradient flows
    /// through it.
    pub fn layers(
        &mut self,
        n: usize,
        mut x: Var<B::Tensor>,
        mut states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
        body: std::rc::Rc<LayerBody<'a, B>>,
    ) -> Var<B::Tensor> {
        // Nobody can watch the inside of a traced body, which has no values, nor hear of its layers one by one.
        let alone = self.watch.is_none() && self.done.is_none();
        if let Some(recorder) = self.backend.layer_loop().filter(|_| n > 0 && alone) {
            return self.layers_as_loop(recorder, n, x, states, checkpointing, &body);
        }
        // Out of `states`, so that a layer may write its state where the last one was.
        let mut befores = states.as_deref_mut().map(std::mem::take).unwrap_or_default().into_iter();
        for layer in 0..n {
            self.layer = Some(layer);
            if self.done.is_some() {
                self.adjoints.push(Box::new(move |pass| {
                    if let Some(done) = &mut pass.done {
                        done(pass.backend, pass.grads, Row::Layer(layer));
                    }
                }));
            }
            let before = befores.next();
            let (out, after) = if self.grads.is_some() && checkpointing == Checkpointing::Block {
                self.layer_run_again(layer, x, before, &body)
            } else {
                body(self, layer, x, before)
            };
            x = out;
            if let Some(states) = states.as_deref_mut() {
                states.push(after);
            }
        }
        self.layer = None;
        x
    }

    /// [`Self::layers`] on a backend that makes a loop of one traced layer.
    fn layers_as_loop(
        &mut self,
        recorder: &dyn LayerLoop<B>,
        n: usize,
        x: Var<B::Tensor>,
        states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
        body: &std::rc::Rc<LayerBody<'a, B>>,
    ) -> Var<B::Tensor> {
        let before = states.as_ref().filter(|s| !s.is_empty()).map(|s| s.as_slice());
        let (input, before) = recorder.begin(n, &x.value, before);
        let (out, after, dx) = match self.grads.as_deref_mut() {
            None => {
                let mut inner = Tape::inference(self.backend);
                let (out, after) = body(&mut inner, 0, Var::constant(input), before);
                (out, after, None)
            }
            Some(grads) => {
                let mut inner = Tape::training(self.backend, grads);
                let input = inner.variable(input);
                let (out, after) = match checkpointing {
                    Checkpointing::None => body(&mut inner, 0, input.clone(), before),
                    Checkpointing::Block => inner.layer_run_again(0, input.clone(), before, body),
                };
                let dy = recorder.turn(&out.value);
                let dx = inner.backward(&[(&out, dy)], &[&input]).remove(0);
                (out, after, Some(dx.expect("a layer depends on its input")))
            }
        };
        let after = states.is_some().then_some(after);
        let looped = recorder.end(Traced { out: out.value, after, dx }, self.grads.as_deref_mut());
        if let Some(states) = states {
            *states = looped.states;
        }
        let id = looped.id;
        self.record(looped.out, move |pass, dy| {
            let recorder = pass.backend.layer_loop().expect("it recorded the layers");
            let dx = recorder.adjoint(id, &dy, pass.grads);
            pass.give(x.id, dx);
        })
    }

    /// Runs one layer without remembering its inside; its adjoint runs it again on a tape of its own.
    fn layer_run_again(
        &mut self,
        layer: usize,
        x: Var<B::Tensor>,
        before: Option<State<B::Tensor>>,
        body: &std::rc::Rc<LayerBody<'a, B>>,
    ) -> (Var<B::Tensor>, State<B::Tensor>) {
        let input = Var::constant(x.value.clone());
        let mut inner = Tape::inference(self.backend).watched(self.watch);
        inner.layer = Some(layer);
        let (out, after) = body(&mut inner, layer, input, before.clone());
        let body = body.clone();
        let out = self.record(out.value, move |pass, dy| {
            let (again, dy) = pass.backend.again(&x.value, dy);
            let mut inner = Tape::training(pass.backend, pass.grads).watched(pass.watch);
            inner.layer = Some(layer);
            let input = inner.variable(again);
            let (out, _) = body(&mut inner, layer, input.clone(), before.clone());
            let dx = inner.backward(&[(&out, dy)], &[&input]).remove(0);
            if let Some(dx) = dx {
                pass.give(x.id, dx);
            }
        });
        (out, after)
    }

    /// Plays the tape back from the loss and from the given cotangents; returns the cotangents of `wanted`, None
    /// where nothing depends on the variable.
    ///
    /// # Panics
    /// On an inference tape.
    pub fn backward(
        self,
        seeds: &[(&Var<B::Tensor>, B::Tensor)],
        wanted: &[&Var<B::Tensor>],
    ) -> Vec<Option<B::Tensor>> {
        let grads = self.grads.expect("backward needs a training tape");
        let mut pass = Backprop {
            backend: self.backend,
            grads,
            cotangents: Vec::new(),
            watch: self.watch,
            done: self.done,
        };
        pass.cotangents.resize_with(self.vars, || None);
        for (var, cotangent) in seeds {
            pass.give(var.id, cotangent.clone());
        }
        for adjoint in self.adjoints.into_iter().rev() {
            adjoint(&mut pass);
        }
        wanted.iter().map(|var| var.id.and_then(|id| pass.take(id))).collect()
    }

    /// An activation with a gradient of its own: for checks of ops, where inputs are leaves.
    pub fn leaf(&mut self, value: B::Tensor) -> Var<B::Tensor> {
        self.variable(value)
    }
}

fn gather_sequence<B: Backend>(backend: &B, x: &B::Tensor, len: usize) -> B::Tensor {
    backend.resize(&backend.all_gather(x, 1, Group::Tp), len)
}

fn scatter_sequence<B: Backend>(backend: &B, x: B::Tensor) -> B::Tensor {
    let len = backend.shape(&x)[1].next_multiple_of(backend.group_size(Group::Tp));
    backend.reduce_scatter(&backend.resize(&x, len), 1, Group::Tp)
}

fn zeros<B: Backend>(backend: &B, (shape, dtype): (Vec<usize>, DType)) -> B::Tensor {
    backend.tensor(&vec![0.0; shape.iter().product()], &shape, dtype)
}
