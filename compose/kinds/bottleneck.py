"""Bottleneck adapters: Houlsby (arXiv:1902.00751), Pfeiffer (arXiv:2005.00052) and parallel (arXiv:2110.04366)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from compose.atoms import Atoms, Below, Block, Function, Replace
from compose.base.sites import Site, SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register
from hub.errors import suggest

_PLACES = {"houlsby": ("attn.o", "mlp.down"), "pfeiffer": ("mlp.down",), "parallel": ("mlp.down",)}
_ACTIVATION = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}


class BottleneckConfig(KindConfig):
    """Where the adapter stands and how narrow it is."""

    style: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="houlsby: after attention and feed-forward; pfeiffer: after feed-forward; parallel: beside it",
    )
    reduction_factor: float = Field(16, gt=0, description="hidden size / width of the bottleneck")
    bottleneck_size: int | None = Field(None, ge=1, description="width; overrides reduction_factor")
    non_linearity: str | None = Field(None, description="default: gelu for houlsby, relu else")
    behind_norm: bool = Field(
        False, description="read and write behind the norm that follows the residual add, as AdapterHub's Pfeiffer does"
    )
    scaling: float = Field(1.0, description="s; the parallel adapter of MAM uses 4")
    init: Literal["houlsby", "lora"] | None = Field(
        None, description="houlsby: both normal(0.001); lora: up at zero. Default by style"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input while training")


@register("bottleneck")
class Bottleneck(Adapter):
    """`h + s (W_u f(W_d z + b_d) + b_u)`, W_d (m, d), W_u (d, m).

    h is the output of the linear that writes the residual stream (attn.o, mlp.down), before the residual add;
    z = h, except for the parallel style, where z is the input of the feed-forward block. With ``behind_norm`` the norm
    N after the residual add becomes u -> N(u + F(N(u))), F the adapter, in families whose norms follow the add.
    """

    Config = BottleneckConfig
    config: BottleneckConfig
    paper = "arXiv:1902.00751"
    averages_in_weight = False
    suffixes = {"down": "down.weight", "down_b": "down.bias", "up": "up.weight", "up_b": "up.bias"}

    @property
    def identity_at_init(self) -> bool:
        """Only with W_u at zero: the Houlsby init is a small step away from it."""
        return self._init() == "lora"

    def _init(self) -> str:
        return self.config.init or ("lora" if self.config.style == "parallel" else "houlsby")

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """Down and up projections at each place."""
        name = self.config.non_linearity or _ACTIVATION[self.config.style]
        if name not in ACT2FN:
            guess = suggest(name, ACT2FN)
            raise KindError(
                f"no activation is called {name!r}" + (f"; {guess}" if guess else ""),
                hint="for example relu, gelu, silu",
            )
        self._activation, self._act = name, ACT2FN[name]
        self._taps: dict[str, str | None] = {}
        # Each place is a linear site or, with behind_norm, the norm behind it, which the adapter then takes in.
        chosen = self.targets(sites, default=_PLACES[self.config.style])
        self._places = {s.path if not self.config.behind_norm else _norm_behind(s, sites): s for s in chosen}
        self.paths = tuple(self._places)
        for path, site in self._places.items():
            # A parallel adapter reads what enters the block, not what the site itself gives.
            self._taps[path] = sites.entry_beside(site).path if self.config.style == "parallel" else None
            d = site.out_features
            m = self.config.bottleneck_size or max(1, round(d / self.config.reduction_factor))
            down, up = torch.empty(m, d), torch.zeros(d, m)
            # With LoRA's start (up is zero) it is the identity at first, with Houlsby's only near it, as published.
            if self._init() == "houlsby":
                for weight in (down, up):
                    nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3, generator=self.generator)
            else:
                nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=self.generator)
            self.add(path, "down", down)
            self.add(path, "down_b", torch.zeros(m))
            self.add(path, "up", up)
            self.add(path, "up_b", torch.zeros(d))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The block function, with its tap if parallel."""
        if path not in self.paths:
            return None
        down, down_b, up, up_b = (self.at(path, n) for n in ("down", "down_b", "up", "up_b"))

        dropout = self.config.dropout if self.training and self.trainable else 0.0
        fn = Block(down, down_b, up, up_b, self._activation, self._act, self.config.scaling, dropout)
        if self.config.behind_norm:
            norm = below.forward
            return Atoms(function=Replace(lambda u: norm(u + fn(norm(u)).to(u.dtype))))
        return Atoms(function=Function(fn, self._taps[path]))


def _norm_behind(site: Site, sites: SiteMap) -> str:
    """Path of the norm that a post-norm family applies after the residual add behind ``site``."""
    block = site.path.rsplit(".", 1)[0]
    names = {"attn.o": ("LayerNorm", "sa_layer_norm"), "mlp.down": ("LayerNorm", "output_layer_norm")}
    near = [f"{parent}.{n}" for n in names.get(site.role, ()) for parent in (block, block.rsplit(".", 1)[0])]
    norm = next((path for path in near if path in sites.norms), None)
    if norm is None:
        raise KindError(f"no norm follows the residual add behind {site.path} in this {sites.model_type} model")
    return norm
