"""What acts on a model's inputs: prefixes in its attention, prompts before its text, and the positions they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.atoms import Prefix, Prompt
from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kernels.coefficients import Coefficient
from compose.kind.adapter import Adapter
from compose.runtime.positions import PositionSlot
from compose.runtime.prefixes import bias_owner, stack_prefixes, use_interface
from compose.runtime.prompts import PromptState, stack_prompts
from compose.slots.slot import Context

Row: TypeAlias = Sequence[tuple[Coefficient, str]]  # adapters of one row with their weights


class Inputs:
    """The prefixes and moved positions of one model, and the prompts to be put in by its calls."""

    def __init__(self, model: PreTrainedModel, sites: SiteMap, context: Context) -> None:
        self._model, self._sites, self._context = model, sites, context
        self._positions: dict[str, PositionSlot] = {}
        self._prefixed: list[nn.Module] = []

    def set_prefixes(self, active: Mapping[str, Adapter], rows: Callable[[str], Sequence[Row]]) -> bool:
        """Put the active prefixes where they act; whether the length of the cache has to be known in each call.

        ``rows`` gives the adapters of each row at a path.
        """
        for module in self._prefixed:
            del module.moduloom_prefix
        self._prefixed.clear()
        holders: dict[str, list[str]] = {}
        for name, adapter in active.items():
            for path in adapter.paths:
                if adapter.prefix(path):
                    holders.setdefault(path, []).append(name)
        use_interface(self._model, on=bool(holders))
        shift: Tensor | None = None
        measures_past = False
        for path, names in holders.items():
            module = self._model.get_submodule(path)
            weighted = [
                [(c, cast("Prefix", active[n].prefix(path))) for c, n in row if n in names and not is_zero(c)]
                for row in rows(path)
            ]
            if not any(weighted):
                continue  # every row leaves it out here
            # Relative positions (T5) count from the first key, so the bias has to know how long the cache is.
            owner = bias_owner(self._model, path)
            measures_past |= owner is not None
            state = stack_prefixes(weighted, past=self._past, bias_owner=owner)
            module.moduloom_prefix = state
            # positions are the whole model's, though a prefix may stand in some layers only
            shift = state.shift if shift is None else torch.maximum(shift, state.shift)
            self._prefixed.append(module)
        self._move_positions(None if shift is None else shift[:, None])
        return measures_past

    def _past(self) -> int:
        return self._context.past

    def _move_positions(self, shift: Tensor | None) -> None:
        if shift is not None and not self._positions:
            for path in self._sites.positions:
                slot = PositionSlot(self._model.get_submodule(path), self._context)
                slot.train(slot.base_layer.training)
                replace_module(self._model, path, slot)
                self._positions[path] = slot
        for slot in self._positions.values():
            slot.offset = shift

    def prompts(self, active: Mapping[str, Adapter], rows: Sequence[Row]) -> PromptState | None:
        """The prompts of each row, laid out.

        Raises
        ------
        KindError
            A weight that is neither zero nor one.
        """
        prompts = {n: prompt for n, a in active.items() if (prompt := a.prompt()) is not None}
        if not prompts:
            return None
        kept: list[list[Prompt]] = []
        for row in rows:
            there = [(c, n) for c, n in row if n in prompts and not is_zero(c)]
            for c, n in there:
                weight = torch.as_tensor(c)
                if not bool((weight == 1).all()):
                    raise KindError(
                        f"prompt {n!r} has weight {weight.tolist()}: a prompt is there or not, it has no half",
                        hint="average(a, b) mixes the embeddings of prompts; 0 leaves one out",
                    )
            kept.append([prompts[n] for _, n in there])
        table = self._model.get_input_embeddings().weight
        like = table.new_zeros(0, table.shape[1], dtype=torch.float32)
        return stack_prompts(kept, like, causal=self._sites.reads_causally)

    def close(self) -> None:
        """Put the position modules back."""
        for path, position in self._positions.items():
            replace_module(self._model, path, position.base_layer)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` into the tree at ``path``."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def is_zero(c: Coefficient) -> bool:
    """Whether a weight is zero everywhere."""
    return not bool(c.any()) if isinstance(c, Tensor) else c == 0
