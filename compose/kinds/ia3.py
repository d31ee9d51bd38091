"""(IA)^3: learned gains on keys, values and the feed-forward input (arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below
from compose.base.sites import SiteMap
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register


class Ia3Config(KindConfig):
    """Targets in ``feedforward_modules`` are scaled at their input, the others at their output."""

    feedforward_modules: tuple[str, ...] | None = Field(
        None, description="those of the targets whose input is scaled; default: the mlp.down sites"
    )


@register("ia3")
class Ia3(Adapter):
    """Output gain y = l * (W x + b), l (d_out,), or input gain y = W (l * x) + b, l (d_in,). Starts at l = 1.

    The output gain scales the bias too.
    """

    Config = Ia3Config
    config: Ia3Config
    peft_type = "IA3"
    paper = "arXiv:2205.05638"
    default_targets = ("attn.k", "attn.v", "attn.qkv", "mlp.down")
    peft_fields = frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})
    suffixes = {"out": "ia3_l", "in": "ia3_l"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """One vector a site, shaped as PEFT's: (d_out, 1) or, feed-forward, (1, d_in)."""
        chosen = self.targets(sites)
        self.paths = tuple(s.path for s in chosen)
        marked = self.config.feedforward_modules
        if marked is None:
            inputs = {s.path for s in chosen if s.role == "mlp.down"}
        else:
            inputs = {s.path for s in chosen if any(s.path in {t.path for t in sites.select(m)} for m in marked)}
        for site in chosen:
            if site.path in inputs:
                self.add(site.path, "in", torch.ones(1, site.in_features))
            else:
                self.add(site.path, "out", torch.ones(site.out_features, 1))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """An input gain or an output gain."""
        if path not in self.paths:
            return None
        if self.has(path, "in"):
            return Atoms(input_gain=self.at(path, "in").flatten())
        return Atoms(gain=self.at(path, "out").flatten(), gain_scales_bias=True)

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's IA3Config; the feed-forward modules are filled in from the sites by the exporter."""
        return {"fan_in_fan_out": sites.model_type == "gpt2", "init_ia3_weights": True}

    def peft_feedforward(self) -> list[str]:
        """``feedforward_modules`` of PEFT's config: whole paths of the sites scaled at their input."""
        return sorted(p for p in self.paths if self.has(p, "in"))

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT's IA3Config."""
        marked = fields.get("feedforward_modules") or ()
        return {"feedforward_modules": (marked,) if isinstance(marked, str) else tuple(sorted(marked))}
