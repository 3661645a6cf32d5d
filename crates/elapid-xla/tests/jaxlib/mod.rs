//! XLA itself, for tests: a Python process with jaxlib that compiles and runs modules on the CPU.

use std::io::{BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use elapid_xla::{Executor, Literal, Module, Type};

/// Names the Python interpreter that has the packages of `tests/requirements.txt`.
pub(crate) const PYTHON: &str = "ELAPID_JAXLIB_PYTHON";

/// The process and its pipes.
pub(crate) struct Jaxlib {
    child: Child,
    pipes: Mutex<(BufWriter<ChildStdin>, BufReader<ChildStdout>)>,
}

impl Jaxlib {
    /// None, with a line that says so, where no interpreter is named.
    pub(crate) fn start() -> Option<Self> {
        let Some(python) = std::env::var_os(PYTHON) else {
            eprintln!(
                "skipped: {PYTHON} names no Python interpreter with crates/elapid-xla/tests/requirements.txt"
            );
            return None;
        };
        let server = concat!(env!("CARGO_MANIFEST_DIR"), "/../elapid-xla/tests/jaxlib/server.py");
        let mut child = Command::new(python)
            .arg(server)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the interpreter starts");
        let stdin = BufWriter::new(child.stdin.take().expect("piped"));
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Some(Self { child, pipes: Mutex::new((stdin, stdout)) })
    }

    fn ask(&self, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<Vec<Vec<u8>>, String> {
        let mut pipes = self.pipes.lock().expect("no test has failed with the pipes in hand");
        let (to, from) = &mut *pipes;
        let talk = || {
            write(to)?;
            to.flush()?;
            if number(from)? != 0 {
                let mut text = vec![0; number(from)? as usize];
                from.read_exact(&mut text)?;
                return Ok(Err(String::from_utf8_lossy(&text).into_owned()));
            }
            let mut outputs = Vec::new();
            for _ in 0..number(from)? {
                let mut size = [0; 8];
                from.read_exact(&mut size)?;
                let mut data = vec![0; u64::from_le_bytes(size) as usize];
                from.read_exact(&mut data)?;
                outputs.push(data);
            }
            Ok(Ok(outputs))
        };
        let result: std::io::Result<Result<Vec<Vec<u8>>, String>> = talk();
        result.unwrap_or_else(|error| Err(format!("the Python process is gone: {error}")))
    }

    /// Number of instructions of the entry, as XLA's parser reads the text.
    #[allow(dead_code)] // not every test that includes this file parses
    pub(crate) fn parse(&self, text: &str) -> Result<usize, String> {
        let outputs = self.ask(|to| {
            to.write_all(&0u32.to_le_bytes())?;
            to.write_all(&(text.len() as u32).to_le_bytes())?;
            to.write_all(text.as_bytes())
        })?;
        Ok(u32::from_le_bytes(outputs[0][..4].try_into().expect("four bytes")) as usize)
    }
}

fn number(from: &mut impl Read) -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

impl Jaxlib {
    /// What a module gives to ranks that run it together: the outputs of each for its inputs.
    pub(crate) fn run_on_ranks(
        &self,
        module: &Module,
        inputs: &[Vec<Literal>],
    ) -> Result<Vec<Vec<Literal>>, String> {
        let outputs = self.send(module, inputs.len(), |to| {
            to.write_all(&(module.inputs.len() as u32).to_le_bytes())?;
            for (i, port) in module.inputs.iter().enumerate() {
                let dtype = match inputs[0][i] {
                    Literal::F32(_) => 0,
                    Literal::Bf16(_) => 1,
                    Literal::S32(_) => 2,
                };
                to.write_all(&[dtype, port.shape.dims.len() as u8])?;
                for &extent in &port.shape.dims {
                    to.write_all(&(extent as u32).to_le_bytes())?;
                }
                inputs.iter().try_for_each(|inputs| to.write_all(&inputs[i].to_bytes()))?;
            }
            Ok(())
        })?;
        let types: Vec<Type> = module.outputs.iter().map(|port| port.shape.ty).collect();
        let of_rank = |outputs: &[Vec<u8>]| {
            outputs.iter().zip(&types).map(|(data, &ty)| Literal::from_bytes(ty, data)).collect()
        };
        Ok(outputs.chunks_exact(types.len()).map(of_rank).collect())
    }

    /// Whether XLA takes and compiles the module, for so many ranks.
    #[allow(dead_code)] // not every test that includes this file asks
    pub(crate) fn compile(&self, module: &Module, ranks: usize) -> Result<(), String> {
        self.send(module, ranks, |to| to.write_all(&u32::MAX.to_le_bytes())).map(|_| ())
    }

    fn send(
        &self,
        module: &Module,
        ranks: usize,
        inputs: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<Vec<Vec<u8>>, String> {
        let bytes = module.to_bytes();
        self.ask(|to| {
            to.write_all(&(bytes.len() as u32).to_le_bytes())?;
            to.write_all(&bytes)?;
            to.write_all(&(ranks as u32).to_le_bytes())?;
            inputs(to)
        })
    }
}

impl Executor for Jaxlib {
    fn run(&self, module: &Module, inputs: &[Literal]) -> Result<Vec<Literal>, String> {
        let outputs = self.run_on_ranks(module, &[inputs.to_vec()])?;
        Ok(outputs.into_iter().next().expect("one rank"))
    }
}

impl Drop for Jaxlib {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
