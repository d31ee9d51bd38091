"""Heads that an adapter carries whole: other numbers of classes than the base's, and rows with heads of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import SiteError

if TYPE_CHECKING:
    from compose.kind.adapter import Adapter


def head_modules(model: PreTrainedModel, sites: SiteMap, names: Sequence[str] | str | None) -> list[str]:
    """Paths of the modules that make up the head: those named, or all that stand outside the backbone.

    Where the backbone is no module of its own (T5), that is the module of the output embeddings.

    Raises
    ------
    SiteError
        A name that no module ends in, or a model without a head.
    """
    modules = {path: model.get_submodule(path) for path in sites.modules}
    if names is not None:
        wanted = (names,) if isinstance(names, str) else tuple(names)
        matches = {name: [p for p in modules if p == name or p.endswith("." + name)] for name in wanted}
        if absent := [name for name, paths in matches.items() if not paths]:
            raise SiteError(f"target {absent[0]!r} is no module of this {sites.model_type} model")
        return [p for p in modules if any(p in paths for paths in matches.values())]
    backbone, output = model.base_model_prefix, model.get_output_embeddings()
    if backbone in modules:
        outside = [
            p for p, m in modules.items() if "." not in p and p != backbone and any(True for _ in m.parameters())
        ]
    else:
        outside = [p for p, m in modules.items() if m is output]
    if not outside:
        raise SiteError(f"{sites.architecture} has no head", hint="load the base for a task, or give target_modules")
    return outside


def output_layer(head: nn.Module) -> tuple[str, nn.Linear] | None:
    """Path (ending in a dot, "" for the head itself) and module of the linear layer that a head ends with."""
    linear = [(path, m) for path, m in head.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        return None
    path, layer = linear[-1]
    return (f"{path}." if path else ""), layer


def fits(head: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """First key whose tensor cannot stand in ``head``, or None. Outputs, and tokens of a table, may be any number."""
    own, output = head.state_dict(), output_layer(head)
    free: set[str] = set()
    if isinstance(head, nn.Embedding) and (table := state["weight"]).dim() == 2 and len(table):
        free = {"weight"} if table.shape[1] == head.embedding_dim else set()
    if output is not None:
        stem, layer = output
        weight, bias = state[f"{stem}weight"], state.get(f"{stem}bias")
        if weight.dim() == 2 and weight.shape[1] == layer.in_features and len(weight):
            free = {f"{stem}weight"}
            if bias is not None and bias.shape == weight.shape[:1]:
                free.add(f"{stem}bias")
    return next((key for key, value in state.items() if key not in free and value.shape != own[key].shape), None)


def widen(head: nn.Module, outputs: int) -> None:
    """Give a head's output layer another number of outputs; its tensors are then to be loaded or initialized."""
    output = output_layer(head)
    if output is None or output[1].out_features == outputs:
        return
    layer = output[1]
    layer.out_features = outputs
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, layer.in_features))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_zeros(outputs))


def take_size(head: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a head the number of outputs, or a table that of tokens, of the tensors that are to be loaded into it."""
    if (output := output_layer(head)) is not None:
        widen(head, len(state[f"{output[0]}weight"]))
    elif isinstance(head, nn.Embedding) and len(state["weight"]) != head.num_embeddings:
        head.num_embeddings = len(state["weight"])
        head.weight = nn.Parameter(head.weight.new_empty(head.num_embeddings, head.embedding_dim))


def own_vocabulary(adapter: Adapter, sites: SiteMap, model: PreTrainedModel) -> int | None:
    """Tokens of an adapter that carries tables of another vocabulary than the base's; None of any other."""
    for path in filter(None, (sites.output, sites.embedding)):
        own = _tokens(adapter.head(path))
        if own is not None and own != _tokens(model.get_submodule(path)):
            return own
    return None


def _tokens(table: nn.Module | None) -> int | None:
    return getattr(table, "num_embeddings", getattr(table, "out_features", None))


def level(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs (..., n) and (..., m) padded to the wider: a class that a row's head does not have is impossible.

    The padding is the dtype's lowest number, not -inf, so that differences and means of logits stay numbers.
    """
    if a.shape[-1] == b.shape[-1]:
        return a, b
    width = max(a.shape[-1], b.shape[-1])
    low = torch.finfo(a.dtype).min
    return F.pad(a, (0, width - a.shape[-1]), value=low), F.pad(b, (0, width - b.shape[-1]), value=low)
