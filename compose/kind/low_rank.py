"""What LoRA and DoRA share: the config with PEFT's field names, the factors, and PEFT's file format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from compose.base.sites import Site, SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.patterns import Patterns, as_dict, value_at, whole

# Initializations that leave the base alone. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) move part of its weight
# into A and B, so the pair means nothing on the plain base.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


class LowRankConfig(KindConfig):
    """PEFT's field names. The scale is lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``."""

    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(8, description="numerator of the scale")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A while training")
    use_rslora: bool = Field(False, description="scale by 1 / sqrt(r) instead of 1 / r (arXiv:2312.03732)")
    rank_pattern: Patterns = Field((), description="other ranks, by the end of a module's path")
    alpha_pattern: Patterns = Field((), description="other alphas, by the end of a module's path")

    @property
    def scale(self) -> float:
        """`s` in `s B A` where no pattern says otherwise."""
        return self._scale(self.r, self.lora_alpha)

    def rank_at(self, path: str) -> int:
        """Rank at a module."""
        rank = value_at(self.rank_pattern, path, self.r)
        if rank != int(rank) or rank < 1:
            raise KindError(f"rank_pattern gives {path} the rank {rank:g}")
        return int(rank)

    def scale_at(self, path: str) -> float:
        """`s` at a module."""
        return self._scale(self.rank_at(path), value_at(self.alpha_pattern, path, self.lora_alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class LowRank(Adapter):
    """A (r, d_in), kaiming-uniform(sqrt 5), and B (d_out, r), zero, at each target: the identity at first."""

    Config = LowRankConfig
    config: LowRankConfig
    peft_type = "LORA"
    peft_fields = frozenset(
        [
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "use_dora",
            "bias",
            "fan_in_fan_out",
            "init_lora_weights",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
            "eva_config",
        ]
    )
    suffixes = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """Create A and B at each target."""
        chosen = self.targets(sites)
        self.paths = tuple(s.path for s in chosen)
        self.scales = {path: self.config.scale_at(path) for path in self.paths}
        for site in chosen:
            self.add_pair(site, self.config.rank_at(site.path))  # PEFT trains ranks above a layer's smaller side, too

    def add_pair(self, site: Site, rank: int) -> None:
        """A and B of one site."""
        a = torch.empty(rank, site.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=self.generator)
        self.add(site.path, "A", a)
        self.add(site.path, "B", torch.zeros(site.out_features, rank))

    @property
    def dropout(self) -> float:
        """Rate on the input of A in the call under way: nothing is dropped unless the adapter trains."""
        return self.config.lora_dropout if self.training and self.trainable else 0.0

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's LoraConfig."""
        assert isinstance(config, LowRankConfig)  # noqa: S101 - narrows the type
        return {
            **config.model_dump(include={"r", "lora_dropout", "use_rslora"}),
            "lora_alpha": whole(config.lora_alpha),
            "rank_pattern": as_dict(config.rank_pattern, sites.paths),
            "alpha_pattern": as_dict(config.alpha_pattern, sites.paths),
            "use_dora": cls.kind == "dora",
            "bias": "none",
            "fan_in_fan_out": sites.model_type == "gpt2",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT's LoraConfig, refusing by name what a plain pair cannot express."""
        init, bias = fields.get("init_lora_weights", True), fields.get("bias", "none")
        if init not in _PLAIN_INITS:
            raise KindError(
                f"this PEFT LoRA has init_lora_weights={init!r}, which changes the base model's own weights",
                hint="save it with PEFT's path_initial_model_for_weight_conversion to get a plain LoRA",
            )
        if bias != "none":
            raise KindError(
                f"this PEFT LoRA trains biases too (bias={bias!r}), which kind {cls.kind!r} cannot express",
                hint="train it with bias='none', or merge it with PEFT's merge_and_unload",
            )
        return {
            "r": fields.get("r", 8),  # PEFT's defaults
            "lora_alpha": fields.get("lora_alpha", 8),
            "lora_dropout": fields.get("lora_dropout", 0.0),
            "use_rslora": fields.get("use_rslora", False),
            "rank_pattern": fields.get("rank_pattern") or (),
            "alpha_pattern": fields.get("alpha_pattern") or (),
        }
