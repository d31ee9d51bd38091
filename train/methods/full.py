"""Full fine-tuning."""

from __future__ import annotations

from train.method import Method, register


@register("full")
class Full(Method):
    """Trains every weight: the reference for all other methods. Stores the whole difference from the base."""

    kind = "dense"
    defaults = {"target_modules": "all"}
