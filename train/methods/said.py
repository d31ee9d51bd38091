"""Intrinsic dimension (SAID)."""

from __future__ import annotations

from train.method import Method, register


@register("said")
class Said(Method):
    """`theta_0i + lambda_i P_i(v)`, P a Fastfood projection, v = 0, lambda = 1 at first.

    Stores v, lambda and a seed.
    """

    kind = "said"
    paper = "arXiv:2012.13255"
