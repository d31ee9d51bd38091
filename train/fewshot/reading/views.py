"""Views of an example: the plain text, or the text in a template, and the one vector that is read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data.batches import Dataset, Ragged
from train.fewshot.examples import Example
from train.fewshot.prompts.filled import encode
from train.fewshot.prompts.template import Template
from train.fewshot.reading.reader import MaskReader, mean_state
from train.steps.evaluate import amp

__all__ = ["Features", "Pool", "View", "ViewModel", "extract", "view_dataset"]

_BATCH = 32
Pool: TypeAlias = Literal["mean", "mask", "last", "match"]


@dataclass(frozen=True)
class View:
    """One way to read an example.

    Attributes
    ----------
    template
        Readable notation; None is the text (or pair) as the tokenizer joins it.
    pool
        `mean` over the last layer's real tokens, `mask`: what the output embedding is fed at the mask, `last`: the
        last token's state (causal models); each scaled to length one. `match`: how well the two texts of a pair, read
        apart, agree (see `match`).
    """

    template: str | None = None
    pool: Pool = "mean"


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
    template: str | None, examples: Sequence[Example], tokenizer: Any, labels: Sequence[str], *, max_length: int
) -> Dataset:
    """The examples in a template (or plain) as model inputs: `input_ids`, `mask_at`, `labels`, ..."""
    if template is None:
        texts = [e.text for e in examples]
        pairs = None if examples[0].text2 is None else [str(e.text2) for e in examples]
        found = tokenizer(texts, pairs, truncation=True, max_length=max_length, verbose=False)
        rows, types = found["input_ids"], found.get("token_type_ids")
        at = [[0]] * len(rows)
    else:
        parsed = Template.parse(template)
        encoded = [encode(parsed, e, tokenizer, max_length=max_length) for e in examples]
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


def pooled(pool: str, out: Any, mask: Tensor) -> Tensor:
    """(B, d) unit vectors of a view, from what a reader gave; `mask` (B, T) marks the real tokens."""
    if pool == "mask":
        return F.normalize(out.states[:, 0].float(), dim=-1)
    if pool == "mean":
        return mean_state(out.hidden.float(), mask)
    return F.normalize(out.hidden[torch.arange(len(mask)), mask.sum(1) - 1].float(), dim=-1)


@torch.no_grad()
def extract(
    reader: MaskReader,
    views: Sequence[View],
    datasets: Mapping[str | None, Dataset],
    words: Sequence[Sequence[int]],
    *,
    precision: str = "fp32",
) -> Features:
    """Read every view of every row, in evaluation mode; views of one template share a pass.

    `words` are the token ids that speak for each label: the mean of their logits at a mask is the label's prior.
    """
    reader.eval()
    states: dict[View, Tensor] = {}
    prior: list[Tensor] = []
    for template, data in datasets.items():
        mine = [view for view in dict.fromkeys(views) if view.template == template]
        found: dict[View, list[Tensor]] = {view: [torch.empty(0)] * len(data) for view in mine}
        priors = [torch.empty(0)] * len(data)
        for rows, batch in data.batches(_BATCH):
            batch.pop("labels")
            with amp(next(reader.parameters()).device, precision):
                out = reader(**batch, hidden=any(view.pool != "mask" for view in mine))
            for view in mine:
                for row, state in zip(rows.tolist(), pooled(view.pool, out, batch["attention_mask"]), strict=True):
                    found[view][row] = state
            if words and template is not None:
                scores = torch.stack([out.logits[:, 0, list(ids)].float().mean(1) for ids in words], 1)
                for row, score in zip(rows.tolist(), scores, strict=True):
                    priors[row] = score
        states |= {view: torch.stack(rows) for view, rows in found.items()}
        if words and template is not None:
            prior.append(torch.stack(priors))
    count = len(next(iter(states.values())))
    empty = torch.zeros(count, 0, max(len(words), 1))
    return Features(tuple(states[view] for view in views), torch.stack(prior, 1) if prior else empty)


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
        out = self.reader(**inputs, hidden=any(v.pool != "mask" for v in self.views))
        logits = torch.empty(0)
        for i, (weight, offset) in enumerate(self.heads):
            mine = view == i
            if not bool(mine.any()):
                continue
            state = pooled(self.views[i].pool, out, inputs["attention_mask"])[mine]
            if not logits.numel():
                logits = state.new_zeros(len(view), weight.shape[1])
            logits = logits.index_put((mine.nonzero()[:, 0],), state @ weight + offset)
        return SimpleNamespace(logits=logits)


def joined(datasets: Sequence[Dataset], rows: Sequence[Tensor] = ()) -> Dataset:
    """The rows of all views in one dataset, each with its view's number and, if given, its number in the replay."""
    first = datasets[0]
    columns: dict[str, Ragged | Tensor] = {}
    for name, column in first.columns.items():
        if isinstance(column, Ragged):
            lists = [d.columns[name] for d in datasets]
            columns[name] = Ragged.of(
                [r.row(i).tolist() for r in lists if isinstance(r, Ragged) for i in range(len(r.starts) - 1)]
            )
        else:
            columns[name] = torch.cat([torch.as_tensor(d.columns[name]) for d in datasets])
    columns["view"] = torch.cat([torch.full((len(d),), i) for i, d in enumerate(datasets)])
    if rows:
        columns["row"] = torch.cat(list(rows))
    return replace(first, columns=columns)
