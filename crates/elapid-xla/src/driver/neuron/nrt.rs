//! The Neuron runtime, `libnrt.so.1`: signatures as its public headers give them (version 2), found at run time.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::Arc;

use libloading::Library;

use crate::driver::{Fault, Kind};

/// Names the library, where it is not to be looked for.
pub const LIBRARY: &str = "ELAPID_LIBNRT";

/// Where the runtime's package puts it, beside where the system looks.
const PLACES: [&str; 2] = ["libnrt.so.1", "/opt/aws/neuron/lib/libnrt.so.1"];

type Status = c_int;

/// Framework "none".
const NO_FRAMEWORK: c_int = 1;
/// In device memory.
const ON_DEVICE: c_int = 0;
/// Names of a model's tensors are that long at most.
const NAME: usize = 256;

/// `nrt_version_t`.
#[repr(C)]
struct Version {
    numbers: [u64; 4],
    detail: [c_char; 128],
    hash: [c_char; 64],
}

/// `nrt_tensor_info_t`.
#[repr(C)]
struct TensorInfo {
    name: [u8; NAME],
    /// 0: input, 1: output.
    usage: c_int,
    size: usize,
    dtype: c_int,
    shape: *mut u32,
    rank: u32,
}

/// Head of `nrt_tensor_info_array_t`; the elements follow it.
#[repr(C)]
struct TensorInfos {
    count: u64,
    first: [TensorInfo; 0],
}

macro_rules! symbols {
    ($($(#[$doc:meta])* $field:ident: $name:literal ( $($arg:ty),* ) $(-> $result:ty)?;)*) => {
        /// The functions, each there or not.
        struct Symbols {
            $($(#[$doc])* $field: Option<unsafe extern "C" fn($($arg),*) $(-> $result)?>,)*
        }

        impl Symbols {
            fn find(library: &Library) -> Self {
                // SAFETY: the types are those of the public headers.
                $(let $field = unsafe { library.get::<unsafe extern "C" fn($($arg),*) $(-> $result)?>(concat!($name, "\0").as_bytes()) }
                    .ok().map(|symbol| *symbol);)*
                Self { $($field),* }
            }

            /// Names of those that every run needs and that are not there.
            fn missing(&self) -> Vec<&'static str> {
                const OPTIONAL: [&str; 4] =
                    ["nrt_load_collectives", "nrt_get_version", "nrt_get_model_tensor_info", "nrt_free_model_tensor_info"];
                let mut missing = Vec::new();
                $(if self.$field.is_none() && !OPTIONAL.contains(&$name) { missing.push($name); })*
                missing
            }
        }
    };
}

symbols! {
    init: "nrt_init"(c_int, *const c_char, *const c_char) -> Status;
    close: "nrt_close"();
    version: "nrt_get_version"(*mut Version, usize) -> Status;
    load: "nrt_load"(*const c_void, usize, i32, i32, *mut *mut c_void) -> Status;
    load_collectives: "nrt_load_collectives"(*const c_void, usize, i32, i32, u32, u32, *mut *mut c_void) -> Status;
    unload: "nrt_unload"(*mut c_void) -> Status;
    tensor_info: "nrt_get_model_tensor_info"(*mut c_void, *mut *mut TensorInfos) -> Status;
    free_tensor_info: "nrt_free_model_tensor_info"(*mut TensorInfos) -> Status;
    allocate: "nrt_tensor_allocate"(c_int, c_int, usize, *const c_char, *mut *mut c_void) -> Status;
    free: "nrt_tensor_free"(*mut *mut c_void);
    read: "nrt_tensor_read"(*const c_void, *mut c_void, usize, usize) -> Status;
    write: "nrt_tensor_write"(*mut c_void, *const c_void, usize, usize) -> Status;
    new_set: "nrt_allocate_tensor_set"(*mut *mut c_void) -> Status;
    add: "nrt_add_tensor_to_tensor_set"(*mut c_void, *const c_char, *mut c_void) -> Status;
    free_set: "nrt_destroy_tensor_set"(*mut *mut c_void);
    execute: "nrt_execute"(*mut c_void, *const c_void, *mut c_void) -> Status;
}

/// Calls a function that [`Runtime::open`] has seen to be there.
macro_rules! call {
    ($runtime:expr, $field:ident($($arg:expr),* $(,)?)) => {{
        let function = $runtime.symbols.$field.expect("looked for when the runtime was opened");
        // SAFETY: the arguments are what the public header asks for; see the callers for lifetimes.
        unsafe { function($($arg),*) }
    }};
}

/// The runtime, initialised for the cores that this process may use.
pub(super) struct Runtime {
    symbols: Symbols,
    path: PathBuf,
    version: String,
}

impl Runtime {
    /// Finds the library and initialises it.
    pub(super) fn open() -> Result<Arc<Self>, Fault> {
        let named = std::env::var_os(LIBRARY).map(PathBuf::from);
        let places: Vec<PathBuf> = match named {
            Some(path) => vec![path],
            None => PLACES.map(PathBuf::from).to_vec(),
        };
        let mut why = String::new();
        let mut found = None;
        for path in places {
            // SAFETY: this is the runtime, or what the user has named in its place.
            match unsafe { Library::new(&path) } {
                Ok(library) => {
                    found = Some((library, path));
                    break;
                }
                Err(cause) => why = cause.to_string(),
            }
        }
        let Some((library, path)) = found else {
            return Err(Fault::new(
                Kind::Missing,
                format!("the Neuron runtime cannot be loaded: {why}"),
                format!(
                    "this takes a Trainium instance with the package aws-neuronx-runtime-lib; {LIBRARY} names the library \
                     where it lies elsewhere"
                ),
            ));
        };
        let symbols = Symbols::find(&library);
        // What it has started does not survive being unloaded.
        std::mem::forget(library);
        let missing = symbols.missing();
        let too_old = |what: String| {
            let hint = "install aws-neuronx-runtime-lib of Neuron SDK 2.20 or later";
            Fault::new(Kind::Version, format!("{} {what}", path.display()), hint)
        };
        if !missing.is_empty() {
            return Err(too_old(format!("has no {}", missing.join(", "))));
        }
        let mut version = "of unknown version".to_owned();
        if let Some(get) = symbols.version {
            let mut found = Version { numbers: [0; 4], detail: [0; 128], hash: [0; 64] };
            // SAFETY: the struct is as large as the size says.
            if unsafe { get(&mut found, size_of::<Version>()) } == 0 {
                let [major, minor, patch, _] = found.numbers;
                version = format!("{major}.{minor}.{patch}");
                if major < 2 {
                    return Err(too_old(format!("is version {version}, and elapid needs 2")));
                }
            }
        }
        let runtime = Self { symbols, path, version };
        let empty = c"".as_ptr();
        let status = call!(runtime, init(NO_FRAMEWORK, empty, empty));
        runtime.check(status, "start")?;
        Ok(Arc::new(runtime))
    }

    /// Its version, for people and for caches.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    fn check(&self, status: Status, what: &str) -> Result<(), Fault> {
        let Some((kind, text, hint)) = meaning(status) else { return Ok(()) };
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        Err(Fault::new(kind, format!("{name} cannot {what}: {text} (status {status})"), hint))
    }

    /// Puts a compiled module on the core. Of several ranks (own number, all) every one must call this in the same order,
    /// and it returns when all have.
    pub(super) fn load(
        self: &Arc<Self>,
        name: &str,
        neff: &[u8],
        (rank, ranks): (u32, u32),
    ) -> Result<Model, Fault> {
        let mut model = null_mut();
        let (data, size) = (neff.as_ptr().cast(), neff.len());
        let what = format!("load {name}");
        let status = if ranks == 1 {
            call!(self, load(data, size, 0, -1, &mut model))
        } else if let Some(load) = self.symbols.load_collectives {
            // SAFETY: as the public header asks for; the data is copied.
            unsafe { load(data, size, 0, -1, rank, ranks, &mut model) }
        } else {
            return Err(Fault::new(
                Kind::Version,
                format!("{} has no nrt_load_collectives, which {ranks} ranks need", self.path.display()),
                "install a later aws-neuronx-runtime-lib, and aws-neuronx-collectives",
            ));
        };
        self.check(status, &what)?;
        Ok(Model { runtime: self.clone(), model, name: name.to_owned() })
    }

    /// Device memory for an array.
    pub(super) fn tensor(self: &Arc<Self>, name: &str, size: usize) -> Result<Tensor, Fault> {
        let label = c_name(name);
        let mut tensor = null_mut();
        // A runtime may refuse a tensor of no bytes.
        let status = call!(self, allocate(ON_DEVICE, 0, size.max(1), label.as_ptr(), &mut tensor));
        self.check(status, &format!("allocate {size} bytes for {name}"))?;
        Ok(Tensor { runtime: self.clone(), tensor, size, name: name.to_owned() })
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        call!(self, close());
    }
}

/// A name for the C side. Ours have no zero byte; one with it would end there.
fn c_name(name: &str) -> CString {
    CString::new(name.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

/// A module on the core.
pub(super) struct Model {
    runtime: Arc<Runtime>,
    model: *mut c_void,
    name: String,
}

// SAFETY: the runtime may be called from any thread, one at a time for an object, which `&mut` sees to.
unsafe impl Send for Model {}

impl Model {
    /// Names of inputs and outputs with their sizes; None: this runtime does not tell.
    pub(super) fn ports(&self) -> Option<Vec<(String, bool, usize)>> {
        let (get, free) = (self.runtime.symbols.tensor_info?, self.runtime.symbols.free_tensor_info?);
        let mut infos = null_mut();
        // SAFETY: the model is loaded, and the list is freed below.
        if unsafe { get(self.model, &mut infos) } != 0 || infos.is_null() {
            return None;
        }
        // SAFETY: the runtime has made a head and as many elements as it says.
        let all = unsafe {
            let first = std::ptr::addr_of!((*infos).first).cast::<TensorInfo>();
            std::slice::from_raw_parts(first, (*infos).count as usize)
        };
        let port = |info: &TensorInfo| {
            let end = info.name.iter().position(|&b| b == 0).unwrap_or(NAME);
            (String::from_utf8_lossy(&info.name[..end]).into_owned(), info.usage == 0, info.size)
        };
        let ports = all.iter().map(port).collect();
        // SAFETY: made by the runtime just above, and not used any more.
        unsafe { free(infos) };
        Some(ports)
    }

    /// Runs it on these arrays, each under the name of its port, and waits.
    pub(super) fn run(
        &self,
        inputs: &[(String, &Tensor)],
        outputs: &[(String, &Tensor)],
    ) -> Result<(), Fault> {
        let set = |ports: &[(String, &Tensor)]| {
            let set = Set::new(&self.runtime)?;
            ports.iter().try_for_each(|(name, tensor)| set.add(name, tensor)).map(|()| set)
        };
        let (inputs, outputs) = (set(inputs)?, set(outputs)?);
        let status = call!(self.runtime, execute(self.model, inputs.set, outputs.set));
        self.runtime.check(status, &format!("run {}", self.name))
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        call!(self.runtime, unload(self.model));
    }
}

/// An array in device memory.
pub(super) struct Tensor {
    runtime: Arc<Runtime>,
    tensor: *mut c_void,
    size: usize,
    name: String,
}

// SAFETY: as for `Model`.
unsafe impl Send for Tensor {}

impl Tensor {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        assert_eq!(bytes.len(), self.size, "{}", self.name);
        let status = call!(self.runtime, write(self.tensor, bytes.as_ptr().cast(), 0, bytes.len()));
        self.runtime.check(status, &format!("write {}", self.name))
    }

    pub(super) fn read(&self) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0u8; self.size];
        let status = call!(self.runtime, read(self.tensor, bytes.as_mut_ptr().cast(), 0, bytes.len()));
        self.runtime.check(status, &format!("read {}", self.name)).map(|()| bytes)
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        call!(self.runtime, free(&mut self.tensor));
    }
}

/// Arrays by name, for one run.
struct Set<'r> {
    runtime: &'r Runtime,
    set: *mut c_void,
}

impl<'r> Set<'r> {
    fn new(runtime: &'r Runtime) -> Result<Self, Fault> {
        let mut set = null_mut();
        runtime.check(call!(runtime, new_set(&mut set)), "make a set of tensors")?;
        Ok(Self { runtime, set })
    }

    fn add(&self, name: &str, tensor: &Tensor) -> Result<(), Fault> {
        let label = c_name(name);
        let status = call!(self.runtime, add(self.set, label.as_ptr(), tensor.tensor));
        self.runtime.check(status, &format!("bind {name}"))
    }
}

impl Drop for Set<'_> {
    fn drop(&mut self) {
        call!(self.runtime, free_set(&mut self.set));
    }
}

/// What a status means and what to do; None: success.
fn meaning(status: Status) -> Option<(Kind, &'static str, &'static str)> {
    let again = "run it again; where that does not help, look at the system log (dmesg) and at neuron-top";
    let report = "this may be a fault of elapid or of the SDK; please report it with the versions of both";
    Some(match status {
        0 => return None,
        1 => (Kind::Device, "it failed and does not say why", again),
        2 | 3 | 1002 => (Kind::Device, "it does not accept what it was given", report),
        4 => (
            Kind::Memory,
            "memory or another resource has run out",
            "give a smaller --batch, --activation-checkpointing block, or a larger --tp",
        ),
        5 => (
            Kind::Ranks,
            "it has waited too long",
            "does every rank still run? NEURON_RT_EXEC_TIMEOUT says how long a run may take",
        ),
        6 | 1200..=1299 => {
            (Kind::Device, "the hardware has failed", "restart the instance, or take another one")
        }
        7 => (Kind::Device, "too many runs wait", again),
        9 => (
            Kind::NoDevice,
            "there are not so many cores",
            "NEURON_RT_VISIBLE_CORES, or the instance, has fewer than ranks were started",
        ),
        10 => (
            Kind::Version,
            "it does not know this version of compiled modules",
            "take neuronx-cc and the runtime from the same SDK, and clear the cache",
        ),
        13 | 14 => (Kind::Device, "it has not been started, or has been closed", report),
        1003 => (
            Kind::NotFinite,
            "a number is not finite",
            "go on from the last checkpoint with --device cpu to find where it comes from",
        ),
        1004 => (Kind::Device, "the run ended with an error of the core", again),
        1005 => (
            Kind::NoDevice,
            "the core is in use by another process",
            "end that process, or choose other cores with NEURON_RT_VISIBLE_CORES",
        ),
        1006 => (Kind::Device, "an access was out of bounds", report),
        1100 => (Kind::Ranks, "a collective is still under way", "does every rank still run?"),
        _ => (Kind::Device, "a status that elapid does not know", again),
    })
}
