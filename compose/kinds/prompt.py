"""Prompt tuning (arXiv:2104.08691), at slots (P-tuning, arXiv:2103.10385), or made from the input (instance-wise)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Prompt, Replace
from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register
from compose.slots.call import own_forward


class PromptConfig(KindConfig):
    """Length of the prompt, where it stands and where it starts from."""

    num_virtual_tokens: int = Field(20, ge=1, description="n")
    init: Literal["vocab", "uniform"] = Field(
        "vocab", description="vocab: embeddings of random tokens; uniform: U(-.5, .5)"
    )
    slot_token: int | None = Field(
        None, ge=0, description="id of the token that holds a place for the next virtual token; default: all in front"
    )
    instance: Literal["table", "mlp"] | None = Field(
        None, description="made from the first n tokens of each text: looked up, or computed from their embeddings"
    )
    generator_width: int = Field(64, ge=1, description="of the mlp")


@register("prompt")
class PromptTuning(Adapter):
    """The input embeddings E (T, d) become [P; E] with P (n, d).

    The n extra positions are taken off token-level outputs again. On an encoder-decoder the prompt goes to the
    encoder. Not the identity at first.

    With ``slot_token`` nothing is put in front: the k-th such token of a row gets P_k for its embedding (P-tuning's
    pseudo tokens, anywhere in a template). With ``instance`` P depends on the text x (instance-wise prompts): rows
    x_1..x_n of a table (|V|, d), or W_u tanh(W_d e(x_i) + b) of the base's embeddings e, W_d (m, d), W_u (d, m).
    """

    Config = PromptConfig
    config: PromptConfig
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    peft_aliases = ("P_TUNING",)  # whose files hold what its encoder makes
    paper = "arXiv:2104.08691"
    averages_in_weight = False
    peft_fields = frozenset(
        [
            "num_virtual_tokens",
            "token_dim",
            "num_attention_heads",
            "num_layers",
            "num_transformer_submodules",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
            "encoder_reparameterization_type",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_dropout",
        ]
    )
    suffixes = {
        "P": "prompt_embeddings",
        "table": "prompt_table",
        "down": "prompt_generator.down.weight",
        "down_b": "prompt_generator.down.bias",
        "up": "prompt_generator.up.weight",
    }

    @property
    def identity_at_init(self) -> bool:
        """Never: attention is shared with the virtual tokens from the start."""
        return False

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """One matrix, or what makes one from the input."""
        c = self.config
        if c.target_modules is not None or c.layers is not None:
            raise KindError("a prompt stands before the input embeddings: it takes no target_modules and no layers")
        if c.slot_token is not None and c.instance is not None:
            raise KindError("a prompt stands at slots of a template or is made from the text before it: not both")
        if sites.input_table is None:
            raise KindError(f"kind 'prompt' cannot work on {sites.model_type}, whose input is not looked up in a table")
        self.paths = (sites.embedding,)
        table = cast("Tensor", model.get_submodule(sites.embedding).weight)
        vocabulary, width = table.shape
        if c.slot_token is not None and c.slot_token >= vocabulary:
            raise KindError(f"slot_token {c.slot_token} is no id of this base, whose vocabulary has {vocabulary}")
        if c.slot_token is not None or c.instance is not None:
            self.peft_type = None  # type: ignore[misc]  # PEFT only puts a fixed prompt in front
        if c.instance is None:
            self.add("", "P", self._fixed(table, c.num_virtual_tokens))
        elif c.instance == "table":
            self.add("", "table", torch.rand(vocabulary, width, generator=self.generator) - 0.5)
        else:
            for name, rows, columns in (("down", c.generator_width, width), ("up", width, c.generator_width)):
                weight = torch.empty(rows, columns)
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=self.generator)
                self.add("", name, weight)
            self.add("", "down_b", torch.zeros(c.generator_width))
            self._embed = _Lookup(model.get_submodule(sites.embedding))

    def _fixed(self, table: Tensor, n: int) -> Tensor:
        vocabulary, width = table.shape
        if self.config.init == "uniform":
            return torch.rand(n, width, generator=self.generator) - 0.5
        chosen = torch.randint(vocabulary, (n,), generator=self.generator)
        return table.detach()[chosen.to(table.device)].float().cpu()

    def prompt(self) -> Prompt | None:
        """The embeddings in front, or the function that makes them."""
        c = self.config
        if c.slot_token is not None:
            return None
        if c.instance is None:
            return Prompt(self.at("", "P"))
        some = self.at("", "table" if c.instance == "table" else "up")
        width = some.shape[1] if c.instance == "table" else some.shape[0]
        return Prompt(some.new_zeros(c.num_virtual_tokens, width), self._of)

    def _of(self, ids: Tensor) -> Tensor:
        """Prompts (B, n, d) for the first n tokens (B, n) of each text."""
        if self.config.instance == "table":
            return F.embedding(ids, self.at("", "table"))
        down, down_b, up = (self.at("", name) for name in ("down", "down_b", "up"))
        return F.linear(torch.tanh(F.linear(self._embed(ids).to(down.dtype), down, down_b)), up)

    def lower(self, path: str, below: Below) -> Atoms | None:
        """At slots: other embeddings for the tokens that hold them."""
        if path not in self.paths or self.config.slot_token is None:
            return None
        rows, slot, table = self.at("", "P"), self.config.slot_token, below.forward

        def embed(ids: Tensor) -> Tensor:
            slots = ids == slot  # (B, T)
            order = slots.cumsum(1) - 1  # which virtual token each slot of a row holds
            if bool((order >= len(rows)).any()):
                raise KindError(f"a text has more than the {len(rows)} slots of prompt {self.name!r}")
            y = cast("Tensor", table(ids))
            return torch.where(slots[..., None], rows.to(y.dtype)[order.clamp_min(0)], y)

        return Atoms(function=Replace(embed))

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's PromptTuningConfig."""
        assert isinstance(config, PromptConfig)  # noqa: S101 - narrows the type
        heads = getattr(sites.config, "num_attention_heads", None) or sites.config.num_heads
        depth = {s.layer for s, _ in sites.attention_modules()}
        return {
            "num_virtual_tokens": config.num_virtual_tokens,
            "token_dim": sites.hidden_size,
            "num_attention_heads": heads,
            "num_layers": len(depth),
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT's PromptTuningConfig or PromptEncoderConfig."""
        return {"num_virtual_tokens": fields.get("num_virtual_tokens")}


class _Lookup:
    """The base's own table as a function: it must not become a part of the adapter."""

    def __init__(self, table: nn.Module) -> None:
        self._table = table

    def __call__(self, ids: Tensor) -> Tensor:
        return cast("Tensor", own_forward(self._table)(ids)).detach()
