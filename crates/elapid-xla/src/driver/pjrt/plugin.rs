//! Finding a plugin, its table of functions, and its errors.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use super::api::{
    Api, Call, Error, Event, Function, Get, Head, NoArgs, One, RESOURCE_EXHAUSTED, TABLE, Text,
};
use crate::driver::{Fault, Kind};

/// Plugins that are found by name: (name, the file, where Python packages keep it below `site-packages`).
const KNOWN: [(&str, &str, &[&str]); 3] = [
    ("cuda", "xla_cuda_plugin.so", &["jax_plugins/xla_cuda13", "jax_plugins/xla_cuda12"]),
    ("tpu", "libtpu.so", &["libtpu"]),
    ("neuron", "libneuronpjrt.so", &["libneuronxla"]),
];

/// Last version whose layouts are ours; Neuron's plugin refuses to start where nobody tells it one.
const OURS: &str = "0.81";

/// A loaded plugin. It stays in the process to its end: what it has started does not survive being unloaded.
pub(super) struct Plugin {
    api: *const Api,
    pub(super) path: PathBuf,
}

// SAFETY: the table is constant, and the PJRT C API may be called from any thread.
unsafe impl Send for Plugin {}
// SAFETY: as above.
unsafe impl Sync for Plugin {}

/// The file that `plugin` means: one of the known names, or a path.
fn find(plugin: &str) -> Result<PathBuf, Fault> {
    let Some((name, file, folders)) = KNOWN.into_iter().find(|known| known.0 == plugin) else {
        let path = PathBuf::from(plugin);
        if path.is_file() {
            return Ok(path);
        }
        let names: Vec<&str> = KNOWN.iter().map(|known| known.0).collect();
        return Err(Fault::new(
            Kind::Missing,
            format!("there is no PJRT plugin {plugin}"),
            format!("give the path of its shared library, or one of {}", names.join(", ")),
        ));
    };
    let libraries = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let direct = std::env::split_paths(&libraries).map(|dir| dir.join(file));
    let packages = site_packages();
    let packaged =
        packages.iter().flat_map(|dir| folders.iter().map(move |folder| dir.join(folder).join(file)));
    direct.chain(packaged).find(|path| path.is_file()).ok_or_else(|| {
        let package = match name {
            "cuda" => "pip install jax-cuda13-plugin[with-cuda]",
            "tpu" => "pip install libtpu",
            _ => "the AWS Neuron SDK installs it",
        };
        Fault::new(
            Kind::Missing,
            format!("the PJRT plugin {name} ({file}) is not found"),
            format!("{package}; then name its path, or have its folder in LD_LIBRARY_PATH or its Python environment active"),
        )
    })
}

/// Folders of Python packages: of the active environment, of the user, of the system.
fn site_packages() -> Vec<PathBuf> {
    let variable = |name: &str, below: &str| std::env::var_os(name).map(|dir| Path::new(&dir).join(below));
    let roots = [
        variable("VIRTUAL_ENV", "lib"),
        variable("CONDA_PREFIX", "lib"),
        variable("HOME", ".local/lib"),
        Some("/usr/local/lib".into()),
        Some("/usr/lib".into()),
    ];
    let versions = roots.into_iter().flatten().flat_map(|root| {
        let entries = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
        let is_python =
            |dir: &PathBuf| dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"));
        entries.filter(is_python).collect::<Vec<_>>()
    });
    versions.flat_map(|dir| ["site-packages", "dist-packages"].map(|name| dir.join(name))).collect()
}

impl Plugin {
    /// Loads and initialises `plugin`.
    pub(super) fn load(plugin: &str) -> Result<Self, Fault> {
        let path = find(plugin)?;
        if path.file_name().is_some_and(|name| name == KNOWN[2].1) {
            // SAFETY: called by the one thread that there is before ranks and workers are started.
            unsafe { std::env::set_var("NEURON_INTERNAL_PJRT_C_API_VERSION", OURS) };
        }
        let cannot = |cause: libloading::Error| {
            let why = format!("{} cannot be used as a PJRT plugin: {cause}", path.display());
            Fault::new(
                Kind::Missing,
                why,
                "give a library that exports GetPjrtApi, and have those it needs at hand",
            )
        };
        // SAFETY: the user named this library to be run.
        let library = unsafe { Library::new(&path) }.map_err(cannot)?;
        // SAFETY: the type is that of the public header.
        let get = unsafe { library.get::<unsafe extern "C" fn() -> *const Api>(b"GetPjrtApi\0") }
            .map_err(cannot)?;
        // SAFETY: it takes nothing and gives a table that lives as long as the library.
        let api = unsafe { get() };
        std::mem::forget(library);
        let broken = |what: String| {
            let hint = format!("elapid knows PJRT {OURS} and what adds to it; use a plugin of 2025 or later");
            Fault::new(Kind::Version, format!("{} {what}", path.display()), hint)
        };
        if api.is_null() {
            return Err(broken("gives no table of functions".into()));
        }
        // SAFETY: not null, and a head and a version are in every table.
        let (size, version) = unsafe { ((*api).head.struct_size, &(*api).version) };
        if version.major != 0 || size < TABLE * size_of::<usize>() {
            let (major, minor) = (version.major, version.minor);
            return Err(broken(format!("has version {major}.{minor} and a table of {size} bytes")));
        }
        let plugin = Self { api, path };
        plugin.call(Call::PluginInitialize, &mut NoArgs { head: Head::of::<NoArgs>() }, "start")?;
        Ok(plugin)
    }

    /// Its version of the interface.
    pub(super) fn version(&self) -> String {
        // SAFETY: checked when it was loaded.
        let version = unsafe { &(*self.api).version };
        format!("{}.{}", version.major, version.minor)
    }

    fn function(&self, call: Call) -> Option<Function> {
        // SAFETY: the table is long enough for every `Call`, and its entries are functions or null.
        unsafe { self.api.cast::<Option<Function>>().add(call as usize).read() }
    }

    /// Calls a function that returns an error or nothing. `what` says in a few words what it is to do.
    pub(super) fn call<A>(&self, call: Call, args: &mut A, what: &str) -> Result<(), Fault> {
        let Some(function) = self.function(call) else {
            return Err(Fault::new(
                Kind::Version,
                format!("{} does not offer what it takes to {what}", self.path.display()),
                "use a newer plugin",
            ));
        };
        // SAFETY: `A` is the struct of this call, complete and with its size.
        let error = unsafe { function(std::ptr::from_mut(args).cast()) };
        if error.is_null() { Ok(()) } else { Err(self.fault(error, what)) }
    }

    /// Calls one of those that free an object and cannot fail in a way that matters.
    pub(super) fn free<T>(&self, call: Call, object: *mut T) {
        let _ = self.call(call, &mut One { head: Head::of::<One<T>>(), object }, "free an object");
    }

    /// The text that an object has to say.
    pub(super) fn text<T>(&self, call: Call, object: *mut T) -> Result<String, Fault> {
        let mut args = Text { head: Head::of::<Text<T>>(), object, text: std::ptr::null(), size: 0 };
        self.call(call, &mut args, "name itself")?;
        // SAFETY: the plugin has set both, and the text lives as long as the object.
        Ok(unsafe { text(args.text.cast(), args.size) })
    }

    /// Asks an object for a value.
    pub(super) fn get<T, U>(&self, call: Call, object: *mut T, nothing: U) -> Result<U, Fault> {
        let mut args = Get { head: Head::of::<Get<T, U>>(), object, value: nothing };
        self.call(call, &mut args, "describe itself")?;
        Ok(args.value)
    }

    /// Waits for an event and frees it.
    pub(super) fn wait(&self, event: *mut Event, what: &str) -> Result<(), Fault> {
        if event.is_null() {
            return Ok(());
        }
        let done =
            self.call(Call::EventAwait, &mut One { head: Head::of::<One<Event>>(), object: event }, what);
        self.free(Call::EventDestroy, event);
        done
    }

    /// What an error says; frees it.
    fn fault(&self, error: *mut Error, what: &str) -> Fault {
        let mut message =
            Text { head: Head::of::<Text<Error>>(), object: error, text: std::ptr::null(), size: 0 };
        let mut code: Get<Error, c_int> =
            Get { head: Head::of::<Get<Error, c_int>>(), object: error, value: 0 };
        let mut free = One { head: Head::of::<One<Error>>(), object: error };
        let calls: [(Call, *mut c_void); 3] = [
            (Call::ErrorMessage, std::ptr::from_mut(&mut message).cast()),
            (Call::ErrorGetCode, std::ptr::from_mut(&mut code).cast()),
            (Call::ErrorDestroy, std::ptr::from_mut(&mut free).cast()),
        ];
        let mut said = String::new();
        for (call, args) in calls {
            if let Call::ErrorDestroy = call {
                // SAFETY: the message lives as long as the error, which is freed after this.
                said = unsafe { text(message.text.cast(), message.size) };
            }
            if let Some(function) = self.function(call) {
                // SAFETY: each struct is that of its call. The first and last return nothing, which is left alone.
                unsafe { function(args) };
            }
        }
        let (kind, hint) = match code.value {
            RESOURCE_EXHAUSTED => {
                (Kind::Memory, "give a smaller --batch, --activation-checkpointing block or --dtype bfloat16")
            }
            _ => (Kind::Device, "the message is the plugin's own; does the device work with other programs?"),
        };
        let place = self.path.file_name().unwrap_or_default().to_string_lossy();
        Fault::new(kind, format!("{place} cannot {what}: {}", said.trim()), hint)
    }
}

/// A plugin's text.
///
/// # Safety
/// `from` points to `size` bytes, or is null.
unsafe fn text(from: *const u8, size: usize) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: as above.
    String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(from, size) }).into_owned()
}
