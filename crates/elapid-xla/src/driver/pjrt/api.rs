//! The part of the PJRT C API that Elapid calls: layouts as its public header gives them (version 0.81; all later ones
//! only add at the ends).
//!
//! Every argument struct begins with its own size and a list of extensions, which is empty here. `Error` and the other
//! empty structs are the plugin's own; we only ever hold pointers to them.

use std::ffi::{c_char, c_int, c_void};

macro_rules! opaque {
    ($($name:ident),*) => { $(#[repr(C)] pub(super) struct $name { _opaque: [u8; 0] })* };
}

opaque!(Error, Client, Device, DeviceDescription, Executable, LoadedExecutable, Buffer, Event);

/// Head of every struct.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut c_void,
}

impl Head {
    pub(super) fn of<T>() -> Self {
        Self { struct_size: size_of::<T>(), extensions: std::ptr::null_mut() }
    }
}

/// The version in an [`Api`].
#[repr(C)]
pub(super) struct Version {
    head: Head,
    pub(super) major: c_int,
    pub(super) minor: c_int,
}

/// A function that takes one struct and gives an error or null.
pub(super) type Function = unsafe extern "C" fn(*mut c_void) -> *mut Error;

/// Where the functions that Elapid calls lie in the table, in words from the start of [`Api`].
#[derive(Clone, Copy)]
pub(super) enum Call {
    ErrorDestroy = 5,
    ErrorMessage = 6,
    ErrorGetCode = 7,
    PluginInitialize = 8,
    EventDestroy = 10,
    EventAwait = 13,
    ClientCreate = 15,
    ClientDestroy = 16,
    ClientPlatformName = 17,
    ClientPlatformVersion = 19,
    ClientAddressableDevices = 21,
    ClientCompile = 25,
    ClientBufferFromHostBuffer = 27,
    DeviceDescriptionId = 28,
    DeviceDescriptionKind = 31,
    DeviceGetDescription = 34,
    ExecutableDestroy = 45,
    ExecutableNumOutputs = 49,
    LoadedExecutableDestroy = 55,
    LoadedExecutableGetExecutable = 56,
    LoadedExecutableExecute = 60,
    BufferDestroy = 63,
    BufferToHostBuffer = 75,
}

/// Words that the table must have.
pub(super) const TABLE: usize = Call::BufferToHostBuffer as usize + 1;

/// The plugin's table: a head, a version, functions.
#[repr(C)]
pub(super) struct Api {
    pub(super) head: Head,
    pub(super) version: Version,
}

#[repr(C)]
pub(super) struct NoArgs {
    pub(super) head: Head,
}

/// Arguments of everything that takes one object and gives nothing.
#[repr(C)]
pub(super) struct One<T> {
    pub(super) head: Head,
    pub(super) object: *mut T,
}

/// Of everything that asks an object for a text.
#[repr(C)]
pub(super) struct Text<T> {
    pub(super) head: Head,
    pub(super) object: *mut T,
    pub(super) text: *const c_char,
    pub(super) size: usize,
}

/// Of everything that asks an object for another, or for a word.
#[repr(C)]
pub(super) struct Get<T, U> {
    pub(super) head: Head,
    pub(super) object: *mut T,
    pub(super) value: U,
}

#[repr(C)]
pub(super) struct Devices {
    pub(super) head: Head,
    pub(super) client: *mut Client,
    pub(super) devices: *const *mut Device,
    pub(super) count: usize,
}

/// A named option; `value` is the union's widest member.
#[repr(C)]
pub(super) struct NamedValue {
    pub(super) head: Head,
    pub(super) name: *const c_char,
    pub(super) name_size: usize,
    pub(super) ty: c_int,
    pub(super) value: u64,
    pub(super) value_size: usize,
}

#[repr(C)]
pub(super) struct ClientCreate {
    pub(super) head: Head,
    pub(super) options: *const NamedValue,
    pub(super) option_count: usize,
    /// Get and put of a key-value store, each with its argument; for clients of several processes.
    pub(super) store: [*mut c_void; 4],
    pub(super) client: *mut Client,
    pub(super) try_get: [*mut c_void; 2],
}

#[repr(C)]
pub(super) struct ProgramText {
    pub(super) head: Head,
    pub(super) code: *const c_char,
    pub(super) code_size: usize,
    pub(super) format: *const c_char,
    pub(super) format_size: usize,
}

#[repr(C)]
pub(super) struct Compile {
    pub(super) head: Head,
    pub(super) client: *mut Client,
    pub(super) program: *const ProgramText,
    pub(super) options: *const c_char,
    pub(super) options_size: usize,
    pub(super) executable: *mut LoadedExecutable,
}

#[repr(C)]
pub(super) struct BufferFromHost {
    pub(super) head: Head,
    pub(super) client: *mut Client,
    pub(super) data: *const c_void,
    pub(super) ty: c_int,
    pub(super) dims: *const i64,
    pub(super) num_dims: usize,
    pub(super) strides: *const i64,
    pub(super) num_strides: usize,
    /// 0: the host's memory is its own again when the call returns.
    pub(super) semantics: c_int,
    pub(super) device: *mut Device,
    pub(super) memory: *mut c_void,
    pub(super) layout: *mut c_void,
    pub(super) done: *mut Event,
    pub(super) buffer: *mut Buffer,
}

#[repr(C)]
pub(super) struct ToHost {
    pub(super) head: Head,
    pub(super) buffer: *mut Buffer,
    pub(super) layout: *mut c_void,
    pub(super) to: *mut c_void,
    pub(super) size: usize,
    pub(super) event: *mut Event,
}

#[repr(C)]
pub(super) struct ExecuteOptions {
    pub(super) head: Head,
    pub(super) callbacks: [*mut c_void; 2],
    pub(super) callback_counts: [usize; 2],
    pub(super) launch: c_int,
    pub(super) not_donated: *const i64,
    pub(super) not_donated_count: usize,
    pub(super) context: *mut c_void,
    pub(super) location: *const c_char,
    pub(super) task_count: usize,
    pub(super) tasks: [*mut c_void; 2],
}

#[repr(C)]
pub(super) struct Execute {
    pub(super) head: Head,
    pub(super) executable: *mut LoadedExecutable,
    pub(super) options: *mut ExecuteOptions,
    pub(super) arguments: *const *const *mut Buffer,
    pub(super) device_count: usize,
    pub(super) argument_count: usize,
    pub(super) outputs: *const *mut *mut Buffer,
    pub(super) events: *mut *mut Event,
    pub(super) device: *mut Device,
}

/// The plugin's numbers for element types.
pub(super) mod element {
    use std::ffi::c_int;

    pub(in super::super) const PRED: c_int = 1;
    pub(in super::super) const S32: c_int = 4;
    pub(in super::super) const F32: c_int = 11;
    pub(in super::super) const BF16: c_int = 13;
}

/// The plugin's number for "too little memory".
pub(super) const RESOURCE_EXHAUSTED: c_int = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes as a C compiler gives them for the public header.
    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!(size_of::<ClientCreate>(), 88);
        assert_eq!(size_of::<ExecuteOptions>(), 112);
        assert_eq!(size_of::<Compile>(), 56);
        assert_eq!(size_of::<BufferFromHost>(), 120);
        assert_eq!(size_of::<Execute>(), 80);
        assert_eq!(size_of::<ToHost>(), 56);
        assert_eq!(size_of::<NamedValue>(), 56);
        assert_eq!(size_of::<ProgramText>(), 48);
    }
}
