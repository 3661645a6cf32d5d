//! The public functions of `libnrt.so.1`, on the evaluator.
//!
//! A compiled module is the word `SIMULATED` and the module itself. Variables of the environment make it fail:
//! `ELAPID_SIM_VERSION` is the major version it claims, `ELAPID_SIM_MEMORY` how many bytes of tensors it has room for.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use elapid_xla::proto::{HloInstructionProto, HloModuleProto};
use elapid_xla::{Shape, Type};
use prost::Message;

use crate::array::{Array, Data};
use crate::eval::{Alone, evaluate};
use crate::world::World;

const MAGIC: &[u8] = b"SIMULATED";

const SUCCESS: c_int = 0;
const FAILURE: c_int = 1;
const INVALID: c_int = 2;
const RESOURCE: c_int = 4;
const TIMEOUT: c_int = 5;
const UNSUPPORTED: c_int = 10;
const UNINITIALIZED: c_int = 13;
const BAD_INPUT: c_int = 1002;
const NOT_FINITE: c_int = 1003;

static STARTED: AtomicBool = AtomicBool::new(false);
static USED: AtomicUsize = AtomicUsize::new(0);
static WORLD: Mutex<Option<World>> = Mutex::new(None);

fn variable(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

struct Port {
    name: String,
    shape: Shape,
}

struct Model {
    module: HloModuleProto,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    ranks: u32,
}

struct Tensor(Vec<u8>);

type Set = HashMap<String, *mut Tensor>;

#[repr(C)]
struct Version {
    numbers: [u64; 4],
    detail: [c_char; 128],
    hash: [c_char; 64],
}

#[repr(C)]
struct TensorInfo {
    name: [u8; 256],
    usage: c_int,
    size: usize,
    dtype: c_int,
    shape: *mut u32,
    rank: u32,
}

fn shapes(proto: &elapid_xla::proto::ShapeProto) -> Vec<Shape> {
    let one = |proto: &elapid_xla::proto::ShapeProto| {
        use elapid_xla::proto::primitive;
        let ty = match proto.element_type {
            primitive::BF16 => Type::Bf16,
            primitive::S32 => Type::S32,
            primitive::PRED => Type::Pred,
            _ => Type::F32,
        };
        Shape { ty, dims: proto.dimensions.iter().map(|&d| d as usize).collect() }
    };
    if proto.tuple_shapes.is_empty() {
        vec![one(proto)]
    } else {
        proto.tuple_shapes.iter().map(one).collect()
    }
}

fn attribute(instruction: &HloInstructionProto, key: &str) -> Option<String> {
    instruction.frontend_attributes.as_ref()?.map.get(key).cloned()
}

impl Model {
    /// None: not what the simulated compiler makes.
    fn read(bytes: &[u8], ranks: u32) -> Option<Self> {
        let module = HloModuleProto::decode(bytes.strip_prefix(MAGIC)?).ok()?;
        let entry = module.computations.iter().find(|c| c.id == module.entry_computation_id)?;
        let mut parameters: Vec<_> = entry.instructions.iter().filter(|i| i.opcode == "parameter").collect();
        parameters.sort_by_key(|i| i.parameter_number);
        let input = |i: &&HloInstructionProto| {
            let name = attribute(i, "neff_input_names")?;
            Some(Port { name, shape: shapes(i.shape.as_ref()?).remove(0) })
        };
        let inputs = parameters.iter().map(input).collect::<Option<_>>()?;
        let root = entry.instructions.iter().find(|i| i.id == entry.root_id)?;
        let names = attribute(root, "neff_output_names")?;
        let outputs = names.split(',').zip(shapes(root.shape.as_ref()?));
        let outputs = outputs.map(|(name, shape)| Port { name: name.to_owned(), shape }).collect();
        Some(Self { inputs, outputs, ranks, module })
    }

    fn run(&self, inputs: &Set, outputs: &Set) -> c_int {
        // SAFETY: whoever binds tensors keeps them until the set is destroyed.
        let bytes =
            |set: &Set, port: &Port| set.get(&port.name).map(|&tensor| unsafe { (*tensor).0.clone() });
        let mut arrays = Vec::new();
        for port in &self.inputs {
            match bytes(inputs, port) {
                Some(bytes) if bytes.len() == port.shape.bytes() => {
                    arrays.push(Array::from_bytes(port.shape.clone(), &bytes));
                }
                _ => return BAD_INPUT,
            }
        }
        for port in &self.outputs {
            let bound = outputs.get(&port.name);
            let fits = bytes(outputs, port).is_some_and(|bytes| bytes.len() == port.shape.bytes());
            // What is updated in place is one tensor on both sides.
            let in_place = port.name.ends_with(".must_alias_input");
            if !fits || in_place && inputs.get(&port.name) != bound {
                return BAD_INPUT;
            }
        }
        let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
        let results = match (&mut *world, self.ranks) {
            (_, 1) => evaluate(&self.module, arrays, &mut Alone),
            (Some(world), _) => evaluate(&self.module, arrays, world),
            (None, _) => return FAILURE,
        };
        let results = match results {
            Ok(results) => results,
            Err(why) => {
                eprintln!("simulated runtime: {}: {why}", self.module.name);
                return if why.contains("rank") { TIMEOUT } else { FAILURE };
            }
        };
        let mut status = SUCCESS;
        for (port, array) in self.outputs.iter().zip(results) {
            if matches!(&array.data, Data::Floats(values) if values.iter().any(|x| x.is_nan())) {
                status = NOT_FINITE;
            }
            // SAFETY: as above; its size was compared.
            unsafe { (*outputs[&port.name]).0 = array.to_bytes() };
        }
        status
    }
}

/// # Safety
/// As the public header says, here and below: pointers are null or valid, handles come from this library.
#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_init(framework: c_int, _: *const c_char, _: *const c_char) -> c_int {
    STARTED.store(true, Ordering::SeqCst);
    if framework == 1 { SUCCESS } else { INVALID }
}

#[unsafe(no_mangle)]
extern "C" fn nrt_close() {
    STARTED.store(false, Ordering::SeqCst);
    *WORLD.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_get_version(version: *mut Version, size: usize) -> c_int {
    if version.is_null() || size < size_of::<Version>() {
        return INVALID;
    }
    let major = variable("ELAPID_SIM_VERSION").unwrap_or(2) as u64;
    // SAFETY: the caller says that it is as large as the struct.
    unsafe { (*version).numbers = [major, 99, 0, 0] };
    SUCCESS
}

unsafe fn load(neff: *const c_void, size: usize, ranks: u32, model: *mut *mut Model) -> c_int {
    if !STARTED.load(Ordering::SeqCst) {
        return UNINITIALIZED;
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(neff.cast::<u8>(), size) };
    let Some(read) = Model::read(bytes, ranks) else { return UNSUPPORTED };
    // SAFETY: the caller's promise.
    unsafe { *model = Box::into_raw(Box::new(read)) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_load(
    neff: *const c_void,
    size: usize,
    _: i32,
    _: i32,
    model: *mut *mut Model,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { load(neff, size, 1, model) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_load_collectives(
    neff: *const c_void,
    size: usize,
    _: i32,
    _: i32,
    rank: u32,
    ranks: u32,
    model: *mut *mut Model,
) -> c_int {
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    if world.is_none() {
        match World::meet(rank as usize, ranks as usize) {
            Ok(met) => *world = Some(met),
            Err(why) => {
                eprintln!("simulated runtime: {why}");
                return FAILURE;
            }
        }
    }
    drop(world);
    // SAFETY: the caller's promise.
    unsafe { load(neff, size, ranks, model) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_unload(model: *mut Model) -> c_int {
    // SAFETY: made by `load`, and not used any more.
    drop(unsafe { Box::from_raw(model) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_get_model_tensor_info(model: *mut Model, infos: *mut *mut u64) -> c_int {
    // SAFETY: made by `load`.
    let model = unsafe { &*model };
    let ports: Vec<_> = [(&model.inputs, 0), (&model.outputs, 1)]
        .into_iter()
        .flat_map(|(ports, usage)| ports.iter().map(move |port| (port, usage)))
        .collect();
    let info = |(port, usage): &(&Port, c_int)| {
        let mut name = [0; 256];
        let bytes = &port.name.as_bytes()[..port.name.len().min(255)];
        name[..bytes.len()].copy_from_slice(bytes);
        TensorInfo { name, usage: *usage, size: port.shape.bytes(), dtype: 0, shape: null_mut(), rank: 0 }
    };
    // The count stands in the eight bytes before the first.
    let words = 1 + ports.len() * size_of::<TensorInfo>() / 8;
    let list = Box::leak(vec![0u64; words].into_boxed_slice());
    list[0] = ports.len() as u64;
    let first = list[1..].as_mut_ptr().cast::<TensorInfo>();
    for (place, port) in ports.iter().enumerate() {
        // SAFETY: there is room for so many, and words are aligned as the struct is.
        unsafe { first.add(place).write(info(port)) };
    }
    // SAFETY: the caller's promise.
    unsafe { *infos = list.as_mut_ptr() };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_free_model_tensor_info(infos: *mut u64) -> c_int {
    // SAFETY: made above, with as many words as the count says.
    unsafe {
        let words = 1 + *infos as usize * size_of::<TensorInfo>() / 8;
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(infos, words)));
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_tensor_allocate(
    _: c_int,
    _: c_int,
    size: usize,
    _: *const c_char,
    tensor: *mut *mut Tensor,
) -> c_int {
    if variable("ELAPID_SIM_MEMORY").is_some_and(|room| USED.load(Ordering::SeqCst) + size > room) {
        return RESOURCE;
    }
    USED.fetch_add(size, Ordering::SeqCst);
    // New memory of a device holds anything.
    // SAFETY: the caller's promise.
    unsafe { *tensor = Box::into_raw(Box::new(Tensor(vec![0xff; size]))) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_tensor_free(tensor: *mut *mut Tensor) {
    // SAFETY: made above, and not used any more.
    let freed = unsafe { Box::from_raw(std::mem::replace(&mut *tensor, null_mut())) };
    USED.fetch_sub(freed.0.len(), Ordering::SeqCst);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_tensor_read(
    tensor: *const Tensor,
    to: *mut c_void,
    offset: usize,
    size: usize,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        let whole = &(*tensor).0;
        let Some(bytes) = whole.get(offset..offset + size) else { return INVALID };
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), size);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_tensor_write(
    tensor: *mut Tensor,
    from: *const c_void,
    offset: usize,
    size: usize,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        let whole = &mut (*tensor).0;
        let Some(bytes) = whole.get_mut(offset..offset + size) else { return INVALID };
        std::ptr::copy_nonoverlapping(from.cast(), bytes.as_mut_ptr(), size);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_allocate_tensor_set(set: *mut *mut Set) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { *set = Box::into_raw(Box::default()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_destroy_tensor_set(set: *mut *mut Set) {
    // SAFETY: made above, and not used any more.
    drop(unsafe { Box::from_raw(std::mem::replace(&mut *set, null_mut())) });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_add_tensor_to_tensor_set(
    set: *mut Set,
    name: *const c_char,
    tensor: *mut Tensor,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { (*set).insert(CStr::from_ptr(name).to_string_lossy().into_owned(), tensor) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nrt_execute(model: *mut Model, inputs: *const Set, outputs: *mut Set) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { (*model).run(&*inputs, &*outputs) }
}
