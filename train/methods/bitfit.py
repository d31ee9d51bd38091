"""BitFit."""

from __future__ import annotations

from train.method import Method, register


@register("bitfit")
class BitFit(Method):
    """Trains every bias, those of layer norms too, and the task's head. Stores what was added to each bias.

    A base without biases (LLaMA, T5) gets zero ones at its linear sites.
    """

    kind = "bias"
    paper = "arXiv:2106.10199"
