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
    if task == "causal_lm":
        return ()
    prefix = model.base_model_prefix
    backbone = f"{prefix}." if hasattr(model, prefix) else ""
    heads = {n for n, m in model.named_children() if n != prefix and any(True for _ in m.parameters())} if backbone else set()
    stored = {_modern(name).removeprefix(backbone) for name in compose.identity(model).weights}
    inside = {name for name, _ in model.named_parameters() if name.partition(".")[0] not in heads}
    missing = {name.rpartition(".")[0] for name in inside if name.removeprefix(backbone) not in stored}
    return tuple(sorted(heads | {path for path in missing if "moduloom_adapters" not in path}))


def _modern(name: str) -> str:
    """Norms of the first BERT checkpoints are called gamma and beta."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(last, last) }".replace(" ", "")
