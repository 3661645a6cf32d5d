//! What a module computes, instruction by instruction, in the plainest way.

use std::collections::HashMap;
use std::sync::Arc;

use elapid_xla::proto::{HloComputationProto, HloInstructionProto, HloModuleProto, ShapeProto, primitive};
use elapid_xla::{Shape, Type};

use crate::array::{Array, Data, each_kind, strides, walk};

/// What ranks give each other.
pub trait Exchange {
    /// This rank's number.
    fn rank(&self) -> usize;

    /// The bytes of every rank, by number.
    ///
    /// # Errors
    /// A rank is gone or late.
    fn gather(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, String>;
}

/// One rank.
pub struct Alone;

impl Exchange for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn gather(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, String> {
        Ok(vec![own])
    }
}

#[derive(Clone)]
enum Value {
    Array(Arc<Array>),
    Tuple(Vec<Value>),
}

impl Value {
    fn array(&self) -> Result<&Array, String> {
        match self {
            Self::Array(array) => Ok(array),
            Self::Tuple(_) => Err("a tuple where an array belongs".into()),
        }
    }
}

/// The outputs of `module` for `inputs`.
///
/// # Errors
/// An instruction that is not known here or does not fit its operands; a rank that is gone.
pub fn evaluate(
    module: &HloModuleProto,
    inputs: Vec<Array>,
    exchange: &mut dyn Exchange,
) -> Result<Vec<Array>, String> {
    let computations = module.computations.iter().map(|computation| (computation.id, computation)).collect();
    let mut evaluator = Evaluator { computations, exchange };
    let inputs: Vec<Value> = inputs.into_iter().map(|array| Value::Array(Arc::new(array))).collect();
    let results = match evaluator.call(module.entry_computation_id, &inputs)? {
        Value::Tuple(parts) => parts,
        one => vec![one],
    };
    drop(inputs);
    let array = |value| match value {
        Value::Array(array) => Ok(Arc::unwrap_or_clone(array)),
        Value::Tuple(_) => Err("a tuple inside of the result".to_owned()),
    };
    results.into_iter().map(array).collect()
}

struct Evaluator<'m> {
    computations: HashMap<i64, &'m HloComputationProto>,
    exchange: &'m mut dyn Exchange,
}

fn shape_of(proto: &ShapeProto) -> Result<Shape, String> {
    let ty = match proto.element_type {
        primitive::F32 => Type::F32,
        primitive::BF16 => Type::Bf16,
        primitive::S32 => Type::S32,
        primitive::PRED => Type::Pred,
        other => return Err(format!("element type {other}")),
    };
    Ok(Shape { ty, dims: proto.dimensions.iter().map(|&d| d as usize).collect() })
}

impl Evaluator<'_> {
    fn call(&mut self, id: i64, arguments: &[Value]) -> Result<Value, String> {
        let computation = *self.computations.get(&id).ok_or(format!("there is no computation {id}"))?;
        // Who uses a value last lets it go.
        let mut last = HashMap::new();
        for (place, instruction) in computation.instructions.iter().enumerate() {
            instruction.operand_ids.iter().for_each(|id| _ = last.insert(*id, place));
        }
        last.insert(computation.root_id, usize::MAX);
        let mut values: HashMap<i64, Value> = HashMap::new();
        for (place, instruction) in computation.instructions.iter().enumerate() {
            let operands = instruction
                .operand_ids
                .iter()
                .map(|id| {
                    values
                        .get(id)
                        .cloned()
                        .ok_or(format!("{} uses {id} before it is there", instruction.name))
                })
                .collect::<Result<Vec<_>, _>>()?;
            instruction
                .operand_ids
                .iter()
                .filter(|id| last[id] == place)
                .for_each(|id| _ = values.remove(id));
            let value = self.instruction(instruction, operands, arguments).map_err(|why| {
                if why.contains(" in ") { why } else { format!("{why} in {}", instruction.name) }
            })?;
            values.insert(instruction.id, value);
        }
        values.remove(&computation.root_id).ok_or("a computation without a root".into())
    }

    fn instruction(
        &mut self,
        instruction: &HloInstructionProto,
        mut operands: Vec<Value>,
        arguments: &[Value],
    ) -> Result<Value, String> {
        let proto = instruction.shape.as_ref().ok_or("no shape")?;
        let called = &instruction.called_computation_ids;
        match instruction.opcode.as_str() {
            "parameter" => {
                let number = instruction.parameter_number as usize;
                return arguments.get(number).cloned().ok_or(format!("there is no argument {number}"));
            }
            "tuple" => return Ok(Value::Tuple(operands)),
            "opt-barrier" | "copy" => return Ok(operands.swap_remove(0)),
            "get-tuple-element" => {
                return match operands.swap_remove(0) {
                    Value::Tuple(mut parts) => Ok(parts.swap_remove(instruction.tuple_index as usize)),
                    Value::Array(_) => Err("an array where a tuple belongs".into()),
                };
            }
            "call" => return self.call(called[0], &operands),
            "while" => {
                // XLA's order: body, condition.
                let mut state = operands;
                while self.call(called[1], &state)?.array()?.data == Data::Truths(vec![true]) {
                    state = vec![self.call(called[0], &state)?];
                }
                return Ok(state.swap_remove(0));
            }
            _ => {}
        }
        let shape = shape_of(proto)?;
        let arrays = operands.iter().map(Value::array).collect::<Result<Vec<_>, _>>()?;
        let array = match instruction.opcode.as_str() {
            "all-reduce" | "all-gather" | "reduce-scatter" => {
                self.collective(instruction, shape, arrays[0])?
            }
            "reduce" => {
                let how = self.computations.get(&called[0]).and_then(|c| c.instructions.last());
                reduce(instruction, shape, arrays[0], arrays[1], &how.ok_or("nothing to reduce by")?.opcode)?
            }
            "dot" => dot(instruction, shape, arrays[0], arrays[1])?,
            "constant" | "iota" => source(instruction, shape)?,
            "broadcast"
            | "reshape"
            | "transpose"
            | "slice"
            | "dynamic-slice"
            | "dynamic-update-slice"
            | "concatenate"
            | "pad" => moved(instruction, shape, &arrays)?,
            opcode => elementwise(instruction, opcode, shape, &arrays)?,
        };
        let want: usize = array.shape.dims.iter().product();
        let have = match &array.data {
            Data::Floats(values) => values.len(),
            Data::Ints(values) => values.len(),
            Data::Truths(values) => values.len(),
        };
        if want == have {
            Ok(Value::Array(Arc::new(array)))
        } else {
            Err(format!("{have} elements for {want}"))
        }
    }

    fn collective(
        &mut self,
        instruction: &HloInstructionProto,
        shape: Shape,
        own: &Array,
    ) -> Result<Array, String> {
        let rank = self.exchange.rank() as i64;
        let groups = &instruction.replica_groups;
        let group = groups.iter().find(|g| g.replica_ids.contains(&rank)).ok_or("no group has this rank")?;
        let all = self.exchange.gather(own.to_bytes())?;
        let mut parts = Vec::new();
        for &member in &group.replica_ids {
            let bytes = all.get(member as usize).ok_or(format!("there is no rank {member}"))?;
            if bytes.len() != own.shape.bytes() {
                return Err(format!("rank {member} brings {} bytes", bytes.len()));
            }
            parts.push(Array::from_bytes(own.shape.clone(), bytes));
        }
        if instruction.opcode == "all-gather" {
            let parts: Vec<&Array> = parts.iter().collect();
            return concatenate(instruction.dimensions[0] as usize, shape, &parts);
        }
        let how = self.computations.get(&instruction.called_computation_ids[0]);
        let how = how.and_then(|c| c.instructions.last()).ok_or("nothing to reduce by")?;
        let mut parts = parts.into_iter();
        let first = parts.next().ok_or("an empty group")?;
        let sum = parts.try_fold(first, |sum, part| {
            elementwise(instruction, &how.opcode, own.shape.clone(), &[&sum, &part])
        })?;
        if instruction.opcode == "all-reduce" {
            return Ok(sum);
        }
        let axis = instruction.dimensions[0] as usize;
        let place = group.replica_ids.iter().position(|&id| id == rank).unwrap_or(0);
        let steps = strides(&sum.shape.dims);
        let from = walk(&shape.dims, &steps, place * shape.dims[axis] * steps[axis]);
        Ok(Array { data: each_kind!(&sum.data, values => pick(values, &from)), shape })
    }
}

fn pick<T: Copy>(values: &[T], from: &[usize]) -> Vec<T> {
    from.iter().map(|&i| values[i]).collect()
}

fn source(instruction: &HloInstructionProto, shape: Shape) -> Result<Array, String> {
    if instruction.opcode == "iota" {
        let axis = instruction.dimensions[0] as usize;
        let (step, extent) = (strides(&shape.dims)[axis], shape.dims[axis]);
        let values = (0..shape.elements()).map(|i| (i / step % extent) as i32);
        return Ok(match shape.ty {
            Type::S32 => Array { data: Data::Ints(values.collect()), shape },
            _ => Array::floats(shape, values.map(|x| x as f32).collect()),
        });
    }
    let literal = instruction.literal.as_ref().ok_or("a constant without a value")?;
    let data = match shape.ty {
        Type::F32 => Data::Floats(literal.f32s.clone()),
        Type::S32 => Data::Ints(literal.s32s.clone()),
        Type::Pred => Data::Truths(literal.preds.clone()),
        Type::Bf16 => return Ok(Array::from_bytes(shape, &literal.bf16s)),
    };
    Ok(Array { shape, data })
}

fn concatenate(axis: usize, shape: Shape, parts: &[&Array]) -> Result<Array, String> {
    let steps = strides(&shape.dims);
    let mut start = 0;
    let mut whole: Option<Data> = None;
    for part in parts {
        let to = walk(&part.shape.dims, &steps, start * steps[axis]);
        start += part.shape.dims[axis];
        put(&mut whole, &part.data, &to, shape.elements())?;
    }
    Ok(Array { data: whole.ok_or("nothing to concatenate")?, shape })
}

/// Writes `values` to the places `to` of `whole`, which is made where it is not there.
fn put(whole: &mut Option<Data>, values: &Data, to: &[usize], len: usize) -> Result<(), String> {
    fn copy<T: Copy>(whole: &mut [T], values: &[T], to: &[usize]) {
        to.iter().zip(values).for_each(|(&place, &x)| whole[place] = x);
    }
    let whole = whole.get_or_insert_with(|| match values {
        Data::Floats(_) => Data::Floats(vec![0.0; len]),
        Data::Ints(_) => Data::Ints(vec![0; len]),
        Data::Truths(_) => Data::Truths(vec![false; len]),
    });
    match (whole, values) {
        (Data::Floats(whole), Data::Floats(values)) => copy(whole, values, to),
        (Data::Ints(whole), Data::Ints(values)) => copy(whole, values, to),
        (Data::Truths(whole), Data::Truths(values)) => copy(whole, values, to),
        _ => return Err("elements of several types".into()),
    }
    Ok(())
}

/// The opcodes that move elements and compute nothing.
fn moved(instruction: &HloInstructionProto, shape: Shape, arrays: &[&Array]) -> Result<Array, String> {
    let from = arrays[0];
    let steps = strides(&from.shape.dims);
    let axes: Vec<usize> = instruction.dimensions.iter().map(|&d| d as usize).collect();
    // Starts are held inside, as XLA does.
    let starts = |arrays: &[&Array], extents: &[usize]| -> Vec<usize> {
        let limits = from.shape.dims.iter().zip(extents).map(|(whole, part)| (whole - part) as i64);
        arrays.iter().zip(limits).map(|(start, limit)| start.index().clamp(0, limit) as usize).collect()
    };
    let dot = |a: &[usize], b: &[usize]| a.iter().zip(b).map(|(a, b)| a * b).sum::<usize>();
    let places = match instruction.opcode.as_str() {
        "reshape" => return Ok(Array { shape, data: from.data.clone() }),
        "broadcast" => {
            let mut out = vec![0; shape.dims.len()];
            axes.iter().zip(&steps).for_each(|(&axis, &step)| out[axis] = step);
            walk(&shape.dims, &out, 0)
        }
        "transpose" => {
            let out: Vec<usize> = axes.iter().map(|&axis| steps[axis]).collect();
            walk(&shape.dims, &out, 0)
        }
        "slice" => {
            let first: Vec<usize> = instruction.slice_dimensions.iter().map(|s| s.start as usize).collect();
            let stride = instruction.slice_dimensions.iter().zip(&steps);
            let out: Vec<usize> = stride.map(|(s, step)| s.stride as usize * step).collect();
            walk(&shape.dims, &out, dot(&first, &steps))
        }
        "dynamic-slice" => walk(&shape.dims, &steps, dot(&starts(&arrays[1..], &shape.dims), &steps)),
        "dynamic-update-slice" => {
            let new = arrays[1];
            let to = walk(&new.shape.dims, &steps, dot(&starts(&arrays[2..], &new.shape.dims), &steps));
            let mut whole = Some(from.data.clone());
            put(&mut whole, &new.data, &to, shape.elements())?;
            return Ok(Array { data: whole.ok_or("nothing")?, shape });
        }
        "concatenate" => return concatenate(axes[0], shape, arrays),
        _ => {
            let padding = instruction.padding_config.as_ref().ok_or("a pad without its extents")?;
            if padding
                .dimensions
                .iter()
                .any(|d| d.interior_padding != 0 || d.edge_padding_low < 0 || d.edge_padding_high < 0)
            {
                return Err("only padding at the edges".into());
            }
            let low: Vec<usize> = padding.dimensions.iter().map(|d| d.edge_padding_low as usize).collect();
            let out = strides(&shape.dims);
            let to = walk(&from.shape.dims, &out, dot(&low, &out));
            let filler = vec![0; shape.elements()];
            let mut whole = Some(each_kind!(&arrays[1].data, values => pick(values, &filler)));
            put(&mut whole, &from.data, &to, shape.elements())?;
            return Ok(Array { data: whole.ok_or("nothing")?, shape });
        }
    };
    Ok(Array { data: each_kind!(&from.data, values => pick(values, &places)), shape })
}

fn reduce(
    instruction: &HloInstructionProto,
    shape: Shape,
    from: &Array,
    first: &Array,
    how: &str,
) -> Result<Array, String> {
    let (Data::Floats(values), Data::Floats(first)) = (&from.data, &first.data) else {
        return Err("only floats are reduced".into());
    };
    let steps = strides(&from.shape.dims);
    let reduced = |axis: &usize| instruction.dimensions.contains(&(*axis as i64));
    let axes = 0..from.shape.dims.len();
    let (inside, outside): (Vec<usize>, Vec<usize>) = axes.partition(reduced);
    let part = |axes: &[usize]| {
        let dims: Vec<usize> = axes.iter().map(|&axis| from.shape.dims[axis]).collect();
        let steps: Vec<usize> = axes.iter().map(|&axis| steps[axis]).collect();
        walk(&dims, &steps, 0)
    };
    let inside = part(&inside);
    let combine = binary(how).ok_or(format!("reduction by {how}"))?;
    let result = |start: &usize| {
        // In f64, so that the order matters less than it does on any device.
        let exact = how == "add";
        if exact {
            return inside.iter().fold(f64::from(first[0]), |sum, i| sum + f64::from(values[start + i]))
                as f32;
        }
        inside.iter().fold(first[0], |sum, i| combine(sum, values[start + i]))
    };
    Ok(Array::floats(shape, part(&outside).iter().map(result).collect()))
}

fn dot(
    instruction: &HloInstructionProto,
    shape: Shape,
    left: &Array,
    right: &Array,
) -> Result<Array, String> {
    let (Data::Floats(a), Data::Floats(b)) = (&left.data, &right.data) else {
        return Err("only floats are multiplied".into());
    };
    let numbers = instruction.dot_dimension_numbers.as_ref().ok_or("a dot without axes")?;
    let side = |array: &Array, batch: &[i64], contract: &[i64]| {
        let (dims, steps) = (&array.shape.dims, strides(&array.shape.dims));
        let part = |axes: &[usize]| {
            let of = |from: &[usize]| axes.iter().map(|&axis| from[axis]).collect::<Vec<_>>();
            walk(&of(dims), &of(&steps), 0)
        };
        let listed = |axes: &[i64]| axes.iter().map(|&axis| axis as usize).collect::<Vec<_>>();
        let used = |axis: &usize| batch.contains(&(*axis as i64)) || contract.contains(&(*axis as i64));
        let free: Vec<usize> = (0..dims.len()).filter(|axis| !used(axis)).collect();
        [part(&listed(batch)), part(&free), part(&listed(contract))]
    };
    let [batch_a, rows, inner_a] =
        side(left, &numbers.lhs_batch_dimensions, &numbers.lhs_contracting_dimensions);
    let [batch_b, columns, inner_b] =
        side(right, &numbers.rhs_batch_dimensions, &numbers.rhs_contracting_dimensions);
    let mut out = Vec::with_capacity(shape.elements());
    let mut sums = vec![0.0f32; columns.len()];
    for (&a_start, &b_start) in batch_a.iter().zip(&batch_b) {
        for &row in &rows {
            sums.fill(0.0);
            for (&i, &j) in inner_a.iter().zip(&inner_b) {
                let x = a[a_start + row + i];
                let start = b_start + j;
                sums.iter_mut().zip(&columns).for_each(|(sum, column)| *sum += x * b[start + column]);
            }
            out.extend_from_slice(&sums);
        }
    }
    Ok(Array::floats(shape, out))
}

/// Functions of two numbers, by opcode.
fn binary(opcode: &str) -> Option<fn(f32, f32) -> f32> {
    // XLA's largest and smallest are NaN where one of the two is.
    Some(match opcode {
        "add" => |a, b| a + b,
        "subtract" => |a, b| a - b,
        "multiply" => |a, b| a * b,
        "divide" => |a, b| a / b,
        "maximum" => |a, b| if a.is_nan() || a > b { a } else { b },
        "minimum" => |a, b| if a.is_nan() || a < b { a } else { b },
        "power" => f32::powf,
        _ => return None,
    })
}

fn unary(opcode: &str) -> Option<fn(f32) -> f32> {
    Some(match opcode {
        "abs" => f32::abs,
        "negate" => |x| -x,
        "exponential" => f32::exp,
        "log" => f32::ln,
        "sqrt" => f32::sqrt,
        "rsqrt" => |x| 1.0 / x.sqrt(),
        "tanh" => f32::tanh,
        "floor" => f32::floor,
        "sign" => |x| if x == 0.0 || x.is_nan() { x } else { x.signum() },
        _ => return None,
    })
}

fn compared<T: PartialOrd + Copy>(a: &[T], b: &[T], direction: &str) -> Result<Vec<bool>, String> {
    let test: fn(&T, &T) -> bool = match direction {
        "EQ" => |a, b| a == b,
        "NE" => |a, b| a != b,
        "LT" => |a, b| a < b,
        "LE" => |a, b| a <= b,
        "GT" => |a, b| a > b,
        "GE" => |a, b| a >= b,
        other => return Err(format!("comparison {other}")),
    };
    Ok(a.iter().zip(b).map(|(a, b)| test(a, b)).collect())
}

fn elementwise(
    instruction: &HloInstructionProto,
    opcode: &str,
    shape: Shape,
    arrays: &[&Array],
) -> Result<Array, String> {
    let unknown = || format!("{opcode} of {:?}", arrays.iter().map(|a| a.shape.ty).collect::<Vec<_>>());
    let data: Vec<&Data> = arrays.iter().map(|array| &array.data).collect();
    let truths = |values| Ok(Array { shape: shape.clone(), data: Data::Truths(values) });
    match (opcode, &data[..]) {
        ("convert", [from]) => {
            let number: Vec<f32> = match from {
                Data::Floats(values) => values.clone(),
                // fp32 holds what fits into 2²⁴, and no more is converted.
                Data::Ints(values) => values.iter().map(|&x| x as f32).collect(),
                Data::Truths(values) => values.iter().map(|&x| f32::from(u8::from(x))).collect(),
            };
            Ok(match shape.ty {
                Type::F32 | Type::Bf16 => Array::floats(shape, number),
                Type::S32 => Array { data: Data::Ints(number.iter().map(|&x| x as i32).collect()), shape },
                Type::Pred => Array { data: Data::Truths(number.iter().map(|&x| x != 0.0).collect()), shape },
            })
        }
        ("select", [Data::Truths(which), yes, no]) => {
            fn choose<T: Copy>(which: &[bool], yes: &[T], no: &[T]) -> Vec<T> {
                let pairs = yes.iter().zip(no);
                which.iter().zip(pairs).map(|(&which, (&yes, &no))| if which { yes } else { no }).collect()
            }
            let data = match (yes, no) {
                (Data::Floats(yes), Data::Floats(no)) => Data::Floats(choose(which, yes, no)),
                (Data::Ints(yes), Data::Ints(no)) => Data::Ints(choose(which, yes, no)),
                (Data::Truths(yes), Data::Truths(no)) => Data::Truths(choose(which, yes, no)),
                _ => return Err(unknown()),
            };
            Ok(Array { shape, data })
        }
        ("compare", [Data::Floats(a), Data::Floats(b)]) => {
            truths(compared(a, b, &instruction.comparison_direction)?)
        }
        ("compare", [Data::Ints(a), Data::Ints(b)]) => {
            truths(compared(a, b, &instruction.comparison_direction)?)
        }
        ("and", [Data::Truths(a), Data::Truths(b)]) => {
            truths(a.iter().zip(b).map(|(&a, &b)| a && b).collect())
        }
        ("or", [Data::Truths(a), Data::Truths(b)]) => {
            truths(a.iter().zip(b).map(|(&a, &b)| a || b).collect())
        }
        ("not", [Data::Truths(a)]) => truths(a.iter().map(|a| !a).collect()),
        (_, [Data::Floats(a)]) => {
            let f = unary(opcode).ok_or_else(unknown)?;
            Ok(Array::floats(shape, a.iter().map(|&x| f(x)).collect()))
        }
        (_, [Data::Floats(a), Data::Floats(b)]) => {
            let f = binary(opcode).ok_or_else(unknown)?;
            Ok(Array::floats(shape, a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()))
        }
        (_, [Data::Ints(a), Data::Ints(b)]) => {
            let f: fn(i32, i32) -> i32 = match opcode {
                "add" => i32::wrapping_add,
                "subtract" => i32::wrapping_sub,
                "multiply" => i32::wrapping_mul,
                "maximum" => Ord::max,
                "minimum" => Ord::min,
                "divide" => |a, b| if b == 0 { -1 } else { a.wrapping_div(b) },
                _ => return Err(unknown()),
            };
            Ok(Array { shape, data: Data::Ints(a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()) })
        }
        _ => Err(unknown()),
    }
}
