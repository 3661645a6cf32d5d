"""Loads a dataset folder that `elapid tokenize` wrote with Python's `datasets`, and compares its tokens with those that
`tokenizers` gives for the same documents.

    python tools/check_dataset.py FOLDER [--texts FILE.jsonl] [--append-eos]
"""

import argparse
import json
from pathlib import Path

import datasets
from tokenizers import Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, help="the documents, one JSON object with `text` a line")
    parser.add_argument("--append-eos", action="store_true")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    loaded = datasets.load_from_disk(args.folder)
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    for name, split in splits.items():
        folder = args.folder / name if isinstance(loaded, dict) else args.folder
        card = json.loads((folder / "dataset_card.json").read_text())
        assert split.split == name and split.info.splits[name].num_examples == len(split), name
        assert len(split) * card["seq_len"] == card["tokens"], name
        assert split.column_names[:2] == ["input_ids", "labels"], split.column_names
        assert split[:]["input_ids"] == split[:]["labels"]
        assert all(len(row) == card["seq_len"] for row in split["input_ids"])
        # It can be worked with as any other.
        assert split.map(lambda row: {"n": len(row["input_ids"])}, keep_in_memory=True)["n"][0] == card["seq_len"]
        columns = {column: feature.feature.dtype for column, feature in split.features.items()}
        print(f"{name}: {len(split)} rows of {card['seq_len']}, {columns}, fingerprint {split._fingerprint}")
    if args.texts:
        assert not isinstance(loaded, dict), "documents of splits are not in order"
        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer/tokenizer.json"))
        eos = [json.loads((args.folder / "dataset_card.json").read_text())["eos_id"]] if args.append_eos else []
        texts = [json.loads(line)["text"] for line in args.texts.read_text(encoding="utf-8").split("\n") if line]
        expected = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids + eos]
        ids = [i for row in loaded["input_ids"] for i in row]
        assert ids == expected[: len(ids)] and len(expected) - len(ids) < card["seq_len"]
        print(f"the same {len(ids)} tokens of {len(texts)} documents")


if __name__ == "__main__":
    main()
