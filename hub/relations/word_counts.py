"""Which words an adapter's texts use, as hashed counts: what it takes to find adapters for a text without weights.

An artifact carries the counts in ``aux/words.safetensors``: of its own texts under ``self``, of a router's members
under each member's digest. Everything here is numpy.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hub.errors import IntegrityError, UsageError
from hub.io.disk import tensor_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hub.storage.artifact import Artifact

    Counts = NDArray[np.float32]

FILE: Final = "aux/words.safetensors"
SELF: Final = "self"
BUCKETS: Final = 4096
_MOST = 4 * 2**20  # characters of texts that are counted
_SMOOTH = 0.5  # added to each bucket
_WORD = re.compile(r"\w+|[^\w\s]")


def count_words(texts: Iterable[str]) -> Counts:
    """Counts (4096,) of the words and signs of texts by CRC-32 of their lower-case form; at most 4 Mi characters."""
    import numpy as np

    counts, left = np.zeros(BUCKETS, dtype=np.float32), _MOST
    for text in texts:
        for word in _WORD.findall(text[:left].lower()):
            counts[zlib.crc32(word.encode()) % BUCKETS] += 1
        left -= len(text)
        if left <= 0:
            break
    return counts


def write_words(directory: Path, counts: Mapping[str, Counts]) -> None:
    """Put counts into an artifact directory that is about to be packed."""
    from safetensors.numpy import save_file

    path = directory / FILE
    path.parent.mkdir(exist_ok=True)
    with tensor_file(path):
        save_file(dict(counts), path)


def read_words(artifact: Artifact) -> dict[str, Counts]:
    """Counts that an artifact carries; {} where it has none.

    Raises
    ------
    IntegrityError
        The file holds something else.
    """
    if FILE not in artifact.files:
        return {}
    from safetensors.numpy import load_file

    tensors = load_file(artifact.file(FILE))
    for key, counts in tensors.items():
        if counts.shape != (BUCKETS,) or not (counts >= 0).all():
            raise IntegrityError(f"{artifact.ref}: {FILE} holds no counts of words under {key!r}", ref=artifact.ref)
    return dict(tensors)


def fit_of(text: str, profiles: Mapping[str, Counts]) -> dict[str, float]:
    """How well each profile explains a text, in nats a word above what all of them together do.

    score_e = sum_w f(w) log(p_e(w) / p(w)), with f the text's word frequencies, p_e the profile's smoothed ones and p
    the mean of all p_e: an adapter for such texts is above 0, one for others below.

    Raises
    ------
    UsageError
        A text without words.
    """
    import numpy as np

    seen = count_words([text])
    if not seen.any():
        raise UsageError("the text has no words", hint="give a text that an adapter could be for")
    if not profiles:
        return {}
    smoothed = np.stack([counts.astype(np.float64) + _SMOOTH for counts in profiles.values()])
    p = smoothed / smoothed.sum(1, keepdims=True)
    scores = np.log(p / p.mean(0)) @ (seen / seen.sum())
    return {name: float(score) for name, score in zip(profiles, scores, strict=True)}
