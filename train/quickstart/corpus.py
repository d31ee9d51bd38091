"""Documents, domains, and the split: by document, under a seed, no near-duplicate on both sides."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hub.errors import UsageError
from train.quickstart.neardup import distinct

DOMAIN_CHARS = 700_000  # use at most this much text a domain: enough to train on, seconds to tokenize
DOCUMENT_CHARS = 16_000  # and this much of one document, so that one long file is not the domain
SHORTEST = 300  # characters; shorter documents say too little to be scored
HELDOUT_SHARE = 0.2
HELDOUT_MOST = 8  # documents; scoring time grows with them
TRAIN_LEAST = 4_000  # characters; less is a typing error, not a domain


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Domain:
    """Documents of one kind of text; no near-duplicate is on both sides.

    `left_out` tells what was not used and why, in words.
    """

    name: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    left_out: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Sha256 over names and texts of both sides: equal digests mean equal data."""
        sides = [[[d.name, d.text] for d in side] for side in (self.train, self.heldout)]
        return "sha256:" + hashlib.sha256(json.dumps(sides, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class GatheredTexts:
    """The documents found for one domain, before near-duplicates go and the split is drawn."""

    documents: tuple[Document, ...]
    left_out: tuple[str, ...] = ()


def within_limits(name: str, documents: Iterable[Document], seed: int) -> GatheredTexts:
    """Drop what is too short, cut what is too long, and stop at the domain's size, in an order drawn from the seed."""
    stripped = [Document(d.name, d.text.strip()[:DOCUMENT_CHARS]) for d in documents]
    long_enough = [d for d in stripped if len(d.text) >= SHORTEST]
    random.Random(f"{seed}/order/{name}").shuffle(long_enough)  # noqa: S311  (no secret)
    total, kept = 0, []
    for document in long_enough:
        if total >= DOMAIN_CHARS:
            break
        total += len(document.text)
        kept.append(document)
    short = len(stripped) - len(long_enough)
    notes = (f"{_count(short, 'document')} under {SHORTEST} characters",) if short else ()
    return GatheredTexts(tuple(kept), notes)


def split(gathered: Mapping[str, GatheredTexts], *, seed: int) -> list[Domain]:
    """Remove near-duplicates over all domains together, then draw each domain's held-out documents from the seed.

    Raises
    ------
    UsageError
        Fewer than two domains, or a domain with too little distinct text to train on and to score.
    """
    if len(gathered) < 2:
        raise UsageError(
            f"routing needs at least two domains, got {len(gathered)}",
            hint="repeat --domain NAME=PATH for each kind of text",
        )
    owners = [(name, document) for name, found in gathered.items() for document in found.documents]
    kept = [owners[i] for i in distinct([document.text for _, document in owners])]
    return [_draw(name, [d for owner, d in kept if owner == name], found, seed) for name, found in gathered.items()]


def _draw(name: str, documents: Sequence[Document], found: GatheredTexts, seed: int) -> Domain:
    order = sorted(documents, key=lambda d: d.name)
    random.Random(f"{seed}/split/{name}").shuffle(order)  # noqa: S311  (no secret)
    count = min(HELDOUT_MOST, max(1, round(HELDOUT_SHARE * len(order))))
    heldout, train = order[:count], order[count:]
    size = sum(len(document.text) for document in train)
    if size < TRAIN_LEAST:
        raise UsageError(
            f"domain {name!r} has too little text: {_count(len(documents), 'distinct document')} of {SHORTEST} "
            f"characters or more, {size} characters to train on beside the held-out ones ({TRAIN_LEAST} needed)",
            hint=f"give more text with --domain {name}=PATH",
        )
    repeated = len(found.documents) - len(documents)
    notes = (_count(repeated, "near-duplicate"),) if repeated else ()
    return Domain(name, tuple(train), tuple(heldout), (*found.left_out, *notes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
