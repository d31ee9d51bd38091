"""What scorers are fitted on and asked about: batches of rows, and a model with its experts and their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from compose.algebra import parse
from compose.expr.tree import Expr
from compose.runtime.model_runtime import runtime
from hub.console.progress import Steps
from hub.errors import UsageError

Experts: TypeAlias = Mapping[str, Expr | str]  # name of an expert -> what it is in the model
IGNORE = -100
_BY_ROW = "choose by row: discriminant, likelihood"


@dataclass(frozen=True)
class Batch:
    """B rows padded on the right.

    Attributes
    ----------
    input_ids, attention_mask : (B, T); a mask of 0 is padding.
    tasks : for each row the expert it asks for, where rows say so.
    labels : (B,) classes, where rows have one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    tasks: tuple[str, ...] = ()
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def of(
        cls, rows: Sequence[Tensor], *, pad: int = 0, tasks: Sequence[str] = (), labels: Tensor | None = None
    ) -> Batch:
        """Pad token ids (T_i,) on the right; UsageError where a row is empty."""
        if not rows or min(len(row) for row in rows) == 0:
            raise UsageError("a row has no tokens", hint="leave empty texts out")
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return cls(ids, mask, tuple(tasks), labels)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.tasks, labels)


Loss: TypeAlias = Callable[[PreTrainedModel, Batch, str], Tensor]


def next_token_loss(model: PreTrainedModel, batch: Batch, _name: str) -> Tensor:
    """Mean of `-log p(x_t | x_<t)` over the real tokens, in nats."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    targets = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)[:, 1:]
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@dataclass(frozen=True)
class Bench:
    """A model with experts attached, and what each of them was made for.

    Attributes
    ----------
    experts : name -> name of a resident adapter, or an expression over them.
    rows : name of an expert -> encoded rows of its kind of text, token ids (T_i,).
    labels : name of an expert -> the classes of those rows, where the loss reads them.
    loss : what learned gates minimize; takes the model, a batch and the name of the expert it is from.
    progress : called with what is done, how many parts are done and how many there are.
    """

    model: PreTrainedModel
    experts: Experts
    rows: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Loss = next_token_loss
    pad: int = 0
    batch_size: int = 16
    seed: int = 0
    progress: Steps | None = None

    def need_data(self) -> None:
        """Refuse experts without rows."""
        refuse_missing(self.experts, self.rows)

    def batches(self, name: str) -> Iterator[Batch]:
        """All rows of an expert, in order."""
        rows = self.rows[name]
        for start in range(0, len(rows), self.batch_size):
            yield self._batch(name, range(start, min(start + self.batch_size, len(rows))))

    def draw(self, name: str, generator: torch.Generator) -> Batch:
        """A random batch of an expert's rows."""
        rows = self.rows[name]
        picked = torch.randint(len(rows), (min(self.batch_size, len(rows)),), generator=generator)
        return self._batch(name, picked.tolist())

    def _batch(self, name: str, picked: Sequence[int]) -> Batch:
        labels = self.labels[name][torch.as_tensor(list(picked))] if name in self.labels else None
        rows = [self.rows[name][i] for i in picked]
        return Batch.of(rows, pad=self.pad, tasks=[name] * len(rows), labels=labels).to(self.model.device)

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress to whoever listens."""
        if self.progress is not None:
            self.progress(what, done, total)


def refuse_missing(experts: Iterable[str], rows: Mapping[str, Sequence[Any]]) -> None:
    """UsageError naming the experts that have no rows."""
    if missing := [name for name in experts if not len(rows.get(name, ()))]:
        raise UsageError(
            f"there is no text for {', '.join(missing)}",
            hint=f"--data {missing[0]}=FILE, with texts of two tokens or more",
        )


def sites_of(model: PreTrainedModel, experts: Experts) -> dict[str, int]:
    """Module paths at which some expert acts -> width of what enters there."""
    model_runtime = runtime(model)
    if bare := [name for name, expert in experts.items() if not tree(expert).refs]:
        raise UsageError(f"{bare[0]!r} is the bare base, which does nothing at a site", hint=_BY_ROW)
    names = dict.fromkeys(name for expert in experts.values() for name in tree(expert).refs)
    paths = dict.fromkeys(path for name in names for path in model_runtime.adapter(name).module_paths)
    known = {**model_runtime.sites.sites, **model_runtime.sites.outside}
    return {path: known[path].in_features if path in known else _width(model, path) for path in paths}


def _width(model: PreTrainedModel, path: str) -> int:
    """Width of what enters a norm. Raises UsageError for a module that reads no vectors, such as an embedding."""
    vector = next((p for p in model.get_submodule(path).parameters() if p.dim() == 1), None)
    if vector is None:
        raise UsageError(f"{path} reads no vectors that a gate could weigh", hint=_BY_ROW)
    return len(vector)


def tree(expert: Expr | str) -> Expr:
    """The expression of an expert."""
    return parse(expert) if isinstance(expert, str) else expert
