"""The server of `nautilus serve` on random weights, as `servers.py` starts it.

python our_server.py SHAPE FORMAT PORT USERS LONGEST SAVED_GB FOLDER THREADS
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch

from nautilus.eval.random_model import random_model
from nautilus.recipes.serve import Settings, api_module, serve
from nautilus.runtime import keep_memory
from nautilus.serve import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers.servers import config_of, tokenizer_of  # noqa: E402


def main(
    shape: str, format: str, port: str, users: str, longest: str, saved_gb: str, folder: str, threads: str
) -> None:
    keep_memory()
    torch.set_num_threads(int(threads))
    config, rows, saved = config_of(shape), int(users), float(saved_gb)
    engine = Engine(
        random_model(config, format), tokenizer_of(config.vocab), max_tokens=int(longest), rows=rows, step_seconds=0.25,
        saved_gb=saved, saved_folder=Path(folder) if folder else None,
    )  # fmt: skip
    with api_module("server").bound("127.0.0.1", int(port)) as listening:
        asyncio.run(serve(engine, Settings(name="bench", rows=rows), api_module("keys").Keys(), listening))


if __name__ == "__main__":
    main(*sys.argv[1:])
