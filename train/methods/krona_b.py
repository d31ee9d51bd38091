"""KronA^B."""

from __future__ import annotations

from train.method import Method, register


@register("krona_b")
class KronaB(Method):
    """`h_ffn + s (L kron R) z` with z the *input* of the feed-forward block, L zero at first. Stores the factors."""

    kind = "krona_b"
    paper = "arXiv:2212.10650"
