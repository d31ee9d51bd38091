"""LoRA."""

from __future__ import annotations

from train.method import Method, register


@register("lora")
class Lora(Method):
    """`y = W x + (lora_alpha / r) B A x`; A kaiming-uniform, B zero. Stores A and B."""

    kind = "lora"
    paper = "arXiv:2106.09685"
