"""The base modules that a task needs trained and stored whole: its head, and what the checkpoint never had."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

import compose
from compose.kind.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["head_parameters", "modules_to_save"]


def modules_to_save(model: PreTrainedModel, task: str) -> tuple[str, ...]:
    """Paths of the modules that stand outside the backbone, and of those inside it that its training never reached.

    These are what its files lack, and the pooler of a sentence encoder: that was trained on its tokens' states as they
    are (their mean, mostly), and the pooler in its files is left from before. Language modelling trains no head: the
    base has one.
    """
    if task in ("causal_lm", "seq2seq"):
        return ()
    prefix = model.base_model_prefix
    children = {name: list(child.parameters()) for name, child in model.named_children()}
    heads = {name for name, held in children.items() if held and name != prefix} if prefix in children else set[str]()
    stored = {_modern(name).removeprefix(f"{prefix}.") for name in compose.identity(model).weights}
    inside = [name for name, _ in model.named_parameters() if name.partition(".")[0] not in heads]
    if _is_sentence_encoder(model):
        stored = {name for name in stored if not name.startswith("pooler.")}
    missing = {name.rpartition(".")[0] for name in inside if name.removeprefix(f"{prefix}.") not in stored}
    return tuple(sorted(heads | missing))


def head_parameters(learner: nn.Module) -> list[nn.Parameter]:
    """Parameters of the whole modules that a learner carries, those of all members of a composition.

    Not those of norms, which start from what the base has learned: of a head there is a matrix at least.
    """
    adapters = [module for module in learner.modules() if isinstance(module, Adapter)]
    carried = [adapter.head(path) for adapter in adapters for path in adapter.saved]
    whole = [list(module.parameters()) for module in carried if module is not None]
    return [parameter for parameters in whole if any(p.dim() > 1 for p in parameters) for parameter in parameters]


def _is_sentence_encoder(model: PreTrainedModel) -> bool:
    """Whether the base's folder is laid out as sentence-transformers does: what pools the tokens is listed there."""
    folder = model.name_or_path
    return bool(folder) and (Path(folder) / "modules.json").is_file()


def _modern(name: str) -> str:
    """Norms of the first BERT checkpoints are called gamma and beta."""
    stem, _, last = name.rpartition(".")
    return ".".join((stem, {"gamma": "weight", "beta": "bias"}.get(last, last)))
