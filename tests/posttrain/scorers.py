"""Two processes of Ray score answers beside this one, and one of them is killed; what came of it, as a line of JSON."""

import json

import torch

from nautilus.posttrain.remote import connected
from nautilus.posttrain.rollout import Rollout, Turn
from nautilus.posttrain.teachers import TeacherActors, Teachers
from nautilus.tasks import Reply, Verdict
from nautilus.tasks.named import TASKS
from tests.posttrain.test_crew import tiny, words


def rollout(task, seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (20 + seed,), generator=draw).tolist()
    turn = Turn(begin=8, end=len(tokens), reply=Reply(content="so"))
    logprobs = (0.0,) * 8 + (-1.0,) * (len(tokens) - 8)
    problem = next(TASKS[task]().problems("train"))
    return Rollout(problem=problem, tokens=tuple(tokens), logprobs=logprobs, turns=(turn,), verdict=Verdict(reward=0.0))


def found(ray) -> dict:
    tokenizer = words()
    models = {"one": tiny(tokenizer, 1), "other": tiny(tokenizer, 2)}
    routes = {"count": "one", "sort": "other", "reverse": "other"}
    rows = [(rollout(task, seed), 0.0) for seed, task in enumerate([*routes] * 3)]
    actors = TeacherActors(ray, 2, models)
    here, there = Teachers(routes=routes, models=models), Teachers(routes=routes, models=models, actors=actors)
    scores = lambda who: [batch.teacher_logprob for batch in who.batches(rows, tokens=64, pad=0)]
    same = lambda: all(torch.equal(*pair) for pair in zip(scores(here), scores(there), strict=True))
    first, before = same(), actors.actors[0]
    ray.kill(before)
    return {
        "batches": len(scores(here)), "same": first, "after": same(), "replaced": actors.actors[0] is not before,
        "again": connected(1) is ray,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(found(connected(2))))
