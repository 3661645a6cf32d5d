//! AWS Trainium: modules compiled by `neuronx-cc`, run by the Neuron runtime. One process a logical core.

mod compiler;
mod nrt;
mod place;

use std::collections::HashMap;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

pub use self::compiler::{COMPILER, Compiler, flags};
pub use self::nrt::LIBRARY;
pub use self::place::Place;

use self::nrt::{Model, Runtime, Tensor};
use super::{Driver, Fault, Kind, Program, array_name, input};
use crate::hlo::{ALIAS, Literal, Module, Port, Shape};

/// Generation of Trainium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Trainium.
    Trn1,
    /// Trainium 2.
    Trn2,
    /// Trainium 3.
    Trn3,
}

impl Target {
    /// The compiler's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trn1 => "trn1",
            Self::Trn2 => "trn2",
            Self::Trn3 => "trn3",
        }
    }

    /// Bytes of device memory of one logical core.
    pub fn memory(self) -> u64 {
        let gibi = match self {
            Self::Trn1 => 16,
            Self::Trn2 => 24,
            Self::Trn3 => 36,
        };
        gibi << 30
    }

    /// Physical cores of a logical one.
    pub fn lnc(self) -> u32 {
        if self == Self::Trn1 { 1 } else { 2 }
    }

    /// Whether the collectives serve so many tensor-parallel ranks, with logical cores of [`Self::lnc`] physical ones.
    ///
    /// # Errors
    /// They do not.
    pub fn check_tp(self, tp: usize) -> Result<(), Fault> {
        let served: &[usize] = match self {
            Self::Trn1 => &[1, 2, 8, 32],
            Self::Trn2 | Self::Trn3 => &[1, 4, 16, 32, 64],
        };
        if served.contains(&tp) {
            return Ok(());
        }
        let all: Vec<String> = served.iter().map(usize::to_string).collect();
        let why = format!("the collectives of {} do not serve {tp} tensor-parallel ranks", self.name());
        Err(Fault::new(Kind::Ranks, why, format!("give --tp {}", all.join(", "))))
    }

    /// The generation of the instance that this runs on; None: none.
    pub fn here() -> Option<Self> {
        let product = std::fs::read_to_string("/sys/devices/virtual/dmi/id/product_name").ok()?;
        [Self::Trn1, Self::Trn2, Self::Trn3].into_iter().find(|target| product.starts_with(target.name()))
    }
}

/// What a [`NeuronDevice`] is opened with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where modules are compiled.
    pub compiler: Compiler,
    /// Which process this is.
    pub place: Place,
    /// Tensor-parallel ranks, to be checked against what the target's collectives serve; None: do not check.
    pub tp: Option<usize>,
}

/// A module as this rank runs it.
struct Ready {
    model: Model,
    name: String,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl Ready {
    /// Whether an output takes the place of an input only after the run: it may not be written while that is read.
    fn is_beside(&self, output: &Port) -> bool {
        let same = |input: &Port| array_name(input) == output.name;
        !output.name.ends_with(ALIAS) && self.inputs.iter().any(same)
    }
}

/// One logical core.
pub struct NeuronDevice {
    settings: Settings,
    programs: Vec<Ready>,
    arrays: HashMap<String, (Shape, Tensor)>,
    /// Memory for the next value of arrays that are not updated in place.
    beside: HashMap<String, (Shape, Tensor)>,
    /// The last, so that it is closed when nothing of it is left.
    runtime: std::sync::Arc<Runtime>,
}

impl NeuronDevice {
    /// Starts the runtime. It sets environment variables, so it must come before other threads.
    ///
    /// # Errors
    /// The runtime cannot be loaded or is too old; there is no free core.
    pub fn open(settings: Settings) -> Result<Self, Fault> {
        if let Some(tp) = settings.tp {
            settings.compiler.target().check_tp(tp)?;
        }
        for (name, value) in settings.place.environment() {
            if std::env::var_os(name).is_none() {
                // SAFETY: the caller has started no other thread yet.
                unsafe { std::env::set_var(name, value) };
            }
        }
        let runtime = Runtime::open()?;
        let (programs, arrays, beside) = (Vec::new(), HashMap::new(), HashMap::new());
        Ok(Self { settings, programs, arrays, beside, runtime })
    }

    /// Memory for an array, unless it has some of that size.
    fn place(&mut self, name: &str, shape: &Shape) -> Result<&mut Tensor, Fault> {
        if self.arrays.get(name).is_none_or(|(there, _)| there.bytes() != shape.bytes()) {
            self.arrays.remove(name);
            let tensor = self.runtime.tensor(name, shape.bytes())?;
            self.arrays.insert(name.to_owned(), (shape.clone(), tensor));
        }
        let (there, tensor) = self.arrays.get_mut(name).expect("just made");
        there.clone_from(shape);
        Ok(tensor)
    }
}

/// Compares what a compiled module takes and gives with what it was compiled from.
fn check_ports(module: &Module, model: &Model) -> Result<(), Fault> {
    let Some(found) = model.ports() else { return Ok(()) };
    for (ports, is_input, what) in [(&module.inputs, true, "input"), (&module.outputs, false, "output")] {
        for port in ports {
            let (name, size) = (&port.name, port.shape.bytes());
            let there = found.iter().find(|(found, input, _)| found == name && *input == is_input);
            let why = match there {
                Some((_, _, found)) if *found == size => continue,
                Some((_, _, found)) => format!("its {what} {name} has {found} bytes instead of {size}"),
                None => format!("it has no {what} {name}"),
            };
            let why = format!("module {} was not compiled as expected: {why}", module.proto.name);
            return Err(Fault::new(
                Kind::Version,
                why,
                "clear the cache of compiled modules, and try another SDK",
            ));
        }
    }
    Ok(())
}

impl Driver for NeuronDevice {
    fn describe(&self) -> String {
        let Place { rank, ranks, .. } = self.settings.place;
        format!("core of rank {rank} of {ranks}, Neuron runtime {}", self.runtime.version())
    }

    fn prepare(&mut self, module: &Module) -> Result<String, Fault> {
        let neff = self.settings.compiler.compile(module)?;
        Ok(Sha256::digest(&neff).iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn load(&mut self, module: &Module) -> Result<Program, Fault> {
        let name = module.proto.name.clone();
        let neff = self.settings.compiler.compile(module)?;
        let Place { rank, ranks, .. } = self.settings.place;
        let model = self.runtime.load(&name, &neff, (rank as u32, ranks as u32))?;
        check_ports(module, &model)?;
        let (inputs, outputs) = (module.inputs.clone(), module.outputs.clone());
        let ready = Ready { model, name, inputs, outputs };
        for port in &ready.outputs {
            let name = array_name(port);
            self.place(name, &port.shape)?;
            if ready.is_beside(port) && !self.beside.contains_key(name) {
                let tensor = self.runtime.tensor(name, port.shape.bytes())?;
                self.beside.insert(name.to_owned(), (port.shape.clone(), tensor));
            }
        }
        self.programs.push(ready);
        Ok(Program(self.programs.len() - 1))
    }

    fn write(&mut self, name: &str, shape: &Shape, value: &Literal) -> Result<(), Fault> {
        self.place(name, shape)?.write(&value.to_bytes())
    }

    fn read(&mut self, name: &str) -> Result<Literal, Fault> {
        let Some((shape, tensor)) = self.arrays.get(name) else {
            return Err(Fault::ours(format!("there is no array {name} on the device")));
        };
        Ok(Literal::from_bytes(shape.ty, &tensor.read()?))
    }

    fn run(&mut self, program: Program) -> Result<(), Fault> {
        let Self { programs, arrays, beside, .. } = self;
        let ready = &programs[program.0];
        // An input and an output of one name that are aliased are the same memory, bound on both sides.
        let from = |port: &Port| input(arrays, &ready.name, port);
        let to =
            |port: &Port| if ready.is_beside(port) { input(beside, &ready.name, port) } else { from(port) };
        let inputs = ready.inputs.iter().map(|port| Ok((port.name.clone(), from(port)?)));
        let outputs = ready.outputs.iter().map(|port| Ok((port.name.clone(), to(port)?)));
        let (inputs, outputs) =
            (inputs.collect::<Result<Vec<_>, Fault>>()?, outputs.collect::<Result<Vec<_>, Fault>>()?);
        let end = ready.model.run(&inputs, &outputs);
        if end.as_ref().is_err_and(|fault| fault.kind != Kind::NotFinite) {
            return end;
        }
        for port in ready.outputs.iter().filter(|port| ready.is_beside(port)) {
            if let (Some(old), Some(new)) = (arrays.get_mut(&port.name), beside.get_mut(&port.name)) {
                std::mem::swap(old, new);
            }
        }
        end
    }

    fn clear(&mut self) {
        self.programs.clear();
        self.arrays.clear();
        self.beside.clear();
    }
}

/// The folder of compiled modules, where nobody names one: `elapid/neff` in the user's cache.
pub fn default_cache() -> PathBuf {
    let below = |name: &str, path: &str| std::env::var_os(name).map(|dir| PathBuf::from(dir).join(path));
    below("XDG_CACHE_HOME", "elapid/neff")
        .or_else(|| below("HOME", ".cache/elapid/neff"))
        .unwrap_or("neff".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collectives_serve_some_numbers_of_ranks() {
        assert!(Target::Trn1.check_tp(8).is_ok() && Target::Trn2.check_tp(4).is_ok());
        let fault = Target::Trn1.check_tp(4).unwrap_err();
        assert!(fault.to_string().contains("trn1") && fault.hint.contains("1, 2, 8, 32"), "{fault:?}");
    }
}
