"""What a merge may ask to be measured of each adapter on data, at each linear site: activations and gradients.

A merge names one (``needs=InputGram``), and is given its values as a last argument, one tensor for each adapter.
Importing this needs no torch: merges are declared without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Statistic(ABC):
    """A sum over batches, for one adapter at one site; ``gradients`` says whether the loss is differentiated."""

    gradients: ClassVar[bool] = False
    total: Tensor | None = None

    @staticmethod
    @abstractmethod
    def elements(d_in: int, d_out: int) -> int:
        """How many numbers are kept at a site."""

    @abstractmethod
    def of(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """The term of one batch.

        ``x`` (B, T, d_in) is what enters the site, zero where a row is padded; ``gradient`` (B, T, d_out) that of the
        batch's summed loss with respect to what leaves it. Both float32.
        """

    def add(self, x: Tensor, gradient: Tensor | None) -> None:
        """Count one batch in."""
        term = self.of(x, gradient)
        self.total = term if self.total is None else self.total + term


class InputGram(Statistic):
    """`G = sum_t x_t x_t^T` over all tokens, (d_in, d_in)."""

    @staticmethod
    def elements(d_in: int, d_out: int) -> int:  # noqa: ARG004
        """d_in^2."""
        return d_in * d_in

    def of(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """`X^T X`."""
        rows = x.flatten(0, -2)
        return rows.T @ rows


class SquaredGradient(Statistic):
    """`F = sum_b (dL_b / dW)^2` over the rows of all batches, (d_out, d_in): the diagonal of the empirical Fisher."""

    gradients = True

    @staticmethod
    def elements(d_in: int, d_out: int) -> int:
        """d_in d_out."""
        return d_in * d_out

    def of(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """`sum_b (g_b^T x_b)^2`, entry by entry."""
        assert gradient is not None  # noqa: S101 - it is asked for
        total = x.new_zeros(gradient.shape[-1], x.shape[-1])
        for x_b, g_b in zip(x, gradient, strict=True):  # row by row: all at once would be (B, d_out, d_in)
            total += (g_b.T @ x_b).square()
        return total
