"""`hub few-shot patterns`: templates filled with real rows, their tokens counted, and the label words checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import compose
from train.data.datasets import read_rows
from train.fewshot.examples import Columns, Example, label_names, to_examples
from train.fewshot.prompts.defaults import PAIR_TEMPLATES, TEMPLATES, name_words
from train.fewshot.prompts.filled import encode, render
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import nearest_single_tokens, word_ids

__all__ = ["show"]


def show(
    data: str,
    templates: Sequence[str],
    base: str,
    columns: Columns,
    words: Mapping[str, Sequence[str]],
    rows: int,
) -> Iterator[str]:
    """Lines of text: each template with a few rows in it, then each label's words."""
    examples = to_examples(read_rows(data), columns, source=data)
    labels = label_names(examples, source=data)
    tokenizer = compose.tokenizer(base)
    parsed = [Template.parse(t) for t in templates or (PAIR_TEMPLATES if columns.text2 else TEMPLATES)]
    first = {label: next(e for e in examples if e.label == label) for label in labels}
    for template in parsed:
        yield template.format()
        yield from _filled(template, list(first.values())[:rows], tokenizer)
    yield "label words"
    for label in labels:
        yield f"  {label}: " + "; ".join(
            _word(tokenizer, w) for w in (words.get(label) or name_words(label) or [label])
        )


def _filled(template: Template, examples: Sequence[Example], tokenizer: object) -> Iterator[str]:
    mask = getattr(tokenizer, "mask_token", None) or "____"
    for example in examples:
        count = f" ({len(encode(template, example, tokenizer).ids)} tokens)" if mask != "____" else ""
        yield f"  {example.label}: {render(template, example, mask)}{count}"


def _word(tokenizer: object, word: str) -> str:
    ids = word_ids(tokenizer, word)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids:
        return f"{word} (unknown to this base)"
    if len(ids) == 1:
        return f"{word} (one token)"
    near = ", ".join(nearest_single_tokens(tokenizer, word))
    return f"{word} ({len(ids)} tokens" + (f"; one token: {near})" if near else ")")
