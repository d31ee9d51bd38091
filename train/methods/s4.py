"""S4: a design found by searching over which method goes into which layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

import compose
from compose.base.sites import SiteMap
from compose.kind.adapter import Adapter
from compose.runtime.model_runtime import runtime
from train.errors import ConfigError
from train.method import Composite, Method, MethodOptions, register

# What each group of layers gets, from the bottom up.
GROUPS = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "bias"), ("prefix", "bias", "lora"))
_KINDS = {"adapter": "bottleneck", "lora": "lora", "prefix": "prefix", "bias": "bias"}
_SIZE = {"adapter": "bottleneck_size", "lora": "r", "prefix": "num_virtual_tokens"}


class S4Options(MethodOptions):
    """The budget."""

    per_layer: int | None = Field(None, ge=1, description="trained numbers a layer; default: 24 times the hidden size")


def spindle(layers: int) -> list[range]:
    """Four groups of layers with the sizes 2-4-4-2 in proportion: thin ends, thick middle.

    >>> [len(group) for group in spindle(12)], [len(group) for group in spindle(4)], [len(g) for g in spindle(6)]
    ([2, 4, 4, 2], [1, 1, 1, 1], [1, 2, 2, 1])
    """
    thin = max(1, round(layers / 6))
    return [range(start, end) for start, end in pairwise((0, thin, layers // 2, layers - thin, layers))]


@register("s4")
class S4(Method):
    """Four spindle-shaped groups of layers with another design each, at equal budgets a layer.

    From the bottom: adapter + LoRA, adapter + prefix, adapter + prefix + bias, prefix + bias + LoRA. A layer's budget
    is shared equally by its parts (a bias takes what it takes), each rounded to a whole rank, width or virtual token.
    Stores ten adapters, each at its layers, and their composition.
    """

    kind = "bottleneck >> lora >> prefix >> bias"
    paper = "arXiv:2301.01821"
    Options = S4Options
    own: S4Options

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """The members, group by group; the task's head is carried by the last."""
        sites = runtime(model).sites
        depth = 1 + max(site.layer for site in sites if site.layer is not None)
        if depth < len(GROUPS):
            raise ConfigError(f"s4 has four groups of layers, and this base has {depth} layers")
        budget = self.own.per_layer or 24 * sites.hidden_size
        members: dict[str, Adapter] = {}
        for number, (layers, parts) in enumerate(zip(spindle(depth), GROUPS, strict=True), 1):
            # A bias has no size to choose: it takes what it takes, and the others share the rest equally.
            left, sized = budget, [part for part in parts if part in _SIZE]
            if "bias" in parts:
                bias = self._member(model, number, "bias", layers, None, seed)
                members[bias.name] = bias
                left -= _count(bias) // len(layers)
            for part in sized:
                # Whole ranks, widths or tokens, as many as the share pays for; a LoRA's rank has a bound of its own.
                unit = _unit(sites, part)
                size = max(1, round(left / len(sized) / unit))
                if part == "lora":
                    size = min(size, _largest_rank(sites))
                # One member carries the head, or it would be added once for each.
                carried = tuple(heads) if number == len(GROUPS) and part == sized[-1] else ()
                member = self._member(model, number, part, layers, size, seed + len(members), carried)
                members[member.name] = member
        expression = " >> ".join(members)
        compose.activate(model, expression)
        return Composite(members, expression)

    def _member(
        self,
        model: PreTrainedModel,
        number: int,
        part: str,
        layers: range,
        size: int | None,
        seed: int,
        heads: Sequence[str] = (),
    ) -> Adapter:
        options: dict[str, Any] = {"layers": tuple(layers)}
        if size is not None:
            options[_SIZE[part]] = size
        if part == "adapter":
            options["init"] = "lora"
        if part == "lora":
            options["lora_alpha"] = size  # a scale of one, whatever the rank
        return self.create(model, self.member_name(f"{part}{number}"), _KINDS[part], options, seed=seed, heads=heads)


def _unit(sites: SiteMap, part: str) -> int:
    """Numbers that one more rank, unit of width or virtual token costs in a layer."""
    first = [site for site in sites if site.layer == 0]
    if part == "lora":
        return sum(s.in_features + s.out_features for s in first if s.role in ("attn.q", "attn.v", "attn.qkv"))
    if part == "adapter":
        return sum(2 * s.out_features + 1 for s in first if s.role == "mlp.down")
    keys = next(s for s in first if s.role in ("attn.k", "attn.qkv"))
    return 2 * (keys.out_features if keys.role == "attn.k" else keys.out_features // 3)


def _largest_rank(sites: SiteMap) -> int:
    return min(min(s.in_features, s.out_features) for s in sites if s.role in ("attn.q", "attn.v", "attn.qkv"))


def _count(adapter: Adapter) -> int:
    return sum(p.numel() for p in adapter.parameters())
