"""Times a training step of transformers on the CPU: forward, backward, clip, AdamW.

    python tools/baseline.py --config mamba2-130m --batch 1 --length 512 --dtype float32 --steps 3

Prints one JSON object: seconds of every step, tokens per second (of the fastest step: the first ones also warm up
the allocator) and the peak resident memory. float32 masters either way; bfloat16 means autocast.
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

CONFIGS = {
    "mamba2-130m": dict(hidden_size=768, num_hidden_layers=24, num_heads=24),
    "tiny": dict(hidden_size=128, num_hidden_layers=2, num_heads=4),
}
SHARED = dict(head_dim=64, n_groups=1, state_size=128, vocab_size=50288, tie_word_embeddings=True, pad_token_id=0)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="mamba2-130m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**SHARED, **CONFIGS[args.config])).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    ids = torch.randint(SHARED["vocab_size"], (args.batch, args.length))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")

    seconds, losses = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        adamw.zero_grad(set_to_none=True)
        with autocast:
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    report = vars(args) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(args.batch * args.length / min(seconds), 2),
        # ru_maxrss is in KiB on Linux.
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "losses": losses,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
