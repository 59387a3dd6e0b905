"""A folder that we saved as a file of llama.cpp, by its own converter: real weights, the prediction block among them.

Its converter knows the tokenizers of published models by a digest of what they make of one text. Ours is not among
them; its words are split as Mistral's Tekken splits them, so that is what it is told.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from nautilus.runtime import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when this file is run by its path
from peers import llama_cpp  # noqa: E402

SPLIT = "tekken"


def exported(folder: Path, path: Path, format: str = "f32") -> Path:
    """The file, which is written if it is not there. UserError with what the converter said, where it fails."""
    if not path.is_file():
        llama_cpp.build()
        words = [sys.executable, str(Path(__file__).resolve()), str(folder), str(path), format]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join(done.stderr.splitlines()[-10:])
            raise UserError(f"llama.cpp's converter did not take {folder}; the end of what it said:\n{said}")
    return path


def convert(folder: str, path: str, format: str) -> None:
    """In a process of its own: the converter is a program that asks its command line."""
    sources = llama_cpp.CACHE / f"llama_cpp_python-{llama_cpp.VERSION}" / "vendor" / "llama.cpp"
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: SPLIT
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", path, "--outtype", format]
    runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    convert(*sys.argv[1:])
