//! The pickles of `torch.save`, read as data.
//!
//! A pickle is a program for a small stack machine that may call any function of Python. This machine knows the
//! instructions and the few names of which a dictionary of tensors is made; it refuses everything else by name and never
//! calls anything. Format: the comments of Python's `pickletools`.

use std::collections::HashMap;

/// Most values that a pickle may make. A model of ten thousand tensors makes some 200,000.
const MAX_VALUES: usize = 1 << 20;

/// A stretch of numbers in a file of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    /// Such as `FloatStorage`.
    pub(super) kind: String,
    /// Name of the file.
    pub(super) key: String,
    /// Number of elements.
    pub(super) elements: u64,
}

/// A strided view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    /// First element.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// In elements.
    pub(super) strides: Vec<usize>,
}

/// Place of a value in [`Machine::values`]: values refer to each other by it, so that none is copied, nested without
/// end or dropped recursively, whatever the program does.
type Id = usize;

#[derive(Clone, Debug)]
enum Value {
    None,
    Bool,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Box<Storage>),
    Tensor(Box<Tensor>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a bool",
            Self::Int(_) => "a number",
            Self::Text(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dict",
            Self::Global(_) => "a function",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// The names that a dictionary of tensors needs.
#[derive(Clone, Debug)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(String),
}

/// Element types of torch that have a storage class of their own.
const STORAGES: [&str; 10] = [
    "FloatStorage",
    "HalfStorage",
    "BFloat16Storage",
    "DoubleStorage",
    "LongStorage",
    "IntStorage",
    "ShortStorage",
    "CharStorage",
    "ByteStorage",
    "BoolStorage",
];

fn global(module: &str, name: &str) -> Result<Global, String> {
    match (module, name) {
        ("collections", "OrderedDict") => Ok(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
        ("torch", kind) if STORAGES.contains(&kind) => Ok(Global::Storage(kind.to_owned())),
        _ => Err(format!("refers to {module}.{name}, which is no part of a dictionary of tensors")),
    }
}

/// The tensors of a pickled dictionary, by name. One more dictionary around it is taken off, where it has this single
/// entry, such as `model` or `state_dict`.
///
/// # Errors
/// The first instruction or name that has no place in such a dictionary, or what is wrong with a value; said so that
/// `the pickle` can stand before it.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let top = machine.run()?;
    let Value::Dict(mut entries) = machine.values[top].clone() else {
        return Err(format!("holds {} instead of a dictionary of tensors", machine.values[top].kind()));
    };
    if let [(_, only)] = entries[..]
        && let Value::Dict(inner) = &machine.values[only]
    {
        entries = inner.clone();
    }
    let mut tensors = HashMap::new();
    let mut names = Vec::new();
    for (key, value) in entries {
        let Value::Text(name) = &machine.values[key] else {
            return Err(format!("has {} as a key", machine.values[key].kind()));
        };
        let Value::Tensor(tensor) = &machine.values[value] else {
            return Err(format!("holds {} as {name:?} instead of a tensor", machine.values[value].kind()));
        };
        if tensors.insert(name.clone(), (**tensor).clone()).is_some() {
            return Err(format!("holds {name:?} twice"));
        }
        names.push(name.clone());
    }
    Ok(names.into_iter().map(|name| tensors.remove_entry(&name).expect("put there above")).collect())
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let at = self.at;
            let [opcode] = self.fixed()?;
            match opcode {
                0x80 => {
                    let [protocol] = self.fixed()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(format!("has protocol {protocol}"));
                    }
                }
                0x95 => drop(self.fixed::<8>()?), // FRAME: its length says nothing new.
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Value::None)?,
                0x88 | 0x89 => self.push(Value::Bool)?,
                b'K' => {
                    let [value] = self.fixed()?;
                    self.push(Value::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.fixed()?);
                    self.push(Value::Int(value.into()))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.fixed()?);
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => {
                    let [length] = self.fixed()?;
                    let digits = self.take(length.into())?;
                    if digits.len() > 8 {
                        return Err(format!("holds a number of {length} bytes"));
                    }
                    let negative = digits.last().is_some_and(|byte| byte & 0x80 != 0);
                    let mut value = [if negative { 0xff } else { 0 }; 8];
                    value[..digits.len()].copy_from_slice(digits);
                    self.push(Value::Int(i64::from_le_bytes(value)))?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.fixed()?);
                    self.text(length as usize)?;
                }
                0x8c => {
                    let [length] = self.fixed()?;
                    self.text(length.into())?;
                }
                b'q' => {
                    let [place] = self.fixed()?;
                    self.remember(place.into())?;
                }
                b'r' => {
                    let place = u32::from_le_bytes(self.fixed()?);
                    self.remember(place)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let [place] = self.fixed()?;
                    self.recall(place.into())?;
                }
                b'j' => {
                    let place = u32::from_le_bytes(self.fixed()?);
                    self.recall(place)?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let first = self.stack.len().checked_sub((opcode - 0x84).into());
                    let items = self.stack.split_off(first.ok_or("takes from an empty stack")?);
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set_items(&items)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global(global(module, name)?))?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(module), Value::Text(name)) = (&self.values[module], &self.values[name])
                    else {
                        return Err("refers to something that is no name".into());
                    };
                    let found = global(module, name)?;
                    self.push(Value::Global(found))?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(Value::Storage(Box::new(storage)))?;
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let value = self.call(function, arguments)?;
                    self.push(value)?;
                }
                b'b' => {
                    let state = self.pop()?;
                    self.build(state)?;
                }
                _ => {
                    return Err(format!(
                        "has the instruction {} (0x{opcode:02x}) at byte {at}, which no dictionary of tensors needs",
                        instruction(opcode)
                    ));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let taken = self.bytes[self.at..].get(..count).ok_or("is cut off")?;
        self.at += count;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("N bytes"))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.bytes[self.at..].iter().position(|byte| *byte == b'\n').ok_or("is cut off")?;
        let line = self.take(end)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|_| "has a name that is not UTF-8".into())
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "has a string that is not UTF-8")?;
        self.push(Value::Text(text.to_owned()))
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.values.len() == MAX_VALUES {
            return Err(format!("makes more than {MAX_VALUES} values"));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        // What lies below a mark is not to be taken before the mark is.
        let bottom = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= bottom {
            return Err("takes from an empty stack".into());
        }
        Ok(self.stack.pop().expect("higher than its bottom"))
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("has no mark where it needs one")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn remember(&mut self, place: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or("remembers what is not there")?;
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Result<(), String> {
        let id = *self.memo.get(&place).ok_or("recalls what it did not remember")?;
        self.stack.push(id);
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let dict = *self.stack.last().ok_or("takes from an empty stack")?;
        let Value::Dict(entries) = &mut self.values[dict] else {
            return Err(format!("puts entries into {}", self.values[dict].kind()));
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("has a key without a value".into());
        }
        entries.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    /// What `('storage', class, key, location, elements)` stands for.
    fn storage(&self, id: Id) -> Result<Storage, String> {
        let fault = || "refers to something outside of it that is no storage".to_owned();
        let Value::Tuple(items) = &self.values[id] else { return Err(fault()) };
        let [tag, class, key, _location, elements] = items[..] else { return Err(fault()) };
        match (&self.values[tag], &self.values[class], &self.values[key], &self.values[elements]) {
            (
                Value::Text(tag),
                Value::Global(Global::Storage(kind)),
                Value::Text(key),
                Value::Int(elements),
            ) if tag == "storage" && *elements >= 0 => {
                Ok(Storage { kind: kind.clone(), key: key.clone(), elements: elements.unsigned_abs() })
            }
            _ => Err(fault()),
        }
    }

    fn call(&self, function: Id, arguments: Id) -> Result<Value, String> {
        let Value::Global(function) = &self.values[function] else {
            return Err(format!("calls {}", self.values[function].kind()));
        };
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return Err("calls a function without its arguments".into());
        };
        let fault = || Err(format!("calls {function:?} with unknown arguments"));
        match (function, &arguments[..]) {
            (Global::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
            (Global::RebuildTensor, [storage, offset, shape, strides, _requires_grad, hooks]) => {
                let (Value::Storage(storage), Value::Int(offset)) =
                    (&self.values[*storage], &self.values[*offset])
                else {
                    return fault();
                };
                self.no_hooks(*hooks)?;
                let offset =
                    usize::try_from(*offset).map_err(|_| format!("has a tensor at element {offset}"))?;
                let (shape, strides) = (self.extents(*shape)?, self.extents(*strides)?);
                if shape.len() != strides.len() {
                    return fault();
                }
                let storage = (**storage).clone();
                Ok(Value::Tensor(Box::new(Tensor { storage, offset, shape, strides })))
            }
            (Global::RebuildParameter, [tensor, _requires_grad, hooks]) => {
                self.no_hooks(*hooks)?;
                match &self.values[*tensor] {
                    tensor @ Value::Tensor(_) => Ok(tensor.clone()),
                    _ => fault(),
                }
            }
            _ => fault(),
        }
    }

    fn no_hooks(&self, id: Id) -> Result<(), String> {
        match &self.values[id] {
            Value::Dict(hooks) if hooks.is_empty() => Ok(()),
            _ => Err("has a tensor with hooks".into()),
        }
    }

    fn extents(&self, id: Id) -> Result<Vec<usize>, String> {
        let Value::Tuple(items) = &self.values[id] else { return Err("has a tensor without extents".into()) };
        if items.len() > 8 {
            return Err(format!("has a tensor of {} axes", items.len()));
        }
        let extent = |id: &Id| match &self.values[*id] {
            Value::Int(extent) => {
                usize::try_from(*extent).map_err(|_| format!("has a tensor of extent {extent}"))
            }
            _ => Err("has a tensor without extents".to_owned()),
        };
        items.iter().map(extent).collect()
    }

    /// Attributes of the value on top of the stack. `_metadata` is the versions of torch's modules, and is left out.
    fn build(&self, state: Id) -> Result<(), String> {
        let target = *self.stack.last().ok_or("takes from an empty stack")?;
        let (Value::Dict(_), Value::Dict(state)) = (&self.values[target], &self.values[state]) else {
            return Err(format!("gives attributes to {}", self.values[target].kind()));
        };
        for (key, _) in state {
            match &self.values[*key] {
                Value::Text(name) if name == "_metadata" => {}
                Value::Text(name) => return Err(format!("gives a dict the attribute {name:?}")),
                _ => return Err("gives a dict an attribute without a name".into()),
            }
        }
        Ok(())
    }
}

/// What Python calls an instruction that is refused.
fn instruction(opcode: u8) -> &'static str {
    match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        0x82..=0x84 => "EXT",
        b'P' => "PERSID",
        b']' => "EMPTY_LIST",
        b'l' => "LIST",
        b'a' => "APPEND",
        b'e' => "APPENDS",
        b'd' => "DICT",
        b'0' => "POP",
        b'1' => "POP_MARK",
        b'2' => "DUP",
        b'F' => "FLOAT",
        b'G' => "BINFLOAT",
        b'I' => "INT",
        b'L' => "LONG",
        0x8b => "LONG4",
        b'S' => "STRING",
        b'T' => "BINSTRING",
        b'U' => "SHORT_BINSTRING",
        b'V' => "UNICODE",
        b'B' | b'C' | 0x8e => "BINBYTES",
        0x8d => "BINUNICODE8",
        0x8f..=0x91 => "SET",
        0x96..=0x98 => "BUFFER",
        b'p' => "PUT",
        b'g' => "GET",
        _ => "of no name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `OrderedDict(name=tensor of shape (2,))`, with `middle` in the place of the tensor's entry.
    fn program(middle: &[u8]) -> Vec<u8> {
        [b"\x80\x02ccollections\nOrderedDict\n)R(", middle, b"u."].concat()
    }

    fn entry(name: &str) -> Vec<u8> {
        let mut bytes = vec![b'X'];
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n");
        bytes.extend(b"X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQK\0K\x02\x85K\x01\x85\x89}tR");
        bytes
    }

    #[test]
    fn a_dictionary_of_tensors() {
        let found = read(&program(&[entry("a"), entry("b")].concat())).unwrap();
        let storage = Storage { kind: "FloatStorage".into(), key: "0".into(), elements: 2 };
        let tensor = Tensor { storage, offset: 0, shape: vec![2], strides: vec![1] };
        assert_eq!(found, [("a".to_owned(), tensor.clone()), ("b".to_owned(), tensor)]);
    }

    #[test]
    fn whatever_could_run_code_is_refused_by_name() {
        for (program, expected) in [
            (&b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R."[..], "refers to os.system"),
            (b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.", "refers to posix.system"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "refers to builtins.eval"),
            (b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.", "refers to torch.nn.modules.linear.Linear"),
            (
                b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n.",
                "_rebuild_device_tensor_from_numpy",
            ),
            (b"\x80\x02(S'true'\nios\nsystem\n.", "STRING (0x53) at byte 3"),
            (b"\x80\x02(ios\nsystem\n.", "INST (0x69)"),
            (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ (0x81)"),
            (b"\x80\x02\x82\x01.", "EXT (0x82)"),
            (b"\x80\x02Pid\n.", "PERSID"),
            (b"\x80\x02].", "EMPTY_LIST"),
            (b"\x80\x02}}X\x09\0\0\0__class__NsbN.", "the attribute \"__class__\""),
            (b"\x80\x02ccollections\nOrderedDict\n(N\x85tR.", "with unknown arguments"),
        ] {
            let error = read(program).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn broken_programs_are_errors() {
        let whole = program(&entry("a"));
        for cut in 0..whole.len() {
            read(&whole[..cut]).unwrap_err();
        }
        for (program, expected) in [
            (&b"\x80\x02."[..], "empty stack"),
            (b"\x80\x02\x87.", "empty stack"),
            (b"\x80\x02t.", "no mark"),
            (b"\x80\x02h\0.", "did not remember"),
            (b"\x80\x02q\0.", "remembers"),
            (b"\x80\x02N.", "holds None"),
            (b"\x80\x02}NNs.", "None as a key"),
            (b"\x80\x02}X\x01\0\0\0aK\x05s.", "a number as \"a\""),
            (b"\x80\x02NNNs.", "puts entries into None"),
            (b"\x80\x02}(Nu.", "a key without"),
            (b"\x80\x02}(s.", "empty stack"),
            (b"\x80\x09}.", "protocol 9"),
            (b"\x80\x02X\xff\xff\xff\xffa.", "cut off"),
            (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
            (b"\x80\x02\x8a\x09\0\0\0\0\0\0\0\0\0.", "9 bytes"),
        ] {
            let error = read(program).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        assert!(read(&program(&[entry("a"), entry("a")].concat())).unwrap_err().contains("\"a\" twice"));
    }

    /// Each of these would be large, deep or endless if values held each other.
    #[test]
    fn programs_that_grow_are_bounded() {
        let nested = [&b"\x80\x02)"[..], &b"\x85".repeat(MAX_VALUES + 1), b"."].concat();
        assert!(read(&nested).unwrap_err().contains("more than"));
        let mut laughs = b"\x80\x02)q\0".to_vec();
        (0..100).for_each(|_| laughs.extend(b"h\0h\0h\0\x87q\0"));
        assert!(read(&laughs).unwrap_err().contains("cut off"));
        // A dictionary that is its own only entry.
        assert!(read(b"\x80\x02}q\0X\x01\0\0\0ah\0s.").unwrap_err().contains("a dict as \"a\""));
    }
}
