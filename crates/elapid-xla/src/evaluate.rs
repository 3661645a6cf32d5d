//! Values on demand: what was recorded and not yet computed, as one module through an executor.

use std::sync::{Arc, Weak};

use crate::backend::XlaBackend;
use crate::hlo::{Literal, Module, Output, emit};
use crate::tensor::{Recorded, Source, XlaTensor};

/// Compiles and runs modules.
pub trait Executor: Send + Sync {
    /// The outputs of `module` for `inputs`, both in its order.
    ///
    /// # Errors
    /// What the compiler or the run says.
    fn run(&self, module: &Module, inputs: &[Literal]) -> Result<Vec<Literal>, String>;
}

impl XlaBackend {
    /// The values of a tensor. All tensors that are still in somebody's hands are computed with it, so that a graph
    /// is compiled once and not once a tensor. Those that are cut from inputs wait until one of their kind is asked for:
    /// whoever computes with them is to cut them.
    ///
    /// # Panics
    /// Without an executor, or when it fails.
    pub(crate) fn read(&self, tensor: &XlaTensor) -> Arc<Literal> {
        if let Some((values, _)) = tensor.0.known.get() {
            return values.clone();
        }
        if let Some(values) = self.recorded_input(tensor) {
            return values;
        }
        let executor = self.executor.as_ref().expect("a backend that only records has no values");
        let mut wanted: Vec<Arc<Recorded>> = Vec::new();
        let cut = self.is_cut_from_input(&tensor.0);
        self.live().retain(|weak: &Weak<Recorded>| {
            let Some(recorded) = weak.upgrade() else { return false };
            let waits = !cut && self.is_cut_from_input(&recorded);
            if !waits && recorded.known.get().is_none() && recorded.shape.elements() > 0 {
                wanted.push(recorded);
            }
            waits
        });
        if !wanted.iter().any(|w| Arc::ptr_eq(w, &tensor.0)) {
            wanted.push(tensor.0.clone());
        }
        let outputs: Vec<Output> = wanted
            .iter()
            .enumerate()
            .map(|(i, w)| Output {
                name: format!("value.{i}"),
                node: self.get(&XlaTensor(w.clone())).node,
                alias: None,
            })
            .collect();
        let module = emit(&self.graph, "values", &outputs, false);
        let results = executor
            .run(&module, &module.recorded_inputs())
            .unwrap_or_else(|why| panic!("the recorded module does not run: {why}\n{}", module.to_text()));
        assert_eq!(results.len(), wanted.len(), "one result an output");
        for (recorded, values) in wanted.iter().zip(results) {
            let place = self.graph.leaf(recorded.shape.clone(), "value", Some(values.clone()));
            let _ = recorded.known.set((Arc::new(values), place));
        }
        tensor.0.known.get().expect("just computed").0.clone()
    }

    fn is_cut_from_input(&self, recorded: &Recorded) -> bool {
        matches!(recorded.source, Source::Part { of, .. } if self.leaf_at(of).is_some())
    }

    /// The values of a tensor that is an input.
    fn recorded_input(&self, tensor: &XlaTensor) -> Option<Arc<Literal>> {
        let Source::Node(place) = tensor.0.source else { return None };
        let leaf = self.leaf_at(place)?;
        self.graph.lock().leaves[leaf].data.clone()
    }
}
