"""Writes golden files into crates/elapid/tests/golden: what the real libraries produce, for the Rust tests to meet.

    python tools/golden.py [models] [datasets] [tokenizers] [configs] [sources] [neox] [convert]

Without an argument everything is written anew. Runs on the CPU in about a minute.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

GOLDEN = Path(__file__).resolve().parent.parent / "crates/elapid/tests/golden"


def main():
    write = {
        "models": ("golden_models", "write_models"),
        "datasets": ("golden_data", "write_datasets"),
        "tokenizers": ("golden_data", "write_tokenizers"),
        "configs": ("golden_data", "write_configs"),
        "sources": ("golden_sources", "write_sources"),
        "neox": ("golden_sources", "write_neox"),
        "convert": ("golden_convert", "write_convert"),
    }
    wanted = sys.argv[1:] or list(write)
    for name in wanted:
        if name not in write:
            sys.exit(f"error: no part is called {name!r}\nhint: there are {', '.join(write)}")
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        module, function = write[name]
        getattr(importlib.import_module(module), function)(folder)


if __name__ == "__main__":
    main()
