"""The model card (README.md) that is written beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nautilus.config import Config, weight_count
from nautilus.runtime import read_text, write_atomic

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
---

# Model card

{rows}

Layer letters: `M` Mamba-2, `*` attention, `E` experts, `-` MLP, `L` linear, `_` nothing.

## Opening it

```python
import nautilus

model, tokenizer = nautilus.load(folder)
```

{opens}
"""

OPENS = {
    "nemotron_h": """\
`transformers` 5 opens this folder as `NemotronHForCausalLM`. Three things to know:

- It drops the multi-token-prediction weights (`mtp.*`) without a word.
- Version 5.23 clamps the Mamba step dt to at least `time_step_min` on prompts, though models are trained without a
  clamp. That key, elsewhere a hint for initialisation (0.001), is therefore 1e-30 in this config.json. For folders of
  other origin, set `layer.mixer.time_step_limit = (0.0, float("inf"))` on every Mamba layer after loading.
- {weights}""",
    "nemotron_h_puzzle": """\
The layers differ in size. `transformers` has no class of its own for that; serving engines that know
`NemotronHPuzzleForCausalLM` read this layout (prefix `model.`, sizes in `block_configs`). `transformers` also drops
multi-token-prediction weights (`mtp.*`).""",
    "llama": "`transformers` opens this folder as `LlamaForCausalLM`.",
    "qwen3_moe": "`transformers` opens this folder as `Qwen3MoeForCausalLM`.",
    "nautilus": """\
No released model family has words for these layers, so this folder opens only in Nautilus: `transformers` and serving
engines cannot read it.""",
}


WEIGHTS = {
    False: "It refuses NVFP4 weights. The weights here are plain floating-point numbers.",
    True: "It refuses NVFP4 weights and others that ModelOpt wrote. The weights here are under ModelOpt's names, as"
    " `hf_quant_config.json` lists them; serving engines read those.",
}


def model_card(config: Config, *, family: str, facts: dict[str, str], quantised: bool = False) -> str:
    """Markdown: the sizes, then `facts` on file and training as they were passed in, then what opens the folder."""
    counts = weight_count(config)
    rows = {
        "parameters": f"{counts['main'] + counts['mtp']:,}",
        "active per token (head included, embedding not)": f"{counts['active']:,}",
        "of these multi-token prediction": f"{counts['mtp']:,}" if config.mtp else "none",
        "layers": f"{len(config.layers)}: `{config.pattern}`",
        "width, vocabulary": f"{config.width:,}, {config.vocab:,}",
        "config": f"`{family}`, fingerprint `{config.fingerprint}`",
    }
    library = "nautilus" if family == "nautilus" else "transformers"
    opens = OPENS[family].format(weights=WEIGHTS[quantised])
    return CARD.format(library=library, rows=table(rows | facts), opens=opens)


def add_to_card(folder: str | Path, title: str, rows: Mapping[str, object], words: str = "") -> None:
    """A section at the end of the folder's card: some words, and a table. A section of that title is replaced."""
    path = Path(folder) / "README.md"
    head, *sections = read_text(path).split("\n## ")
    kept = [part for part in sections if part.partition("\n")[0] != title]
    cells = {cell(name): cell(value) for name, value in rows.items()}
    fresh = "\n\n".join([title, *([words] if words else []), table(cells)])
    write_atomic(path, "\n## ".join([head, *kept, fresh]).rstrip("\n") + "\n")


def cell(value: object) -> str:
    """Text that cannot end its cell."""
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
