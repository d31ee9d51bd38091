"""The K-shot protocol of LM-BFF (arXiv:2012.15723): K training and K held-out rows a class, for five seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.errors import DataError
from train.fewshot.examples import Example, label_names
from train.seeds import generator

__all__ = ["SEEDS", "KShot", "folds", "k_shot", "stratified"]

SEEDS = (13, 21, 42, 87, 100)


@dataclass(frozen=True)
class KShot:
    """K rows a class to learn from, up to K others a class to choose by, and the rest, unused."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    rest: tuple[Example, ...]
    labels: tuple[str, ...]


def k_shot(examples: Sequence[Example], k: int, seed: int, *, source: str = "the data", dev: bool = True) -> KShot:
    """Draw the split of one seed; rows with equal texts are drawn once.

    The rows of a class are shuffled by a stream of their own (`seed/split/<label>`), so a class's rows do not depend
    on what other classes there are. The order of what is drawn is label by label, that of the rest is `stratified`.

    Raises
    ------
    DataError
        Fewer than `k` different rows of some label, or a single label.
    """
    labels = label_names(examples, source=source)
    by_label: dict[str, list[Example]] = {label: [] for label in labels}
    seen: set[tuple[str, str]] = set()
    for example in examples:
        if example.key not in seen:
            seen.add(example.key)
            by_label[str(example.label)].append(example)
    short = {label: len(rows) for label, rows in by_label.items() if len(rows) < k}
    if short:
        label, count = min(short.items(), key=lambda item: item[1])
        raise DataError(
            f"{source}: label {label!r} has {count} different rows, {k} are asked for ({len(short)} labels are short)",
            hint=f"--k {count}" if count else "the label has no row left once equal texts are drawn once",
        )
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for label, rows in by_label.items():
        order = torch.randperm(len(rows), generator=generator(seed, "split", label)).tolist()
        cuts = (k, 2 * k if dev else k)
        for part, chosen in zip(parts, (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]), strict=True):
            part += [rows[i] for i in chosen]
    return KShot(tuple(parts[0]), tuple(parts[1]), tuple(stratified(parts[2], seed)), labels)


def stratified(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples shuffled so that the first n, for any n, have the labels of all in their proportions.

    Row r of the n_y rows of a label, in random order, stands at r / n_y: the first of every label come first.
    """
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(str(example.label), []).append(example)
    placed = []
    for label, rows in by_label.items():
        order = torch.randperm(len(rows), generator=generator(seed, "order", label)).tolist()
        placed += [(place / len(rows), rows[i]) for place, i in enumerate(order)]
    mixed = torch.randperm(len(placed), generator=generator(seed, "order")).tolist()  # among equal places, by chance
    return [placed[i][1] for i in sorted(mixed, key=lambda i: placed[i][0])]


def folds(examples: Sequence[Example], parts: int, seed: int) -> list[list[int]]:
    """Row numbers of `parts` disjoint, stratified folds: what a choice inside the K examples is made with."""
    by_fold: list[list[int]] = [[] for _ in range(parts)]
    turn = 0
    for label in sorted({str(e.label) for e in examples}):
        rows = [i for i, e in enumerate(examples) if str(e.label) == label]
        for i in torch.randperm(len(rows), generator=generator(seed, "folds", label)).tolist():
            by_fold[turn % parts].append(rows[i])
            turn += 1
    return [sorted(fold) for fold in by_fold if fold]
