"""How adapters lie to one another: inner products of their effects, duplicates, nearest ones, a heat map.

Deltas are compared in factor space (:mod:`compose.kernels.factors`), so a thousand adapters at d = 4096 are a matter of
seconds; gains enter with the weight they scale. The cosine of two adapters says whether adding both doubles an effect
(1), leaves both as they are (0), or cancels them (-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.algebra import parse
from compose.errors import KindError
from compose.expr.tree import Expr
from compose.kernels import factors
from compose.kind.adapter import Adapter
from compose.parameter_space.effect import effect_of
from compose.parameter_space.execute import Workspace, without_merges
from compose.parameter_space.job import Member
from hub.console.progress import Steps


@dataclass(frozen=True)
class Interference:
    """Inner products <tau_i, tau_j> of N adapters: ``inner`` over all places, ``by_place`` at each, (N, N) float64."""

    names: tuple[str, ...]
    inner: Tensor
    by_place: Mapping[str, Tensor]

    @property
    def norms(self) -> Tensor:
        """`||tau_i||`, (N,)."""
        return self.inner.diagonal().clamp_min(0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """<tau_i, tau_j> / (||tau_i|| ||tau_j||), (N, N); 0 where an adapter does nothing."""
        return _cosine(self.inner)

    @property
    def distance(self) -> Tensor:
        """`||tau_i - tau_j|| / max(||tau_i||, ||tau_j||)`, (N, N)."""
        square = self.inner.diagonal()
        gap = (square[:, None] + square - 2 * self.inner).clamp_min(0).sqrt()
        return gap / torch.maximum(self.norms[:, None], self.norms).clamp_min(torch.finfo(torch.float64).tiny)

    def cosine_at(self, place: str) -> Tensor:
        """The cosines at one place."""
        return _cosine(self.by_place[place])

    def duplicates(self, tolerance: float = 1e-3) -> list[tuple[str, str, float]]:
        """Pairs whose relative distance is within ``tolerance``, nearest first, whatever their factors look like."""
        gap = self.distance
        near = torch.triu(gap <= tolerance, diagonal=1).nonzero().tolist()
        return sorted(((self.names[i], self.names[j], float(gap[i, j])) for i, j in near), key=lambda pair: pair[2])

    def nearest(self, name: str, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` adapters with the largest cosine to ``name``."""
        if name not in self.names:
            raise KindError(f"{name!r} is not on this map", hint="on it are: " + ", ".join(self.names))
        row = self.cosine[self.names.index(name)]
        order = [i for i in row.argsort(descending=True).tolist() if self.names[i] != name]
        return [(self.names[i], float(row[i])) for i in order[:k]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "names": list(self.names),
            "norms": self.norms.tolist(),
            "cosine": self.cosine.tolist(),
            "duplicates": [{"a": a, "b": b, "distance": d} for a, b, d in self.duplicates()],
        }

    def heatmap(self, path: str | Path) -> Path:
        """Draw the cosines; the file's ending says how (svg, png, pdf)."""
        from matplotlib.figure import Figure

        n = len(self.names)
        figure = Figure(figsize=(1.6 + 0.5 * n, 1.2 + 0.5 * n), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(self.cosine.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_xticks(range(n), self.names, rotation=45, ha="right")
        axes.set_yticks(range(n), self.names)
        if n <= 16:
            for i in range(n):
                for j in range(n):
                    value = float(self.cosine[i, j])
                    color = "white" if abs(value) > 0.6 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        figure.colorbar(image, label="cosine of the adapters' effects")
        figure.savefig(path)
        return Path(path)


def _cosine(inner: Tensor) -> Tensor:
    norms = inner.diagonal().clamp_min(0).sqrt()
    scale = norms[:, None] * norms
    return torch.where(scale > 0, inner / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)


@torch.no_grad()
def interference(model: PreTrainedModel, exprs: Sequence[Expr | str], *, progress: Steps | None = None) -> Interference:
    """Compare resident adapters, or static expressions over them, place by place.

    Raises
    ------
    KindError
        Adapters that are no changes of weights (bottleneck, prefix, prompt) beside others, or of different configs.
    """
    from compose.runtime.model_runtime import runtime

    workspace = Workspace(runtime(model))
    trees = [without_merges(workspace, parse(e) if isinstance(e, str) else e) for e in exprs]
    members = [Member.of(tree, workspace) for tree in trees]
    adapters = [a for m in members for a in m.adapters]
    in_weights = all(a.averages_in_weight for a in adapters)
    places = _weights(workspace, members, progress) if in_weights else _tensors(members)
    total = sum(places.values(), torch.zeros(len(members), len(members), dtype=torch.float64))
    return Interference(tuple(map(str, exprs)), total, places)


def _weights(workspace: Workspace, members: Sequence[Member], progress: Steps | None) -> dict[str, Tensor]:
    paths = list(dict.fromkeys(p for m in members for a in m.adapters for p in a.module_paths))
    places: dict[str, Tensor] = {}
    for done, path in enumerate(paths):
        effects = [effect_of(workspace, path, m.expr) for m in members]
        if all(e.factored for e in effects):
            places[path] = factors.gram([e.pair_or_zero() for e in effects]).cpu()
        else:
            rows = [[a.inner(b) if j >= i else 0.0 for j, b in enumerate(effects)] for i, a in enumerate(effects)]
            upper = torch.tensor(rows, dtype=torch.float64)
            places[path] = upper + upper.triu(1).T
        if any(e.bias is not None for e in effects):
            zero = torch.zeros(effects[0].rows)
            vectors = torch.stack([zero if e.bias is None else e.bias.cpu() for e in effects]).double()
            places[f"{path}.bias"] = vectors @ vectors.T
        if progress is not None:
            progress("compare", done + 1, len(paths))
    return places


def _tensors(members: Sequence[Member]) -> dict[str, Tensor]:
    first = members[0].adapters[0]
    for member in members:
        other: Adapter = member.adapters[0]
        if not member.single or other.kind != first.kind or other.config != first.config:
            raise KindError(
                f"{member.expr} cannot be compared with {first.kind} {first.name!r}: where a kind is no change of "
                "weights, only single adapters of one kind and config have tensors that correspond"
            )
    states = [m.adapters[0].state(heads=False) for m in members]
    stacked = {key: torch.stack([s[key].double().flatten() for s in states]).cpu() for key in states[0]}
    return {key: rows @ rows.T for key, rows in stacked.items()}
