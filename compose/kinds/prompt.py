"""Prompt tuning: trained embeddings before the input (arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from compose.atoms import Prompt
from compose.kind import Adapter, KindConfig, KindError, register
from compose.sites import SiteMap


class PromptConfig(KindConfig):
    """Length of the prompt and where it starts from."""

    num_virtual_tokens: int = Field(20, ge=1, description="n")
    init: Literal["vocab", "uniform"] = Field(
        "vocab", description="vocab: embeddings of random tokens; uniform: U(-.5, .5)"
    )


@register("prompt")
class PromptTuning(Adapter):
    """The input embeddings E (T, d) become [P; E] with P (n, d).

    The n extra positions are taken off token-level outputs again. On an encoder-decoder the prompt goes to the
    encoder. Not the identity at first.
    """

    Config = PromptConfig
    config: PromptConfig
    peft_type = "PROMPT_TUNING"
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
        ]
    )
    suffixes = {"P": "prompt_embeddings"}

    @property
    def identity_at_init(self) -> bool:
        """Never: attention is shared with the virtual tokens from the start."""
        return False

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """One matrix."""
        if self.config.target_modules is not None or self.config.layers is not None:
            raise KindError("a prompt stands before the input embeddings: it takes no target_modules and no layers")
        self.paths = (sites.embedding,)
        table = model.get_input_embeddings().weight
        n, (vocabulary, width) = self.config.num_virtual_tokens, table.shape
        if self.config.init == "vocab":
            chosen = torch.randint(vocabulary, (n,), generator=self.generator)
            weight = table.detach()[chosen.to(table.device)].float().cpu()
        else:
            weight = torch.rand(n, width, generator=self.generator) - 0.5
        self.add("", "P", weight)

    def prompt(self) -> Prompt | None:
        """The embeddings."""
        return Prompt(self.at("", "P"))

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
        """Read PEFT's PromptTuningConfig."""
        return {"num_virtual_tokens": fields.get("num_virtual_tokens")}
