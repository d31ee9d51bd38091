"""Averages: model soups (arXiv:2203.05482), adapter soups (arXiv:2302.07027), AdaMix (arXiv:2205.12410)."""

from __future__ import annotations

from typing import Any

from compose.functions.average import shares
from compose.parameter_space.method import linear


@linear("average", paper="arXiv:2203.05482")
def average(o: Any, n: int) -> list[float]:
    """sum_i w_i tau_i / sum_i w_i, with equal weights unless ``weights`` are given."""
    return [float(share) for share in shares(n, o.weights)]
