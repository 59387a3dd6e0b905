"""Questions about texts, made from a seed: answers over several facts, long documents in short, texts of one's own.

Makers as in `made_files`: (draw, more, steps) to a question and its answer.
"""

from __future__ import annotations

import random

from nautilus.eval.ruler import ADJECTIVES, NOUNS, invent

# A fact about two names, and how the second one is asked for by the first.
RELATIONS = (
    ("{} was written by {}.", "the author of {}"),
    ("{} was born in {}.", "the birthplace of {}"),
    ("{} lies in the region {}.", "the region of {}"),
    ("{} is ruled from {}.", "the seat of {}"),
    ("{} was founded by {}.", "the founder of {}"),
)
SENTENCES = (
    "{when} {who} {does} the {thing} {where}.",
    "{who} {does} the {thing} {where} and thinks of {whom}.",
    "The {thing} stands {where}, where {whom} {does} it.",
    "{who} asks {whom} for the {thing}.",
    "{when} the {thing} is found {where}, and {who} {does} it.",
)
WHEN = "At dawn,In the evening,After the rain,Before winter,On market day,At low tide,That year,Later".split(",")
DOES = "finds,keeps,repairs,carries,paints,sells,hides,watches,borrows,forgets".split(",")
WHERE = "at the harbour,in the old mill,by the river,on the hill,near the station,in the garden".split(",")
KINDS_OF, OBJECTS = ADJECTIVES.split(), NOUNS.split()
IDEAS = "Clean,Draw,Describe,Photograph,Measure,Count,Lend,Mend".split(",")


def sentence(draw: random.Random, about: str = "") -> str:
    """Such as: At dawn Kodaru finds the amber bridge by the river."""
    words = {"when": draw.choice(WHEN), "does": draw.choice(DOES), "where": draw.choice(WHERE)}
    return draw.choice(SENTENCES).format(who=name(draw), whom=name(draw), thing=about or thing(draw), **words)


def thing(draw: random.Random) -> str:
    return f"{draw.choice(KINDS_OF)} {draw.choice(OBJECTS)}"


def name(draw: random.Random) -> str:
    return invent(draw).capitalize()


def hops(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """A chain of 1 + steps facts among those of other chains; the answer names the facts, then what was asked for."""
    length = 1 + min(steps, len(RELATIONS) - 1)
    chains = [[name(draw) for _ in range(1 + length)] for _ in range(2 + more)]
    facts = lambda chain: [RELATIONS[i][0].format(*chain[i : i + 2]) for i in range(length)]
    everything = [fact for chain in chains for fact in facts(chain)]
    draw.shuffle(everything)
    asked = draw.choice(chains)
    phrase = asked[0]
    for _, ask in RELATIONS[:length]:
        phrase = ask.format(phrase)
    question = f"{' '.join(everything)}\n\nWhat is {phrase}? Name the sentences that tell it, then the answer."
    return question, f"{' '.join(facts(asked))} The answer is {asked[-1]}."


def summary(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """A document of 2 + steps sections; the answer has the first sentence of each."""
    count = 2 + steps
    sections = [[sentence(draw) for _ in range(2 + more // count)] for _ in range(count)]
    body = "\n\n".join(f"# {name(draw)}\n{' '.join(section)}" for section in sections)
    question = f"{body}\n\nSummarise this: give the first sentence of every section, one on a line."
    return question, "\n".join(section[0] for section in sections)


def minutes(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """A meeting with 1 + steps decisions somewhere in it; the answer lists them in their order."""
    people = [name(draw) for _ in range(4)]
    lines = [f"{draw.choice(people)}: {sentence(draw)}" for _ in range(4 + more)]
    decided = [
        f"Decision: {draw.choice(people)} takes the {thing(draw)} {draw.randint(10, 99)}." for _ in range(1 + steps)
    ]
    places = sorted(draw.sample(range(len(lines) + 1), 1 + steps), reverse=True)
    for place, line in zip(places, reversed(decided), strict=True):
        lines.insert(place, line)
    body = "\n".join(lines)
    return f"{body}\n\nList the decisions of this meeting, one on a line.", "\n".join(decided)


def story(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """Some sentences, the first about a thing: nothing else of the answer stands in the prompt."""
    about, count = thing(draw), 2 + more
    parts = [sentence(draw, about), *(sentence(draw) for _ in range(count - 1))]
    return f"Write a story of {count} sentences about the {about}.", " ".join(parts)


def ideas(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """What one can do with a thing, as a list."""
    about, count = thing(draw), 2 + more
    listed = [f"{draw.choice(IDEAS)} it {draw.choice(WHERE)}, with the {thing(draw)}." for _ in range(count)]
    return f"There is the {about}. Give {count} ideas what to do with it.", "\n".join(listed)
