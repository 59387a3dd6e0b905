"""The mixtures that Nemotron 3 Nano, Super and Ultra were pre-trained on, as the figures of their reports give them.

Percent of tokens of phase 1 and phase 2; the columns sum to 100 within the rounding of the figures. The border between
the phases is the share of the main run that phase 1 took: 23.5 of 25, 20 of 25 and 15 of 20 trillion tokens. The texts
themselves are only in part public: a blend file says where one's own text of each kind is.
"""

from __future__ import annotations

BORDERS = {"nano": 0.94, "super": 0.8, "ultra": 0.75}
# source                  Nano          Super         Ultra
PERCENT = {
    "syn-crawl-high": (20.4, 20.4, 22.4, 22.4, 22.4, 22.4),
    "syn-crawl-medium": (11.7, 5.0, 11.3, 6.2, 10.3, 3.8),
    "crawl-high": (6.5, 6.5, 6.5, 6.5, 6.5, 6.5),
    "crawl-medium-high": (5.7, 4.0, 5.7, 5.7, 5.7, 5.7),
    "crawl-medium": (6.8, 0, 1.8, 0, 4.3, 0),
    "code": (14.0, 14.0, 14.0, 14.0, 14.0, 14.0),
    "nemotron-cc-code": (1.3, 0, 2.1, 2.1, 2.1, 2.1),
    "math": (6.4, 12.5, 6.4, 6.4, 6.4, 6.4),
    "stem-sft": (11.1, 22.3, 11.1, 11.8, 9.2, 9.2),
    "code-sft": (3.3, 6.7, 3.3, 3.9, 3.9, 3.9),
    "general-sft": (0.2, 0.4, 0.2, 0.1, 1.6, 4.0),
    "multilingual": (5.0, 5.0, 5.0, 5.0, 5.0, 5.0),
    "academic": (4.1, 2.0, 1.7, 1.0, 1.6, 1.6),
    "crawl++": (2.9, 0, 1.8, 0, 1.4, 1.4),
    "wiki": (0.6, 1.3, 0.6, 0.6, 0.6, 0.6),
    "finepdfs": (0, 0, 6.1, 0, 4.9, 0),
    "finepdfs-high": (0, 0, 0, 14.3, 0, 10.7),
    "finepdfs-medium": (0, 0, 0, 0, 0, 2.5),
    "legal": (0, 0, 0, 0, 0, 0.1),
}


def mixture(name: str) -> list[tuple[float, dict[str, float]]]:
    """(share of the run at which the phase ends, weight by source) of both phases of a model."""
    column = 2 * list(BORDERS).index(name)
    first, second = ({s: row[column + i] for s, row in PERCENT.items() if row[column + i]} for i in (0, 1))
    return [(BORDERS[name], first), (1.0, second)]
