"""Adapters for a text, from what the store's artifacts say of the words they were made for; no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hub.relations.word_counts import SELF, fit_of, read_words
from hub.store import Store

if TYPE_CHECKING:
    from hub.relations.word_counts import Counts


def rank(text: str, store: Store | None = None) -> list[tuple[str, float]]:
    """Refs of the store's adapters with how well each fits a text, best first; see `hub.relations.word_counts.fit_of`.

    An adapter is known by the counts it carries, else by those of a router it is a member of. Withdrawn ones and those
    nobody has counts of are left out.

    Raises
    ------
    UsageError
        A text without words.
    """
    profiles: dict[str, Counts] = {}
    here = {artifact.digest: artifact for artifact in (store or Store()).list()}
    for artifact in sorted(here.values(), key=lambda artifact: artifact.facts.type == "router"):
        for key, counts in read_words(artifact).items():
            digest = artifact.digest if key == SELF else key
            if digest in here:
                profiles.setdefault(str(here[digest].ref), counts)
    scores = fit_of(text, profiles)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
