"""KronA."""

from __future__ import annotations

from train.method import Method, register


@register("krona")
class Krona(Method):
    """`W x + s (A kron B) x`, one factor zero at first, by the vec trick. Stores the factors."""

    kind = "krona"
    paper = "arXiv:2212.10650"
