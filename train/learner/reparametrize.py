"""Tensors of an adapter as functions of other tensors while it trains, on torch's own parametrizations.

The adapter reads its tensor as always and gets ``module(original)``; the original and the module's parameters are what
trains and what a checkpoint holds. `fold` puts the tensor back as the function left it: that is what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compose.kind.adapter import Adapter

__all__ = ["PrefixMLP", "attribute", "attributes", "fold", "function", "original", "reparametrize"]


def attribute(path: str, name: str) -> str:
    """Where an adapter keeps the tensor `name` of the site `path`."""
    return f"{path}:{name}".replace(".", "/")


def attributes(adapter: Adapter, *names: str) -> Iterator[tuple[str, str]]:
    """(path, name) of the adapter's tensors with these names, in the order of its sites."""
    for path in adapter.paths or ("",):
        for name in names:
            if hasattr(adapter, attribute(path, name)):
                yield path, name


def reparametrize(adapter: Adapter, path: str, name: str, module: nn.Module) -> None:
    """Make one tensor ``module(original)``; a `right_inverse` of the module says what the original starts from."""
    module.to(getattr(adapter, attribute(path, name)).device)
    parametrize.register_parametrization(adapter, attribute(path, name), module, unsafe=True)
    adapter.revision += 1


def function(adapter: Adapter, path: str, name: str) -> nn.Module:
    """The module that makes a reparametrized tensor."""
    return adapter.get_submodule(f"parametrizations.{attribute(path, name)}.0")


def original(adapter: Adapter, path: str, name: str) -> nn.Parameter:
    """What trains in the place of a reparametrized tensor."""
    holder = adapter.get_submodule("parametrizations")
    parameter = getattr(getattr(holder, attribute(path, name)), "original")  # noqa: B009 (a plain name to torch)
    assert isinstance(parameter, nn.Parameter)  # noqa: S101 - narrows the type
    return parameter


def fold(adapter: Adapter) -> None:
    """Store what each function gives in evaluation mode, and drop the functions."""
    training = adapter.training
    adapter.eval()
    if parametrize.is_parametrized(adapter):
        for name, _ in list(adapter.get_submodule("parametrizations").named_children()):
            parametrize.remove_parametrizations(adapter, name, leave_parametrized=True)
    adapter.train(training)
    adapter.revision += 1


class PrefixMLP(nn.Module):
    """A prefix behind an MLP: `P = W_2 tanh(W_1 E + b_1) + b_2` with E (n, h), P (n, width) (arXiv:2101.00190)."""

    def __init__(self, width: int, hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, width)
        self._random, self._hidden = random, hidden
        with torch.no_grad():
            for layer in (self.first, self.second):
                bound = layer.in_features**-0.5
                for tensor in (layer.weight, layer.bias):
                    tensor.uniform_(-bound, bound, generator=random)

    def forward(self, embedding: Tensor) -> Tensor:
        """The prefix of all layers."""
        projected: Tensor = self.second(torch.tanh(self.first(embedding)))
        return projected

    def right_inverse(self, prefix: Tensor) -> Tensor:
        """The embedding starts as normals, whatever the prefix was."""
        return torch.randn(prefix.shape[0], self._hidden, generator=self._random).to(prefix)
