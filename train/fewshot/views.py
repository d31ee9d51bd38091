"""Views of an example: the plain text, or the text in a template, and the one vector that is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.batches import Dataset, Ragged
from train.fewshot.examples import Example
from train.fewshot.prompts import encode
from train.fewshot.reader import MaskReader, mean_state
from train.fewshot.template import Template

__all__ = ["Features", "View", "ViewModel", "extract", "view_dataset"]

_BATCH = 32


@dataclass(frozen=True)
class View:
    """One way to read an example.

    Attributes
    ----------
    template
        Readable notation; None is the text (or pair) as the tokenizer joins it.
    pool
        `mean` over the last layer's real tokens, `mask`: what the output embedding is fed at the mask, `last`: the
        last token's state (causal models). Every vector is scaled to length one.
    """

    template: str | None = None
    pool: Literal["mean", "mask", "last"] = "mean"


@dataclass(frozen=True)
class Features:
    """What the views saw: `states` holds (N, d) a view, `prior` (N, P, C) the label words' logits at each mask."""

    states: tuple[Tensor, ...]
    prior: Tensor

    def __len__(self) -> int:
        return len(self.states[0])

    def select(self, rows: Sequence[int] | Tensor) -> Features:
        """The given rows."""
        rows = torch.as_tensor(rows)
        return Features(tuple(s[rows] for s in self.states), self.prior[rows])


def view_dataset(
    view: View, examples: Sequence[Example], tokenizer: Any, labels: Sequence[str], *, max_length: int
) -> Dataset:
    """The examples as this view's model inputs."""
    if view.template is None:
        texts = [e.text for e in examples]
        pairs = None if examples[0].text2 is None else [str(e.text2) for e in examples]
        found = tokenizer(texts, pairs, truncation=True, max_length=max_length, verbose=False)
        rows, types = found["input_ids"], found.get("token_type_ids")
        at = [[0]] * len(rows)
    else:
        template = Template.parse(view.template)
        encoded = [encode(template, e, tokenizer, max_length=max_length) for e in examples]
        rows, at = [e.ids for e in encoded], [list(e.mask_at) for e in encoded]
        types = [e.types for e in encoded] if "token_type_ids" in tokenizer.model_input_names else None
    index = {label: i for i, label in enumerate(labels)}
    columns: dict[str, Ragged | Tensor] = {
        "input_ids": Ragged.of(rows),
        "mask_at": torch.tensor(at),
        "labels": torch.tensor([index.get(str(e.label), 0) for e in examples]),
    }
    if types is not None:
        columns["token_type_ids"] = Ragged.of(types)
    return Dataset(columns, "classification", tokenizer.pad_token_id or 0, tuple(labels), "the examples")


def read_state(reader: MaskReader, pool: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, d) unit vectors of a view and (B, V) logits at its mask."""
    out = reader(**inputs, hidden=pool != "mask")
    if pool == "mask":
        return F.normalize(out.states[:, 0].float(), dim=-1), out.logits[:, 0]
    mask = inputs["attention_mask"]
    if pool == "mean":
        return mean_state(out.hidden.float(), mask), out.logits[:, 0]
    last = out.hidden[torch.arange(len(mask)), mask.sum(1) - 1]
    return F.normalize(last.float(), dim=-1), out.logits[:, 0]


@torch.no_grad()
def extract(
    reader: MaskReader, views: Sequence[View], datasets: Sequence[Dataset], words: Sequence[Sequence[int]]
) -> Features:
    """Read every view of every row, in evaluation mode.

    `words` are the token ids that speak for each label: the mean of their logits is the label's prior.
    """
    reader.eval()
    states: list[Tensor] = []
    prior: list[Tensor] = []
    for view, data in zip(views, datasets, strict=True):
        found: list[Tensor] = [torch.empty(0)] * len(data)
        said: list[Tensor] = [torch.empty(0)] * len(data)
        for rows, batch in data.batches(_BATCH):
            batch.pop("labels")
            state, logits = read_state(reader, view.pool, batch)
            spoken = torch.stack([logits[:, list(ids)].mean(1) for ids in words], 1) if words else state[:, :0]
            for row, one, score in zip(rows.tolist(), state, spoken, strict=True):
                found[row], said[row] = one, score
        states.append(torch.stack(found))
        if view.pool == "mask" and words:
            prior.append(torch.stack(said))
    count = len(states[0])
    return Features(tuple(states), torch.stack(prior, 1) if prior else torch.zeros(count, 0, max(len(words), 1)))


class ViewModel(nn.Module):
    """Label logits of rows of several views, each by the head of its own view: what refining trains through.

    Rows carry `view` (B,), the number of their view; `heads` are fixed (d, C) matrices with (C,) offsets.
    """

    def __init__(self, reader: MaskReader, views: Sequence[View], heads: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.reader, self.views = reader, tuple(views)
        self.heads = list(heads)

    def forward(self, view: Tensor, **inputs: Tensor) -> Any:
        """`.logits` (B, C)."""
        from types import SimpleNamespace

        mean = [i for i, v in enumerate(self.views) if v.pool != "mask"]
        out = self.reader(**inputs, hidden=bool(mean))
        logits = torch.empty(0)
        for i, (weight, offset) in enumerate(self.heads):
            mine = view == i
            if not bool(mine.any()):
                continue
            state = self._state(i, out, inputs["attention_mask"])[mine]
            if not logits.numel():
                logits = state.new_zeros(len(view), weight.shape[1])
            logits = logits.index_put((mine.nonzero()[:, 0],), state @ weight + offset)
        return SimpleNamespace(logits=logits)

    def _state(self, i: int, out: Any, mask: Tensor) -> Tensor:
        pool = self.views[i].pool
        if pool == "mask":
            return F.normalize(out.states[:, 0].float(), dim=-1)
        if pool == "mean":
            return mean_state(out.hidden.float(), mask)
        return F.normalize(out.hidden[torch.arange(len(mask)), mask.sum(1) - 1].float(), dim=-1)


def joined(datasets: Sequence[Dataset], rows: Sequence[Tensor]) -> Dataset:
    """The rows of all views in one dataset, each with its view's number and its number in the replay."""
    first = datasets[0]
    columns: dict[str, Ragged | Tensor] = {}
    for name, column in first.columns.items():
        if isinstance(column, Ragged):
            lists = [d.columns[name] for d in datasets]
            columns[name] = Ragged.of([r.row(i).tolist() for r in lists if isinstance(r, Ragged) for i in range(len(r.starts) - 1)])
        else:
            columns[name] = torch.cat([torch.as_tensor(d.columns[name]) for d in datasets])
    columns["view"] = torch.cat([torch.full((len(d),), i) for i, d in enumerate(datasets)])
    columns["row"] = torch.cat(list(rows))
    return replace(first, columns=columns)
