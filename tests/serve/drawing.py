"""A draw from the logits of one position alone."""

from nautilus.serve.sample import draw


def draw_one(logits_V, sampling, position, rules=()):
    (drawn,) = draw(logits_V[None], [sampling], [position], [rules])
    return drawn
