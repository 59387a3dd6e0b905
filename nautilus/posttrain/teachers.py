"""Which teacher scores which answers, and their scores.

Every task has exactly one teacher. One without a teacher is an error before anything is drawn: with a silent stand-in
a student would be distilled from itself, and learn nothing (Nemotron 3 Ultra, arXiv 2606.15007).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nautilus.data.batch import Batch
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.rollout import Rollout
from nautilus.posttrain.stream import batches_of
from nautilus.runtime import UserError
from nautilus.train.policy import drawn_logprob


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """routes: task → name of its teacher; models: by name, each once however many tasks it teaches."""

    routes: Mapping[str, str]
    models: Mapping[str, Language]

    def check(self, tasks: Iterable[str], student: Language) -> None:
        """UserError for a task without a teacher, a teacher without a model, and one of another vocabulary."""
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

    def batches(self, rows: Sequence[tuple[Rollout, float]], *, tokens: int, pad: int) -> list[Batch]:
        """Micro-batches that have one teacher each, with its log-probs."""
        found = list[Batch]()
        for name in dict.fromkeys(self.routes[one.problem.task] for one, _ in rows):
            mine = [pair for pair in rows if self.routes[pair[0].problem.task] == name]
            found += [scored(self.models[name], batch) for batch in batches_of(mine, tokens=tokens, pad=pad)]
        return found


@torch.no_grad()
def scored(teacher: Language, batch: Batch) -> Batch:
    return replace(batch, teacher_logprob=drawn_logprob(teacher, batch, "policy"))


def same_words(student: Tokenizer, others: Mapping[str, Tokenizer]) -> None:
    """UserError for a teacher whose tokens are others than the student's."""
    for name, one in others.items():
        if one.fingerprint != student.fingerprint:
            raise UserError(
                f"the teacher {name} has another tokenizer than the student; its log-probs mean nothing here"
            )
