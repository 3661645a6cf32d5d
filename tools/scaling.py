#!/usr/bin/env python3
"""Model FLOPs utilisation of a training run on many accelerators, on paper.

    tools/scaling.py target/release/elapid [--measured bench.json] [--model Mamba7B]

Nothing here was run on such machines. What a rank computes, holds and sends comes from `elapid inspect`; how near kernels
come to the limits of their machine from `elapid bench train --json` (--measured; the default is what docs/lab.md records).
Needs Python alone.

Time of a step = micro-steps × (compute + collectives between tp ranks, none of them hidden)
               + what is left of the gradients' reduce-scatter after the backward pass of the last micro-step
               + AdamW + ZeRO-1's gather of parameters, not hidden.
"""

import argparse
import json
import subprocess

LENGTH, GLOBAL_BATCH, TP = 2048, 1024, 8

# Per rank: peak FLOP/s of bf16 products and of fp32 arithmetic, memory bytes/s, bytes/s to ranks of the same node (one way);
# ranks of a node. Per node: bytes/s to other nodes. Published figures.
EFA = 800e9 / 8
NODES = {
    "32 ranks of 95 TFLOP/s (a Trainium1 core), 800 Gb/s": dict(bf16=95e12, fp32=24e12, memory=410e9, link=192e9, ranks=32, net=EFA),
    "8 ranks of 989 TFLOP/s (an H100, NVLink), 800 Gb/s": dict(bf16=989e12, fp32=67e12, memory=3350e9, link=450e9, ranks=8, net=EFA),
}
# Share of a link's bytes/s that a collective reaches, and seconds before its first byte.
WIRE, LATENCY = 0.7, 20e-6

# Least time over time of the ops of a step, by kind: `elapid bench train --model mamba2-130m --seq-len 512 --threads 1`, fp32,
# beside other work on the machine.
MEASURED = {"products": 0.26, "mixer": 0.05, "rest": 0.34, "update": 0.71}
KINDS = {
    "products": ["linear", "linear adjoint", "head_loss adjoint"],
    "mixer": ["mamba2", "mamba2 adjoint"],
    "rest": ["rms_norm", "rms_norm adjoint", "add", "embedding", "embedding adjoint", "cast"],
    "update": ["adamw", "clip", "zero_buffer", "cast_buffer"],
}


def shares(path):
    """Least time over time by kind of op, from the output of `bench train --json`."""
    if path is None:
        return MEASURED
    with open(path) as file:
        ops = {op["op"]: op for op in json.load(file)["ops"]}
    found = {}
    for kind, names in KINDS.items():
        rows = [ops[name] for name in names if name in ops]
        least = sum(row["roofline_share"] * row["total_s"] for row in rows)
        found[kind] = least / sum(row["total_s"] for row in rows)
    return found


def inspect(elapid, *words):
    return json.loads(subprocess.run([elapid, "inspect", *words, "--json"], check=True, capture_output=True).stdout)


def step(node, share, model, plan, ranks):
    """Seconds of a step by what they are spent on."""
    dp = ranks // TP
    micro_steps = GLOBAL_BATCH // dp
    dims, parts = model["dimensions"], model["parameters_in"]
    # Of a rank and a micro-step of one sequence.
    tokens = LENGTH / TP
    flops = sum(model["flops_per_token"].values())
    head = parts["head"] or parts["embedding"]
    products = 6 * (parts["projections"] + head)
    layers, d = dims["num_hidden_layers"], dims["hidden_size"]
    # Norm and sum of a layer read and write the fp32 residual stream some ten times, forward and backward.
    streamed = layers * d * 4 * 10
    compute = tokens * (
        products / node["bf16"] / share["products"]
        + (flops - products) / node["fp32"] / share["mixer"]
        + streamed / node["memory"] / share["rest"]
    )
    inside = plan["sent_a_micro_step_bytes"] / (node["link"] * WIRE) + 8 * layers * LATENCY
    # Elements of a rank, 1 / dp of which have moments here.
    n = plan["moments_bytes"] * dp / 8
    between = node["link"] if ranks <= node["ranks"] else node["net"] / min(node["ranks"], ranks)
    wire = (dp - 1) / dp * n / (between * WIRE)
    scatter, gather = 4 * wire + layers * LATENCY, 2 * wire + layers * LATENCY
    # The backward pass is two thirds of the compute.
    exposed = max(0.0, scatter - 2 / 3 * (compute + inside))
    update = 28 * n / dp / node["memory"] / share["update"]
    return {"compute": micro_steps * compute, "tp": micro_steps * inside, "dp": exposed + gather, "update": update}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elapid")
    parser.add_argument("--measured", metavar="BENCH.json")
    parser.add_argument("--model", default="Mamba7B")
    args = parser.parse_args()
    share = shares(args.measured)
    model = inspect(args.elapid, args.model)
    print("share of the roofline: " + ", ".join(f"{kind} {value:.2f}" for kind, value in share.items()))
    for name, node in NODES.items():
        print(f"\n{name}\n\n| ranks | dp | micro-steps | memory a rank | compute | tp | dp | update | step | tokens/s | MFU |")
        print("|" + "---|" * 11)
        for ranks in (32, 64, 128, 256, 512, 1024, 2048):
            dp = ranks // TP
            mesh = f"dp={dp},tp={TP},zero-1,sp"
            plan = inspect(args.elapid, args.model, "--plan", "--dtype", "bfloat16", "--mesh", mesh)["meshes"][0]
            parts = step(node, share, model, plan, ranks)
            seconds = sum(parts.values())
            tokens = GLOBAL_BATCH * LENGTH
            mfu = tokens * sum(model["flops_per_token"].values()) / (seconds * ranks * node["bf16"])
            cells = [ranks, dp, GLOBAL_BATCH // dp, f"{plan['all_bytes'] / 2**30:.1f} GiB"]
            cells += [f"{parts[part]:.2f} s" for part in ("compute", "tp", "dp", "update")]
            cells += [f"{seconds:.2f} s", f"{tokens / seconds:,.0f}", f"{100 * mfu:.1f} %"]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
