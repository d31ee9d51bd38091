"""A new domain for a pool of experts: begun from the expert that explains its text best (DEMix, arXiv 2108.05036)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import compose
from compose.algebra import parse
from compose.expr.tree import Ref
from compose.kind.adapter import Adapter
from compose.runtime.model_runtime import runtime
from hub.errors import Conflict, UsageError
from router.ensemble.experts import expert_log_probs


def closest(
    model: PreTrainedModel, experts: Sequence[str], input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[str, Tensor]:
    """The expert with the highest posterior over all the texts together, and `log p(texts | e)` of each (E,), in nats.

    Under a uniform prior that is the one with the highest likelihood; of equal ones the earlier.
    """
    if not experts:
        raise UsageError("there are no experts to begin from", hint="train the first domain from scratch")
    log_probs, _ = expert_log_probs(model, list(experts), input_ids, attention_mask)
    evidence = log_probs.double().sum((1, 2)).cpu()  # (E,)
    return experts[int(evidence.argmax())], evidence


def new_domain(
    model: PreTrainedModel,
    name: str,
    experts: Sequence[str],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Adapter, str]:
    """A trainable adapter called `name` that starts as the expert closest to some texts of the new domain.

    Returns
    -------
    The adapter, resident and not active, and the name of the expert it is a copy of.

    Raises
    ------
    Conflict
        An adapter of that name is resident.
    UsageError
        The closest expert is an expression, which has no tensors of its own.
    """
    model_runtime = runtime(model)
    if name in model_runtime.adapters:
        raise Conflict(f"an adapter {name!r} is attached already", hint="give the new domain another name")
    nearest, _ = closest(model, experts, input_ids, attention_mask)
    what = parse(nearest)
    if not isinstance(what, Ref):
        raise UsageError(f"{nearest} is no single adapter, so nothing can be copied", hint="merge it first")
    source = model_runtime.adapter(what.text)
    adapter = compose.create(model, source.kind, source.config, name=name)
    with torch.no_grad():
        adapter.load_state({key: value.clone() for key, value in source.state().items()})
    adapter.labels = source.labels
    return adapter, nearest
