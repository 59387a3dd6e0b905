"""Steps of reinforcement an hour, against the GRPO trainer of TRL: one model, one task, the same batch and lengths.

    python benchmarks/rl_steps.py                      # half an hour on two cores; prints the table

The model is the 16M hybrid of `train_step.py` with random weights. A step puts 16 problems to it, draws 8 answers of 32
tokens to each, rewards them by their share of vowels, and makes one update of all weights (ours leaves the routers as
they are, as always). Both in float32 and in bfloat16, as processes in turns; of each the first steps are not counted.
The peer gets what makes it fastest: no checkpoints of activations, one pass for all answers, the experts with which it
trains faster (all at once, `batched_mm`, its backward takes more memory than there is), no reference model. `best` is
the faster precision of either side. `--record FILE` appends the rows. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recorded import append  # noqa: E402
from rollouts import PRECISIONS  # noqa: E402
from train_step import VOCAB, config, machine  # noqa: E402

PROBLEMS, GROUP, TOKENS, WARM = 16, 8, 32, 2
EXPERTS = ("grouped_mm", "eager")
ASKED = "Write as many vowels as you can. Number {} of them. Begin."
RATE = 1e-5


def vowels(text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def ours(folder: Path, precision: str, steps: int, work: Path) -> list[float]:
    """Seconds of each step."""
    from functools import partial

    import torch

    import nautilus
    from nautilus.posttrain.blend import Blend, domain
    from nautilus.posttrain.practice import open_practice, practise
    from nautilus.recipes.rlvr import Settings, rows
    from nautilus.tasks.task import Problem, Question, Verdict, assistant, user
    from nautilus.train.optim import OptimConfig
    from nautilus.train.policy import Correction, Surrogate, policy

    class Vowels(Question):
        name, levels, thinks = "vowels", range(1, 2), False

        def draw(self, rng, level):
            asked = user(ASKED.format(rng.randrange(100_000)))
            return Problem(task=self.name, level=level, messages=asked, truth=1, worked=(assistant("a"),))

        def grade(self, problem, reply):
            return Verdict(reward=vowels(reply.content))

    model, words = nautilus.load(folder, dtype=torch.float32)
    optim = OptimConfig(lr=RATE, min_lr=RATE, warmup=0, decay=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    settings = Settings(
        model=str(folder), out=work, steps=steps, prompts=PROBLEMS, group=GROUP, tokens=256, turn_tokens=TOKENS,
        thinking=False, optim=optim, together=PROBLEMS * GROUP, save_every=0, tasks=("vowels",),
        compute={"float32": "fp32", "bfloat16": "bf16"}[precision],
    )  # fmt: skip
    times, run = list[float](), open_practice(settings, model, words)
    blend = Blend(domains=[domain(Vowels(), 512)], prompts=PROBLEMS, steps=steps, seed=0)
    learnt = partial(rows, settings, model.config.pad)

    def told(groups):
        times.append(time.perf_counter())
        drawn = [one.length for group in groups for one in group.rollouts]
        assert statistics.mean(drawn) > 0.95 * TOKENS, drawn
        return learnt(groups)

    practise(run, settings, model, words, blend, told, policy(Surrogate(correction=Correction()), settings.mtp))
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def peer(folder: Path, precision: str, experts: str, steps: int, work: Path) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, NemotronHForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = AutoTokenizer.from_pretrained(folder)
    model = NemotronHForCausalLM.from_pretrained(folder, experts_implementation=experts, dtype=torch.float32)
    asked = [[{"role": "user", "content": ASKED.format(97 * number % 100_000)}] for number in range(512)]
    times = list[float]()

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            times.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=str(work), use_cpu=True, bf16=precision == "bfloat16", max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="constant", per_device_train_batch_size=PROBLEMS * GROUP, num_generations=GROUP,
        max_completion_length=TOKENS, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, chat_template_kwargs={"enable_thinking": False},
        generation_kwargs={"min_new_tokens": TOKENS},
    )  # fmt: skip
    rewards = lambda completions, **more: [vowels(one[0]["content"]) for one in completions]  # noqa: E731
    rewards.__name__ = "vowels"
    trainer = GRPOTrainer(
        model=model, reward_funcs=rewards, args=config, train_dataset=Dataset.from_dict({"prompt": asked}),
        processing_class=words, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def worker(asked: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        given = asked.folder, asked.precision
        where = Path(work) / "run"
        found = (
            ours(*given, asked.steps, where)
            if asked.worker == "ours"
            else peer(*given, asked.experts, asked.steps, where)
        )
    print(json.dumps(found[WARM - 1 :]))


def seconds(who: str, folder: Path, precision: str, experts: str, steps: int) -> float:
    """Of a step, the median."""
    command = [sys.executable, __file__, "--worker", who, "--folder", str(folder), "--precision", precision]
    done = subprocess.run(
        [*command, "--experts", experts, "--steps", str(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{who} in {precision} ended with exit code {done.returncode}\n{done.stderr[-3000:]}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def fastest(folder: Path, precision: str) -> str:
    """The peer's way to compute experts."""
    found = {experts: seconds("peer", folder, precision, experts, WARM + 1) for experts in EXPERTS}
    print(f"peer {precision}: {', '.join(f'{name} {took:.1f} s' for name, took in found.items())} a step", flush=True)
    return min(found, key=lambda name: found[name])


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", type=Path)
    for hidden in ("--worker", "--precision", "--experts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.worker:
        return worker(asked)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        from nautilus.data.tokenizer import train_tokenizer
        from nautilus.model.language import Language

        folder = Path(temporary) / "model"
        texts = (path.read_text() for path in Path(argparse.__file__).parent.glob("*.py"))
        Language(config()).initialise(0).save(folder, precision="fp32", tokenizer=train_tokenizer(texts, vocab=VOCAB))
        experts = {name: fastest(folder, name) for name in PRECISIONS}
        turns = []
        for _ in range(asked.repeats):
            turn = {}
            for name in PRECISIONS:
                for who in ("ours", "peer"):
                    turn[who, name] = 3600 / seconds(who, folder, name, experts[name], asked.steps)
                    print(f"{who} {name}: {turn[who, name]:.0f} steps an hour", flush=True)
            turn |= {(who, "best"): max(turn[who, name] for name in PRECISIONS) for who in ("ours", "peer")}
            turns.append(turn)
    rows = []
    for name in (*PRECISIONS, "best"):
        ratios = sorted(turn["ours", name] / turn["peer", name] for turn in turns)
        mine, theirs = (round(statistics.median(turn[who, name] for turn in turns)) for who in ("ours", "peer"))
        times = [round(value, 2) for value in (ratios[0], statistics.median(ratios), ratios[-1])]
        rows.append({"precision": name, "experts": experts.get(name, ""), "ours_steps_per_hour": mine,
                     "peer_steps_per_hour": theirs, "times_as_fast": times})  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    append(asked.record, "rl_steps.py", words, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
