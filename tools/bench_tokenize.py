"""Times `elapid tokenize` beside `datasets.map` with the same tokenizer, packing and number of processes.

    python tools/bench_tokenize.py --elapid target/release/elapid [--megabytes 200] [--num-proc 2]
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEQ_LEN = 2048


def write_text(path, megabytes):
    """Documents of words with Zipf's frequencies, of one to some thousand words."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, range(len(letters), 0, -1), k=rng.randint(2, 11))) for _ in range(60_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    size = 0
    with open(path, "w") as file:
        while size < megabytes * 1_000_000:
            chosen = rng.choices(words, cum_weights=weights, k=int(rng.lognormvariate(5.5, 1)) + 1)
            text = " ".join(word + ("." if i % 13 == 12 else "") for i, word in enumerate(chosen))
            size += file.write(json.dumps({"text": text}) + "\n")


def train_tokenizer(folder, text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(text) as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in itertools.islice(file, 10_000)), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def with_datasets(folder, text, num_proc):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")

    def encode(batch):
        return {"input_ids": [e.ids + [eos] for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

    def pack(batch):
        ids = list(itertools.chain.from_iterable(batch["input_ids"]))
        rows = [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]
        return {"input_ids": rows, "labels": rows}

    loaded = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "cache"))
    encoded = loaded.map(encode, batched=True, num_proc=num_proc, remove_columns=loaded.column_names)
    packed = encoded.map(pack, batched=True, num_proc=num_proc)
    packed.save_to_disk(folder / "python", num_proc=num_proc)
    return len(packed)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elapid", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--num-proc", type=int, default=os.cpu_count())
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        write_text(text, args.megabytes)
        train_tokenizer(folder / "tokenizer", text)
        size = text.stat().st_size / 1e6

        start = time.perf_counter()
        command = [args.elapid, "tokenize", "--dataset", text, "--tokenizer", folder / "tokenizer", "--append-eos"]
        command += ["--seq-len", str(SEQ_LEN), "--num-proc", str(args.num_proc), "--save-path", folder / "ours", "--json"]
        ran = subprocess.run(["/usr/bin/time", "-f", "%M", *command], check=True, capture_output=True, text=True)
        ours = time.perf_counter() - start
        memory = int(ran.stderr.split()[-1]) / 1024
        start = time.perf_counter()
        rows = with_datasets(folder, text, args.num_proc)
        theirs = time.perf_counter() - start
        versions = f"datasets {datasets.__version__}, tokenizers {tokenizers.__version__}"
        print(f"{size:.0f} MB, {args.num_proc} processes, {versions}")
        print(f"elapid    {ours:6.1f} s  {size / ours:5.1f} MB/s  {json.loads(ran.stdout)['blocks']} blocks, {memory:.0f} MiB")
        print(f"datasets  {theirs:6.1f} s  {size / theirs:5.1f} MB/s  {rows} blocks")
        print(f"ratio     {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
