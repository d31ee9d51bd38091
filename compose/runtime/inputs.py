"""What acts on a model's inputs: prefixes in its attention, prompts before its text, and the positions they move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.atoms import Prefix, Prompt
from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kernels.coefficients import Coefficient
from compose.kind.adapter import Adapter
from compose.runtime.positions import PositionSlot
from compose.runtime.prefixes import PrefixState, bias_owner, stack_prefixes
from compose.runtime.prompts import PromptState, stack_prompts
from compose.slots.call import Context

Row: TypeAlias = Sequence[tuple[Coefficient, str]]  # adapters of one row with their weights


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of a composition: by the path of an attention module, and how far each row's text moves, (R, 1).

    ``measures_past``: the length of the cache has to be known in each call.
    """

    states: Mapping[str, PrefixState] = field(default_factory=dict)
    shift: Tensor | None = None
    measures_past: bool = False


class PrefixPlace:
    """Tells an attention module which prefix it has in the call under way."""

    def __init__(self, path: str, context: Context) -> None:
        self._path, self._context = path, context

    def __call__(self) -> PrefixState | None:
        """The prefix, or None."""
        call = self._context.call
        if call.waiting:
            call.waiting.discard(self._path)
        return cast("PrefixState | None", getattr(call.composition, "prefixes", {}).get(self._path))


class Inputs:
    """The places in one model where prefixes and moved positions come in; what there is, a call's composition says."""

    def __init__(self, model: PreTrainedModel, sites: SiteMap, context: Context) -> None:
        self._model, self._sites, self._context = model, sites, context
        self._positions: list[PositionSlot] = []
        self._attentions: dict[str, nn.Module] = {}

    def prefixes(self, active: Mapping[str, Adapter], rows: Callable[[str], Sequence[Row]]) -> Prefixes:
        """The active prefixes laid out. ``rows`` gives the adapters of each row at a path."""
        holders: dict[str, list[str]] = {}
        for name, adapter in active.items():
            for path in adapter.paths:
                if adapter.prefix(path):
                    holders.setdefault(path, []).append(name)
        states: dict[str, PrefixState] = {}
        shift: Tensor | None = None
        measures_past = False
        for path, names in holders.items():
            weighted = [
                [(c, cast("Prefix", active[n].prefix(path))) for c, n in row if n in names and not is_zero(c)]
                for row in rows(path)
            ]
            if not any(weighted):
                continue  # every row leaves it out here
            # Relative positions (T5) count from the first key, so the bias has to know how long the cache is.
            owner = bias_owner(self._model, path)
            measures_past |= owner is not None
            state = stack_prefixes(weighted, past=self._past, places=self._places, bias_owner=owner)
            measures_past |= state.ahead is not None
            states[path] = state
            # positions are the whole model's, though a prefix may stand in some layers only
            shift = state.shift if shift is None else torch.maximum(shift, state.shift)
        return Prefixes(states, None if shift is None else shift[:, None], measures_past)

    def _past(self) -> int:
        return self._context.call.past

    def _places(self, length: int) -> Tensor:
        """Places of the tokens of the call, (B or 1, length): where it says they are, else from 0, padding counted."""
        call = self._context.call
        if call.places is None or call.places.shape[1] != length:
            return torch.arange(call.past, call.past + length)[None]
        return call.places

    def enter(self, paths: Iterable[str], *, moves: bool) -> None:
        """Be at these attention modules, and if a prefix moves positions where those come in."""
        for path in paths:
            module = self._attentions[path] = self._model.get_submodule(path)
            module.__dict__.setdefault("moduloom_prefix", PrefixPlace(path, self._context))
        if moves:
            if not self._positions:
                modules = [self._model.get_submodule(path) for path in self._sites.positions]
                self._positions = [PositionSlot(module, self._context) for module in modules]
            for slot in self._positions:
                slot.enter()

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
        table: Any = self._model.get_submodule(self._sites.embedding)
        like = table.weight.new_zeros(0, table.weight.shape[1], dtype=torch.float32)
        return stack_prompts(kept, like, causal=self._sites.reads_causally)

    def leave(self) -> None:
        """Be nowhere: attention and position modules are as they were."""
        for module in self._attentions.values():
            module.__dict__.pop("moduloom_prefix", None)
        for slot in self._positions:
            slot.leave()


def is_zero(c: Coefficient) -> bool:
    """Whether a weight is zero everywhere."""
    return not bool(c.any()) if isinstance(c, Tensor) else c == 0
