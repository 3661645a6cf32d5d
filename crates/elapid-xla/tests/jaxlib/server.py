"""Compiles and runs HLO modules with jaxlib's CPU client; talks over stdin and stdout.

A request: u32 n, n bytes of a serialized HloModuleProto, u32 number of inputs, and for each u8 dtype, u8 rank, u32 an
extent, its bytes. An answer: u32 0 and the number of outputs, and for each u64 n and n bytes; or u32 1, u32 n and n
bytes of an error's text. With n = 0 the request is u32 n and n bytes of HLO text to parse, and the answer the number of
instructions of its entry as one u32 output.
"""

import os
import struct
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimised code compiles ten times faster; the arithmetic is the same.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)

import jax
import ml_dtypes
import numpy as np
from jaxlib import _hlo, _jax

TYPES = [np.float32, ml_dtypes.bfloat16, np.int32]
requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print is no answer
device = jax.devices("cpu")[0]
client = device.client
compiled = {}


def number(form):
    size = struct.calcsize(form)
    data = requests.read(size)
    if len(data) < size:
        sys.exit(0)
    return struct.unpack(form, data)[0]


def executable(module):
    if module not in compiled:
        text = _jax.mlir.hlo_to_stablehlo(module)
        compiled[module] = client.compile_and_load(text, [device], _jax.CompileOptions())
    return compiled[module]


def run(module, inputs):
    inputs = [jax.device_put(x, device) for x in inputs]
    results = executable(module).execute_sharded(inputs).disassemble_into_single_device_arrays()
    return [np.asarray(part[0]).tobytes() for part in results]


while True:
    size = number("<I")
    if size == 0:
        text, module, inputs = requests.read(number("<I")).decode(), None, None
    else:
        module = requests.read(size)
        inputs = []
        for _ in range(number("<I")):
            dtype, rank = TYPES[number("<B")], number("<B")
            shape = [number("<I") for _ in range(rank)]
            count = int(np.prod(shape, dtype=np.int64))
            data = requests.read(count * np.dtype(dtype).itemsize)
            inputs.append(np.frombuffer(data, dtype).reshape(shape))
    try:
        if module is None:
            parsed = _hlo.hlo_module_from_text(text)
            outputs = [struct.pack("<I", len(parsed.computations()[-1].instructions()))]
        else:
            outputs = run(module, inputs)
        answers.write(struct.pack("<II", 0, len(outputs)))
        for data in outputs:
            answers.write(struct.pack("<Q", len(data)) + data)
    except Exception as error:  # whatever XLA finds wrong is the answer
        text = f"{type(error).__name__}: {error}".encode()
        answers.write(struct.pack("<II", 1, len(text)) + text)
    answers.flush()
