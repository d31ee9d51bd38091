"""(IA)^3."""

from __future__ import annotations

from train.method import Method, register


@register("ia3")
class Ia3(Method):
    """Gains l_k on keys, l_v on values, l_ff inside the feed-forward block, all one at first. Stores the gains."""

    kind = "ia3"
    paper = "arXiv:2205.05638"
