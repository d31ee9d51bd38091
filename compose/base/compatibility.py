"""The base ladder: how near the base an adapter was made for is to the model at hand.

exact -> the same weights; quantization -> the same weights, held in other numbers (warned of); drift -> the same
architecture with other weights (refused unless allowed); incompatible -> refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, TypeAlias

from hub.errors import BaseMismatch
from hub.manifest import BaseIdentity, TrainedOn

Rung: TypeAlias = Literal["exact", "quantization", "drift", "incompatible"]


class BaseWarning(UserWarning):
    """The base is usable, but not exactly what the adapter was made on or what was asked for."""


def rung(made_for: BaseIdentity, model: BaseIdentity, *, trained: str | None = None, held: str | None = None) -> Rung:
    """Compare two identities; ``trained`` and ``held`` are their quantizations, ``None`` for unknown."""
    if made_for.weights_fingerprint == model.weights_fingerprint or not differing(made_for, model):
        return "quantization" if trained and held and trained != held else "exact"
    return "drift" if made_for.arch_digest == model.arch_digest else "incompatible"


def differing(a: BaseIdentity, b: BaseIdentity) -> tuple[str, ...]:
    """Names of the tensors that differ, sorted.

    A tensor that only one side has is no difference if it repeats one that both have: a tied head that one file
    stores and the other leaves out.
    """
    shared = {digest for name, digest in a.weights.items() if b.weights.get(name) == digest}
    return tuple(
        sorted(
            name
            for name in a.weights.keys() | b.weights.keys()
            if a.weights.get(name) != b.weights.get(name)
            and not (_alone(a.weights, b.weights, name) and (a.weights | b.weights)[name] in shared)
        )
    )


def _alone(a: Mapping[str, str], b: Mapping[str, str], name: str) -> bool:
    return (name in a) != (name in b)


def compare(
    made_for: BaseIdentity,
    model: BaseIdentity,
    *,
    trained_on: TrainedOn | None = None,
    quantization: str | None = None,
    ref: str | None = None,
    allow_drift: bool = False,
) -> Rung:
    """Rung of the ladder that an adapter stands on; refuses what must not be composed.

    Parameters
    ----------
    made_for
        The base in the adapter's manifest.
    model
        The base at hand.
    trained_on, quantization
        How the base was held in training, and is held now (``none``, ``int8``, ``nf4``).
    ref
        The adapter, for messages.
    allow_drift
        Accept other weights of the same architecture, with a warning.

    Raises
    ------
    BaseMismatch
        Other weights (unless allowed) or another architecture; the message names the first tensors that differ.
    """
    adapter = ref or "the adapter"
    nearness = rung(made_for, model, trained=trained_on.quantization if trained_on else None, held=quantization)
    if nearness == "incompatible" or (nearness == "drift" and not allow_drift):
        raise BaseMismatch(_refusal(nearness, adapter, made_for, model), ref=ref, hint=_next_step(nearness, made_for))
    if nearness == "drift":
        _warn(f"{adapter} was made for other weights of this architecture: {_first(made_for, model)}")
    if nearness == "quantization" and trained_on is not None:
        _warn(f"{adapter} was trained on a base held as {trained_on.quantization}; this one is held as {quantization}")
    if nearness != "drift":
        _warn_of_surroundings(adapter, made_for, model)
    return nearness


def _refusal(nearness: Rung, adapter: str, made_for: BaseIdentity, model: BaseIdentity) -> str:
    what = "other weights of the same architecture" if nearness == "drift" else "another architecture"
    return (
        f"{adapter} was made for {_name(made_for)}; this model, {_name(model)}, has {what}: {_first(made_for, model)}"
    )


def _next_step(nearness: Rung, made_for: BaseIdentity) -> str:
    load = f"load {_name(made_for)}, the base it was made for"
    return f"{load}, or pass allow_base_drift=True (--allow-base-drift)" if nearness == "drift" else load


def _name(identity: BaseIdentity) -> str:
    revision = f"@{identity.revision[:12]}" if identity.revision else ""
    return f"{identity.repo}{revision} ({identity.weights_fingerprint[7:19]})"


def _first(made_for: BaseIdentity, model: BaseIdentity, count: int = 3) -> str:
    names = differing(made_for, model)
    shown = []
    for name in names[:count]:
        missing = "" if name in made_for.weights and name in model.weights else " (missing on one side)"
        shown.append(name + missing)
    if len(names) > count:
        shown.append(f"{len(names) - count} more")
    total = len(made_for.weights.keys() | model.weights.keys())
    return f"{len(names)} of {total} tensors differ, {', '.join(shown)}"


def _warn_of_surroundings(adapter: str, made_for: BaseIdentity, model: BaseIdentity) -> None:
    if made_for.config_digest != model.config_digest:
        _warn(f"{adapter} was made with the same weights under another config.json (positions, activation, ...)")
    if made_for.tokenizer_digest and model.tokenizer_digest and made_for.tokenizer_digest != model.tokenizer_digest:
        _warn(f"{adapter} was made with another tokenizer: token ids may mean something else")


def _warn(message: str) -> None:
    warnings.warn(message, BaseWarning, stacklevel=4)
