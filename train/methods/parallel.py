"""Parallel adapters."""

from __future__ import annotations

from train.method import Method, register


@register("parallel")
class Parallel(Method):
    """`h_ffn + s W_u relu(W_d x)` with x the *input* of the feed-forward block, W_u zero at first. Stores both."""

    kind = "bottleneck"
    paper = "arXiv:2110.04366"
    defaults = {"style": "parallel", "scaling": 4.0}
