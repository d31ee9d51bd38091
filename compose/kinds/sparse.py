"""Sparse deltas: few chosen weights that moved (diff pruning, arXiv:2012.07463; LT-SFT, arXiv:2110.07560)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kernels.maps import LinearMap, Sparse
from compose.kind.parameter_shift import Shift, ShiftConfig
from compose.kind.registry import register


class SparseConfig(ShiftConfig):
    """How many weights a fresh adapter may move; a stored one says itself which ones they are."""

    density: float = Field(0.005, gt=0, le=1, description="share of each parameter that moves, drawn at random")


@register("sparse")
class SparseShift(Shift):
    """`theta = theta_0 + D`, D zero but at n_p chosen places of each parameter p: indices (n_p,), values (n_p,).

    Indices are flat, sorted and 32-bit where they fit. Values start at zero, at places drawn by the seed; a method that
    chooses better ones puts them in with :meth:`choose`.
    """

    Config = SparseConfig
    config: SparseConfig
    paper = "arXiv:2012.07463"
    suffixes = {
        "weight": "weight_values",
        "bias": "bias_values",
        "weight_at": "weight_indices",
        "bias_at": "bias_indices",
    }

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """Places drawn without replacement, their values zero."""
        for place in self.places(sites, model):
            self._shapes[f"{place.path}:{place.name}"] = place.shape
            n = max(1, round(self.config.density * place.numel))
            chosen = torch.randperm(place.numel, generator=self.generator)[:n].sort().values
            self.add(place.path, place.name, torch.zeros(n))
            self.add(place.path, f"{place.name}_at", chosen.to(_index_dtype(place.numel)), trained=False)

    def choose(self, path: str, name: str, indices: Tensor, values: Tensor | None = None) -> None:
        """Move these places (flat, of W as (d_out, d_in)) of one parameter from now on, from zero or ``values``.

        Raises
        ------
        KindError
            An index outside the parameter, or one twice.
        """
        numel = self._numel(path, name)
        order = indices.flatten().sort()
        self._check(self.key(path, f"{name}_at"), order.values, numel)
        moved = torch.zeros(len(order.values)) if values is None else values.flatten()[order.indices]
        parameter = self.at(path, name)
        parameter.data = moved.to(parameter)
        self.set_fixed(path, f"{name}_at", order.values.to(parameter.device, _index_dtype(numel)))
        self.changed()

    def _numel(self, path: str, name: str) -> int:
        return int(torch.Size(self._shapes[f"{path}:{name}"]).numel())

    def _check(self, where: str, indices: Tensor, numel: int) -> None:
        if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise KindError(f"{where} of adapter {self.name!r} is no list of integers")
        if isinstance(indices, FakeTensor):  # an outline knows shapes only
            return
        if len(indices) and (int(indices[0]) < 0 or int(indices[-1]) >= numel or bool((indices.diff() <= 0).any())):
            raise KindError(
                f"{where} of adapter {self.name!r} is not sorted, not distinct, or outside {numel} elements",
                hint="it was made for another base, or the file was damaged",
            )

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The file decides how many places move; they must lie inside, sorted, with one value each."""
        mine: set[str] = set()
        for where in self._shapes:
            path, name = where.rsplit(":", 1)
            values, places = self.key(path, name), self.key(path, f"{name}_at")
            self._check(places, tensors[places], self._numel(path, name))
            if tensors[values].shape != tensors[places].shape:
                raise KindError(f"{values} of adapter {self.name!r} has another length than its indices")
            mine |= {values, places}
        super().check_tensors({key: value for key, value in tensors.items() if key not in mine})

    def map_at(self, path: str, name: str) -> LinearMap:
        """Indices and values."""
        rows, columns = self._shapes[f"{path}:{name}"]
        return Sparse(self.at(path, f"{name}_at").long(), self.at(path, name), (rows, columns))

    def vector_at(self, path: str, name: str) -> Tensor:
        """The parameter's delta, spread out."""
        shape, values = self._shapes[f"{path}:{name}"], self.at(path, name)
        flat = values.new_zeros(self._numel(path, name)).index_put((self.at(path, f"{name}_at").long(),), values)
        return flat.view(shape)


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64
