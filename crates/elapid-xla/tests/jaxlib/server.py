"""Compiles and runs HLO modules with jaxlib's CPU client; talks over stdin and stdout.

A request: u32 n, n bytes of a serialized HloModuleProto, u32 number of ranks, u32 number of inputs, and for each u8
dtype, u8 number of axes, u32 an extent, then the bytes of each rank. An answer: u32 0 and the number of outputs, all of
the first rank, then all of the second, and for each u64 n and n bytes; or u32 1, u32 n and n bytes of an error's text.
With 2³² − 1 inputs the module is compiled and not run. With n = 0 the request is u32 n and n bytes of HLO text to parse, and the
answer the number of instructions of its entry as one u32 output.
"""

import os
import struct
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimised code compiles ten times faster; the arithmetic is the same.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    " --xla_force_host_platform_device_count=32",
)

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import _hlo, _jax

COMPILE = 2**32 - 1
TYPES = [np.float32, ml_dtypes.bfloat16, np.int32]
requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print is no answer
devices = jax.devices("cpu")
compiled = {}


def number(form):
    size = struct.calcsize(form)
    data = requests.read(size)
    if len(data) < size:
        sys.exit(0)
    return struct.unpack(form, data)[0]


def executable(module, ranks):
    if (module, ranks) not in compiled:
        options = _jax.CompileOptions()
        options.num_replicas = ranks
        if ranks > 1:
            places = np.arange(ranks, dtype=np.int32).reshape(ranks, 1)
            options.device_assignment = _jax.DeviceAssignment.create(places)
        text = _jax.mlir.hlo_to_stablehlo(module)
        compiled[module, ranks] = devices[0].client.compile_and_load(text, devices[:ranks], options)
    return compiled[module, ranks]


def run(module, inputs, ranks):
    # What each rank holds under a name is its own: to jax all of it is called one replicated array.
    everywhere = NamedSharding(Mesh(np.array(devices[:ranks]), ("rank",)), PartitionSpec())

    def place(parts):
        parts = [jax.device_put(part, device) for part, device in zip(parts, devices)]
        return jax.make_array_from_single_device_arrays(parts[0].shape, everywhere, parts)

    results = executable(module, ranks).execute_sharded([place(parts) for parts in inputs])
    results = results.disassemble_into_single_device_arrays()
    return [np.asarray(result[rank]).tobytes() for rank in range(ranks) for result in results]


while True:
    size = number("<I")
    if size == 0:
        text, module, inputs = requests.read(number("<I")).decode(), None, None
    else:
        module = requests.read(size)
        inputs, ranks, count = [], number("<I"), number("<I")
        for _ in range(0 if count == COMPILE else count):
            dtype, axes = TYPES[number("<B")], number("<B")
            shape = [number("<I") for _ in range(axes)]
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            parts = [requests.read(size) for _ in range(ranks)]
            inputs.append([np.frombuffer(data, dtype).reshape(shape) for data in parts])
    try:
        if module is None:
            parsed = _hlo.hlo_module_from_text(text)
            outputs = [struct.pack("<I", len(parsed.computations()[-1].instructions()))]
        elif count == COMPILE:
            executable(module, ranks)
            outputs = []
        else:
            outputs = run(module, inputs, ranks)
        answers.write(struct.pack("<II", 0, len(outputs)))
        for data in outputs:
            answers.write(struct.pack("<Q", len(data)) + data)
    except Exception as error:  # whatever XLA finds wrong is the answer
        text = f"{type(error).__name__}: {error}".encode()
        answers.write(struct.pack("<II", 1, len(text)) + text)
    answers.flush()
