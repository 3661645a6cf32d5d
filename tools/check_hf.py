"""Loads a model folder that Elapid exported with transformers, and compares the two programs.

    python tools/check_hf.py DIR --prompt-ids 1,2,3 --max-new-tokens 20
    python tools/check_hf.py DIR --prompt-ids 1,2,3 --max-new-tokens 20 --elapid target/release/elapid --data-dir DATA

Prints one JSON object. Exits with 1 when transformers finds a tensor missing, unknown or of another shape, when the
greedy continuations differ, or when the losses are more than 1e-4 apart or over another number of tokens.
"""

import argparse
import json
import math
import subprocess
import sys

import datasets
import safetensors.torch
import torch
import transformers
from transformers import Mamba2ForCausalLM

LOSS_TOLERANCE = 1e-4


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", help="Hugging Face model folder")
    parser.add_argument("--prompt-ids", required=True, type=lambda s: [int(i) for i in s.split(",")])
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--logits-out", metavar="FILE", help="write the prompt's logits [L, V] as safetensors")
    parser.add_argument("--data-dir", help="dataset folder: compute the loss over all of it")
    parser.add_argument("--elapid", metavar="BINARY", help="compare with this elapid")
    return parser.parse_args()


def load(folder, problems):
    model, info = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind, found in info.items():
        if found:
            problems.append(f"transformers reports {kind}: {found}")
    return model.eval()


@torch.no_grad()
def greedy(model, prompt, count):
    """The continuation, and how far each chosen token led the next best. Every token costs a whole forward pass:
    with its cache transformers 5.23 forgets `time_step_limit`."""
    ids, leads = list(prompt), []
    for _ in range(count):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        leads.append(best - second)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], leads


@torch.no_grad()
def dataset_loss(model, folder):
    """Mean token loss over a dataset folder; (loss, tokens that have one)."""
    total, count = 0.0, 0
    for row in datasets.load_from_disk(folder).with_format("torch"):
        ids = row["input_ids"].long()[None]
        logits = model(ids, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count, count


def elapid(binary, *args):
    """What `elapid ARGS --json` prints."""
    run = subprocess.run([binary, *map(str, args), "--json"], stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(f"error: {' '.join(run.args)} ended with {run.returncode}")
    return json.loads(run.stdout)


def compare_ids(theirs, ours, prompt, leads, problems):
    if ours[: len(prompt)] == prompt and len(ours) == len(prompt) + len(theirs):
        ours = ours[len(prompt) :]
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
    lead = f"; transformers chose with a lead of {leads[at]:.1e} in the logits" if at < len(leads) else ""
    problems.append(f"continuations differ from new token {at} on: transformers {theirs}, elapid {ours}{lead}")


def compare_loss(theirs, count, evaluated, problems):
    if evaluated["tokens"] != count:
        problems.append(f"transformers takes the loss over {count} tokens, elapid over {evaluated['tokens']}")
    loss, perplexity = evaluated["loss"], evaluated["perplexity"]
    if not abs(loss - theirs) <= LOSS_TOLERANCE:
        problems.append(f"losses differ: transformers {theirs}, elapid {loss}")
    if not math.isclose(perplexity, math.exp(loss), rel_tol=1e-4):
        problems.append(f"elapid's perplexity {perplexity} is not exp(loss) = {math.exp(loss)}")


def main():
    args = arguments()
    problems = []
    model = load(args.dir, problems)
    with torch.no_grad():
        logits = model(torch.tensor([args.prompt_ids]), use_cache=False).logits[0]
    if args.logits_out:
        safetensors.torch.save_file({"logits": logits.contiguous()}, args.logits_out)
    ids, leads = greedy(model, args.prompt_ids, args.max_new_tokens)
    report = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompt_ids": args.prompt_ids,
        "ids": ids,
        "smallest_lead": min(leads, default=None),
        "last_logits": logits[-1].tolist(),
    }
    if args.data_dir:
        report["loss"], report["loss_tokens"] = dataset_loss(model, args.data_dir)
    if args.elapid:
        prompt = ",".join(map(str, args.prompt_ids))
        generated = elapid(
            args.elapid, "generate", "--model", args.dir, "--prompt-ids", prompt, "--max-new-tokens",
            args.max_new_tokens, "--temperature", 0, "--ignore-eos",
        )  # fmt: skip
        report["elapid"] = {"ids": generated["ids"]}
        compare_ids(ids, generated["ids"], args.prompt_ids, leads, problems)
        if args.data_dir:
            evaluated = elapid(args.elapid, "eval", "--model", args.dir, "--data-dir", args.data_dir)
            report["elapid"] |= evaluated
            compare_loss(report["loss"], report["loss_tokens"], evaluated, problems)
    report["problems"] = problems
    print(json.dumps(report))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
