"""Whether all that a store of saved states counts agrees with what is there."""

from collections import Counter
from collections.abc import Mapping


def disagreements(saved, references: Mapping[int, int]) -> list[str]:
    """What is wrong, in words; nothing if all is well.

    references: for each page what the pool counts, less what requests hold.
    """
    entries = list(saved.entries())
    mine = Counter(page for entry in entries for page in entry.pages)
    pages = sorted(page for page in {*mine, *references} if mine[page] != references.get(page, 0))
    wrong = [f"page {page} is held {mine[page]} times, the pool counts {references.get(page, 0)}" for page in pages]
    if (size := sum(entry.bytes for entry in entries if entry.here)) != saved.counts.bytes:
        wrong.append(f"entries take {size} bytes of memory, {saved.counts.bytes} are counted")
    if lost := [entry.length for entry in entries if not entry.here and (entry.pages or not entry.file)]:
        wrong.append(f"entries of {lost} tokens are neither in memory nor in a file")
    files, sizes = {entry.file for entry in entries if entry.file}, saved.folder.sizes if saved.folder else {}
    if files != sizes.keys():
        wrong.append(f"entries have {len(files)} files, the folder counts {len(sizes)}")
    return wrong
