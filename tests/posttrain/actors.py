"""Two processes of Ray play beside this one, and one of them is killed; what came of it, as a line of JSON."""

import asyncio
import json

from nautilus.posttrain.crew import Actors, Here
from nautilus.posttrain.remote import connected
from tests.posttrain.test_crew import PLAYING, PROBLEMS, TASK, drawn_by, other_weights, tiny, words


async def played(ray) -> dict:
    tokenizer = words()
    model = tiny(tokenizer)
    here, crew = (
        Here(model, tokenizer, PLAYING, rows=4),
        Actors(ray, 2, model, tokenizer, PLAYING, rows=4),
    )
    try:
        mine, theirs = [[await one.play(TASK, PROBLEMS[0], 2, 1)] for one in (here, crew)]
        ray.kill(crew.actors[0])
        found = await asyncio.gather(*(crew.play(TASK, one, 2, seed) for seed, one in enumerate(PROBLEMS)))
        plain = await asyncio.gather(*(here.play(TASK, one, 2, seed) for seed, one in enumerate(PROBLEMS)))
        await crew.update(other_weights(tokenizer), 1)
        later = await crew.play(TASK, PROBLEMS[0], 2, 1)
        return {
            "same": drawn_by(mine) == drawn_by(theirs),
            "again": drawn_by(found) == drawn_by(plain),
            "lost": sum(group.lost["actor"] for group in found),
            "replaced": crew.lost,
            "later": [one.version for one in later.rollouts],
        }
    finally:
        await crew.close()
        await here.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(played(connected(2)))))
