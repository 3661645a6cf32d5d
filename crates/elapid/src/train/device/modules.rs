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
}

/// The modules of a run.
pub(super) struct Modules {
    pub(super) micro_step: Module,
    pub(super) update: Module,
    /// Where there is something to evaluate on.
    pub(super) eval: Option<Module>,
    pub(super) form: Form,
    pub(super) eval_form: Form,
}

impl Modules {
    /// Records them and says what they need.
    pub(super) fn record(run: &Run, data: &Dataset, held_out: Option<&HeldOut<'_>>) -> Result<Self, Error> {
        let form = |data: &Dataset| Form {
            size: run.args.batch,
            length: data.seq_len(),
            documents: data.knows_documents(),
        };
        let eval_form = form(held_out.map_or(data, HeldOut::data));
        let form = form(data);
        let recording = |form: Form| Recording {
            config: &run.config,
            dtype: run.args.dtype.compute(),
            batch: form.size,
            length: form.length,
            documents: form.documents,
            // One rank, whose sequences stand alone: the start has refused the rest.
            carried: false,
            sequence_parallel: false,
            zero1: false,
            checkpointing: run.args.activation_checkpointing.into(),
            // Rate and step are inputs of the module.
            hyper: AdamW {
                lr: 1.0,
                beta1: run.args.beta1,
                beta2: run.args.beta2,
                eps: run.args.eps,
                weight_decay: run.args.weight_decay,
                step: 1,
            },
            max_norm: run.args.max_grad_norm,
            options: Options { layers: run.args.layer_loop.into(), ..Options::default() },
        };
        let modules = Self {
            micro_step: recording(form).micro_step(),
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
        [&self.micro_step, &self.update].into_iter().chain(&self.eval)
    }
}
