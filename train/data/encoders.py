"""Rows to datasets, for the tasks beside plain language modelling and classification (see train.data.datasets)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from train.data.batches import IGNORE, Dataset, Ragged
from train.data.cells import CellError, conversation, number
from train.errors import DataError

__all__ = ["chats", "numbers", "packed", "pad_id", "sequences", "tagged"]

log = logging.getLogger(__name__)
Message = Mapping[str, Any]


def sequences(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], max_length: int, *, source: str = "rows"
) -> tuple[Dataset, int]:
    """Rows of an encoder-decoder: it reads the prompt and learns to say the answer. Also how many rows were cut."""
    cut = {"truncation": True, "max_length": max_length}
    whole = [tokenizer(list(texts), verbose=False)["input_ids"] for texts in (prompts, answers)]
    longer = sum(max(len(p), len(a)) > max_length for p, a in zip(*whole, strict=True))
    ids = tokenizer(list(prompts), **cut)["input_ids"]
    labels = tokenizer(text_target=list(answers), **cut)["input_ids"]
    columns = {"input_ids": Ragged.of(ids), "labels": Ragged.of(labels)}
    return Dataset(columns, "seq2seq", pad_id(tokenizer), source=source), longer


def numbers(encoded: Mapping[str, Ragged | Tensor], values: Sequence[Any], pad_id: int, *, source: str) -> Dataset:
    """Rows with a number each.

    Raises
    ------
    DataError
        A label that is no finite number, with its row.
    """
    found = []
    for row, value in enumerate(values, 1):
        try:
            found.append(number(value))
        except CellError as error:
            raise DataError(f"{source}, row {row}: the label {error}", hint=error.hint) from error
    return Dataset({**encoded, "labels": torch.tensor(found)}, "regression", pad_id, source=source)


def tagged(
    tokenizer: Any,
    words: Sequence[Sequence[str]],
    tags: Sequence[Sequence[Any]],
    max_length: int,
    *,
    labels: Sequence[str] | None = None,
    source: str = "rows",
) -> tuple[Dataset, int]:
    """Rows of words with a tag each, which the first piece of a word carries. Also how many rows were cut.

    Raises
    ------
    DataError
        A row with other numbers of words and tags, a tag unseen in training, or a tokenizer that cannot tell words.
    """
    for row, (left, right) in enumerate(zip(words, tags, strict=True), 1):
        if not isinstance(left, list | tuple) or not isinstance(right, list | tuple) or len(left) != len(right):
            raise DataError(f"{source}, row {row}: tokens and tags are not two lists of the same length")
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot tell which word a piece belongs to", hint="a fast tokenizer"
        )
    names = [[str(tag) for tag in row] for row in tags]
    if labels is None:
        labels = sorted({tag for row in names for tag in row})
    index = {name: i for i, name in enumerate(labels)}
    for row, tags_of_row in enumerate(names, 1):
        if unseen := sorted(set(tags_of_row) - index.keys()):
            raise DataError(f"{source}, row {row}: tags unseen in training: {', '.join(unseen)}")
    texts = [[str(word) for word in row] for row in words]
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    whole = tokenizer(texts, is_split_into_words=True, verbose=False)["input_ids"]
    columns = {name: Ragged.of(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}
    rows = range(len(texts))
    columns["labels"] = Ragged.of([_first_pieces(encoded.word_ids(i), [index[t] for t in names[i]]) for i in rows])
    cut = sum(len(ids) > max_length for ids in whole)
    return Dataset(columns, "token_classification", pad_id(tokenizer), tuple(labels), source), cut


def _first_pieces(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    return [
        IGNORE if word is None or (at > 0 and words[at - 1] == word) else tags[word] for at, word in enumerate(words)
    ]


def chats(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    max_length: int,
    *,
    tools: Sequence[Any] = (),
    source: str = "rows",
) -> tuple[Dataset, int]:
    """Conversations in the tokenizer's chat template, in which what the assistant says is learned, and its end.

    What is learned is found by rendering the conversation up to each answer, so that any template will do whose
    beginning does not change with what follows; a message with `"weight": 0` is not learned. `tools` are those that
    each conversation may call. Also how many rows were cut.

    Raises
    ------
    DataError
        A tokenizer without a template, messages that are no role and content, tools that the template leaves out, or
        a template that refuses a conversation or rewrites history.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{source}: this tokenizer has no chat template", hint="give columns prompt and completion")
    for row, messages in enumerate(conversations, 1):
        try:
            conversation(messages)
        except CellError as error:
            raise DataError(f"{source}, row {row}: {error}", hint=error.hint) from error
    _tell_unread(tokenizer, conversations, tools, source)
    ids, labels, cut = [], [], 0
    for row, (messages, usable) in enumerate(zip_longest(conversations, tools), 1):
        text, spans = _rendered(tokenizer, messages, usable, f"{source}, row {row}")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        row_labels = [
            token if any(start <= a and b <= end and a < b for start, end in spans) else IGNORE
            for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        cut += len(row_labels) > max_length
        ids.append(encoded["input_ids"][:max_length])
        labels.append(row_labels[:max_length])
    columns = {"input_ids": Ragged.of(ids), "labels": Ragged.of(labels)}
    return Dataset(columns, "causal_lm", pad_id(tokenizer), source=source), cut


def _tell_unread(tokenizer: Any, conversations: Sequence[Sequence[Message]], tools: Sequence[Any], source: str) -> None:
    """Refuse tools that the template leaves out; what else it leaves out of messages is told."""
    template = str(tokenizer.chat_template)
    if any(tools) and "tools" not in template:
        raise DataError(f"{source}: the chat template of this tokenizer says nothing of tools", hint="drop the column")
    known = {"role", "content", "weight"}
    keys = {key for messages in conversations for message in messages for key in message}
    if unread := sorted(key for key in keys - known if str(key) not in template):
        log.warning("%s: the chat template leaves out of messages: %s", source, ", ".join(map(str, unread)))


def _rendered(tokenizer: Any, messages: Sequence[Message], tools: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the places in it that the assistant wrote and that are to be learned."""

    def said(part: Sequence[Message], **options: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(part, tools=tools, tokenize=False, **options))
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error

    whole = said(messages)
    spans = []
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            before = said(messages[:at], add_generation_prompt=True)
            after = said(messages[: at + 1])
            if not whole.startswith(after) or not after.startswith(before):
                raise DataError(f"{where}: the chat template writes message {at + 1} in another way when more follows")
            spans.append((len(before), len(after)))
    return whole, spans


def packed(data: Dataset, max_length: int) -> Dataset:
    """Rows laid end to end, as many as fit into `max_length`, each with its own positions and attention.

    A packed row has no attention mask: transformers' causal models tell by `position_ids`, which start again at 0,
    where one row ends and the next begins. The longest rows are laid first (first fit, decreasing).
    """
    labels = data.columns.get("labels")
    assert isinstance(labels, Ragged)  # noqa: S101 - completions and chats have labels a token
    # First fit, decreasing: each row goes into the first bin that has room, and only else into a new one.
    room: list[int] = []
    bins: list[list[int]] = []
    for row in torch.argsort(data.lengths, descending=True, stable=True).tolist():
        length = int(data.lengths[row])
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            room.append(max_length - length)
            bins.append([row])
        else:
            room[place] -= length
            bins[place].append(row)
    ids = [[token for row in rows for token in data.tokens.row(row).tolist()] for rows in bins]
    # The first token of a row is predicted by nothing: not by the last one of the row before.
    packed_labels = [[t for row in rows for t in [IGNORE, *labels.row(row).tolist()[1:]]] for rows in bins]
    positions = [[at for row in rows for at in range(int(data.lengths[row]))] for rows in bins]
    columns = {"input_ids": Ragged.of(ids), "labels": Ragged.of(packed_labels), "position_ids": Ragged.of(positions)}
    return replace(data, columns=columns, origin=None)


def pad_id(tokenizer: Any) -> int:
    """Its padding token, or any other: padded positions are masked in attention and loss."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
