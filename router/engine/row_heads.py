"""Classification heads over one shared backbone: each row's hidden states go through its own adapter's head.

How hidden states become logits (pooling, dropout, projections) is left to transformers' own classification model: its
backbone is replaced by one that answers with hidden states computed before, and its head by the adapter's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, PreTrainedModel

from compose.base.sites import SiteMap
from compose.expr.tree import Call, Expr, Ref, Scale, Seq
from compose.kind.adapter import Adapter
from compose.kind.tensors import PREFIX
from compose.slots.limits import limits
from hub.errors import GateError, HubError

Weighted = list[tuple[float, str]]


class _GivenStates(nn.Module):
    """Stands where a backbone stood and gives what it was told."""

    output: Any = None

    def forward(self, *_args: Any, **_options: Any) -> Any:
        """What the real backbone said of these rows."""
        return self.output


class Heads:
    """Heads of one base.

    Parameters
    ----------
    model
        The loaded base: a classification model (an encoder), or a causal language model, on which the classification
        modules of its family are put so that adapters find their places.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.backbone = model.base_model_prefix
        self._shell = cache(self._make_shell)
        self.own = dict(_outside(model, self.backbone))

    def names(self) -> tuple[str, ...]:
        """Modules that a classification model of this family has outside its backbone; () if there is none such.

        None for an encoder-decoder, whose classes are words that it writes.
        """
        config = self.model.config
        if config.is_encoder_decoder or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return ()
        return tuple(name for name, _ in _outside(self._shell(2), self.backbone))

    def graft(self) -> None:
        """Put the family's classification modules on the base where it lacks them; its own forward never runs them."""
        for name in self.names():
            if not hasattr(self.model, name):
                place = getattr(self._shell(2), name).to_empty(device=self.model.device)
                self.model.add_module(name, place.requires_grad_(False))

    def classes(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """How many classes the tensors (by their key on disk) of an adapter's head tell apart; None without one."""
        if not self.names():
            return None
        two, three = (self._shell(n).state_dict() for n in (2, 3))
        telling = [name for name in two if two[name].shape != three[name].shape]
        heads = [shape for key, shape in shapes.items() if key.removeprefix(PREFIX) in telling]
        return int(heads[0][0]) if heads else None

    def view(self, classes: int | None, sites: SiteMap) -> tuple[PreTrainedModel, SiteMap]:
        """The base as an adapter with a head of so many classes is read onto: same modules, another head.

        Nothing of it is shared that changes while the base runs, so adapters may be read in another thread.
        """
        view = copy.copy(self.model)
        modules = {name: child for name, child in self.model._modules.items() if not name.startswith("moduloom")}
        if classes is not None:
            shell = self._make_shell(classes)
            heads = {name: getattr(shell, name).to_empty(device="cpu") for name in self.names()}
            modules = {self.backbone: modules[self.backbone], **heads}  # what a classification model has, no more
        view.__dict__["_modules"] = modules
        sites = copy.copy(sites)
        sites.modules = tuple(path for path in sites.modules if path.partition(".")[0] in modules)
        return view, sites

    def logits(self, adapter: Adapter, output: Any, mask: Tensor) -> Tensor:
        """Logits (n, classes) of rows whose backbone gave ``output``, by the head that an adapter carries.

        The mask (n, T) stands for the ids as well: models look at those only to find a text's end.
        """
        carried = {name: adapter.head(name) for name in self.names() if name in adapter.saved}
        shapes = {f"{PREFIX}{name}.{k}": v.shape for name, m in carried.items() if m for k, v in m.state_dict().items()}
        shell = self._shell(self.classes(shapes) or 2)
        for name in self.names():
            head = carried.get(name) or self.own.get(name)
            if head is None:
                raise HubError(f"{adapter.name} brings no {name!r}, and the base has none", ref=adapter.name)
            shell._modules[name] = head
        inside = next((p.dtype for m in carried.values() if m for p in m.parameters()), None)
        shell._modules[self.backbone].output = _map(output, lambda t: t.to(inside))
        logits: Tensor = shell(input_ids=mask, attention_mask=mask).logits
        return logits.float()

    def _make_shell(self, classes: int) -> PreTrainedModel:
        """A classification model on the meta device, whose backbone answers."""
        config = copy.deepcopy(self.model.config)
        config.__dict__.pop("quantization_config", None)
        config.num_labels = classes
        config.pad_token_id = 0  # what a mask, given as ids, has where there is padding
        with torch.device("meta"):
            shell = AutoModelForSequenceClassification.from_config(config).eval()
        if shell.base_model_prefix != self.backbone or self.backbone not in shell._modules:
            raise GateError(
                f"{type(shell).__name__} keeps its backbone elsewhere than {type(self.model).__name__}",
                hint="classification is not served on this family",
            )
        shell._modules[self.backbone] = _GivenStates()
        return shell


def _outside(model: PreTrainedModel, backbone: str) -> list[tuple[str, nn.Module]]:
    """Children with parameters beside the backbone."""
    children = [(n, m) for n, m in model.named_children() if n != backbone and not n.startswith("moduloom")]
    return [(n, m) for n, m in children if next(m.parameters(), None) is not None]


def pick(output: Any, rows: Tensor, *, last: bool) -> Any:
    """The rows of a backbone's output; with ``last`` only each row's last place of (B, T, d)."""
    return _map(output, lambda t: t[rows][:, -1:] if last and t.dim() == 3 else t[rows])


def _map(output: Any, change: Any) -> Any:
    values = {f.name: getattr(output, f.name) for f in fields(output)}
    tensors = {name: change(v) for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return type(output)(**tensors)


def heads_of(expr: Expr, adapters: Mapping[str, Adapter], names: Sequence[str]) -> Weighted:
    """Adapters of an expression whose heads answer, with their shares: in ``>>`` the last head stays."""
    if isinstance(expr, Ref):
        return [(1.0, expr.text)] if any(name in adapters[expr.text].saved for name in names) else []
    if isinstance(expr, Scale):
        return [(expr.factor * w, name) for w, name in heads_of(expr.of, adapters, names)]
    # A merge is an adapter of its own once activated; `at(...)` keeps what its argument brings whole.
    assert not isinstance(expr, Call) or limits(expr)  # noqa: S101
    parts = [heads_of(child, adapters, names) for child in expr.children]
    if isinstance(expr, Seq):
        return next((part for part in reversed(parts) if part), [])
    return [pair for part in parts for pair in part]


def blend(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Logits of heads that stand side by side: their mean, weighed by the adapters' weights."""
    if len(parts) == 1:
        return parts[0][1]
    total = sum(w for w, _ in parts)
    if total == 0:
        raise HubError("the heads of this expression have weights that sum to zero", hint="give them positive weights")
    stacked = torch.stack([w / total * logits for w, logits in parts])
    return stacked.sum(0)
