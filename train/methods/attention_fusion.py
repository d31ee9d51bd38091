"""Attention fusion."""

from __future__ import annotations

from train.method import Method, register


@register("attention_fusion")
class AttentionFusion(Method):
    """`c = sum_l softmax_l(q . h_l) h_l` for each token over all layers, then the head. Stores q, the head.

    q = 0 at first: the mean of the layers. The hidden states do not depend on q: no gradient enters the model, which
    runs without dropout.
    """

    kind = "attention_fusion"
    paper = "doi:10.18653/v1/2022.findings-naacl.64"
    noise = False
