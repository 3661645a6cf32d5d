//! Any XLA device through a PJRT plugin: GPUs, TPUs, CPUs.

mod api;
mod plugin;

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use prost::Message;

use self::api::{
    Buffer, BufferFromHost, Call, ClientCreate, Compile, Devices, Executable, Execute, ExecuteOptions, Head,
    LoadedExecutable, ProgramText, ToHost, element,
};
use self::plugin::Plugin;
use super::{Driver, Fault, Kind, Program, array_name, input};
use crate::hlo::{Literal, Module, Port, Shape, Type};

/// A plugin with its devices, shared by the ranks of a process.
pub struct Client {
    plugin: Plugin,
    client: *mut api::Client,
    devices: Vec<*mut api::Device>,
    compiled: Mutex<Compiled>,
}

/// Programs by module and number of ranks: all ranks run one.
type Compiled = HashMap<(Vec<u8>, usize), Weak<Loaded>>;

// SAFETY: the PJRT C API may be called from any thread; the pointers are the plugin's own and live as long as the client.
unsafe impl Send for Client {}
// SAFETY: as above.
unsafe impl Sync for Client {}

impl Client {
    /// Loads `plugin`, the path of a library or one of `cuda`, `tpu` and `neuron`, and finds its devices. It may set an
    /// environment variable, so it must come before other threads.
    ///
    /// # Errors
    /// There is no such plugin, it is too old, or it has no device.
    pub fn open(plugin: &str) -> Result<Arc<Self>, Fault> {
        let plugin = Plugin::load(plugin)?;
        let mut create = ClientCreate {
            head: Head::of::<ClientCreate>(),
            options: null(),
            option_count: 0,
            store: [null_mut(); 4],
            client: null_mut(),
            try_get: [null_mut(); 2],
        };
        plugin.call(Call::ClientCreate, &mut create, "find a device").map_err(|fault| Fault {
            kind: Kind::NoDevice,
            hint: "is there such a device in this machine, with its driver, and is it free?".into(),
            ..fault
        })?;
        let mut devices =
            Devices { head: Head::of::<Devices>(), client: create.client, devices: null(), count: 0 };
        let found = plugin.call(Call::ClientAddressableDevices, &mut devices, "list its devices");
        let mut client =
            Self { plugin, client: create.client, devices: Vec::new(), compiled: Mutex::default() };
        found?;
        if devices.count > 0 {
            // SAFETY: the plugin's list of that many devices, which lives as long as the client.
            client.devices = unsafe { std::slice::from_raw_parts(devices.devices, devices.count) }.to_vec();
        }
        if client.devices.is_empty() {
            return Err(Fault::new(
                Kind::NoDevice,
                format!("{} finds no device", client.plugin.path.display()),
                "is there one in this machine, with its driver?",
            ));
        }
        Ok(Arc::new(client))
    }

    /// How many devices there are.
    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// Device `rank` of the first `ranks`, which all run the same modules together.
    ///
    /// # Errors
    /// There are not so many.
    pub fn device(self: &Arc<Self>, rank: usize, ranks: usize) -> Result<PjrtDevice, Fault> {
        if ranks > self.devices.len() {
            return Err(Fault::new(
                Kind::NoDevice,
                format!(
                    "{ranks} ranks need as many devices, and {} has {}",
                    self.name()?,
                    self.devices.len()
                ),
                "give a smaller --tp and --dp",
            ));
        }
        let arrays = HashMap::new();
        Ok(PjrtDevice { client: self.clone(), rank, ranks, arrays, programs: Vec::new(), launches: 0 })
    }

    fn name(&self) -> Result<String, Fault> {
        self.plugin.text(Call::ClientPlatformName, self.client)
    }

    fn description(&self, number: usize) -> Result<*mut api::DeviceDescription, Fault> {
        self.plugin.get(Call::DeviceGetDescription, self.devices[number], null_mut())
    }

    /// What device `number` is.
    fn describe(&self, number: usize) -> Result<String, Fault> {
        let plugin = &self.plugin;
        let kind = plugin.text(Call::DeviceDescriptionKind, self.description(number)?)?;
        let version = plugin.text(Call::ClientPlatformVersion, self.client)?;
        let version = version.lines().next().unwrap_or_default().to_owned();
        Ok(format!("{kind} ({} through PJRT {}, {version})", self.name()?, plugin.version()))
    }

    /// The plugin's number of device `number`.
    fn id(&self, number: usize) -> Result<i64, Fault> {
        self.plugin.get(Call::DeviceDescriptionId, self.description(number)?, 0 as c_int).map(i64::from)
    }

    /// `module` compiled for the first `ranks` devices. Who comes while another rank compiles it waits.
    fn compile(self: &Arc<Self>, module: &Module, ranks: usize) -> Result<Arc<Loaded>, Fault> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (module.to_bytes(), ranks);
        if let Some(loaded) = compiled.get(&key).and_then(Weak::upgrade) {
            return Ok(loaded);
        }
        let format = b"hlo";
        let text = ProgramText {
            head: Head::of::<ProgramText>(),
            code: key.0.as_ptr().cast(),
            code_size: key.0.len(),
            format: format.as_ptr().cast(),
            format_size: format.len(),
        };
        let ids = (0..ranks).map(|number| self.id(number)).collect::<Result<_, _>>()?;
        let options = compile_options(ids);
        let mut args = Compile {
            head: Head::of::<Compile>(),
            client: self.client,
            program: &text,
            options: options.as_ptr().cast(),
            options_size: options.len(),
            executable: null_mut(),
        };
        let what = format!("compile {}", module.proto.name);
        self.plugin.call(Call::ClientCompile, &mut args, &what).map_err(|fault| match fault.kind {
            Kind::Memory => fault,
            _ => Fault { kind: Kind::Compile, ..fault },
        })?;
        let loaded = Arc::new(Loaded { client: self.clone(), executable: args.executable });
        loaded.check_outputs(module.outputs.len(), &what)?;
        compiled.retain(|_, loaded| loaded.strong_count() > 0);
        compiled.insert(key, Arc::downgrade(&loaded));
        Ok(loaded)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.plugin.free(Call::ClientDestroy, self.client);
    }
}

/// A compiled module, on the device.
struct Loaded {
    client: Arc<Client>,
    executable: *mut LoadedExecutable,
}

// SAFETY: as for `Client`.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Outputs are written into a list of our own, so their number has to be right.
    fn check_outputs(&self, expected: usize, what: &str) -> Result<(), Fault> {
        let plugin = &self.client.plugin;
        let get = Call::LoadedExecutableGetExecutable;
        let executable = plugin.get(get, self.executable, null_mut::<Executable>())?;
        let found = plugin.get(Call::ExecutableNumOutputs, executable, 0usize);
        plugin.free(Call::ExecutableDestroy, executable);
        let found = found?;
        if found != expected {
            let why = format!("cannot {what}: it gives {found} arrays instead of {expected}");
            return Err(Fault::new(Kind::Compile, why, "use a plugin of another version"));
        }
        Ok(())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.client.plugin.free(Call::LoadedExecutableDestroy, self.executable);
    }
}

/// An array on a device.
struct Array {
    client: Arc<Client>,
    buffer: *mut Buffer,
}

// SAFETY: as for `Client`.
unsafe impl Send for Array {}

impl Drop for Array {
    fn drop(&mut self) {
        self.client.plugin.free(Call::BufferDestroy, self.buffer);
    }
}

/// A module as this rank runs it.
struct Ready {
    name: String,
    loaded: Arc<Loaded>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

/// One device of a [`Client`], as a rank of its own. Calls return before the device is done; reading waits.
pub struct PjrtDevice {
    client: Arc<Client>,
    rank: usize,
    ranks: usize,
    arrays: HashMap<String, (Shape, Array)>,
    programs: Vec<Ready>,
    /// Number of the next run, which all ranks count alike: the plugin brings runs of one number together.
    launches: c_int,
}

impl PjrtDevice {
    fn device(&self) -> *mut api::Device {
        self.client.devices[self.rank]
    }
}

// SAFETY: as for `Client`.
unsafe impl Send for PjrtDevice {}

impl Driver for PjrtDevice {
    fn describe(&self) -> String {
        self.client.describe(self.rank).unwrap_or_else(|fault| fault.to_string())
    }

    fn prepare(&mut self, module: &Module) -> Result<String, Fault> {
        // Ranks of a client are threads of one program, and the first that loads the module compiles it for all.
        Ok(module.proto.name.clone())
    }

    fn load(&mut self, module: &Module) -> Result<Program, Fault> {
        let loaded = self.client.compile(module, self.ranks)?;
        let Module { proto, inputs, outputs, .. } = module;
        let (name, inputs, outputs) = (proto.name.clone(), inputs.clone(), outputs.clone());
        self.programs.push(Ready { name, loaded, inputs, outputs });
        Ok(Program(self.programs.len() - 1))
    }

    fn write(&mut self, name: &str, shape: &Shape, value: &Literal) -> Result<(), Fault> {
        let bytes = value.to_bytes();
        assert_eq!(bytes.len(), shape.bytes(), "value of {name}");
        let dims: Vec<i64> = shape.dims.iter().map(|&d| d as i64).collect();
        let mut args = BufferFromHost {
            head: Head::of::<BufferFromHost>(),
            client: self.client.client,
            data: bytes.as_ptr().cast(),
            ty: element_type(shape.ty),
            dims: dims.as_ptr(),
            num_dims: dims.len(),
            strides: null(),
            num_strides: 0,
            semantics: 0,
            device: self.device(),
            memory: null_mut(),
            layout: null_mut(),
            done: null_mut(),
            buffer: null_mut(),
        };
        // The old value makes room first.
        self.arrays.remove(name);
        let what = format!("put {name} on the device");
        self.client.plugin.call(Call::ClientBufferFromHostBuffer, &mut args, &what)?;
        let array = Array { client: self.client.clone(), buffer: args.buffer };
        self.client.plugin.wait(args.done, &what)?;
        self.arrays.insert(name.to_owned(), (shape.clone(), array));
        Ok(())
    }

    fn read(&mut self, name: &str) -> Result<Literal, Fault> {
        let Some((shape, array)) = self.arrays.get(name) else {
            return Err(Fault::ours(format!("there is no array {name} on the device")));
        };
        let mut bytes = vec![0; shape.bytes()];
        let mut args = ToHost {
            head: Head::of::<ToHost>(),
            buffer: array.buffer,
            layout: null_mut(),
            to: bytes.as_mut_ptr().cast::<c_void>(),
            size: bytes.len(),
            event: null_mut(),
        };
        let what = format!("read {name} from the device");
        self.client.plugin.call(Call::BufferToHostBuffer, &mut args, &what)?;
        self.client.plugin.wait(args.event, &what)?;
        Ok(Literal::from_bytes(shape.ty, &bytes))
    }

    fn run(&mut self, program: Program) -> Result<(), Fault> {
        let Ready { name, loaded, inputs, outputs } = &self.programs[program.0];
        let arguments: Vec<*mut Buffer> = inputs
            .iter()
            .map(|port| input(&self.arrays, name, port).map(|array| array.buffer))
            .collect::<Result<_, _>>()?;
        let mut results = vec![null_mut::<Buffer>(); outputs.len()];
        self.launches = self.launches.wrapping_add(1).max(1);
        let mut options = ExecuteOptions {
            head: Head::of::<ExecuteOptions>(),
            callbacks: [null_mut(); 2],
            callback_counts: [0; 2],
            launch: self.launches,
            not_donated: null(),
            not_donated_count: 0,
            context: null_mut(),
            location: null(),
            task_count: 0,
            tasks: [null_mut(); 2],
        };
        let (arguments, outputs_list) = ([arguments.as_ptr()], [results.as_mut_ptr()]);
        let mut args = Execute {
            head: Head::of::<Execute>(),
            executable: loaded.executable,
            options: &mut options,
            arguments: arguments.as_ptr(),
            device_count: 1,
            argument_count: inputs.len(),
            outputs: outputs_list.as_ptr(),
            events: null_mut(),
            device: if self.ranks > 1 { self.device() } else { null_mut() },
        };
        self.client.plugin.call(Call::LoadedExecutableExecute, &mut args, &format!("run {name}"))?;
        let results: Vec<Array> =
            results.into_iter().map(|buffer| Array { client: self.client.clone(), buffer }).collect();
        // Where an output has taken over the memory of an input, that one's old handle goes here.
        for (port, array) in outputs.iter().zip(results) {
            self.arrays.insert(array_name(port).to_owned(), (port.shape.clone(), array));
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.arrays.clear();
        self.programs.clear();
    }
}

fn element_type(ty: Type) -> c_int {
    match ty {
        Type::F32 => element::F32,
        Type::Bf16 => element::BF16,
        Type::S32 => element::S32,
        Type::Pred => element::PRED,
    }
}

/// Options for one replica on each of these devices.
fn compile_options(devices: Vec<i64>) -> Vec<u8> {
    let replicas = devices.len() as i64;
    let assignment = DeviceAssignmentProto {
        replica_count: replicas as i32,
        computation_count: 1,
        computation_devices: vec![ComputationDeviceProto { replica_device_ids: devices }],
    };
    let build = ExecutableBuildOptionsProto {
        num_replicas: replicas,
        num_partitions: 1,
        device_assignment: Some(assignment),
    };
    CompileOptionsProto { executable_build_options: Some(build) }.encode_to_vec()
}

/// The part of XLA's messages of these names that Elapid writes; field numbers are theirs.
#[derive(Clone, PartialEq, prost::Message)]
struct CompileOptionsProto {
    #[prost(message, optional, tag = "3")]
    executable_build_options: Option<ExecutableBuildOptionsProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecutableBuildOptionsProto {
    #[prost(int64, tag = "4")]
    num_replicas: i64,
    #[prost(int64, tag = "5")]
    num_partitions: i64,
    #[prost(message, optional, tag = "9")]
    device_assignment: Option<DeviceAssignmentProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DeviceAssignmentProto {
    #[prost(int32, tag = "1")]
    replica_count: i32,
    #[prost(int32, tag = "2")]
    computation_count: i32,
    #[prost(message, repeated, tag = "3")]
    computation_devices: Vec<ComputationDeviceProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ComputationDeviceProto {
    #[prost(int64, repeated, tag = "1")]
    replica_device_ids: Vec<i64>,
}
