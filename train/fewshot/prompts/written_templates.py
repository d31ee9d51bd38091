"""Templates written by a seq2seq model (LM-BFF, arXiv:2012.15723, section 5.2).

T5 fills the spans around the label word; one beam search runs over all training examples at once, and a beam's score
is the sum over examples of log p: the template that suits all of them. (The original code averages logits instead;
this follows the paper.)

    one text:   S <X> word <Y>   and   . <X> word <Y> S      half of the beam each
    a pair:     S0[:-1] <X> word <Y> s1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.fewshot.examples import Example
from train.fewshot.prompts.likelihood import sentinel
from train.fewshot.prompts.template import Template

__all__ = ["Beam", "beam_search", "source_texts", "templates"]

_LENGTH = 20
_ROWS = 256  # of a pass: beams times examples


@dataclass(frozen=True)
class Beam:
    """What was written so far: `<X> first <Y> second`, and the sum of log p over the examples."""

    tokens: tuple[int, ...]
    score: float


def source_texts(example: Example, word: str) -> list[str]:
    """What the seq2seq model reads for an example and its label word."""
    spans = f"<extra_id_0> {word} <extra_id_1>"
    if example.text2 is not None:
        second = example.text2[:1].lower() + example.text2[1:]
        return [f"{example.text[:-1]} {spans} {second}"]
    return [f"{example.text} {spans}", f". {spans} {example.text}"]


@torch.no_grad()
def beam_search(
    model: Any, tokenizer: Any, texts: Sequence[str], *, beam: int = 100, max_tokens: int = _LENGTH
) -> list[Beam]:
    """Fillings `<X> ... <Y> ... <Z>` by their summed log p over `texts`, best first.

    After `<X>` come at most `max_tokens` tokens: where there is room for the sentinels alone, they are written.
    """
    first, second, third = (sentinel(tokenizer, i) for i in range(3))
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"]
    states = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    start = model.config.decoder_start_token_id
    banned = [i for i in tokenizer.all_special_ids if i not in (second, third)]
    beams, done = [Beam((first,), 0.0)], list[Beam]()
    for written in range(max_tokens):
        scores = _next(model, states, mask, [[start, *b.tokens] for b in beams])  # (A, V)
        scores += torch.tensor([b.score for b in beams])[:, None]
        scores[:, banned] = -torch.inf
        for row, b in enumerate(beams):
            due = third if second in b.tokens else second
            if max_tokens - written <= (1 if second in b.tokens else 2):  # room for the sentinels alone
                scores[row, torch.arange(scores.shape[1]) != due] = -torch.inf
            scores[row, second if second in b.tokens else third] = -torch.inf  # the sentinels come in order
        values, where = scores.flatten().topk(min(beam, int((scores > -torch.inf).sum())))
        grown: list[Beam] = []
        for value, at in zip(values.tolist(), where.tolist(), strict=True):
            row, token = divmod(at, scores.shape[1])
            (done if token == third else grown).append(Beam((*beams[row].tokens, token), value))
        beams, done = grown, sorted(done, key=lambda b: -b.score)[:beam]
        if not beams or (len(done) == beam and done[-1].score >= beams[0].score):  # scores only fall
            break
    return done


def _next(model: Any, states: Tensor, mask: Tensor, prefixes: Sequence[Sequence[int]]) -> Tensor:
    """(A, V) log p of the next token after each prefix, summed over the N examples."""
    found = []
    count = len(states)
    for part in torch.split(torch.tensor(prefixes), max(1, _ROWS // count)):
        rows = len(part)
        out = model(
            encoder_outputs=(states.repeat(rows, 1, 1),),
            attention_mask=mask.repeat(rows, 1),
            decoder_input_ids=part.repeat_interleave(count, 0),
        )
        log_p = out.logits[:, -1].float().log_softmax(-1)  # (rows N, V)
        found.append(log_p.view(rows, count, -1).sum(1))
    return torch.cat(found)


def templates(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    words: Sequence[str],
    labels: Sequence[str],
    *,
    beam: int = 100,
) -> list[tuple[Template, float]]:
    """Templates in the order of their scores; `words` are the label words of `labels`.

    Templates that read the same are listed once, with their best score.
    """
    word = dict(zip(labels, words, strict=True))
    sources = [source_texts(e, word[str(e.label)]) for e in examples]
    ways = len(sources[0])
    scores: dict[Template, float] = {}
    for way in range(ways):
        for one in beam_search(model, tokenizer, [s[way] for s in sources], beam=beam // ways):
            template = _template(one, tokenizer, way if ways == 2 else 2)
            if template is not None:
                scores[template] = max(one.score, scores.get(template, -torch.inf))
    return sorted(scores.items(), key=lambda item: -item[1])


def _template(beam: Beam, tokenizer: Any, way: int) -> Template | None:
    """The template that a filling stands for; None where it cannot be written down."""
    second = sentinel(tokenizer, 1)
    cut = beam.tokens.index(second)
    parts = [tokenizer.decode(list(part)).strip() for part in (beam.tokens[1:cut], beam.tokens[cut + 1 : -1])]
    if any(set("{}*_") & set(part) for part in parts):
        return None
    left, right = (f" {part}" if part and part[0].isalnum() else part for part in parts)
    spaced = f"{left} " if left else " "
    texts = (f"{{text}}{spaced}{{mask}}{right}", f"{left.strip()} {{mask}}{right} {{text}}".strip())
    return Template.parse((*texts, f"{{text:cut}}{spaced}{{mask}}{right} {{text2:lower}}")[way])
