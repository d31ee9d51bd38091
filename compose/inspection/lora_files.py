"""Low-rank pairs read straight from files: what can be said of LoRAs without their base, however large that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compose.errors import KindError
from compose.formats.files import read_tensors
from compose.formats.peft import check_types
from compose.kernels.low_rank import Pair
from compose.kind.patterns import value_at
from compose.kind.registry import get_kind
from compose.planning.members import StoredAdapter

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


def contents(stored: StoredAdapter) -> Contents:
    """Read an adapter's files; of a LoRA each pair has the scale that PEFT gives it.

    Raises
    ------
    KindError, NotFound, IntegrityError
        No kind reads the config, or a factor is alone or of the wrong shape: named.
    """
    kind = stored.facts.kind
    if get_kind(kind).peft_type == "LORA":
        check_types(stored.config)
        get_kind(kind).from_peft(stored.config)  # refuses, by name, what a plain pair does not express
    tensors = read_tensors(stored.where)
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in tensors.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None:
            others[_plain(key)] = value
        else:
            found.setdefault(_plain(key.removesuffix(end)), {})[_ENDS[end]] = value
    return Contents(kind, stored.config, {path: _pair(stored, path, ab) for path, ab in found.items()}, others)


def _plain(key: str) -> str:
    return next((key.removeprefix(stem) for stem in _STEMS if key.startswith(stem)), key)


def _pair(stored: StoredAdapter, path: str, ab: Mapping[str, Tensor]) -> Pair:
    if ab.keys() != {"A", "B"}:
        (only,) = ab
        raise KindError(
            f"{stored.text} has lora_{only} at {path} and not the other factor", hint="save the adapter again"
        )
    a, b = ab["A"], ab["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise KindError(f"{stored.text}: at {path} lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are no pair")
    return Pair(a, b, _scale(stored.config, path, int(a.shape[0])))


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Scale s = alpha / r, or / sqrt(r) with use_rslora; alpha_pattern may change alpha at some modules."""
    patterns = config.get("alpha_pattern") or {}
    alpha = value_at(patterns.items(), path, float(config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
