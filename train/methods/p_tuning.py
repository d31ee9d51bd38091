"""P-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.errors import ConfigError
from train.learner.reparametrize import fold, reparametrize
from train.method import Composite, Method, MethodOptions, register


class PTuningOptions(MethodOptions):
    """The encoder that makes the prompt, and where the prompt stands."""

    slot: str | None = Field(
        None, description="a token of the rows that holds a place for the next pseudo token; default: all in front"
    )
    hidden: int = Field(0, ge=0, description="width of the LSTM's states and of the MLP; 0: the embedding's own width")


class PromptEncoder(nn.Module):
    """`P = MLP(BiLSTM(E))`, two layers each; E and P are (n, d)."""

    def __init__(self, width: int, hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * (hidden // 2), hidden), nn.ReLU(), nn.Linear(hidden, width))
        with torch.no_grad():
            for parameter in self.parameters():
                bound = max(parameter.shape[-1], hidden // 2) ** -0.5
                parameter.uniform_(-bound, bound, generator=random)

    def forward(self, embedding: Tensor) -> Tensor:
        """The prompt."""
        prompt: Tensor = self.mlp(self.lstm(embedding[None])[0])
        return prompt[0]

    def right_inverse(self, prompt: Tensor) -> Tensor:
        """The pseudo tokens start from what the prompt was."""
        return prompt


@register("p_tuning")
class PTuning(Method):
    """Pseudo tokens through a two-layer BiLSTM and an MLP. Stores their outputs (n, d) alone, as a prompt.

    The encoder ties the pseudo tokens together while they train, and is dropped at the end. With `slot` they stand
    where a template puts them: `"[unused1] {text} [unused1] It was [MASK]."` has two places.
    """

    kind = "prompt"
    paper = "arXiv:2103.10385"
    Options = PTuningOptions
    own: PTuningOptions

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """The token of the slots by its id."""
        if self.own.slot is not None:
            self.kind_options = {**self.kind_options, "slot_token": _id(tokenizer, self.own.slot)}
        return super().build(model, seed=seed, heads=heads, tokenizer=tokenizer)

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """The prompt behind its encoder."""
        width = adapter.at("", "P").shape[1]
        reparametrize(adapter, "", "P", PromptEncoder(width, self.own.hidden or width, adapter.generator))

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """What the encoder makes."""
        fold(learner)
        return learner


def _id(tokenizer: Any, slot: str) -> int:
    ids = tokenizer(slot, add_special_tokens=False)["input_ids"] if tokenizer else []
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f"slot {slot!r} is not one token of this base", hint="one that its texts do not use, such as '[unused1]'"
        )
    return int(ids[0])
