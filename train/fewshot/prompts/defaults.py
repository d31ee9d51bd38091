"""What a user need not write: templates that fit most tasks, and label words taken from the labels' own names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from train.fewshot.prompts.verbalizer import word_ids

__all__ = ["PAIR_TEMPLATES", "TEMPLATES", "name_words", "spoken"]

TEMPLATES = ("{text} It was {mask}.", "{mask} : {text}", "{text} This is {mask}.")
PAIR_TEMPLATES = ("{text} ? {mask} , {text2}", "{text} {mask} , {text2}")


def name_words(label: str) -> list[str]:
    """The words in a label's name: `card_arrival` and `cardArrival` have two; a number has none."""
    parts = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return [word.lower() for word in re.findall(r"[^\W\d_]+", parts)]


def spoken(
    labels: Sequence[str], tokenizer: Any, given: dict[str, Sequence[str]] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Token ids that speak for each label: of the given words, else of its name.

    Empty where some label has no word or two labels would have the same: then words say nothing.
    """
    found = []
    for label in labels:
        words = (given or {}).get(label) or name_words(label)
        ids = [i for word in words for i in word_ids(tokenizer, word) if i != tokenizer.unk_token_id]
        found.append(tuple(dict.fromkeys(ids)))
    if not all(found) or len(set(found)) < len(found):
        return ()
    return tuple(found)
