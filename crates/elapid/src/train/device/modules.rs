//! The modules of a run.

use elapid_tensor::AdamW;
use elapid_xla::{Module, Options, estimate};

use crate::Error;
use crate::config::run::Run;
use crate::data::Dataset;
use crate::error::say;
use crate::record::{Recording, keeps_rules};
use crate::train::evaluate::HeldOut;
use crate::train::memory::bytes;

/// What a module needs of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    /// B.
    pub(super) size: usize,
    /// L.
    pub(super) length: usize,
    /// Whether it is told where documents begin.
    pub(super) documents: bool,
    /// Whether it is told which rows go on from the batch before.
    pub(super) carried: bool,
}

/// The modules of a run.
pub(super) struct Modules {
    /// To be run in this order.
    pub(super) micro_step: Vec<Module>,
    pub(super) update: Module,
    /// Where there is something to evaluate on.
    pub(super) eval: Option<Module>,
    pub(super) form: Form,
    pub(super) eval_form: Form,
}

impl Modules {
    /// Records them and says what they need.
    ///
    /// # Errors
    /// `--layer-groups` does not fit the model.
    pub(super) fn record(run: &Run, data: &Dataset, held_out: Option<&HeldOut<'_>>) -> Result<Self, Error> {
        let args = &run.args;
        let form = |data: &Dataset| Form {
            size: args.batch,
            length: data.seq_len(),
            documents: data.knows_documents(),
            carried: args.carry_state,
        };
        let eval_form = form(held_out.map_or(data, HeldOut::data));
        let form = form(data);
        let recording = |form: Form| Recording {
            config: &run.config,
            dtype: args.dtype.compute(),
            batch: form.size,
            length: form.length,
            documents: form.documents,
            carried: form.carried,
            sequence_parallel: args.sequence_parallel_enabled,
            zero1: args.use_zero_1,
            checkpointing: args.activation_checkpointing.into(),
            // Rate and step are inputs of the module.
            hyper: AdamW {
                lr: 1.0,
                beta1: args.beta1,
                beta2: args.beta2,
                eps: args.eps,
                weight_decay: args.weight_decay,
                step: 1,
            },
            max_norm: args.max_grad_norm,
            options: Options {
                layers: args.layer_loop.into(),
                in_place: !args.not_in_place,
                dp: run.mesh.dp,
                tp: run.mesh.tp,
                ..Options::default()
            },
        };
        let modules = Self {
            micro_step: recording(form).micro_steps_of(args.layer_groups)?,
            update: recording(form).update(),
            eval: held_out.map(|_| recording(eval_form).eval()),
            form,
            eval_form,
        };
        for module in modules.all() {
            keeps_rules(module)?;
            let name = &module.proto.name;
            let (count, memory) = (module.instructions(), estimate(&module.proto).memory());
            say(format_args!("  {name:<12} {count} instructions, about {} on the device", bytes(memory)));
        }
        Ok(modules)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Module> {
        self.micro_step.iter().chain([&self.update]).chain(&self.eval)
    }
}
