"""Prefix tuning: trained keys and values before each self-attention's own (arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.atoms import Prefix
from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register
from compose.runtime.positions import position_argument
from compose.runtime.prefixes import takes_prefix


class PrefixConfig(KindConfig):
    """Length of the prefix and how it is trained."""

    num_virtual_tokens: int = Field(20, ge=1, description="n")
    move_positions: bool = Field(
        True, description="the text stands behind the prefix, at n, n + 1, ...; else at 0, 1, ..."
    )
    slides: bool = Field(
        True, description="sliding-window attention loses it as it loses a text before; else all of the text sees it"
    )
    init_std: float = Field(1.0, ge=0, description="standard deviation of the initial keys and values")


@register("prefix")
class PrefixTuning(Adapter):
    """`K <- [P_K; K], V <- [P_V; V]` in each self-attention; P (n, layers * 2 * kv_heads * head_dim) as PEFT has it.

    Real tokens take positions n, n + 1, ... as after n tokens in the cache, which is PEFT's convention; keys of the
    prefix are not rotated. On an encoder-decoder the decoder's self-attention gets the prefix. Where attention has a
    window of w places, the text's t-th token (from 0) sees the one that stands a places before the text as long as
    a + t < w, as in PEFT; without ``slides`` always. A call that tells no positions counts padding among them, as PEFT
    does. Not the identity at first: attention is shared with the prefix from the start.
    """

    Config = PrefixConfig
    config: PrefixConfig
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    paper = "arXiv:2101.00190"
    averages_in_weight = False
    peft_fields = frozenset(
        [
            "num_virtual_tokens",
            "token_dim",
            "num_attention_heads",
            "num_layers",
            "num_transformer_submodules",
            "encoder_hidden_size",
            "prefix_projection",
            "init_weights",
        ]
    )
    suffixes = {"P": "prompt_embeddings"}

    @property
    def identity_at_init(self) -> bool:
        """Never: attention is shared with the virtual tokens from the start."""
        return False

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """One matrix for all layers."""
        if self.config.target_modules is not None:
            raise KindError("a prefix acts in self-attention: it takes layers, but no target_modules")
        stack, layers = "decoder" if sites.is_encoder_decoder else None, self.config.layers
        chosen = [(s, p) for s, p in sites.attention_modules() if stack is None or s.stack == stack]
        if layers is not None:
            chosen = [(s, p) for s, p in chosen if s.layer in layers]
            self.peft_type = None  # type: ignore[misc]  # PEFT has no prefix for some layers only
        if not (self.config.move_positions and self.config.slides):
            self.peft_type = None  # type: ignore[misc]  # nor one that leaves the positions, or stays in sight
        if not chosen:
            raise KindError(f"kind 'prefix' finds no self-attention in this {sites.model_type} model")
        _check_family(sites, model, [p for _, p in chosen])
        self.heads, self.head_dim = attention_shape(sites)
        self.paths = tuple(p for _, p in chosen)
        self._rows = _layer_rows(len(chosen), doubled=sites.is_encoder_decoder)
        width = self.heads * self.head_dim
        weight = torch.empty(self.config.num_virtual_tokens, len(chosen) * 2 * width)
        nn.init.normal_(weight, std=self.config.init_std, generator=self.generator)
        self.add("", "P", weight)

    def prefix(self, path: str) -> Prefix | None:
        """Key and value of one attention module, each (n, kv_heads, head_dim)."""
        if path not in self.paths:
            return None
        parts: Tensor = self.at("", "P").view(self.config.num_virtual_tokens, -1, self.heads, self.head_dim)
        key, value = self._rows[self.paths.index(path)]
        return Prefix(parts[:, key], parts[:, value], moves=self.config.move_positions, slides=self.config.slides)

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's PrefixTuningConfig."""
        assert isinstance(config, PrefixConfig)  # noqa: S101 - narrows the type
        heads, head_dim = attention_shape(sites)
        layers = {s.layer for s, _ in sites.attention_modules() if s.stack != "encoder"}
        return {
            "num_virtual_tokens": config.num_virtual_tokens,
            "token_dim": heads * head_dim,
            "num_attention_heads": heads,
            "num_layers": len(layers),
            "num_transformer_submodules": 2 if sites.is_encoder_decoder else 1,
            "encoder_hidden_size": heads * head_dim,
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT's PrefixTuningConfig (the projection is not stored: the file holds its output)."""
        return {"num_virtual_tokens": fields.get("num_virtual_tokens")}


def _check_family(sites: SiteMap, model: PreTrainedModel, paths: list[str]) -> None:
    """Refuse a family whose attention or positions are made where a prefix cannot reach them."""
    closed = next((p for p in paths if not takes_prefix(model.get_submodule(p))), None)
    if closed is not None:
        raise KindError(
            f"kind 'prefix' cannot work on {sites.model_type}: {closed} does not go through transformers' attention "
            "interface, where the keys and values of a prefix come in"
        )
    fixed = next((p for p in sites.positions if position_argument(model.get_submodule(p)) is None), None)
    if fixed is not None:
        raise KindError(
            f"kind 'prefix' cannot work on {sites.model_type}: {fixed} makes up the positions itself, "
            "and the text after a prefix of n stands at n, n + 1, ..."
        )


def attention_shape(sites: SiteMap) -> tuple[int, int]:
    """(kv_heads, head_dim) of the self-attention, from the model's config (grouped queries have fewer kv heads).

    Raises
    ------
    KindError
        They differ from layer to layer.
    """

    def field(*names: str) -> Any:
        try:
            return next((value for name in names if (value := getattr(sites.config, name, None)) is not None), None)
        except RuntimeError:  # transformers says so of what each layer has its own of
            return ()

    heads = field("num_attention_heads", "num_heads")
    width, grouped = field("head_dim", "d_kv"), field("num_key_value_heads")
    if not isinstance(heads, int) or () in (width, grouped):
        raise KindError(
            f"kind 'prefix' cannot work on {sites.model_type}: not all of its layers have heads of one number and width"
        )
    return int(grouped or heads), int(width or sites.hidden_size // heads)


def _layer_rows(layers: int, *, doubled: bool) -> list[tuple[int, int]]:
    """Where layer i's key and value stand among the 2 L slices of P.

    PEFT writes an encoder-decoder's slices twice and deals them out four a layer (self, then cross, which it drops);
    so layer i's self-attention reads slices 4 i and 4 i + 1 of the doubled list.
    """
    step = 4 if doubled else 2
    return [((step * i) % (2 * layers), (step * i + 1) % (2 * layers)) for i in range(layers)]
