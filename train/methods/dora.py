"""DoRA."""

from __future__ import annotations

from train.method import Method, register


@register("dora")
class Dora(Method):
    """`m (W + s B A) / ||W + s B A||_row`, the norm held constant in the backward pass. Stores m, A and B."""

    kind = "dora"
    paper = "arXiv:2402.09353"
