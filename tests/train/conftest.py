"""A model small enough to reason about, data for it, and the built-in base's tokenizer."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compose
from train.batches import Dataset, Ragged
from train.config import TrainConfig

VOCABULARY = 23


class ToyLM(nn.Module):
    """A frozen bag-of-last-token language model with room for an adapter: logits (B, T, V)."""

    def __init__(self, adapter: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(7)
        self.embed = nn.Parameter(torch.randn(VOCABULARY, 16, generator=random), requires_grad=False)
        self.head = nn.Parameter(torch.randn(VOCABULARY, 16, generator=random) * 0.1, requires_grad=False)
        self.drop = nn.Dropout(dropout)
        self.adapter = adapter
        self.forwards = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.forwards += 1
        hidden = self.adapter(self.drop(self.embed[input_ids]))
        return types.SimpleNamespace(logits=hidden @ self.head.T)


class ToyAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(16, 4, generator=random) * 0.3)
        self.up = nn.Parameter(torch.zeros(4, 16))
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gain * (hidden + hidden @ self.down @ self.up)


@pytest.fixture
def toy():
    """A fresh (model, adapter) at the same initial values each time."""

    def make(dropout: float = 0.0) -> tuple[ToyLM, ToyAdapter]:
        adapter = ToyAdapter()
        return ToyLM(adapter, dropout).eval(), adapter

    return make


@pytest.fixture
def ragged_lm():
    """Language-modelling rows of unequal length in which the next token follows from the last one."""

    def make(rows: int = 50, seed: int = 0, shortest: int = 3, longest: int = 12) -> Dataset:
        random = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (rows,), generator=random).tolist()
        starts = torch.randint(0, VOCABULARY, (rows,), generator=random).tolist()
        ids = [[(start + 3 * i) % VOCABULARY for i in range(n)] for start, n in zip(starts, lengths, strict=True)]
        return Dataset({"input_ids": Ragged.of(ids)}, "causal_lm", source="toy")

    return make


@pytest.fixture
def config():
    """A TrainConfig with test-sized defaults."""

    def make(**changes: Any) -> TrainConfig:
        values = {"batch_size": 8, "duration": 12, "lr": 0.02, "schedule": "constant", "warmup": 0.0, **changes}
        return TrainConfig(**values)

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return compose.tokenizer("builtin:tiny-lm")
