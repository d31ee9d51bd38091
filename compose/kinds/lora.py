"""LoRA: a low-rank delta at linear sites (arXiv:2106.09685), and its rank-stabilized scale (arXiv:2312.03732)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Moved
from compose.base.sites import Site, SiteMap
from compose.kind.adapter import KindConfig
from compose.kind.low_rank import LowRank, LowRankConfig
from compose.kind.registry import register


class LoraConfig(LowRankConfig):
    """PEFT's field names."""

    lora_bias: bool = Field(False, description="a bias on B too: y = W x + s (B A x + b)")


@register("lora")
class Lora(LowRank):
    """`y = W x + s B A x` with A (r, d_in), B (d_out, r), s = lora_alpha / r (or / sqrt(r) with ``use_rslora``).

    ``lora_bias`` adds s b, b (d_out,). At the input embeddings the row of token t moves by s B A[:, t], A (r, |V|)
    zero and B (d, r) normal at first; tied output embeddings stay as they are.
    """

    Config = LoraConfig
    config: LoraConfig
    paper = "arXiv:2106.09685"
    adapts_tables = True
    peft_fields = LowRank.peft_fields | {"lora_bias"}
    suffixes = {
        **LowRank.suffixes,
        "bias": "lora_B.bias",
        "table_A": "lora_embedding_A",
        "table_B": "lora_embedding_B",
    }

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """The pairs, and biases if wanted."""
        super().build(sites, model)
        for path in self.paths if self.config.lora_bias else ():
            if self.has(path, "B"):
                self.add(path, "bias", torch.zeros(sites[path].out_features))

    def add_pair(self, site: Site, rank: int) -> None:
        """A and B; at a table their roles at first are exchanged."""
        if site.role != "embed":
            super().add_pair(site, rank)
            return
        self.add(site.path, "table_A", torch.zeros(rank, site.in_features))
        self.add(site.path, "table_B", torch.randn(site.out_features, rank, generator=self.generator))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The pair (A, B) with its scale."""
        if path not in self.paths:
            return None
        scale = self.scales[path]
        if self.has(path, "table_A"):
            return Atoms(function=self._on_table(path, below.layer))
        bias = scale * self.at(path, "bias") if self.has(path, "bias") else None
        return Atoms(A=self.at(path, "A"), B=self.at(path, "B"), scale=scale, bias=bias, dropout=self.dropout)

    def _on_table(self, path: str, table: nn.Module) -> Moved:
        a, b, scale = self.at(path, "table_A"), self.at(path, "table_B"), self.scales[path]
        own = getattr(table, "embed_scale", 1.0)  # some tables multiply what they give

        def fn(ids: Tensor) -> Tensor:
            return F.linear(F.embedding(ids, a.T), b) * (scale * own)  # (B, T, r) -> (B, T, d)

        return Moved(fn, lambda: {"weight": scale * (b @ a).T})

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's LoraConfig."""
        assert isinstance(config, LoraConfig)  # noqa: S101 - narrows the type
        return {**super().peft_config(config, sites), "lora_bias": config.lora_bias}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT's LoraConfig."""
        return {**super().from_peft(fields), "lora_bias": fields.get("lora_bias", False)}
