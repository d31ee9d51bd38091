"""Where the rows of a batch stand in what enters a module.

Most modules get (B, T, d), some (T, B, d), (B T, d), or (B W, T, d) with W windows a row. A program that weighs rows
apart is computed on rows in the first dimension and one after the other; a :class:`RowLayout` brings them there and
back. Which one a module has is found by trial (:mod:`compose.runtime.row_trials`), never by the sizes of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from compose.errors import KindError


class Place(Protocol):
    """The module that the layout is of."""

    path: str
    on_features: bool


@dataclass(frozen=True)
class RowLayout:
    """Rows lie along dimension ``dim`` (0 or 1), with one of ``counts`` entries each.

    ``by_token``: or as many as a row has tokens. ``windows``: or any number, the same for all rows. ``tokens``: what a
    row has are the tokens of its text, in their order, so that weights per token mean something there.
    """

    dim: int = 0
    counts: frozenset[int] = frozenset({1})
    by_token: bool = False
    windows: bool = False
    tokens: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether it is (B, T, d) and nothing else."""
        return self.dim == 0 and self.counts == {1} and not self.by_token and not self.windows

    def joined(self, other: RowLayout) -> RowLayout | None:
        """The layout of a module that is called with both; None if rows lie in different dimensions."""
        if self.dim != other.dim:
            return None
        return replace(
            self,
            counts=self.counts | other.counts,
            by_token=self.by_token or other.by_token,
            windows=self.windows or other.windows,
            tokens=self.tokens and other.tokens,
        )

    def rows_first(self, x: Tensor, batch: int, lengths: Sequence[int], at: Place) -> Tensor:
        """``x`` as (B, T, d), (k B, T, d) or (B, T) token ids; what does not act on features gets (B, C, H, W).

        Raises
        ------
        KindError
            There are not as many entries as B = ``batch`` rows, of ``lengths`` tokens, can have.
        """
        entries = x.shape[self.dim] if x.dim() > self.dim else 0
        if entries != batch or 1 not in self.counts:
            self._check(entries, batch, lengths, at.path)
        if self.dim == 1:
            return x.transpose(0, 1)
        return x.reshape(batch, -1, x.shape[-1]) if _is_flattened(x, at) else x

    def _check(self, entries: int, batch: int, lengths: Sequence[int], path: str) -> None:
        if batch and entries % batch == 0:
            each = entries // batch
            if self.windows or each in self.counts or (self.by_token and each in lengths):
                return
        raise KindError(
            f"{entries} entries come to {path} for {batch} rows, so that nothing says which are whose",
            hint="activate one composition for the whole batch",
        )

    def back(self, y: Tensor, x: Tensor, at: Place) -> Tensor:
        """The output ``y`` for :meth:`rows_first` of ``x``, laid out as the module's own for ``x``."""
        if self.dim == 1:
            return y.transpose(0, 1).contiguous()
        if not _is_flattened(x, at):
            return y
        return y.flatten(0, 1) if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


ROWS_FIRST = RowLayout()


def _is_flattened(x: Tensor, at: Place) -> bool:
    return x.is_floating_point() and (x.dim() == 2 or (x.dim() > 3 and at.on_features))
