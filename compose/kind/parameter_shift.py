"""What dense and sparse share: `theta = theta_0 + delta` for chosen parameters of the base, and its atoms.

A shifted weight of a linear site is a linear map beside it, a shifted bias a bias; a norm or an embedding is affine in
its parameters p, so its shift is M(p = delta) - M(p = 0), evaluated on the module's input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Moved
from compose.base.sites import SiteMap, linear_shape
from compose.base.weights import with_parameters
from compose.errors import SiteError
from compose.kernels.fused_rows import FusedRows
from compose.kernels.maps import LinearMap
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import get_kind, make_config


@dataclass(frozen=True)
class ShiftedParameter:
    """One parameter of the base: ``name`` in the module at ``path``; a linear weight counts as (d_out, d_in)."""

    path: str
    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of its elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n


class ShiftConfig(KindConfig):
    """Which parameters move."""

    target_modules: tuple[str, ...] | str | None = Field(
        None,
        description='roles, suffixes, "all-linear", paths of norms or of the input embeddings, or "all" of these; '
        "default: the linears and norms of the blocks",
    )
    biases: bool = Field(True, description="the biases of those modules move too")


class Shift(Adapter, ABC):
    """`theta_0 + w delta`: linear in its weight w, and the identity at first (delta = 0).

    A parameter that two modules share (tied embeddings) is stored once and moves in both where both are chosen.
    Modules that are neither linear, norm nor input embedding (convolutions, position tables) stay as they are.
    """

    Config = ShiftConfig
    config: ShiftConfig

    def places(self, sites: SiteMap, model: PreTrainedModel) -> Iterator[ShiftedParameter]:
        """Parameters to create, each once; fills ``self.paths`` and the aliases of tied ones."""
        self.paths = tuple(_chosen(self.config, sites, model))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tied: dict[tuple[str, str], tuple[str, str]] = {}
        self._modules_of: dict[str, Callable[[], nn.Module]] = {}
        owners: dict[tuple[int, FusedRows | None], tuple[str, str]] = {}
        # A parameter that two modules share is created where it comes first; the second place points to that one.
        for path in self.paths:
            module, rows = model.get_submodule(sites.module_of(path)), sites.rows_of(path)
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" and not self.config.biases:
                    continue
                first = owners.setdefault((id(parameter), rows), (path, name))
                self._tied[path, name] = first
                if first == (path, name):
                    shape = _shape(module, name, parameter)
                    yield ShiftedParameter(path, name, shape if rows is None else (len(rows), *shape[1:]))

    def as_dense(self, sites: SiteMap, model: PreTrainedModel) -> Shift:
        """The same deltas, spread out: merges work on those."""
        cls = cast("type[Shift]", get_kind("dense"))
        if isinstance(self, cls):
            return self
        options = {name: getattr(self.config, name) for name in cls.Config.model_fields}
        dense = cls(make_config(cls, options), sites, model, name=self.name).to(model.device)
        # Tied parameters have one owner: each is written once, and moves in all its places.
        for owner in dict.fromkeys(self._tied.values()):
            shape = dense.at(*owner).shape
            module = model.get_submodule(sites.module_of(owner[0]))
            linear = owner[1] == "weight" and linear_shape(module) is not None
            spread = self.map_at(*owner).dense() if linear else self.vector_at(*owner)
            dense.at(*owner).data = spread.detach().reshape(shape).clone()
        if self.saved:
            dense.load_state({**dense.state(heads=False), **self.head_state()})
        dense.labels = self.labels
        return cast("Shift", dense.freeze())

    def own(self, path: str, name: str) -> tuple[str, str] | None:
        """Where the delta of this parameter is kept, or None if it does not move."""
        return self._tied.get((path, name))

    @abstractmethod
    def map_at(self, path: str, name: str) -> LinearMap:
        """The delta of a linear weight."""

    @abstractmethod
    def vector_at(self, path: str, name: str) -> Tensor:
        """The delta of any other parameter, in its own shape."""

    def lower(self, path: str, below: Below) -> Atoms | None:
        """A map and a bias at a linear site, a moved module elsewhere."""
        if path not in self.paths:
            return None
        owners = {name: own for name in ("weight", "bias") if (own := self.own(path, name)) is not None}
        bias = self.vector_at(*owners["bias"]) if "bias" in owners else None
        module = below.layer
        if linear_shape(module) is not None:
            return Atoms(delta=self.map_at(*owners["weight"]), bias=bias)
        deltas = {"weight": self.vector_at(*owners["weight"])} if "weight" in owners else {}
        if bias is not None:
            deltas["bias"] = bias
        return Atoms(function=Moved(_moved(module, deltas), lambda: deltas))


def _moved(module: nn.Module, deltas: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """`F(x) = M(p = delta)(x) - M(p = 0)(x)`, in float32; an embedding of zeros is zero."""

    def run(x: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            return cast("Tensor", with_parameters(module, deltas)(x))
        zeros = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in module.named_parameters(recurse=False)}
        new = {**zeros, **{name: delta.float() for name, delta in deltas.items()}}
        return cast("Tensor", with_parameters(module, new)(x.float()) - with_parameters(module, zeros)(x.float()))

    return run


def _shape(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    linear = linear_shape(module)  # whatever holds it: packed nf4 codes, Conv1D's transpose
    return (linear[1], linear[0]) if linear is not None and name == "weight" else tuple(parameter.shape)


def _chosen(config: ShiftConfig, sites: SiteMap, model: PreTrainedModel) -> list[str]:
    """Module paths in model order."""
    wanted, carried = config.target_modules, tuple(f".{name}." for name in config.modules_to_save)
    # What can move: linears and norms of the blocks, linears outside them, and the table that texts are read with.
    blocks = {s.path: s.layer for s in sites} | {p: sites.layer_of(p) for p in sites.norms}
    everything = {**blocks, **dict.fromkeys(sites.outside)}
    tables: set[str] = set()
    if sites.input_table is not None:  # with a decoder's embeddings that are the encoder's
        table = model.get_submodule(sites.embedding).weight
        tables = {p for p in sites.tables if model.get_submodule(p).weight is table}
        everything |= dict.fromkeys(tables)
    # What is asked for: by default what stands in a block.
    if wanted is None:
        chosen = {p for p, layer in blocks.items() if layer is not None}
    elif wanted == "all":
        chosen = set(everything)
    elif wanted == "all-linear":
        chosen = set(sites.sites)
    else:
        chosen = set()
        for name in (wanted,) if isinstance(wanted, str) else wanted:
            chosen |= {p for p in everything if p == name or p.endswith("." + name)} or {
                s.path for s in sites.select(name)
            }
    if config.layers is not None:
        chosen = {p for p in chosen if sites.layer_of(p) in config.layers}
    # A module that is carried whole has no delta beside it.
    chosen = {p for p in chosen if p and not any(name in f".{p}." for name in carried)}
    if not chosen:
        raise SiteError(
            f"no module of {wanted or 'the blocks'!r} lies in layers {config.layers}", hint=f"layers: {sites.depth()}"
        )
    parts = {path: tuple(part.path for part in parts) for path, parts in sites.parts.items()}
    if chosen & tables:  # tied tables move together
        chosen |= tables
    return [p for whole in sites.modules for p in (whole, *parts.get(whole, ())) if p in chosen]
