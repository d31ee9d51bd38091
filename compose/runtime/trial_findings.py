"""From what entered a module in five trial calls to where its rows stand.

The calls: ``base`` with three random rows, ``first`` and ``second`` with one row of them changed, ``others`` with what
is not of the rows changed, and ``last`` with two rows of another length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from compose.runtime.trial_inputs import Sizes
from compose.slots.row_layout import ROWS_FIRST, RowLayout

Finding: TypeAlias = RowLayout | str  # or why there is none

_GATHERED = "takes the tokens of all rows together"
_SHARED = "gets one input for all rows"
_MIXED = "gets what is made of several rows"
_VARIES = "is called with rows in one place, then in another"
OTHER = "gets an input that is not the text's"
_UNLIKE = "gives states of other shapes than a block before it"
_ORDER = "numbers tokens in another order than (rows, tokens)"
# Share of an entry by which it must move: entries of other rows move by rounding alone.
_MOVED = {torch.float32: 1e-5, torch.float64: 1e-10}
_IN_HALF = 1e-3
_FEATURES = 64  # of an entry that are looked at


class Runs(NamedTuple):
    """What entered a module, in each of the calls; once, or call by call."""

    base: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    others: Sequence[Tensor]
    last: Sequence[Tensor]


class Trial(NamedTuple):
    """The sizes of the calls; ``text``: a row's length is that of its text."""

    many: Sizes
    few: Sizes
    text: bool


def sample(x: Tensor) -> Tensor:
    """Some features of each entry, (..., f); ids are their own feature."""
    if not x.is_floating_point() or x.dim() == 0:
        return x.detach().clone().float()[..., None]
    return x[..., :: max(1, x.shape[-1] // _FEATURES)].detach().clone()


def find(runs: Runs, trial: Trial) -> Finding | None:
    """The layout of a module, or why there is none; None if it never ran."""
    if not any(runs):
        return None
    if len({len(run) for run in runs[:4]}) > 1 or not runs.last:  # as an expert that some texts do without
        return _GATHERED
    found: Finding | None = None
    for i, (base, first, second, others) in enumerate(zip(*runs[:4], strict=True)):
        last = runs.last[min(i, len(runs.last) - 1)]
        if any(other.shape != base.shape for other in (first, second, others)):
            return _GATHERED
        moved = _moved(base, first), _moved(base, second), _moved(base, others)
        found = joined(found, _layout(*moved, small=last.shape[:-1], trial=trial))
    return found


def find_states(runs: Runs, trial: Trial, widths: set[int]) -> Finding | None:
    """The layout of the states that enter and leave all blocks, which must be alike in shape."""
    found = find(runs, trial)
    alike = len({states.shape[:-1] for states in runs.base}) == 1 and len(widths) == 1
    return found if alike or not isinstance(found, RowLayout) else _UNLIKE


def find_positions(runs: Runs, trial: Trial) -> Finding | None:
    """Whether position ids are (T,), (1, T) or (B, T), with others in front: then each row can have its own."""
    if not any(runs):
        return None
    for ids, sizes in [(ids, trial.many) for ids in runs.base] + [(ids, trial.few) for ids in runs.last]:
        shape = (1, *ids.shape[:-1])  # without the feature, which is the id
        if shape[-1] != sizes.length or shape[-2] not in (1, sizes.rows):
            return _ORDER
    return ROWS_FIRST


def joined(a: Finding | None, b: Finding) -> Finding:
    """What holds for both of two calls."""
    if a is None or a == b:
        return b
    if isinstance(a, RowLayout) and isinstance(b, RowLayout):
        return a.joined(b) or _VARIES
    return a if isinstance(a, str) else _VARIES


def _moved(a: Tensor, b: Tensor) -> Tensor:
    """Which entries differ by more than rounding."""
    share, a, b = _MOVED.get(a.dtype, _IN_HALF), a.float(), b.float()
    return (a - b).abs().sum(-1) > share * (a.abs().sum(-1) + b.abs().sum(-1))


def _layout(first: Tensor, second: Tensor, others: Tensor, *, small: torch.Size, trial: Trial) -> Finding:
    leading, (rows, _), (few, _) = first.shape, _pair(trial.many), _pair(trial.few)
    if not (first.any() or second.any()):
        if others.any():
            return OTHER
        # A constant: queries that are learned, the same for each row, or positions, once for all.
        each_its_own = len(leading) > 1 and leading[0] == rows and small[0] == few
        return RowLayout(tokens=False) if each_its_own else _SHARED
    for dim in range(min(2, len(leading))):
        each, rest = divmod(leading[dim], rows)
        if not rest and (dim == 0 or each == 1) and _only(first, dim, 0, each) and _only(second, dim, 1, each):
            return _counted(leading, small, dim, trial)
    return _MIXED if len(leading) > 1 else _GATHERED


def _only(moved: Tensor, dim: int, row: int, each: int) -> bool:
    """Whether entries moved in one row, and in no other."""
    own = moved.narrow(dim, row * each, each)
    return bool(own.any()) and int(own.sum()) == int(moved.sum())


def _counted(leading: torch.Size, small: torch.Size, dim: int, trial: Trial) -> Finding:
    """How many entries a row has: as many in both calls, or one a token."""
    (rows, length), (few, other) = _pair(trial.many), _pair(trial.few)
    if len(small) != len(leading) or small[dim] % few:
        return _GATHERED
    each = leading[dim] // rows, small[dim] // few
    if len(leading) == 1:  # (B, d) or (B T, d)
        if each[0] == each[1]:
            return RowLayout(counts=frozenset({each[0]}), tokens=False)
        return RowLayout(counts=frozenset(), by_token=True) if each == (length, other) else _GATHERED
    in_order = not trial.text or (leading[1 - dim], small[1 - dim]) == (length, other)
    tokens = len(leading) == 2 and each == (1, 1) and in_order
    return RowLayout(dim, frozenset({each[0]}), windows=each[0] != each[1], tokens=tokens)


def _pair(sizes: Sizes) -> tuple[int, int]:
    return sizes.rows, sizes.length
