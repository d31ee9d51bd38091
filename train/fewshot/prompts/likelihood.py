"""Labels by likelihood, for models without a mask: how likely each label's words are where the mask stands.

A causal LM reads the prompt up to the mask; a label's score is the sum of log p of its word and of what follows it in
the template. An encoder-decoder of the T5 kind reads the prompt with a sentinel at the mask and its decoder says
`<sentinel 0> word <sentinel 1>`: the score is the sum of log p of the word's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.fewshot.examples import Example
from train.fewshot.prompts.filled import render
from train.fewshot.prompts.template import Template, TemplateError

__all__ = ["causal_scores", "infill_scores", "split_at_mask"]

_MARK = "\x00"


def split_at_mask(template: Template, example: Example) -> tuple[str, str]:
    """The prompt's text before and after its mask; no space is left before it, the word brings its own."""
    before, after = render(template, example, _MARK).split(_MARK)
    return before.rstrip(" "), after


@torch.no_grad()
def causal_scores(
    model: Any,
    tokenizer: Any,
    template: Template,
    examples: Sequence[Example],
    words: Sequence[str],
    *,
    max_length: int = 256,
    size: int = 32,
) -> Tensor:
    """(N, C) sums of log p of each word and the rest of the template, given the prompt before the mask.

    A prompt that is too long loses its first tokens.
    """
    rows: list[tuple[list[int], int]] = []
    for example in examples:
        before, after = split_at_mask(template, example)
        start = tokenizer(before, verbose=False)["input_ids"] if before else [tokenizer.bos_token_id or 0]
        for word in words:
            gap = " " if before else ""
            end = tokenizer(f"{gap}{word}{after}", add_special_tokens=False, verbose=False)["input_ids"]
            kept = start[-(max_length - len(end)) :]
            rows.append((kept + end, len(end)))
    scores = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for at in range(0, len(order), size):
        mine = order[at : at + size]
        longest = max(len(rows[i][0]) for i in mine)
        ids = torch.tensor([rows[i][0] + [0] * (longest - len(rows[i][0])) for i in mine])
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (longest - len(rows[i][0])) for i in mine])
        log_p = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        own = log_p.gather(2, ids[:, 1:, None])[..., 0]
        for row, i in enumerate(mine):
            total, said = len(rows[i][0]), rows[i][1]
            scores[i] = own[row, total - said - 1 : total - 1].sum()
    return scores.view(len(examples), len(words))


def sentinel(tokenizer: Any, number: int) -> int:
    """Token of T5's `<extra_id_number>`.

    Raises
    ------
    TemplateError
        The tokenizer has no sentinels.
    """
    found = tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>")
    if found is None or found == tokenizer.unk_token_id:
        raise TemplateError("this tokenizer has no <extra_id_0>: it is not of the T5 kind", hint="a T5 directory or id")
    return int(found)


@torch.no_grad()
def infill_scores(
    model: Any,
    tokenizer: Any,
    template: Template,
    examples: Sequence[Example],
    words: Sequence[str],
    *,
    max_length: int = 256,
) -> Tensor:
    """(N, C) sums of log p of each word's tokens as the filling of the sentinel at the mask."""
    first, second = sentinel(tokenizer, 0), sentinel(tokenizer, 1)
    targets = [[first, *tokenizer(w, add_special_tokens=False, verbose=False)["input_ids"], second] for w in words]
    scores = torch.zeros(len(examples), len(words))
    for i, example in enumerate(examples):
        text = render(template, example, "<extra_id_0>")
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        encoded = model.get_encoder()(input_ids=ids)
        for c, target in enumerate(targets):
            labels = torch.tensor([target])
            log_p = model(encoder_outputs=encoded, labels=labels).logits[0].float().log_softmax(-1)
            scores[i, c] = log_p[range(1, len(target) - 1), target[1:-1]].sum()
    return scores
