"""Ladder side-tuning: a small transformer beside the frozen one, fed by its hidden states (arXiv:2206.06522)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Side
from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register
from compose.slots.side import Trace, depth


class LadderConfig(KindConfig):
    """Width of the side network and how it is joined to the backbone."""

    reduction_factor: float = Field(8, gt=0, description="hidden size / width of the side network")
    temperature: float = Field(0.1, gt=0, description="T of the gates")
    residual: bool = Field(True, description="add to the backbone's final states; without: take their place")


_SHAPES: dict[str, tuple[int, int] | None] = {  # of a block, in widths; a norm is one vector
    "norm1": None,
    "qkv": (3, 1),
    "o": (1, 1),
    "norm2": None,
    "up": (4, 1),
    "down": (1, 4),
}


@register("ladder")
class Ladder(Adapter):
    """`s_i = Block_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i)`, s_0 = D_0 h_0, mu_i = sigmoid(a_i / T), a_i = 0 at first.

    h_i (B, T, d) is what block i of the backbone gives (h_0: what the first one gets), D_i (m, d), Block_i attention
    and feed-forward of width m = d / reduction_factor, each behind a norm. The final states become h + U s_L with U
    (d, m) zero at first, or U s_L alone. No gradient enters the backbone. ``layers`` chooses the rungs.
    """

    Config = LadderConfig
    config: LadderConfig
    paper = "arXiv:2206.06522"
    averages_in_weight = False

    @property
    def identity_at_init(self) -> bool:
        """As long as it only adds to the backbone."""
        return self.config.residual

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """The side network, one block a rung."""
        if self.config.target_modules is not None:
            raise KindError("a ladder stands beside the whole model: it takes layers, and no target_modules")
        total = depth(sites)
        self.rungs = tuple(range(total)) if self.config.layers is None else self.config.layers
        if not self.rungs or not set(self.rungs) <= set(range(total)):
            raise KindError(f"layers {list(self.rungs)} of a ladder are not all among 0-{total - 1}")
        self.paths = (FINAL,)
        d = sites.hidden_size
        m = max(1, round(d / self.config.reduction_factor))
        self._heads = math.gcd(m, max(1, m // 32))
        # s_0 comes from the embeddings; each rung brings a layer's states down to m and mixes them in by its gate.
        self._add_matrix("in", m, d)
        for i in self.rungs:
            self._add_matrix(f"{i}.in", m, d)
            self.add("", f"{i}.gate", torch.zeros(()))
            for name, shape in _SHAPES.items():
                if shape is None:
                    self.add("", f"{i}.{name}", torch.ones(m))
                else:
                    self._add_matrix(f"{i}.{name}", shape[0] * m, shape[1] * m)
        self.add("", "out", torch.zeros(d, m))  # zero: the final states are the base's at first

    def _add_matrix(self, name: str, rows: int, columns: int) -> None:
        weight = torch.empty(rows, columns)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=self.generator)
        self.add("", name, weight)

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The side network."""
        return Atoms(function=Side(self._climb)) if path == FINAL else None

    def _climb(self, h: Tensor, trace: Trace) -> Tensor:
        dtype = self.at("", "in").dtype
        s = F.linear(trace.hidden[0].to(dtype), self.at("", "in"))  # (B, T, m)
        for i in self.rungs:
            mu = torch.sigmoid(self.at("", f"{i}.gate") / self.config.temperature)
            rung = F.linear(trace.hidden[i + 1].to(dtype), self.at("", f"{i}.in"))
            s = self._block(i, mu * s + (1 - mu) * rung, trace)
        change = F.linear(s, self.at("", "out")).to(h.dtype)
        return change if self.config.residual else change - h

    def _block(self, i: int, s: Tensor, trace: Trace) -> Tensor:
        norm1, qkv, o, norm2, up, down = (self.at("", f"{i}.{name}") for name in _SHAPES)
        width = s.shape[-1]
        parts = F.linear(F.layer_norm(s, (width,), norm1), qkv)
        q, k, v = parts.view(*s.shape[:2], 3, self._heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, m / heads)
        # The side network decodes as the model does: its own keys and values are kept from call to call.
        k, v = trace.remember(f"{self.name}:{i}", k, v)
        mask = trace.visible(q.shape[2], k.shape[2], q.device)
        s = s + F.linear(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2), o)
        return s + F.linear(F.gelu(F.linear(F.layer_norm(s, (width,), norm2), up)), down)
