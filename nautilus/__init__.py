"""Make, shrink, serve and examine language models of the Nemotron 3 kind.

model, tokenizer = nautilus.load("runs/demo")       a run, a checkpoint folder or a hub id
engine = nautilus.Engine(model, tokenizer)          requests in; text, tokens and log-probs out
nautilus.fit(model, stream, objective, optimizer, steps=100)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nautilus.data.tokenizer import Tokenizer
    from nautilus.model.language import Language
    from nautilus.serve.engine import Engine
    from nautilus.train.loop import fit

__version__ = "0.1.0"
__all__ = ["Engine", "fit", "load"]


def load(source: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Language, Tokenizer]:
    """The model and the tokenizer in a run, in a Hugging Face checkpoint folder, or of a hub id.

    dtype: of parameters and activations; None keeps each tensor as it is stored. Errors name what is wrong with the
    folder or its tensors, or that the tokenizer has tokens that the model does not know (fewer is well); no code that
    came with a checkpoint is ever run.
    """
    from nautilus.data.tokenizer import load_tokenizer
    from nautilus.model.weights import load_model, local_folder
    from nautilus.runtime import UserError

    folder = local_folder(checkpoint_of(source))
    model, tokenizer = load_model(folder, dtype=dtype, device=device), load_tokenizer(folder)
    if tokenizer.vocab > model.config.vocab:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab:,} tokens, the model's vocabulary {model.config.vocab:,};"
            f" copy there the tokenizer that was released with the model or made for its training"
        )
    return model, tokenizer


def checkpoint_of(source: str | Path) -> str | Path:
    """The model folder of a run; anything else as it is."""
    from nautilus.runtime import Run, UserError, is_run, repair

    try:
        Path(source).exists()
    except (OSError, TypeError, ValueError) as bad:
        raise UserError(f"{str(source)[:80]!r} can be no run, folder or hub id: {type(bad).__name__}") from bad
    if Path(source).parent.is_dir():
        repair(source)
    if not is_run(source):
        return source
    run = Run.open(source)
    if not run.model.is_dir() and (run.state / "stages.json").is_file():
        raise UserError(f"{source} holds stages of a pipeline; name one of them, such as {run.folder / '1-student'}")
    if not run.model.is_dir():
        saved = f"{run.saved_step} of {run.settings.get('steps', '?')} steps are saved"
        raise UserError(
            f"the run in {source} is unfinished and has no model yet: {saved}; the command that began it, given again,"
            f" resumes it there"
        )
    return run.model


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str):
    # What needs torch is imported when it is first used, so that the command line answers at once.
    if name == "Engine":
        from nautilus.serve.engine import Engine

        return Engine
    if name == "fit":
        from nautilus.train.loop import fit

        return fit
    raise AttributeError(f"module 'nautilus' has no attribute {name!r}; it has {', '.join(__all__)}")
