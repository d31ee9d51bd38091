"""Shared by the tests of merging: a tiny model, adapters on it, and how far two compositions are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compose
from compose.algebra import parse
from compose.merging.merge import merge
from compose.parameter_space.effect import effect_of
from compose.runtime.model_runtime import runtime


class Lab:
    """A tiny model, adapters on it, and how far two compositions are apart."""

    def __init__(self, tiny: Any, family: str = "llama", dtype: str = "fp32", **options: Any) -> None:
        self.tiny, self.family = tiny, family
        self.model = tiny.model(family, dtype, **options)
        self.batch = tiny.batch(family, tiny.rows(7, 5))

    def add(self, kind: str, *names: str, size: int = 0, **options: Any) -> None:
        for name in names:
            seed = sum(map(ord, name))
            self.tiny.adapter(self.model, kind, name, seed=seed, size=size, **options).freeze()

    def logits(self, expr: Any) -> Tensor:
        compose.activate(self.model, expr)
        return torch.cat(self.tiny.logits(self.model, self.batch))

    def apart(self, one: Any, other: Any) -> float:
        """Distance of the outputs relative to what ``other`` changes."""
        a, b, base = self.logits(one), self.logits(other), self.logits(None)
        return float((a - b).norm() / (b - base).norm())

    def merge(self, expr: str, name: str = "merged") -> Any:
        made = merge(self.model, expr, name=name)
        compose.attach(self.model, name, made.adapter)
        return made

    def delta(self, expr: str, path: str = "model.layers.0.self_attn.q_proj") -> Tensor:
        """D of an expression over resident adapters at one site, dense."""
        return effect_of(runtime(self.model), path, parse(expr)).dense()


@pytest.fixture(scope="session")
def lab(tiny: Any) -> Callable[..., Lab]:
    """``lab(family, dtype, **config)`` makes one."""
    return lambda *args, **options: Lab(tiny, *args, **options)
