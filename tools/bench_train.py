"""Training steps of elapid and of transformers side by side: one model, one batch, one number of threads, optimizer included.

    python tools/bench_train.py --elapid target/release/elapid --length 512
    python tools/bench_train.py --length 512 --sides elapid,eager,compile --dtypes float32 --rounds 1 --json

Each round runs every side once, one after the other, each in a process of its own: `elapid bench train`, transformers eager and,
if asked for, through torch.compile. bfloat16 is elapid's compute dtype and torch's autocast; masters and moments are fp32
everywhere. Each process takes one step that is not measured, then --steps that are. Over all rounds: tokens per second of the
fastest step, of the median of the rounds' fastest steps, the largest peak of resident memory, and how many CPUs others took at
most meanwhile, on this machine or on the one that it is a part of: far from 0 the figures are not worth much. Prints a Markdown table, or
with --json one object with every round in it.

transformers needs much memory on a CPU: about 6 GB at L 512 and 17 GB at L 2048 in fp32 (mamba2-130m, B 1). Where memory runs out,
it is its process that Linux ends, and its row says so. Versions other than those of requirements.txt are refused.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

TOOLS = pathlib.Path(__file__).parent
NAMES = {"elapid": "elapid", "eager": "transformers, eager", "compile": "transformers, torch.compile"}


def several(allowed):
    def parse(text):
        words = text.split(",")
        for word in words:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word} is none of {', '.join(allowed)}")
        return words

    return parse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elapid", default="target/release/elapid")
    parser.add_argument("--model", choices=["mamba2-130m", "tiny"], default="mamba2-130m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtypes", type=several(["float32", "bfloat16"]), default=["float32", "bfloat16"])
    parser.add_argument("--sides", type=several(list(NAMES)), default=["elapid", "eager"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps a process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def versions():
    """Those of the pinned libraries that a step uses; ends where they are not the pinned ones."""
    pins = dict(line.split("==") for line in (TOOLS / "requirements.txt").read_text().split() if "==" in line)
    here = {name: version(name) for name in ["torch", "transformers"]}
    for name, found in here.items():
        if found.split("+")[0] != pins[name]:
            raise SystemExit(f"error: {name} {found} is installed; tools/requirements.txt pins {pins[name]}")
    return here


def first_to_die():
    pathlib.Path("/proc/self/oom_score_adj").write_text("1000")


def all_busy():
    """Seconds that all CPUs have been at work, here or, where this machine is a virtual one, for others."""
    user, nice, system, _, _, irq, softirq, steal = map(int, pathlib.Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_busy():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(args, side, dtype):
    """One process: its report, or why there is none."""
    shape = ["--batch", str(args.batch), "--threads", str(args.threads), "--steps", str(args.steps), "--dtype", dtype]
    if side == "elapid":
        command = [args.elapid, "bench", "train", "--model", args.model, "--seq-len", str(args.length), *shape, "--json"]
    else:
        command = [sys.executable, TOOLS / "baseline.py", "--config", args.model, "--length", str(args.length), *shape]
        command += ["--compile"] if side == "compile" else []
    start, busy, own = time.perf_counter(), all_busy(), own_busy()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=first_to_die)
    others = (all_busy() - busy - own_busy() + own) / (time.perf_counter() - start)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"failed": f"signal {-done.returncode}" if done.returncode < 0 else last}
    report = json.loads(done.stdout.strip().splitlines()[-1])
    best = report["best_step_s"] if side == "elapid" else min(report["step_seconds"])
    others = round(max(others, 0.0), 2)
    return {"best_step_s": best, "others": others, "peak_bytes": report["peak_bytes"], "parameters": report["parameters"]}


def measure(args):
    rows = [(side, dtype) for dtype in args.dtypes for side in args.sides]
    runs = {row: [] for row in rows}
    for number in range(args.rounds):
        for side, dtype in rows:
            said = run(args, side, dtype)
            runs[side, dtype].append(said)
            print(f"round {number + 1}/{args.rounds}  {NAMES[side]} {dtype}: {said}", file=sys.stderr)
    sizes = {said["parameters"] for row in runs.values() for said in row if "parameters" in said}
    if len(sizes) > 1:
        raise SystemExit(f"error: not one model but several, of {sorted(sizes)} parameters")
    tokens = args.batch * args.length
    found = []
    for (side, dtype), row in runs.items():
        good = [said for said in row if "failed" not in said]
        line = {"side": side, "dtype": dtype, "rounds": row}
        if good:
            seconds = [said["best_step_s"] for said in good]
            line["tokens_per_s"] = tokens / min(seconds)
            line["median_tokens_per_s"] = tokens / statistics.median(seconds)
            line["others"] = max(said["others"] for said in good)
            line["peak_bytes"] = max(said["peak_bytes"] for said in good)
        found.append(line)
    return {"parameters": min(sizes, default=None), "rows": found}


def table(args, report):
    libraries = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"{args.model}, B {args.batch}, L {args.length}, {args.threads} threads, {report['cpu']}; {libraries}\n")
    print("| | dtype | tokens/s, best | median | of elapid's speed | peak memory, GiB | CPUs taken by others |")
    print("|---|---|---|---|---|---|---|")
    own = {row["dtype"]: row.get("tokens_per_s") for row in report["rows"] if row["side"] == "elapid"}
    for row in report["rows"]:
        head = f"| {NAMES[row['side']]} | {row['dtype']} "
        if "tokens_per_s" not in row:
            print(f"{head}| {row['rounds'][-1]['failed']} | | | | |")
            continue
        ours, speed = own.get(row["dtype"]), row["tokens_per_s"]
        share = f"{speed / ours:.2f}" if ours else ""
        peak = row["peak_bytes"] / 2**30
        print(f"{head}| {speed:.1f} | {row['median_tokens_per_s']:.1f} | {share} | {peak:.2f} | {row['others']:.2f} |")


def main():
    args = arguments()
    here = versions()
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    report = vars(args) | {"cpu": cpu[1] if cpu else "?", "versions": here} | measure(args)
    print(json.dumps(report)) if args.json else table(args, report)


if __name__ == "__main__":
    main()
