"""Two processes of Ray play beside this one, and one of them is killed; what came of it, as a line of JSON."""

import asyncio
import json

from nautilus.posttrain.crew import Actors, Here
from nautilus.posttrain.remote import connected
from tests.posttrain.test_crew import PLAYING, PROBLEMS, TASK, other_weights, tiny, words


async def played(ray) -> dict:
    tokenizer = words()
    model = tiny(tokenizer)
    here, crew = (
        Here(model, tokenizer, PLAYING, rows=4),
        Actors(ray, 2, model, tokenizer, PLAYING, rows=4),
    )
    try:
        mine, theirs = [await one.play(TASK, PROBLEMS[0], 2, 1) for one in (here, crew)]
        same = [(one.tokens, one.logprobs) for one in mine.rollouts] == [
            (one.tokens, one.logprobs) for one in theirs.rollouts
        ]
        ray.kill(crew.actors[0])
        found = await asyncio.gather(*(crew.play(TASK, one, 2, seed) for seed, one in enumerate(PROBLEMS)))
        await crew.update(other_weights(tokenizer), 1)
        later = await crew.play(TASK, PROBLEMS[0], 2, 1)
        return {
            "same": same,
            "whole": [len(group.rollouts) + group.lost.total() for group in found],
            "lost": sum(group.lost["actor"] for group in found),
            "replaced": crew.lost,
            "later": [one.version for one in later.rollouts],
        }
    finally:
        await crew.close()
        await here.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(played(connected(2)))))
