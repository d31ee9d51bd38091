"""Pfeiffer adapters."""

from __future__ import annotations

from train.method import Method, register


@register("pfeiffer")
class Pfeiffer(Method):
    """`h + W_u relu(W_d h + b_d) + b_u` after the feed-forward block only, width d / 16. Stores W_d and W_u."""

    kind = "bottleneck"
    paper = "arXiv:2005.00052"
    defaults = {"style": "pfeiffer", "reduction_factor": 16}
