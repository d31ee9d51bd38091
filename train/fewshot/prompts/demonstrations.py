"""Demonstrations (LM-BFF, arXiv:2012.15723, section 6): one solved example a class after the query.

A query is never its own demonstration, nor one with equal texts. With a filter, only the half of each class that is
most like the query (cosine of sentence embeddings) is drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.data.batches import Dataset
from train.fewshot.examples import Example
from train.fewshot.prompts.filled import encode, to_dataset
from train.fewshot.prompts.template import Template
from train.seeds import generator

__all__ = ["candidates", "choose", "demonstrated"]


def candidates(
    query: Example, pool: Sequence[Example], likeness: Tensor | None = None, share: float = 0.5
) -> dict[str, list[int]]:
    """Rows of the pool that may follow the query, by label; `likeness` (len(pool),) keeps the top `share` of each.

    At least one row a label is kept, where the label has one that is not the query itself.
    """
    by_label: dict[str, list[int]] = {}
    for i, example in enumerate(pool):
        if example.key != query.key:
            by_label.setdefault(str(example.label), []).append(i)
    if likeness is None:
        return by_label
    nearest = {}
    for label, rows in by_label.items():
        order = sorted(rows, key=lambda i: -float(likeness[i]))
        nearest[label] = order[: max(1, math.ceil(share * len(order)))]
    return nearest


def choose(
    query: Example, pool: Sequence[Example], random: torch.Generator, likeness: Tensor | None = None
) -> list[int]:
    """One row of the pool a label, in the order of the labels."""
    rows = candidates(query, pool, likeness)
    return [mine[int(torch.randint(len(mine), (1,), generator=random))] for _, mine in sorted(rows.items())]


def demonstrated(
    template: Template,
    queries: Sequence[Example],
    pool: Sequence[Example],
    words: dict[str, str],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    samples: int,
    seed: int,
    likeness: Tensor | None = None,
    max_length: int = 256,
) -> Dataset:
    """Each query `samples` times in a row, every time with other demonstrations; `likeness` is (N, len(pool)).

    What is drawn for a query depends on the seed and its own text alone.
    """
    rows, answers = [], []
    for i, query in enumerate(queries):
        near = None if likeness is None else likeness[i]
        random = generator(seed, "demonstrations", *query.key)
        for _ in range(samples):
            chosen = choose(query, pool, random, near)
            solved = [(pool[j], words[str(pool[j].label)]) for j in chosen]
            rows.append(encode(template, query, tokenizer, max_length=max_length, demonstrations=solved))
            answers.append(query.label)
    return to_dataset(rows, answers, tokenizer, labels)
