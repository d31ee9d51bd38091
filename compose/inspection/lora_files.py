"""Low-rank pairs read straight from files: what can be said of LoRAs without their base, however large that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compose.errors import KindError
from compose.formats import directory as interop
from compose.formats.peft import check_types
from compose.kernels import factors
from compose.kernels.low_rank import Pair
from compose.kind.adapter import get_kind
from compose.kind.patterns import value_at
from compose.merging.interference import Interference, interference
from compose.parameter_space.job import Progress
from compose.planning.members import Held, Shelf
from hub.contents.gates import EXTRA, WEIGHTS
from hub.errors import UsageError

_ENDS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
_STEMS = ("base_model.model.", "base_model.")


@dataclass(frozen=True)
class Contents:
    """What an adapter's files hold: pairs by module path, and all other tensors by key."""

    kind: str
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    others: Mapping[str, Tensor]

    @property
    def low_rank(self) -> bool:
        """Whether the pairs are all there is, heads aside: a LoRA without gains and biases."""
        return self.kind == "lora" and bool(self.pairs) and not any(".lora_" in key for key in self.others)


def nested(found: Iterable[Contents]) -> bool:
    """Whether one acts on a fused layer and another on a part of it: which rows those are, only the base tells."""
    paths = {path for each in found for path in each.pairs}
    return any(path.rpartition(".")[0] in paths for path in paths)


def contents(held: Held) -> Contents:
    """Read an adapter's files; of a LoRA each pair has the scale that PEFT gives it.

    Raises
    ------
    KindError, NotFound, IntegrityError
        No kind reads the config, or a factor is alone or of the wrong shape: named.
    """
    kind = held.facts.kind
    if get_kind(kind).peft_type == "LORA":
        check_types(held.config)
        get_kind(kind).from_peft(held.config)  # refuses, by name, what a plain pair does not express
    tensors = interop.read_tensors(held.need(WEIGHTS), held.file(EXTRA))
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in tensors.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None:
            others[_plain(key)] = value
        else:
            found.setdefault(_plain(key.removesuffix(end)), {})[_ENDS[end]] = value
    return Contents(kind, held.config, {path: _pair(held, path, ab) for path, ab in found.items()}, others)


def _plain(key: str) -> str:
    return next((key.removeprefix(stem) for stem in _STEMS if key.startswith(stem)), key)


def _pair(held: Held, path: str, ab: Mapping[str, Tensor]) -> Pair:
    if ab.keys() != {"A", "B"}:
        (only,) = ab
        raise KindError(
            f"{held.text} has lora_{only} at {path} and not the other factor", hint="save the adapter again"
        )
    a, b = ab["A"], ab["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise KindError(f"{held.text}: at {path} lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are no pair")
    return Pair(a, b, _scale(held.config, path, int(a.shape[0])))


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Scale s = alpha / r, or / sqrt(r) with use_rslora; alpha_pattern may change alpha at some modules."""
    patterns = config.get("alpha_pattern") or {}
    alpha = value_at(patterns.items(), path, float(config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def interference_of(
    texts: Sequence[str], shelf: Shelf, *, base: str | Path | None = None, progress: Progress | None = None
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
    members = {text: shelf.find(text) for text in texts}
    for text, held in members.items():
        if held.facts.type not in ("adapter", "merge"):
            raise UsageError(f"{text} is a {held.facts.type}, and a map is of adapters", hint=f"hub show {text}")
    if all(held.facts.kind == "lora" for held in members.values()):
        read = {text: contents(held) for text, held in members.items()}
        if all(found.low_rank for found in read.values()) and not nested(read.values()):
            return _in_factors({text: found.pairs for text, found in read.items()}, progress)
    return _on_base(members, shelf, base, progress)


def _in_factors(members: Mapping[str, Mapping[str, Pair]], progress: Progress | None) -> Interference:
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
    members: Mapping[str, Held], shelf: Shelf, base: str | Path | None, progress: Progress | None
) -> Interference:
    from compose.api import attach
    from compose.base.model import load_base
    from compose.expr.tree import Ref, add
    from compose.inspection.explain import base_of
    from compose.planning.plan import plan

    for held in members.values():
        get_kind(held.facts.kind)
    made = plan(add(*map(Ref, members)), shelf.resolve)  # refuses adapters of different bases before one is loaded
    model = load_base(base or base_of(made, shelf))
    for text, held in members.items():
        attach(model, text, held.where)
    return interference(model, [Ref(text) for text in members], progress=progress)
