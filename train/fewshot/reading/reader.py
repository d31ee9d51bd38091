"""What a masked language model says of a prompt: scores of the label words, and the states to put a head on."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from compose.base.text_config import fact
from train.errors import TrainError
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.reading.replay import Replay

__all__ = ["MaskReader", "PromptModel", "inputs_of", "mean_state", "usable_positions"]


class MaskReader(nn.Module):
    """A masked language model that computes vocabulary logits at the masks only.

    The output embedding is fed the masked positions alone: for short texts the whole vocabulary at every position
    would cost as much as the layers.

    Raises
    ------
    TrainError
        The model has no output embedding.
    """

    def __init__(self, lm: nn.Module, replay: Replay | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.replay = replay
        output: nn.Module | None = cast("Any", lm).get_output_embeddings()
        if output is None:
            raise TrainError(f"{type(lm).__name__} has no output embedding to read words from", hint="a masked-LM base")
        self._at: Tensor | None = None
        self._states = torch.empty(0)
        self._hook = output.register_forward_pre_hook(self._only_masks)

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def forward(self, mask_at: Tensor, row: Tensor | None = None, *, hidden: bool = False, **inputs: Tensor) -> Any:
        """`.logits` (B, k, V) at `mask_at` (B, k), and `.states` (B, k, d), what the output embedding was fed there.

        With `hidden` also `.hidden` (B, T, d) of the last layer.
        """
        self._at = mask_at
        if self.replay is not None:
            self.replay.rows = row
        try:
            out = self.lm(**inputs, output_hidden_states=hidden, return_dict=True)
        finally:
            self._at = None
        hidden_states = out.hidden_states[-1] if hidden else None
        return SimpleNamespace(logits=out.logits, states=self._states, hidden=hidden_states)

    def _only_masks(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._at is None:
            return None
        states = args[0]
        self._states = states.gather(1, self._at[..., None].expand(-1, -1, states.shape[-1]))
        return (self._states, *args[1:])


class PromptModel(nn.Module):
    """Label logits (B, C) of prompts: what `train.loop.fit` trains an adapter through."""

    def __init__(self, reader: MaskReader, scores: WordScores) -> None:
        super().__init__()
        self.reader, self.scores = reader, scores
        self.config = SimpleNamespace(use_cache=False)

    def forward(self, mask_at: Tensor, row: Tensor | None = None, **inputs: Tensor) -> Any:
        """`.logits` (B, C): the words' logits at the one mask."""
        return SimpleNamespace(logits=self.scores(self.reader(mask_at, row, **inputs).logits[:, 0]))


def usable_positions(model: Any) -> int:
    """Tokens that the base has positions for.

    RoBERTa and its kin count from behind their padding's id: of 514 positions 512 are texts'.
    """
    positions = fact(model.config, "max_position_embeddings") or sys.maxsize
    behind = [
        module.padding_idx + 1
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None
    ]
    return int(positions) - max(behind, default=0)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a reader takes of a batch."""
    return {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask", "token_type_ids", "mask_at")}


def mean_state(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, d) mean over the real tokens of (B, T, d), as unit vectors."""
    mask = attention_mask[..., None].to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)
