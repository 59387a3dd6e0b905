"""Which teacher scores which answers, and their scores.

Every task has exactly one teacher. One without a teacher is an error before anything is drawn: with a silent stand-in
a student would be distilled from itself, and learn nothing (Nemotron 3 Ultra, arXiv 2606.15007).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautilus.data.batch import Batch
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.divergence import weighted_kl
from nautilus.posttrain.remote import model_of, parts_of
from nautilus.posttrain.rollout import Rollout
from nautilus.posttrain.stream import batches_of
from nautilus.runtime import UserError
from nautilus.serve.prefixes import fingerprint
from nautilus.train.objective import Objective, Pairs, Terms
from nautilus.train.policy import Mtp, Surrogate, distill, drawn_logprob, read, surrogate

TRIES = 3  # of scores whose process died


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """routes: task → name of its teacher; models: by name, each once however many tasks it teaches; actors: who scores
    in place of this process."""

    routes: Mapping[str, str]
    models: Mapping[str, Language]
    actors: TeacherActors | None = None

    @property
    def short(self) -> dict[str, str]:
        """Their names without the folders that lie above, where these are still different."""
        last = {name: Path(name).name for name in self.models}
        return {name: word if [*last.values()].count(word) == 1 else name for name, word in last.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: fingerprint(model) for name, model in self.models.items()}

    def check(self, tasks: Sequence[str], student: Language) -> None:
        """UserError for a task without a teacher, a teacher without a model, and one of another vocabulary."""
        if strange := sorted(self.routes.keys() - set(tasks)):
            raise UserError(
                f"a teacher of {', '.join(strange)} was named, which is not asked; there is {', '.join(tasks)}: name"
                " each without its levels"
            )
        if lacking := sorted(set(tasks) - self.routes.keys()):
            raise UserError(f"{', '.join(lacking)} has no teacher; write teachers={lacking[0]}=RUN for each of them")
        if lacking := sorted(set(self.routes.values()) - self.models.keys()):
            raise UserError(f"the teachers {', '.join(lacking)} have no model; there are {', '.join(self.models)}")
        for name, model in self.models.items():
            if model.config.vocab != student.config.vocab:
                raise UserError(
                    f"the teacher {name} knows {model.config.vocab} tokens, the student {student.config.vocab}; both"
                    " need one tokenizer: take teachers that were trained from the student, or from what it was trained"
                    " from"
                )

    def batches(
        self, rows: Sequence[tuple[Rollout, float]], *, tokens: int, pad: int, whole: bool = False
    ) -> list[Batch]:
        """Micro-batches that have one teacher each, with its log-probs; whole: for `distill_whole`, without these."""
        asked = list[tuple[str, Batch]]()
        for name in dict.fromkeys(self.routes[one.problem.task] for one, _ in rows):
            mine = [pair for pair in rows if self.routes[pair[0].problem.task] == name]
            asked += [(name, batch) for batch in batches_of(mine, tokens=tokens, pad=pad)]
        if whole:
            return [replace(batch, teacher=name) for name, batch in asked]
        found = self.actors(asked) if self.actors else [score(self.models[name], batch) for name, batch in asked]
        each = zip(asked, found, strict=True)
        return [replace(batch, teacher_logprob=scores, teacher=name) for (name, batch), scores in each]

    def distill(self, how: Surrogate, mtp: Mtp, reward: float = 0.0) -> Objective:
        """`train.policy.distill`, with the lead of each teacher told apart."""
        return self.told_apart(distill(how, mtp, reward=reward))

    def distill_whole(self, how: Surrogate, mtp: Mtp, reward: float = 0.0) -> Objective:
        """Distillation by all words of the vocabulary: at every token that the student drew, its reverse KL from the
        teacher, in place of the drawn word's share in that, which is as right in the mean and noisier.

            L = (1/N) sum_t w_t KL(student(. | tokens < t) || teacher(. | tokens < t))  +  reward * L_policy

        L_policy is `train.policy`'s, of the batch's advantages.
        """
        whole = Objective(partial(self.whole_terms, how=how, mtp=mtp, reward=reward), mtp.coefficients, mtp.weigh)
        return self.told_apart(whole)

    def told_apart(self, objective: Objective) -> Objective:
        return replace(objective, terms=partial(self.apart_terms, objective.terms))

    def apart_terms(self, all_terms: Terms, model: Language, batch: Batch) -> tuple[Pairs, Pairs]:
        terms, watched = all_terms(model, batch)
        return terms, watched | {f"teacher_gap_{self.short[batch.teacher]}": watched["teacher_gap"]}

    def whole_terms(
        self, model: Language, batch: Batch, *, how: Surrogate, mtp: Mtp, reward: float
    ) -> tuple[Pairs, Pairs]:  # fmt: skip
        assert batch.sampled_logprob is not None
        teacher, mask_BT = self.models[batch.teacher], batch.weights["policy"]
        drawn_BT, hidden_BTD = read(model, batch, "policy")
        lp_BT = drawn_BT.detach()
        weight_BT = mask_BT * how.correction.of((lp_BT - batch.sampled_logprob).where(mask_BT > 0, 0), mask_BT)
        with torch.no_grad():
            told_BT, other_BTE = read(teacher, replace(batch, routes=None), "policy")
        loss, _ = weighted_kl(
            hidden_BTD[:, :-1].flatten(0, 1)[None], model.head_weight, other_BTE[:, :-1].flatten(0, 1),
            teacher.head_weight, weight_BT[:, 1:].flatten()[None], reverse=True,
        )  # fmt: skip
        if reward and batch.advantage is not None:
            pushed, _ = surrogate(drawn_BT, batch, mask_BT, reward * batch.advantage, how)
            loss = loss + pushed["policy"][0]
        count = mask_BT.sum()
        seen = {"mismatch": (lp_BT - batch.sampled_logprob).abs(), "surprise": -lp_BT}
        seen |= {"teacher_gap": told_BT - lp_BT, "left_out": (weight_BT == 0).to(mask_BT.dtype)}
        watched = {name: ((value_BT * mask_BT).sum(), count) for name, value_BT in seen.items()}
        return {"policy": (loss, count)} | mtp.terms(model, batch, hidden_BTD), watched


@torch.no_grad()
def score(teacher: Language, batch: Batch) -> Tensor:
    return drawn_logprob(teacher, batch, "policy")


class Scorer:
    """One process of Ray, with all teachers."""

    def __init__(self, teachers: Mapping[str, Any], threads: int):
        torch.set_num_threads(threads)
        self.models = {name: model_of(parts) for name, parts in teachers.items()}

    def score(self, name: str, batch: Batch) -> Tensor:
        return score(self.models[name], batch)


class TeacherActors:
    """So many of them; micro-batches go to them in turn. One that dies is replaced, and what it was at is scored again.
    `ray` is the library, connected. They ask Ray for no cores, which may all be held by those that draw answers."""

    def __init__(self, ray: Any, count: int, models: Mapping[str, Language]):
        self.ray, self.kind = ray, ray.remote(num_cpus=0)(Scorer)
        self.teachers = ray.put({name: parts_of(model) for name, model in models.items()})
        self.threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // count)
        self.actors = [self.started() for _ in range(count)]

    def started(self) -> Any:
        return self.kind.remote(self.teachers, self.threads)

    def __call__(self, asked: Sequence[tuple[str, Batch]]) -> list[Tensor]:
        """The scores of each. UserError where processes go on dying."""
        found = dict[int, Tensor]()
        for _ in range(TRIES):
            left = [number for number in range(len(asked)) if number not in found]
            who = {number: self.actors[number % len(self.actors)] for number in left}
            under_way = {number: actor.score.remote(*asked[number]) for number, actor in who.items()}
            for number, scores in under_way.items():
                try:
                    found[number] = self.ray.get(scores)
                except self.ray.exceptions.RayActorError:
                    at = number % len(self.actors)
                    self.actors[at] = self.started() if self.actors[at] is who[number] else self.actors[at]
            if len(found) == len(asked):
                return [found[number] for number in range(len(asked))]
        raise UserError(f"processes of teachers died {TRIES} times in a row; take fewer of them, or smaller batches")


def same_words(student: Tokenizer, others: Mapping[str, Tokenizer]) -> None:
    """UserError for a teacher whose tokens are others than the student's."""
    for name, one in others.items():
        if one.fingerprint != student.fingerprint:
            raise UserError(
                f"the teacher {name} has another tokenizer than the student, so that its log-probs mean nothing here;"
                " take one of the student's own lineage"
            )
