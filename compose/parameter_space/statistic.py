"""What a merge may ask to be measured of each adapter on data, at each linear site: activations and gradients.

A merge names one (``needs=InputGram``) and is given its values as a last argument, one tensor for each adapter.
Importing this needs no torch: merges are declared without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Statistic(ABC):
    """A sum over data, for one adapter at one site.

    ``gradients`` says whether the loss is differentiated: then rows come one by one, each with its own loss.
    """

    gradients: ClassVar[bool] = False

    def __init__(self) -> None:
        self.total: Tensor | None = None

    @staticmethod
    @abstractmethod
    def shape(d_out: int, d_in: int) -> tuple[int, int]:
        """Shape of the total at a site."""

    @staticmethod
    def block(total: Tensor, lo: int, hi: int) -> Tensor:  # noqa: ARG004
        """What an elementwise merge of the rows lo..hi of a weight is given: all of it, unless this is overridden."""
        return total

    @abstractmethod
    def term(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """What one call of the layer adds.

        ``x`` (n, d_in) are the tokens that enter it, zero where they are padding; ``gradient`` (n, d_out) is that of
        the row's loss with respect to what leaves it, if gradients are asked for. Both float32.
        """

    def add(self, x: Tensor, gradient: Tensor | None = None) -> None:
        """Count one call of the layer in."""
        term = self.term(x, gradient)
        self.total = term if self.total is None else self.total.add_(term)


class InputGram(Statistic):
    """`G = sum_t x_t x_t^T` over all tokens, (d_in, d_in)."""

    @staticmethod
    def shape(d_out: int, d_in: int) -> tuple[int, int]:  # noqa: ARG004
        """(d_in, d_in)."""
        return d_in, d_in

    def term(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """`X^T X`."""
        return x.T @ x


class SquaredGradient(Statistic):
    """`F = sum_b (dL_b / dW)^2` over the rows b of the data, (d_out, d_in): the diagonal of the empirical Fisher."""

    gradients = True

    @staticmethod
    def shape(d_out: int, d_in: int) -> tuple[int, int]:
        """(d_out, d_in)."""
        return d_out, d_in

    @staticmethod
    def block(total: Tensor, lo: int, hi: int) -> Tensor:
        """The same rows as of the weight."""
        return total[lo:hi]

    def term(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """`(g^T x)^2`, entry by entry."""
        assert gradient is not None  # noqa: S101 - asked for
        return (gradient.T @ x).square_()
