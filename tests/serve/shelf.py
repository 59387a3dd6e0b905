"""A pool of pages as small as can be, and what a model would have in mind after any tokens."""

import torch

PAGE = 2  # tokens


class Pool:
    """Counts references, and fails where one is missing or a page is asked for that is not there."""

    page_bytes = 24

    def __init__(self, pages=64):
        self.references = [0] * pages
        self.contents = [torch.zeros(pages, PAGE), torch.zeros(pages, 2, PAGE, dtype=torch.int32)]

    def free(self):
        return self.references.count(0)

    def take(self, count):
        pages = [page for page, held in enumerate(self.references) if not held][:count]
        assert len(pages) == count
        self.hold(pages)
        return pages

    def hold(self, pages):
        for page in pages:
            self.references[page] += 1

    def release(self, pages):
        for page in pages:
            assert self.references[page] > 0, f"page {page} is released once too often"
            self.references[page] -= 1

    def read(self, pages):
        return [tensor[list(pages)] for tensor in self.contents]

    def write(self, pages, tensors):
        for mine, tensor in zip(self.contents, tensors, strict=True):
            mine[list(pages)] = tensor

    def counted(self, *, requests=()):
        """As `Saved.audit` wants them: pages of running requests left out."""
        counts = dict(enumerate(self.references))
        for pages in requests:
            for page in pages:
                counts[page] -= 1
        return {page: count for page, count in counts.items() if count}


def state_after(tokens):
    """Two layers' states: any difference in the tokens or their order shows."""
    mixed = 0
    for token in tokens:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return [torch.tensor([mixed, len(tokens)], dtype=torch.float32), torch.tensor([[mixed % 97]], dtype=torch.bfloat16)]


def contents_of(tokens):
    """Of the pages of these tokens."""
    padded = torch.tensor([*tokens, *[-1] * (-len(tokens) % PAGE)]).view(-1, PAGE)
    return [padded.float(), torch.stack([padded, padded + 1], 1).int()]


def compute(saved, space, tokens, *, most=None, marks=(), seconds=1.0):
    """What an engine does with a prompt: find, compute the rest, keep the state after all tokens and at the marks.

    Gives what was found, checked against what computing all of it would have given.
    """
    pool, most = saved.pool, len(tokens) - 1 if most is None else most
    found = saved.find(space, tokens, most)
    shared = []
    if found.entry is not None:
        check(saved, found, tokens)
        shared = found.entry.pages[: found.length // PAGE]
        pool.hold(shared)
        saved.unlock(found.entry)
    need = -(-len(tokens) // PAGE) - len(shared)
    if not saved.make_room(need):
        pool.release(shared)
        return found
    pages = shared + pool.take(need)
    pool.write(pages[len(shared) :], [part[len(shared) :] for part in contents_of(tokens)])
    for mark in sorted({*marks, len(tokens)}):
        if mark > found.length:
            part = tokens[:mark]
            saved.keep(space, part, pages[: -(-mark // PAGE)], state_after(part), seconds * mark)
    pool.release(pages)
    return found


def check(saved, found, tokens):
    """That it holds what was in mind after these tokens."""
    entry, length = found.entry, found.length
    assert entry.here and entry.locks and 0 < length <= len(tokens)
    assert saved.everywhere or entry.length == length
    if not saved.everywhere:
        want = state_after(tokens[:length])
        assert all(torch.equal(a, b) for a, b in zip(entry.state, want, strict=True))
    whole = saved.pool.read(entry.pages)
    values = [whole[0].flatten(), *whole[1].transpose(0, 1).flatten(1)]
    want = torch.tensor(list(tokens[:length]))
    for got, wanted in zip(values, [want, want, want + 1], strict=True):
        assert got[:length].tolist() == wanted.tolist()
