"""Golden text files and a GPT-NeoX style tokenizer, as pyarrow, datasets and tokenizers write them."""

import csv
import gzip
import json
import zlib

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import tokenizers
import zstandard
from datasets import Dataset, DatasetDict
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "A snake moves by small steps.",
    "",
    "Der Zustand faßt zusammen; größer wird er nicht.",
    "Состояние помнит то, что было раньше.",
    "状態は過去をまとめる。 상태는 과거를 요약한다.",
    "حالة النموذج تتذكر ما سبق",
    "🐍 snakes 👩‍🚀 and e\u0301 combining, \u200b zero width",
    'quotes " and commas, and\nlines\r\nand\ttabs \\ and \u2028',
    "control \x00\x01\x1b[0m\x7f\x85",
    "  leading and trailing  ",
    "the same again",
    "the same again",
    "x" * 3000,
]


def write_sources(folder):
    datasets.disable_progress_bars()
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS, "title": [t[:5] for t in TEXTS]})

    def parquet(name, table=table, **options):
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", **options)

    for codec in ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]:
        parquet(codec, compression=codec)
    parquet("groups", row_group_size=4)
    parquet("plain", use_dictionary=False, compression="zstd", data_page_size=64, write_batch_size=2)
    parquet("pages_v2", data_page_version="2.0", compression="zstd")
    parquet("pages_v2_snappy", data_page_version="2.0", compression="snappy", row_group_size=5)
    parquet("delta", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}, compression="zstd")
    required = pyarrow.schema([pyarrow.field("text", pyarrow.string(), nullable=False)])
    parquet("required", pyarrow.table({"text": TEXTS}, schema=required))
    parquet("large_string", pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())}))
    parquet("nested", pyarrow.table({"meta": [{"text": t} for t in TEXTS]}))
    parquet("nulls", pyarrow.table({"text": ["a", None, "b"]}))

    rows = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    half = lines.index(b"\n", len(lines) // 3) + 1
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines[:half], mtime=0) + gzip.compress(lines[half:], mtime=0))
    pack = zstandard.ZstdCompressor(level=19, write_checksum=True).compress
    (folder / "lines.jsonl.zst").write_bytes(pack(lines[:half]) + pack(lines[half:]))
    (folder / "array.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)

    # As `datasets` reads it: every format above that it has a reader for gives the same texts.
    for kind, name in [("parquet", "pages_v2.parquet"), ("json", "lines.jsonl.zst"), ("json", "array.json")]:
        loaded = datasets.load_dataset(kind, data_files=str(folder / name), split="train", cache_dir=folder / "cache")
        assert loaded["text"][:] == TEXTS, name
    for path in sorted((folder / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "cache").rmdir()

    dataset = Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    dataset.save_to_disk(folder / "saved", num_shards=2)
    DatasetDict({"train": dataset, "test": dataset.select([2, 3])}).save_to_disk(folder / "splits")
    pyarrow.feather.write_feather(table, folder / "feather.arrow", compression="uncompressed")
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    view = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.string_view())})
    with pyarrow.ipc.new_stream(folder / "view.arrow", view.schema) as writer:
        writer.write_table(view)
    (folder / "expected.json").write_text(json.dumps(TEXTS, indent=0) + "\n")


def write_neox(folder):
    """The pipeline of GPT-NeoX: NFC, byte-level BPE, runs of blanks as added tokens, two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:12] * 8, trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = TEXTS + [
        "def f(x):\n        return x  # eight blanks,                          and twenty-six",
        "A<|endoftext|>B <|padding|> <|endoftext",
        "\u0041\u030a and \u1e9b\u0323 are normalised",
        "".join(map(chr, range(1, 0x250))),
        "\ud7ff\ue000\ufffd\U0010ffff",
        "1234567890 1,234.5 don't we'll they'VE",
    ]
    samples = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in pieces]
    # Very long lines: a pattern, how often, and what tells its tokens from others.
    long = []
    for pattern, times in [("state ", 100_000), ("状態は", 60_000), ("ab", 150_000), ("line 1\n\n  x", 50_000), ("🐍 e\u0301", 40_000)]:
        ids = tokenizer.encode(pattern * times, add_special_tokens=False).ids
        crc = zlib.crc32(b"".join(i.to_bytes(4, "little") for i in ids))
        long.append({"pattern": pattern, "times": times, "tokens": len(ids), "crc32": crc})
    about = {"version": tokenizers.__version__, "vocab_size": tokenizer.get_vocab_size(), "samples": samples, "long": long}
    (folder / "expected.json").write_text(json.dumps(about) + "\n")
