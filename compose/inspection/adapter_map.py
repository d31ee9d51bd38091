"""``hub compose map``: how adapters lie to one another, from files alone for plain LoRAs, else on the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compose.api import attach
from compose.base.model import load_base
from compose.expr.tree import Ref, add
from compose.inspection.explain import base_of
from compose.inspection.lora_files import contents, nested
from compose.kernels import factors
from compose.kernels.low_rank import Pair
from compose.kind.registry import get_kind
from compose.merging.interference import Interference, interference
from compose.planning.members import AdapterFinder, StoredAdapter
from compose.planning.plan import plan
from hub.console.progress import Steps
from hub.errors import UsageError


def interference_of(
    texts: Sequence[str], finder: AdapterFinder, *, base: str | Path | None = None, progress: Steps | None = None
) -> Interference:
    """Map adapters, without their base where they are all plain LoRAs, else on it.

    Parameters
    ----------
    texts
        Refs or directories.
    base
        Needed where an effect depends on the base's weights (dora, ia3, ...); default: the one they were made for.

    Raises
    ------
    HubError
        Adapters that cannot be compared, named.
    """
    if len(set(texts)) < max(2, len(texts)):
        raise UsageError("a map needs two or more different adapters", hint="hub compose map A B C")
    members = {text: finder.find(text) for text in texts}
    for text, stored in members.items():
        if stored.facts.type not in ("adapter", "merge"):
            raise UsageError(f"{text} is a {stored.facts.type}, and a map is of adapters", hint=f"hub show {text}")
    if all(stored.facts.kind == "lora" for stored in members.values()):
        read = {text: contents(stored) for text, stored in members.items()}
        if all(found.low_rank for found in read.values()) and not nested(read.values()):
            return _in_factors({text: found.pairs for text, found in read.items()}, progress)
    return _on_base(members, finder, base, progress)


def _in_factors(members: Mapping[str, Mapping[str, Pair]], progress: Steps | None) -> Interference:
    paths = sorted({path for pairs in members.values() for path in pairs})
    places: dict[str, Tensor] = {}
    for done, path in enumerate(paths):
        places[path] = factors.gram([pairs.get(path) or _zero(path, members) for pairs in members.values()])
        if progress is not None:
            progress("compare", done + 1, len(paths))
    total = torch.stack(list(places.values())).sum(0)
    return Interference(tuple(members), total, places)


def _zero(path: str, members: Mapping[str, Mapping[str, Pair]]) -> Pair:
    like = next(pairs[path] for pairs in members.values() if path in pairs)
    return Pair(like.A[:0], like.B[:, :0], 1.0)


def _on_base(
    members: Mapping[str, StoredAdapter], finder: AdapterFinder, base: str | Path | None, progress: Steps | None
) -> Interference:
    for stored in members.values():
        get_kind(stored.facts.kind)
    made = plan(add(*map(Ref, members)), finder.resolve)  # refuses adapters of different bases before one is loaded
    model = load_base(base or base_of(made, finder))
    for text, stored in members.items():
        attach(model, text, stored.where)
    return interference(model, [Ref(text) for text in members], progress=progress)
