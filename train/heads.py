"""Which base modules a task needs trained and stored whole: its head, and what the checkpoint never had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import compose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["modules_to_save"]


def modules_to_save(model: PreTrainedModel, task: str) -> tuple[str, ...]:
    """Paths of the modules that stand outside the backbone, and of those inside it that its files lack (a pooler).

    Language modelling trains no head: the base has one.
    """
    if task in ("causal_lm", "seq2seq"):
        return ()
    prefix = model.base_model_prefix
    children = {name: list(child.parameters()) for name, child in model.named_children()}
    heads = {name for name, held in children.items() if held and name != prefix} if prefix in children else set[str]()
    stored = {_modern(name).removeprefix(f"{prefix}.") for name in compose.identity(model).weights}
    inside = [name for name, _ in model.named_parameters() if name.partition(".")[0] not in heads]
    missing = {name.rpartition(".")[0] for name in inside if name.removeprefix(f"{prefix}.") not in stored}
    return tuple(sorted(heads | missing))


def _modern(name: str) -> str:
    """Norms of the first BERT checkpoints are called gamma and beta."""
    stem, _, last = name.rpartition(".")
    return ".".join((stem, {"gamma": "weight", "beta": "bias"}.get(last, last)))
