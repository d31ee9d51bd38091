"""Attention fusion: a token's features are a learned mean of its states in all layers (Findings of NAACL 2022, 64)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Side
from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register
from compose.slots.side import Trace, depth


class AttentionFusionConfig(KindConfig):
    """No options of its own but ``layers``: those whose states are read beside the final ones; default: all."""


@register("attention_fusion")
class AttentionFusion(Adapter):
    """`c = sum_l softmax_l(q . h_l) h_l` for each token, over the embeddings, the blocks and the final states h_L.

    q (d,), zero at first: the uniform mean, which is not the identity. The states do not depend on q, so they can be
    computed once and kept: see :func:`fuse`. Carry the head with ``modules_to_save``, or put a ``head`` beside it.
    """

    Config = AttentionFusionConfig
    config: AttentionFusionConfig
    paper = "doi:10.18653/v1/2022.findings-naacl.64"
    averages_in_weight = False

    @property
    def identity_at_init(self) -> bool:
        """Never: it starts from the mean of the layers."""
        return False

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """The query."""
        if self.config.target_modules is not None:
            raise KindError("attention fusion reads whole layers: it takes layers, and no target_modules")
        total = depth(sites)
        self.read = tuple(range(total)) if self.config.layers is None else self.config.layers
        if not set(self.read) <= set(range(total)):
            raise KindError(f"layers {list(self.read)} are not all among 0-{total - 1}")
        self.paths = (FINAL,)
        self.add("", "query", torch.zeros(sites.hidden_size))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The fused states in place of the final ones."""
        return Atoms(function=Side(self._fused)) if path == FINAL else None

    def _fused(self, h: Tensor, trace: Trace) -> Tensor:
        # State l enters block l; what leaves the last block is h but for the final norm.
        return fuse([trace.hidden[i] for i in self.read] + [h], self.at("", "query")).to(h.dtype) - h


def fuse(states: Sequence[Tensor], query: Tensor) -> Tensor:
    """sum_l softmax_l(q . h_l) h_l for states (B, T, d) of each layer."""
    stacked = torch.stack([s.to(query.dtype) for s in states])  # (L, B, T, d)
    shares = torch.softmax(stacked @ query, dim=0)  # (L, B, T)
    return (shares[..., None] * stacked).sum(0)
