"""Prompts: an example in a template becomes token ids with the place of the mask. Pure functions, no model.

The texts are shortened, never the words around them: while the prompt is too long, the longest text loses its last
token (PET's rule, arXiv:2001.07676: the longer side first; on a tie the later one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.data.batches import Dataset, Ragged
from train.fewshot.examples import Example
from train.fewshot.prompts.template import Field, Label, Literal, Sep, Template, TemplateError
from train.fewshot.prompts.verbalizer import Verbalizer

__all__ = ["PVP", "EncodedPrompt", "encode", "lengths_after_cut", "prompt_dataset", "render"]


@dataclass(frozen=True)
class PVP:
    """A pattern with its verbalizer."""

    template: Template
    verbalizer: Verbalizer

    @classmethod
    def of(cls, template: str, words: Any) -> PVP:
        """From texts."""
        return cls(Template.parse(template), Verbalizer.of(words))


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    mask_at: tuple[int, ...]  # positions of the run of masks


def lengths_after_cut(lengths: Sequence[int], room: int) -> list[int]:
    """Tokens each text keeps so that they fill `room`: the longest loses its last token, again and again.

    Examples
    --------
    >>> lengths_after_cut([7, 3], 6), lengths_after_cut([5, 5], 7), lengths_after_cut([2, 1], 9)
    ([3, 3], [4, 3], [2, 1])
    """
    kept = list(lengths)
    over = sum(kept) - max(room, 0)
    while over > 0:
        longest = max(kept)
        ties = [i for i, n in enumerate(kept) if n == longest]
        below = max((n for n in kept if n < longest), default=0)
        whole = min(longest - below, over // len(ties))  # all of the longest together, as often as it goes
        for i in ties:
            kept[i] -= whole
        over -= whole * len(ties)
        if over > 0 and whole < longest - below:
            for i in reversed(ties[-over:]):
                kept[i] -= 1
            over = 0
    return kept


def encode(
    template: Template,
    example: Example,
    tokenizer: Any,
    *,
    words: Sequence[str] = (),
    max_length: int = 256,
    demonstrations: Sequence[tuple[Example, str]] = (),
) -> EncodedPrompt:
    """Fill the template and tokenize it piece by piece.

    Parameters
    ----------
    words
        Word of each label, for `label_i` parts.
    demonstrations
        Solved examples put after the prompt in the same template, the mask replaced by their word.

    Raises
    ------
    TemplateError
        The tokenizer has no mask; a pair is asked for and there is none; the words alone do not fit `max_length`.
    """
    if tokenizer.mask_token_id is None:
        raise TemplateError("this base's tokenizer has no mask token", hint="use a masked-LM base, such as BERT")
    parts: list[_Part] = []
    for i, (one, answer) in enumerate([(example, None), *demonstrations]):
        parts += _parts(template, one, tokenizer, words, answer)
        if i < len(demonstrations):
            parts.append(_Part(_ends(tokenizer)[1][:1]))
    return _assemble(parts, tokenizer, max_length)


@dataclass
class _Part:
    ids: list[int]
    text: bool = False  # may be shortened
    mask: bool = False
    segment: bool = False  # what follows has the next token type


def _parts(
    template: Template, example: Example, tokenizer: Any, words: Sequence[str], answer: str | None
) -> list[_Part]:
    return [_part(piece, example, tokenizer, words, answer) for piece in template.pieces]


def _part(piece: Any, example: Example, tokenizer: Any, words: Sequence[str], answer: str | None) -> _Part:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    if isinstance(piece, Literal):
        return _Part(ids(piece.text))
    if isinstance(piece, Field):
        return _Part(ids(piece.apply(_text(example, piece))), text=not piece.keep)
    if isinstance(piece, Sep):
        return _Part(_ends(tokenizer)[1][:1], segment=piece.segment)
    if isinstance(piece, Label):
        return _Part(ids(f" {words[piece.index]}"))
    if answer is not None:
        return _Part(ids(f" {answer}"))
    return _Part([tokenizer.mask_token_id] * piece.count, mask=True)


def _text(example: Example, field: Field) -> str:
    if field.index == 0:
        return example.text
    if field.index > 1:
        raise TemplateError(f"sent_{field.index} is a text of a demonstration; demonstrations are added by themselves")
    if example.text2 is None:
        raise TemplateError(
            "the template shows {text2}, and the examples have one text", hint="name it: --text2 COLUMN"
        )
    return example.text2


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and after a sequence of this base."""
    before = [tokenizer.cls_token_id] if tokenizer.cls_token_id is not None else []
    after = [tokenizer.sep_token_id] if tokenizer.sep_token_id is not None else []
    return before, after


def _assemble(parts: Sequence[_Part], tokenizer: Any, max_length: int) -> EncodedPrompt:
    before, after = _ends(tokenizer)
    texts = [part for part in parts if part.text]
    fixed = len(before) + len(after) + sum(len(part.ids) for part in parts if not part.text)
    if fixed + len(texts) > max_length:
        hint = "shorten the template, or give fewer demonstrations"
        raise TemplateError(f"the words of the template take {fixed} of {max_length} tokens", hint=hint)
    for part, length in zip(texts, lengths_after_cut([len(p.ids) for p in texts], max_length - fixed), strict=True):
        part.ids = part.ids[:length]
    ids, types, segment = list(before), [0] * len(before), 0
    at: tuple[int, ...] = ()
    for part in parts:
        if part.mask:
            at = tuple(range(len(ids), len(ids) + len(part.ids)))
        ids += part.ids
        types += [segment] * len(part.ids)
        segment += part.segment
    return EncodedPrompt((*ids, *after), (*types, *[segment] * len(after)), at)


def render(template: Template, example: Example, word: str = "[MASK]", words: Sequence[str] = ()) -> str:
    """The prompt as text, for people, for language models without a mask, and for T5."""
    shown = []
    for piece in template.pieces:
        if isinstance(piece, Literal):
            shown.append(piece.text)
        elif isinstance(piece, Field):
            shown.append(piece.apply(_text(example, piece)))
        elif isinstance(piece, Sep):
            shown.append("\n")
        elif isinstance(piece, Label):
            shown.append(words[piece.index] if words else f"<label {piece.index}>")
        else:
            shown.append(" ".join([word] * piece.count))
    return "".join(shown)


def prompt_dataset(
    template: Template, examples: Sequence[Example], tokenizer: Any, labels: Sequence[str], *, max_length: int = 256
) -> Dataset:
    """Rows for `train.loop.fit`: `input_ids`, `token_type_ids` where the base has them, `mask_at`, `labels`.

    Unlabelled rows get label 0, for prediction only.
    """
    rows = [encode(template, example, tokenizer, max_length=max_length) for example in examples]
    return to_dataset(rows, [e.label for e in examples], tokenizer, labels)


def to_dataset(
    rows: Sequence[EncodedPrompt], answers: Sequence[str | None], tokenizer: Any, labels: Sequence[str]
) -> Dataset:
    """Encoded prompts and their labels as a dataset."""
    index = {label: i for i, label in enumerate(labels)}
    columns: dict[str, Ragged | Tensor] = {
        "input_ids": Ragged.of([row.ids for row in rows]),
        "mask_at": torch.tensor([row.mask_at for row in rows]),
        "labels": torch.tensor([index[a] if a is not None else 0 for a in answers]),
    }
    if any(any(row.types) for row in rows) and "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = Ragged.of([row.types for row in rows])
    return Dataset(columns, "classification", tokenizer.pad_token_id or 0, tuple(labels), "prompts")
