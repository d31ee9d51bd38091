"""How the states of a text become its vector: what the base says, and the sums that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LAYER = "1_Pooling/config.json"  # where sentence-transformers writes it
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


def pooling_of(model: PreTrainedModel, *, decodes: bool) -> str:
    """What the base's directory says (sentence-transformers' pooling layer), else the mean; a decoder's last token."""
    path = Path(str(getattr(model.config, "_name_or_path", "") or "")) / _LAYER
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    asked = [mode for name, mode in _MODES.items() if told.get(name) is True]
    return asked[0] if len(asked) == 1 else "last" if decodes else "mean"


class Pool:
    """The vector of one text, from its states as they come in chunks."""

    def __init__(self, mode: str) -> None:
        self._mode, self._sum, self._count = mode, torch.zeros(()), 0

    def add(self, states: Tensor) -> None:
        """The last layer's states (n, d) of the next n tokens."""
        if not len(states):
            return
        if self._mode == "mean":
            self._sum = self._sum + states.float().sum(0).cpu()
        elif self._mode == "last" or not self._count:
            self._sum = states[-1 if self._mode == "last" else 0].float().cpu()
        self._count += len(states)

    @property
    def vector(self) -> tuple[float, ...]:
        """(d,)."""
        return tuple((self._sum / self._count if self._mode == "mean" else self._sum).tolist())
