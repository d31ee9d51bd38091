"""Verbalizers: the words that stand for each label, and what tokens they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hub.errors import UsageError

__all__ = ["Verbalizer", "VerbalizerError", "WordScores", "nearest_single_tokens", "word_ids"]


class VerbalizerError(UsageError):
    """Label words that are missing, shared by two labels, or not one token."""


@dataclass(frozen=True)
class Verbalizer:
    """Label -> one or more words. Several: the label's score is the mean of their scores.

    Raises
    ------
    VerbalizerError
        A label without a word, or a word of two labels.
    """

    words: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, words: Mapping[str, str | Sequence[str]]) -> Verbalizer:
        """From a mapping; a single word may stand alone."""
        return cls(tuple((label, (w,) if isinstance(w, str) else tuple(w)) for label, w in words.items()))

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for label, words in self.words:
            if not words or not all(word.strip() for word in words):
                raise VerbalizerError(f"label {label!r} has no word", hint=f"--word {label}=WORD")
            for word in words:
                if owner.setdefault(word, label) != label:
                    raise VerbalizerError(f"{word!r} stands for both {owner[word]!r} and {label!r}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in their order."""
        return tuple(label for label, _ in self.words)

    def single(self, tokenizer: Any) -> WordScores:
        """The token of each word.

        Raises
        ------
        VerbalizerError
            A word that is not one token, named with the nearest words that are.
        """
        ids: list[list[int]] = []
        for label, words in self.words:
            ids.append([])
            for word in words:
                tokens = word_ids(tokenizer, word)
                if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
                    raise _not_one_token(tokenizer, label, word, tokens)
                ids[-1].append(tokens[0])
        return WordScores(tuple(tuple(row) for row in ids))

    def tokens(self, tokenizer: Any) -> list[list[int]]:
        """The tokens of each label's first word, any number of them."""
        return [word_ids(tokenizer, words[0]) for _, words in self.words]


@dataclass(frozen=True)
class WordScores:
    """Token ids of each label's words, and the label scores they give."""

    ids: tuple[tuple[int, ...], ...]

    @cached_property
    def flat(self) -> Tensor:
        """(W,) all words of all labels."""
        return torch.tensor([i for row in self.ids for i in row])

    @cached_property
    def mean(self) -> Tensor:
        """(W, C) each label's share of each word: 1 / (words of the label)."""
        table = torch.zeros(len(self.flat), len(self.ids))
        at = 0
        for c, row in enumerate(self.ids):
            table[at : at + len(row), c] = 1 / len(row)
            at += len(row)
        return table

    def __call__(self, logits: Tensor) -> Tensor:
        """Label scores (..., C) from logits (..., V): the mean of the raw logits of each label's words."""
        return logits[..., self.flat.to(logits.device)] @ self.mean.to(logits)


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word inside a sentence: with the leading space, where the tokenizer keeps spaces."""
    spaced = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    plain = tokenizer(word, add_special_tokens=False)["input_ids"]
    return list(spaced if len(spaced) <= len(plain) else plain)


def nearest_single_tokens(tokenizer: Any, word: str, count: int = 3) -> list[str]:
    """Whole words of the vocabulary that are spelled most like `word`."""
    known = {}
    for token in tokenizer.get_vocab():
        plain = token.lstrip("Ġ▁")
        if plain.isalpha() and len(plain) > 2 and abs(len(plain) - len(word)) < 5:
            known[plain] = token
    near = get_close_matches(word, known, n=4 * count, cutoff=0.5)
    return [w for w in near if len(word_ids(tokenizer, w)) == 1][:count]


def _not_one_token(tokenizer: Any, label: str, word: str, tokens: Sequence[int]) -> VerbalizerError:
    pieces = " + ".join(tokenizer.convert_ids_to_tokens(tokens)) or "nothing"
    near = nearest_single_tokens(tokenizer, word)
    hint = f"words that are: {', '.join(near)}" if near else "choose a shorter, more common word"
    return VerbalizerError(
        f"the word {word!r} of label {label!r} is {len(tokens)} tokens for this base ({pieces}), not one",
        hint=f"{hint}; or learn it whole with --method multi-mask",
    )
