"""Houlsby adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from compose.runtime.model_runtime import runtime
from train.method import Composite, Method, register


@register("houlsby")
class Houlsby(Method):
    """`h + W_u gelu(W_d h + b_d) + b_u` after attention and after the feed-forward block.

    Both start as a normal of 1e-3, truncated. The layer norms inside the blocks train too, as in the paper. Stores W_d,
    W_u and, whole, the norms.
    """

    kind = "bottleneck"
    paper = "arXiv:1902.00751"
    defaults = {"style": "houlsby", "bottleneck_size": 64}

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """The norms of the blocks are carried beside the task's head."""
        sites = runtime(model).sites
        norms = [p for p in sites.norms if sites.layer_of(p) is not None and sites.passes_text(p)]
        return super().build(model, seed=seed, heads=(*norms, *heads), tokenizer=tokenizer)
