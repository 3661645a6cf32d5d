"""Golden datasets, tokenizer and configurations, as the Hugging Face libraries write them."""

import json
import math

import datasets
import pyarrow
import tokenizers
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Mamba2Config

ROWS, LENGTH = 7, 16


def blocks(rows):
    return [[(row * LENGTH + i) % 50 for i in range(LENGTH)] for row in rows]


def write_datasets(folder):
    datasets.disable_progress_bars()
    rows = blocks(range(ROWS))
    pair = {"input_ids": rows, "labels": rows}

    def typed(make):
        return Features({"input_ids": make(), "labels": make()})

    plain = Dataset.from_dict(pair)  # The library's own choice: int32 for a column called input_ids, else int64.
    saved = {
        "plain": plain,
        "int64": Dataset.from_dict(pair, features=typed(lambda: List(Value("int64")))),
        "int32": Dataset.from_dict(pair, features=typed(lambda: List(Value("int32")))),
        "large_list": Dataset.from_dict(pair, features=typed(lambda: LargeList(Value("int64")))),
        "fixed_size": Dataset.from_dict(pair, features=typed(lambda: List(Value("int64"), length=LENGTH))),
        # As a tokenizer's output often is: more columns, and input_ids not the first.
        "columns": Dataset.from_dict(
            {"text": ["x"] * ROWS, "attention_mask": [[1] * LENGTH] * ROWS, "labels": rows, "input_ids": rows}
        ),
        # Without labels.
        "unlabelled": Dataset.from_dict({"input_ids": rows}),
        # Rows 2 to 8 of a longer table.
        "slice": Dataset.from_dict({k: [[49] * 16] * 2 + v + [[49] * 16] for k, v in pair.items()}).select(range(2, 9)),
        # Not blocks: rows of 16 and of 9 tokens. A reader of blocks has to refuse it.
        "ragged": Dataset.from_dict({"input_ids": rows[:2] + [rows[2][:9]], "labels": rows[:2] + [rows[2][:9]]}),
    }
    for name, dataset in saved.items():
        dataset.save_to_disk(folder / name)
    plain.save_to_disk(folder / "shards", num_shards=2)
    # The library starts a record batch every 1000 rows; a smaller number makes several batches of seven rows.
    usual = datasets.config.DEFAULT_MAX_BATCH_SIZE
    datasets.config.DEFAULT_MAX_BATCH_SIZE = 3
    plain.save_to_disk(folder / "batches")
    datasets.config.DEFAULT_MAX_BATCH_SIZE = usual
    DatasetDict({"train": plain, "test": plain.select([0, 1])}).save_to_disk(folder / "splits")

    expected = {}
    for name in [*saved, "shards", "batches", "splits/train", "splits/test"]:
        loaded = datasets.load_from_disk(folder / name)
        batches = [b.num_rows for file in sorted((folder / name).glob("*.arrow")) for b in pyarrow.ipc.open_stream(file)]
        expected[name] = {
            "arrow": {c: str(loaded.data.schema.field(c).type) for c in loaded.column_names},
            "files": len(loaded.cache_files),
            "record_batches": batches,
            "input_ids": loaded["input_ids"][:],
        }
        wanted = rows[:2] if name == "splits/test" else rows
        assert name == "ragged" or expected[name]["input_ids"] == wanted, name
    write_json(folder / "expected.json", expected)


CORPUS = """\
A snake moves by small steps, and every step begins where the last one ended.
The model reads one token after the other; its state is all that it remembers of the tokens before.
What a state does not keep is gone, so the model learns what is worth keeping.
In 2024 the chunked form of the scan made training fast: 1, 2, 3, and then 256 tokens at a time.
Der Zustand fasst zusammen, was vorher war; größer wird er dabei nicht.
L'état résume le passé, sans jamais grandir.
Состояние помнит то, что было раньше.
状態は過去をまとめる。
"""

SAMPLES = [
    "",
    " ",
    "The model reads one token after the other.",
    "the state is all that it remembers",
    "  two  spaces,\ttabs\nand\r\nlines  ",
    "don't, it's, we'll, they've",
    "x=1234567890; y = 3.14e-10",
    "größer, état, naïve, ﬁ",
    "Состояние 状態は過去をまとめる。",
    "🐍 snakes 👩‍🚀 and \u0301 combining e\u0301",
    "A<|endoftext|>B",
    "<|endoftext|>",
    "<|endoftext",
]


def write_tokenizers(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True) * 4, trainer)
    place = folder / "bpe"
    place.mkdir()
    tokenizer.save(str(place / "tokenizer.json"))

    loaded = Tokenizer.from_file(str(place / "tokenizer.json"))
    samples = []
    for text in SAMPLES:
        ids = loaded.encode(text).ids
        assert loaded.decode(ids, skip_special_tokens=False) == text, text
        samples.append({"text": text, "ids": ids})
    # A line of the corpus has to come out shorter than its bytes: merges are in use.
    assert len(samples[2]["ids"]) < 0.7 * len(SAMPLES[2])
    about = {"version": tokenizers.__version__, "vocab_size": loaded.get_vocab_size()}
    about |= {"endoftext": loaded.token_to_id("<|endoftext|>"), "samples": samples}
    write_json(place / "expected.json", about)


# What mamba2-130m looks like.
SIZES = dict(
    hidden_size=768,
    num_hidden_layers=24,
    num_heads=24,
    head_dim=64,
    n_groups=1,
    state_size=128,
    vocab_size=50288,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)


def write_configs(folder):
    Mamba2Config(**SIZES).save_pretrained(folder / "tagged_infinity")
    Mamba2Config(**SIZES | {"tie_word_embeddings": False, "n_groups": 8}, time_step_limit=[0.001, 0.1]).save_pretrained(
        folder / "finite"
    )

    # Made by hand after what versions 4.4x wrote: an infinity that is not JSON, `torch_dtype`, fields since dropped.
    old = {
        "architectures": ["Mamba2ForCausalLM"],
        **SIZES,
        "chunk_size": 256,
        "conv_kernel": 4,
        "expand": 2,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "layer_norm_epsilon": 1e-05,
        "model_type": "mamba2",
        "norm_before_gate": True,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "rms_norm": True,
        "time_step_floor": 0.0001,
        "time_step_limit": [0.0, math.inf],
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": 48,
        "torch_dtype": "float32",
        "transformers_version": "4.44.0",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
    }
    (folder / "bare_infinity").mkdir()
    (folder / "bare_infinity/config.json").write_text(json.dumps(old, indent=2, sort_keys=True) + "\n")

    expected = {}
    for name in ["tagged_infinity", "finite", "bare_infinity"]:
        text = (folder / name / "config.json").read_text()
        config = Mamba2Config.from_pretrained(folder / name)
        assert ('{\n      "__float__": "Infinity"' in text) == (name == "tagged_infinity"), text
        fields = [*SIZES, "expand", "conv_kernel", "chunk_size", "use_bias", "use_conv_bias", "residual_in_fp32"]
        fields += ["layer_norm_epsilon"]
        low, high = config.time_step_limit
        expected[name] = {f: getattr(config, f) for f in fields}
        expected[name]["time_step_limit"] = [low, "inf" if high == math.inf else high]
    assert expected["bare_infinity"] == expected["tagged_infinity"]
    write_json(folder / "expected.json", expected)


def write_json(path, value):
    """One line an entry of the outermost object."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
