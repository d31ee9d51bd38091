"""Prompt tuning with its choices of a start."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.errors import ConfigError
from train.method import Method, MethodOptions, register


class PromptOptions(MethodOptions):
    """Words to start from."""

    init_text: str | None = Field(
        None, description="start from the embeddings of this text, repeated to the length: label words, an instruction"
    )


@register("prompt")
class Prompt(Method):
    """`[P; emb(x)]` with P (n, d) from the vocabulary, from uniform noise or from words. Stores P.

    Label words (`init_text: "positive negative"`) are what the paper found best for small models.
    """

    kind = "prompt"
    paper = "arXiv:2104.08691"
    Options = PromptOptions
    own: PromptOptions

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """The prompt, over the words if some are given."""
        if self.own.init_text is not None:
            ids = tokenizer(self.own.init_text, add_special_tokens=False)["input_ids"] if tokenizer else []
            if not ids:
                raise ConfigError(f"init_text {self.own.init_text!r} has no token", hint="give words of the vocabulary")
            table, prompt = model.get_input_embeddings().weight, adapter.at("", "P")
            turn = torch.tensor([ids[i % len(ids)] for i in range(len(prompt))], device=table.device)
            with torch.no_grad():
                prompt.copy_(table[turn])
