"""Times a training step of transformers on the CPU: forward, backward, clip, AdamW.

    python tools/baseline.py --config mamba2-130m --batch 1 --length 512 --dtype float32 --steps 3

The first step, which fills the allocator and with --compile compiles, is not measured. Prints one JSON object: seconds of
every measured step, tokens per second of the fastest one, and the peak resident memory. float32 masters either way; bfloat16
means autocast; AdamW is torch's fused one, its fastest on a CPU.
"""

import argparse
import json
import os
import resource
import time

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM

# elapid's presets.
CONFIGS = {
    "mamba2-130m": dict(hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, state_size=128, vocab_size=50288),
    "tiny": dict(
        hidden_size=128, num_hidden_layers=4, num_heads=8, head_dim=32, state_size=32, vocab_size=512, chunk_size=64
    ),
}
SHARED = dict(n_groups=1, tie_word_embeddings=True, pad_token_id=0)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="mamba2-130m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**SHARED, **CONFIGS[args.config])).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    if args.compile:
        model = torch.compile(model)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")

    seconds, losses = [], []
    for _ in range(1 + args.steps):
        start = time.perf_counter()
        adamw.zero_grad(set_to_none=True)
        with autocast:
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    seconds = seconds[1:]
    report = vars(args) | {
        "parameters": parameters,
        "step_seconds": [round(s, 6) for s in seconds],
        "tokens_per_second": round(args.batch * args.length / min(seconds), 2),
        # ru_maxrss is in KiB on Linux.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
