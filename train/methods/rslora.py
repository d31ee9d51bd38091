"""Rank-stabilized LoRA."""

from __future__ import annotations

from train.method import Method, register


@register("rslora")
class RsLora(Method):
    """LoRA with the scale `lora_alpha / sqrt(r)`, under which gradients keep their size at any rank. Stores A and B."""

    kind = "lora"
    paper = "arXiv:2312.03732"
    defaults = {"use_rslora": True}
