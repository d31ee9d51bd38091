"""QLoRA: a recipe more than a method."""

from __future__ import annotations

from train.method import Method, register


@register("qlora")
class QLora(Method):
    """LoRA at every linear but the output layer of an nf4 base with double quantization. Stores A and B.

    The recipe is the paper's for 7B and 13B models: r 64, alpha 16, dropout 0.1, constant rate 2e-4 after 3% of warmup,
    clipping at 0.3, batches of 16 grouped by length, gradient checkpointing, bf16 arithmetic, paged 32-bit AdamW (beta2
    0.999). For 33B and 65B it takes lora_dropout 0.05 and lr 1e-4. A value given in the run file wins.
    """

    kind = "lora"
    paper = "arXiv:2305.14314"
    defaults = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    recipe = {
        "quantize": "nf4",
        "precision": "bf16",
        "optimizer": "paged_adamw_32bit",
        "lr": 2e-4,
        "schedule": "constant",
        "warmup": 0.03,
        "clip": 0.3,
        "batch_size": 16,
        "group_by_length": True,
        "gradient_checkpointing": True,
    }
