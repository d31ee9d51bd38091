"""Near-duplicate removal: one licence in twenty packages is one document, not twenty.

Two documents are near-duplicates when they share at least half of the word 5-grams (shingles) of the smaller one:

    overlap(a, b) = |S(a) & S(b)| / min(|S(a)|, |S(b)|) >= 0.5

The overlap coefficient is used rather than Jaccard's because a text quoted whole inside a bundle leaks into it just as
much as a copy does. Source of the shingle sets: Broder, "On the resemblance and containment of documents" (1997).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
THRESHOLD = 0.5
_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication permutes the 64-bit integers


def shingles(text: str) -> NDArray[np.uint64]:
    """Sorted distinct 64-bit hashes of the word 5-grams of `text`; case, punctuation and layout do not count.

    A text of fewer than five words has one shingle, the whole text. The hash depends on nothing but the text.
    """
    words = _WORD.findall(text.lower())
    ids = np.array([zlib.crc32(word.encode()) for word in words] or [0], dtype=np.uint64)
    width = min(SHINGLE, len(ids))
    mixed = np.zeros(len(ids) - width + 1, dtype=np.uint64)
    for k in range(width):
        mixed = (mixed ^ ids[k : len(ids) - width + 1 + k]) * np.uint64(_MULTIPLIER)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


def overlap(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Overlap coefficient of two shingle sets, in [0, 1]."""
    return len(np.intersect1d(a, b, assume_unique=True)) / min(len(a), len(b))


def distinct(texts: Sequence[str], *, threshold: float = THRESHOLD) -> list[int]:
    """Indices, in increasing order, of texts no two of which are near-duplicates.

    Smallest first: of a licence and a bundle that quotes it, the licence stays; so a bundle of everything cannot tie
    unrelated texts into one cluster. Among equals the earlier text stays.
    """
    sets = [shingles(text) for text in texts]
    firsts: list[int] = []
    holders: dict[int, list[int]] = {}  # shingle -> kept texts that hold it
    for index in sorted(range(len(texts)), key=lambda i: len(sets[i])):
        values: list[int] = sets[index].tolist()
        shared = Counter(holder for value in values for holder in holders.get(value, ()))
        # Kept texts are never larger than this one, so the smaller set is theirs.
        if any(count >= threshold * len(sets[holder]) for holder, count in shared.items()):
            continue
        firsts.append(index)
        for value in values:
            holders.setdefault(value, []).append(index)
    return sorted(firsts)
