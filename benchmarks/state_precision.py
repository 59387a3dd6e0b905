"""What the format of the recurrent state costs: a small hybrid trained here, decoded in every format of
`nautilus/ops/state_format.py`.

    python benchmarks/state_precision.py               # on two idle cores: trains for 4 minutes once, measures for 6

The model is kept in `--folder` (the same command again resumes or reuses it). Held-out documents are decoded token by
token from the first one on, all formats side by side on the same tokens; every token's state is stored and read back.
Then the same prompts are continued greedily and by sampling. Intervals are 95 % over documents (Student's t), always of
the difference to fp32 on the same document; all documents share one stream of random bits. `--record FILE` appends the
rows to a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from train_step import machine

import nautilus
from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.corpus import sources
from nautilus.data.prepare import prepare
from nautilus.model.language import Language
from nautilus.model.state import MambaState, State, StoredMamba
from nautilus.ops.state_format import KINDS, StateFormat, encode
from nautilus.presets import nano
from nautilus.recipes.pretrain import Settings, pretrain
from nautilus.runtime import keep_memory
from nautilus.serve import Engine, Sampling
from nautilus.train.optim import OptimConfig

DOCUMENTS, LENGTH, EVERY, SEED, VOCAB, MAX_BYTES = 20, 1024, 128, 0, 4096, 20_000_000
T95 = 2.093  # 97.5 % quantile of Student's t with DOCUMENTS - 1 degrees of freedom
PROMPT, CONTINUED, SAMPLES = 256, 192, 2
Measured = dict[str, dict[str, Tensor]]  # format -> measure -> one number for each document


# ----- the model ------------------------------------------------------------------------------------------------------


def config() -> Config:
    """The demo's model with the released state width of 128, 96 KiB of state for each of 6 heads in 3 layers."""
    mamba = Mamba(heads=6, head_width=64, state=128, groups=2)
    attention = Attention(heads=4, groups=2, head_width=64)
    experts = Experts(experts=16, active=4, hidden=128, shared=384, latent=128, scale=2.5)
    return Config(vocab=VOCAB, width=256, layers=lay("MEM*EME", mamba, attention, experts), positions=1 << 20)


def trained(folder: Path, steps: int) -> tuple[Language, object, list[list[int]]]:
    """The model, its tokenizer and the first tokens of held-out documents that are long enough."""
    optim = OptimConfig(lr=5e-3, min_lr=5e-5, warmup=40, decay=0.3)
    settings = Settings(
        model=config(), out=folder, steps=steps, rows=2, length=LENGTH, max_bytes=MAX_BYTES, mtp_depths=0, optim=optim,
        save_every=50,
    )  # fmt: skip
    if not (folder / "report.html").exists():
        pretrain(settings)
    model, tokenizer = nautilus.load(folder, dtype=torch.float32)
    prepared = prepare(sources(("embedded",), max_bytes=MAX_BYTES), folder / "data", vocab=VOCAB)
    every = (tokenizer.encode(text) for texts in prepared.held_out().values() for text in texts)
    documents = [tokens[: LENGTH + 1] for tokens in every if len(tokens) > LENGTH][:DOCUMENTS]
    if len(documents) < DOCUMENTS:
        sys.exit(f"{len(documents)} held-out documents have more than {LENGTH} tokens, {DOCUMENTS} are needed")
    return model.eval(), tokenizer, documents


def decays(model: Language) -> list[float]:
    """What a head keeps of its state from token to token where dt is at its bias, ascending."""
    kept = []
    for block in model.backbone.layers:
        if block.mixer is not None and "A_log" in dict(block.mixer.named_parameters()):
            dt = torch.nn.functional.softplus(block.mixer.dt_bias)
            kept += torch.exp(-dt * block.mixer.A_log.exp()).tolist()
    return sorted(kept)


# ----- token by token -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def follow(model: Language, tokens_BT: Tensor) -> tuple[Measured, Tensor]:
    """Per document: mean nats, KL from fp32 (all, and the last quarter), error and growth of the state; fp32's nats."""
    states: dict[str, State | None] = dict.fromkeys(KINDS)
    nats, kl, errors = ({name: [] for name in KINDS} for _ in range(3))
    exact_BV = torch.empty(0)
    for t in range(LENGTH):
        for name in KINDS:
            format = StateFormat(name=name, seed=SEED)
            hidden_BTD, states[name] = model.hidden(tokens_BT[:, t : t + 1], state=states[name], state_format=format)
            logprob_BV = model.head(hidden_BTD)[:, 0].double().log_softmax(-1)
            exact_BV = logprob_BV if name == "fp32" else exact_BV
            nats[name].append(-logprob_BV.gather(1, tokens_BT[:, t + 1 : t + 2])[:, 0])
            kl[name].append((exact_BV.exp() * (exact_BV - logprob_BV)).sum(1))
        if (t + 1) % EVERY == 0:
            for name in KINDS:
                errors[name].append(torch.stack(state_error(states[name], states["fp32"])))
            print(f"  {t + 1} of {LENGTH} tokens", file=sys.stderr, flush=True)
    base_B = torch.stack(nats["fp32"]).mean(0)
    measured = {}
    for name in KINDS:
        divergence_TB, error_B, growth_B = torch.stack(kl[name]), *torch.stack(errors[name]).mean(0)
        measured[name] = {
            "loss_change_percent": 100 * (torch.stack(nats[name]).mean(0) / base_B - 1),
            "kl": divergence_TB.mean(0), "kl_last_quarter": divergence_TB[-LENGTH // 4 :].mean(0),
            "state_error_percent": 100 * error_B, "state_norm_change_percent": 100 * growth_B,
        }  # fmt: skip
    return measured, base_B


def recurrent(state: State | None) -> list[Tensor]:
    assert state is not None
    opened = (part.opened(torch.float32) if isinstance(part, StoredMamba) else part for part in state.layers)
    return [part.ssm_BHPN.flatten(1) for part in opened if isinstance(part, MambaState)]


def state_error(state: State | None, exact: State | None) -> tuple[Tensor, Tensor]:
    """Of each row, over its layers: |S - S_fp32| / |S_fp32|, and |S| / |S_fp32| - 1."""
    pairs = list(zip(recurrent(state), recurrent(exact), strict=True))
    norm_B = sum(want.square().sum(1) for _, want in pairs)
    far_B = sum((got - want).square().sum(1) for got, want in pairs)
    grown_B = sum(got.square().sum(1) for got, _ in pairs)
    return (far_B / norm_B).sqrt(), (grown_B / norm_B).sqrt() - 1


# ----- answers --------------------------------------------------------------------------------------------------------


def answers(model: Language, tokenizer, documents: list[list[int]]) -> tuple[Measured, Tensor]:
    """Per document: greedy tokens before the first that differs from fp32's; change of the length of sampled answers
    (to a blank line) against the mean of fp32's; the latter's lengths."""
    prompts = [tokens[:PROMPT] for tokens in documents]
    greedy = Sampling(temperature=0, max_tokens=CONTINUED)
    sampled = [
        Sampling(temperature=0.8, seed=seed, max_tokens=CONTINUED, stop=("\n\n",))
        for seed in range(SAMPLES)
        for _ in prompts
    ]
    path, length = {}, {}
    for name in KINDS:
        engine = Engine(model, tokenizer, rows=SAMPLES * len(prompts), state=name, state_seed=SEED)
        path[name] = [answer.tokens for answer in engine.generate(prompts, greedy)]
        found = [len(answer.tokens) for answer in engine.generate(prompts * SAMPLES, sampled)]
        length[name] = torch.tensor(found, dtype=torch.float64).view(SAMPLES, -1).mean(0)
        print(f"  answers in {name}", file=sys.stderr, flush=True)
    mean = length["fp32"].mean()
    return {
        name: {
            "greedy_tokens_in_common": torch.tensor(
                [in_common(*pair) for pair in zip(path[name], path["fp32"], strict=True)], dtype=torch.float64
            ),
            "answer_length_change_percent": 100 * (length[name] - length["fp32"]) / mean,
        }
        for name in KINDS
    }, length["fp32"]


def in_common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))


# ----- the table ------------------------------------------------------------------------------------------------------


def interval(values: Tensor) -> list[float]:
    """Mean, and half the width of its 95 % interval, to three digits of the latter."""
    half = T95 * values.double().std().item() / len(values) ** 0.5
    return [float(f"{values.double().mean().item():.4g}"), float(f"{half:.3g}")]


def bytes_of(name: str, layers: int, mamba: Mamba) -> int:
    """Recurrent state of one sequence."""
    zeros_BHPN = torch.zeros(1, mamba.heads, mamba.head_width, mamba.state)
    return layers * encode(zeros_BHPN, StateFormat(name=name), layer=0, position_B=torch.zeros(1)).bytes


def rows_of(model: Language, followed: Measured, answered: Measured) -> list[dict]:
    rows = []
    for name in KINDS:
        row: dict = {"format": name}
        for label, of in (("bytes_per_sequence", model.config), ("nano_mib_per_sequence", nano())):
            layers = [layer for layer in of.layers if isinstance(layer, Mamba)]
            size = bytes_of(name, len(layers), layers[0])
            row[label] = size if label.startswith("bytes") else round(size / 2**20, 2)
        measures = followed[name] | answered[name]
        row |= {label: interval(values) for label, values in measures.items()}
        row["greedy_never_differs"] = int((measures["greedy_tokens_in_common"] == CONTINUED).sum())
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    labels = [label for label in rows[0] if label != "format"]
    lines = []
    for label in labels:
        lines.append(f"{label}")
        for row in rows:
            value = row[label]
            text = f"{value[0]:>12g} +- {value[1]:g}" if isinstance(value, list) else f"{value:>12}"
            lines.append(f"    {row['format']:8} {text}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/state_precision"), help="where the model is kept")
    parser.add_argument("--steps", type=int, default=700, help="of its training, 2,048 tokens each")
    parser.add_argument("--record", type=Path, help="append the rows to this JSONL file")
    options = parser.parse_args()
    print(machine())
    keep_memory()
    torch.set_num_threads(2)
    model, tokenizer, documents = trained(options.folder, options.steps)
    begin = time.monotonic()
    followed, nats_B = follow(model, torch.tensor(documents))
    answered, length_B = answers(model, tokenizer, documents)
    rows, kept = rows_of(model, followed, answered), decays(model)
    facts = {
        "steps": options.steps, "repeats": DOCUMENTS, "tokens": LENGTH, "continued": CONTINUED,
        "nats_per_token": interval(nats_B), "answer_tokens": interval(length_B),
        "decay_at_rest": [round(v, 6) for v in (kept[0], statistics.median(kept), kept[-1])],
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }  # fmt: skip
    print(table(rows))
    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    if options.record:
        command = f"python benchmarks/state_precision.py --steps {options.steps}"
        record = {"command": command, "machine": machine(), "date": time.strftime("%F")}
        with options.record.open("a") as file:
            file.write(json.dumps(record | facts | {"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
