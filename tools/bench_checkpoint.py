"""Times checkpoints: of elapid, of torch.save, of safetensors, and the disk's own speed.

    python tools/bench_checkpoint.py --elapid target/release/elapid --model mamba2-130m --length 512

Trains a few steps in a folder that is removed afterwards. `stall_s` is what the run waits for the copy of a save, `first_stall_s`
that of the first one, whose memory is new; `saving_step_s` are steps beside a save, `step_s` others; `save_s` is a save with
--no-async-save. Python writes the same fp32 tensors (parameters and AdamW's two moments), with fsync. `dd` writes and reads as
many bytes. Reads come from the disk where this user may drop the page cache. Prints one JSON object, medians.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elapid", default="target/release/elapid")
    parser.add_argument("--model", default="mamba2-130m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dir", help="folder on the disk to measure")
    return parser.parse_args()


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_cache():
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def train(args, room, *more):
    command = [args.elapid, "train", "--model", args.model, "--data-dir", room / "data", "--batch", "1", *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    output = pathlib.Path(more[more.index("--output-dir") + 1])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], done.stderr


def measure(args, room):
    (room / "text").write_text("A line of text.\n" * (args.steps * args.length // 8))
    tokenize = ["tokenize", "--dataset", room / "text", "--tokenizer", "bytes", "--seq-len", str(args.length)]
    subprocess.run([args.elapid, *tokenize, "--save-path", room / "data"], capture_output=True, check=True)
    found = {"model": args.model, "length": args.length}

    run = room / "run"
    every = ["--checkpoint-freq", 3, "--num-kept-checkpoint", 1]
    lines, _ = train(args, room, "--max-steps", args.steps, *every, "--output-dir", run)
    beside = [line for line in lines if "save_s" in line]
    found["first_stall_s"] = beside[0]["save_s"]
    found["stall_s"] = statistics.median(line["save_s"] for line in beside[1:])
    found["saving_step_s"] = statistics.median(line["step_time_s"] for line in beside)
    found["step_s"] = statistics.median(line["step_time_s"] for line in lines if "save_s" not in line)
    checkpoint = max((run / "checkpoints").glob("step-*"))
    found["bytes"] = size = sum(file.stat().st_size for file in checkpoint.iterdir())

    waits = room / "waits"
    lines, _ = train(args, room, "--max-steps", 4, "--no-async-save", "--checkpoint-freq", 1, "--output-dir", waits)
    found["save_s"] = statistics.median(line["save_s"] for line in lines if "save_s" in line)
    shutil.rmtree(waits)

    found["cold"] = drop_cache()
    _, said = train(args, room, "--max-steps", args.steps + 1, "--resume", checkpoint, "--output-dir", room / "again")
    found["check_s"] = float(re.search(r"checked in ([0-9.]+) s", said)[1])
    found["load_s"] = float(re.search(r"read in ([0-9.]+) s", said)[1])

    tensors = load_file(checkpoint / "rank-00000.safetensors")
    for name, save, load in [
        ("torch", lambda path: torch.save(tensors, path), lambda path: torch.load(path, weights_only=True)),
        ("safetensors", lambda path: save_file(tensors, path), load_file),
    ]:
        path = room / name
        found[f"{name}_save_s"] = statistics.median(timed(lambda: (save(path), sync(path))) for _ in range(3))
        drop_cache()
        found[f"{name}_load_s"] = timed(lambda: [tensor.sum() for tensor in load(path).values()])
        path.unlink()

    count = [f"of={room / 'dd'}", "bs=1M", f"count={size >> 20}", "conv=fsync"]
    found["dd_write_s"] = timed(lambda: subprocess.run(["dd", "if=/dev/zero", *count], capture_output=True, check=True))
    drop_cache()
    read = ["dd", f"if={room / 'dd'}", "of=/dev/null", "bs=1M"]
    found["dd_read_s"] = timed(lambda: subprocess.run(read, capture_output=True, check=True))
    return found


def main():
    args = arguments()
    room = pathlib.Path(tempfile.mkdtemp(dir=args.dir))
    try:
        print(json.dumps(measure(args, room)))
    finally:
        shutil.rmtree(room)


if __name__ == "__main__":
    main()
