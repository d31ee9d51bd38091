"""How well the second text of a pair is borne out by the first: cosines between the states of their tokens.

With states a_s of the first text's tokens and b_t of the second's, both read apart, and c_st = cos(a_s, b_t):

    cos(mean_s a_s, mean_t b_t),   mean_t max_s c_st,   mean_s max_t c_st,   min_t max_s c_st

The second and third are recall and precision of arXiv:1904.09675.

Entailment, paraphrase and answers show in these four numbers after a few examples; in the one vector of a joined pair,
which says above all what it is about, they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.errors import DataError
from train.fewshot.examples import Example
from train.fewshot.reading.reader import MaskReader, inputs_of
from train.fewshot.reading.views import view_dataset
from train.steps.evaluate import amp

__all__ = ["agreement", "match", "pairs"]

_WIDTH = 4
_BATCH = 32


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """(4,) the cosines above, from states (S, d) and (T, d); zeros where a text has no tokens."""
    if not len(first) or not len(second):
        return first.new_zeros(_WIDTH)
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T  # (S, T)
    borne_out = cosines.max(0).values
    means = F.cosine_similarity(first.mean(0), second.mean(0), dim=0)
    return torch.stack([means, borne_out.mean(), cosines.max(1).values.mean(), borne_out.min()])


def pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """The two texts of each example.

    Raises
    ------
    DataError
        One has a single text.
    """
    alone = next((e for e in examples if e.text2 is None), None)
    if alone is not None:
        raise DataError(f"pairs are read here, and {alone.text[:40]!r} has no second text", hint="name it: --text2")
    return [(e.text, str(e.text2)) for e in examples]


@torch.no_grad()
def match(
    reader: MaskReader, texts: Sequence[tuple[str, str]], tokenizer: Any, *, max_length: int, precision: str = "fp32"
) -> Tensor:
    """(N, 4) agreement of each pair of texts."""
    reader.eval()
    each = list(dict.fromkeys(text for pair in texts for text in pair))
    states = dict(zip(each, _states(reader, each, tokenizer, max_length, precision), strict=True))
    return torch.stack([agreement(states[first], states[second]) for first, second in texts])


def _states(reader: MaskReader, texts: Sequence[str], tokenizer: Any, max_length: int, precision: str) -> list[Tensor]:
    """(T_i, d) last states of each text's own tokens, those that the tokenizer adds left out."""
    data = view_dataset(None, [Example(text) for text in texts], tokenizer, (), max_length=max_length)
    added = torch.tensor(tokenizer.all_special_ids)
    states = [torch.empty(0)] * len(texts)
    for rows, batch in data.batches(_BATCH):
        with amp(next(reader.parameters()).device, precision):
            hidden = reader(**inputs_of(batch), hidden=True).hidden.float()
        own = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], added)
        for row, state, mine in zip(rows.tolist(), hidden, own, strict=True):
            states[row] = state[mine]
    return states
