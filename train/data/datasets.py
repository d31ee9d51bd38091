"""Rows to datasets: language-modelling blocks, completions, labelled texts or pairs, and what encoders.py makes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig, refuse_unmeasured
from train.data import encoders
from train.data.batches import IGNORE, Dataset, Ragged
from train.data.cells import CellError, class_name, in_order, read_cell, shape_hint
from train.data.encoders import pad_id
from train.data.files import file_digests, read_rows
from train.errors import ConfigError, DataError
from train.seeds import generator

__all__ = ["Splits", "check", "completions", "labelled", "load_splits", "read_rows", "text_blocks", "values_of"]

log = logging.getLogger(__name__)
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Splits:
    """The two parts of a run's data; `eval` is None when there is nothing to evaluate on."""

    train: Dataset
    eval: Dataset | None
    digests: Mapping[str, str]  # file -> sha256:... of its bytes
    shared: int = 0  # held-out rows that say what a training row says: they flatter what is measured


def text_blocks(tokenizer: Any, texts: Iterable[str], block_size: int, *, source: str = "texts") -> Dataset:
    """Language-modelling rows: texts joined by an end-of-text token and cut every `block_size` tokens.

    Every token is kept (the last block is shorter) and every token but a block's first is predicted.

    Raises
    ------
    DataError
        No text, or fewer than two tokens in all.
    """
    texts = list(texts)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else ():
        stream += ids
        if end is not None and (not ids or ids[-1] != end):
            stream.append(end)
    usable = len(stream) - (len(stream) % block_size == 1)  # a block of one token predicts nothing
    if usable < 2 or not any(text.strip() for text in texts):
        raise DataError(f"{source}: no text to learn from ({len(texts)} documents)")
    starts = torch.tensor([*range(0, usable, block_size), usable])
    tokens = Ragged(torch.tensor(stream[:usable], dtype=torch.int32), starts)
    return Dataset({"input_ids": tokens}, "causal_lm", pad_id(tokenizer), source=source)


def completions(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], max_length: int, *, source: str = "rows"
) -> Dataset:
    """Rows of prompt, completion and end token in which only the completion and the end are learned.

    Raises
    ------
    DataError
        A prompt that leaves no room for any of its completion (its rows are named).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    heads = tokenizer(list(prompts), verbose=False)["input_ids"]
    tails = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [(head + tail + end)[:max_length] for head, tail in zip(heads, tails, strict=True)]
    labels = [[IGNORE] * min(len(head), len(row)) + row[len(head) :] for head, row in zip(heads, ids, strict=True)]
    cut = sum(len(h) + len(t) + len(end) > max_length for h, t in zip(heads, tails, strict=True))
    _say_cut(cut, len(ids), max_length, source)
    columns = {"input_ids": Ragged.of(ids), "labels": Ragged.of(labels)}
    data = Dataset(columns, "causal_lm", pad_id(tokenizer), source=source)
    check(data, hint=f"the prompt fills all {max_length} tokens: raise max_length or shorten it")
    return data


def labelled(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    answers: Sequence[Any],
    max_length: int,
    *,
    labels: Sequence[str] | None = None,
    source: str = "rows",
) -> Dataset:
    """Classification rows: a text, or a pair joined as the tokenizer joins pairs (the longer side is cut).

    `labels` are the class names by index; by default the sorted distinct answers (numbers by value).

    Raises
    ------
    DataError
        Fewer than two classes, or an answer that is not among `labels`.
    """
    names = [class_name(answer) for answer in answers]
    if labels is None:
        labels = in_order(names)
        if len(labels) < 2:
            raise DataError(f"{source}: every row has the label {labels[0]!r}; a classifier needs at least two")
    unseen = sorted(set(names) - set(labels))
    if unseen:
        first = names.index(unseen[0]) + 1
        raise DataError(f"{source}: labels unseen in training: {', '.join(unseen)} (first at row {first})")
    index = {name: i for i, name in enumerate(labels)}
    columns = _texts_or_pairs(tokenizer, texts, pairs, max_length, source)
    columns["labels"] = torch.tensor([index[name] for name in names])
    return Dataset(columns, "classification", pad_id(tokenizer), tuple(labels), source)


def _texts_or_pairs(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, source: str
) -> dict[str, Ragged | Tensor]:
    """Token columns of texts, or of pairs as the tokenizer joins them (the longer side is cut)."""
    second = None if pairs is None else list(pairs)
    encoded = tokenizer(list(texts), second, verbose=False)
    cut = sum(len(ids) > max_length for ids in encoded["input_ids"])
    if cut:
        encoded = tokenizer(list(texts), second, truncation=True, max_length=max_length)
    _say_cut(cut, len(encoded["input_ids"]), max_length, source)
    return {name: Ragged.of(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}


def load_splits(config: TrainConfig, tokenizer: Any) -> Splits:
    """Read, check and encode what `config.data` names.

    Raises
    ------
    ConfigError
        No training data is named, or what the run says of its data would do nothing.
    DataError
        A missing column (with those present), an empty split, or labels that do not fit.
    """
    source, held_out = config.data.get("train"), config.data.get("eval")
    if not isinstance(source, str):
        hint = "set data.train=FILE (jsonl, csv, parquet, text) or a folder of texts"
        raise ConfigError("no training data", hint=hint)
    if held_out is None:
        refuse_unmeasured(config)
    measured = held_out if isinstance(held_out, str) else None
    rows: Rows = read_rows(source, part="train", without=measured if measured != source else None)
    digests = file_digests(source, part="train", without=measured if measured != source else None)
    if isinstance(held_out, float):
        return Splits(*_hold_out(rows, config, tokenizer, fraction=held_out, source=source), digests)
    train = encode(rows, config, tokenizer, source=source)
    if measured is None:
        return Splits(train, None, digests)
    others: Rows = read_rows(measured, part="eval")
    test = encode(others, config, tokenizer, labels=train.labels, source=measured)
    digests |= {f"eval/{name}": digest for name, digest in file_digests(measured, part="eval").items()}
    shared = _shared(rows, others, config, measured)
    return Splits(train, test, digests, shared)


def _shared(rows: Rows, others: Rows, config: TrainConfig, source: str) -> int:
    """How many of the other rows say what one of the rows says; told where there are any."""
    roles = _read_of(rows, config)
    known = {_said(row, roles, config) for row in rows}
    twice = sum(_said(row, roles, config) in known for row in others)
    if twice:
        log.warning("%s: %d of %d held-out rows are also training rows", source, twice, len(others))
    return twice


def _read_of(rows: Rows, config: TrainConfig) -> tuple[str, ...]:
    """The roles that the task reads of these rows, its labels left out: what two equal rows have in common."""
    there = {*config.columns, *rows[0]}
    if config.task in ("classification", "regression"):
        return ("text", "text_pair") if "text_pair" in there else ("text",)
    if config.task == "token_classification":
        return ("tokens",)
    if config.task == "causal_lm" and "messages" in there:
        return ("messages",)
    answers = config.task == "seq2seq" or {"prompt", "completion"} & set(config.columns)
    return ("prompt", "completion") if answers or {"prompt", "completion"} <= set(rows[0]) else ("text",)


def _said(row: Mapping[str, Any], roles: Sequence[str], config: TrainConfig) -> str:
    """What a row says, without case and spacing."""
    values = [row.get(config.columns.get(role, role)) for role in roles]
    return " ".join(json.dumps(values, default=str, sort_keys=True, ensure_ascii=False).casefold().split())


def encode(
    rows: Rows, config: TrainConfig, tokenizer: Any, *, labels: Sequence[str] | None = None, source: str
) -> Dataset:
    """Rows to the dataset of the config's task."""
    take = partial(values_of, rows, config, source)
    for role in config.columns:  # also one that the task does not look at: a typo must not go unseen
        take(role)
    length, where, read = config.max_length, {"source": source}, _read_of(rows, config)
    if config.task in ("classification", "regression"):
        texts, answers = take("text"), take("label")
        pairs = take("text_pair") if "text_pair" in read else None
        if config.task == "regression":
            columns = _texts_or_pairs(tokenizer, texts, pairs, length, source)
            return encoders.numbers(columns, answers, pad_id(tokenizer), source=source)
        return labelled(tokenizer, texts, pairs, answers, length, labels=labels or None, source=source)
    if config.task == "token_classification":
        data, cut = encoders.tagged(tokenizer, take("tokens"), take("tags"), length, labels=labels or None, **where)
    elif config.task == "seq2seq":
        data, cut = encoders.sequences(tokenizer, take("prompt"), take("completion"), length, **where)
    elif "messages" in read:
        tools = [row.get("tools") for row in rows]
        data, cut = encoders.chats(tokenizer, take("messages"), length, tools=tools, **where)
    elif "prompt" in read:
        data, cut = completions(tokenizer, take("prompt"), take("completion"), length, **where), 0
    else:
        if config.data.get("packing"):
            hint = "leave data.packing out: texts are cut into blocks, which are full as they are"
            raise ConfigError("data.packing lays rows of completions or messages together, not texts", hint=hint)
        return text_blocks(tokenizer, take("text"), length, source=source)
    _say_cut(cut, len(data), length, source)
    if config.data.get("packing") and config.task == "causal_lm":
        check(data)  # while rows are those of the file
        return encoders.packed(data, length)
    return data


def values_of(rows: Rows, config: TrainConfig, source: str, role: str) -> list[Any]:
    """The values of a role (`train.config.ROLES`), each of them what the role is for. Raises DataError."""
    name, values = config.columns.get(role, role), []
    role = "number" if role == "label" and config.task == "regression" else role
    for number, row in enumerate(rows, 1):
        where, value = f"{source}, row {number}", row.get(name)
        if value is None:
            if name in row:
                raise DataError(f"{where}: {name!r} is empty")
            present = ", ".join(sorted(str(key) for key in row)) or "none"
            hint = shape_hint(map(str, row)) or f"name the column: columns.{role}=..."
            raise DataError(f"{where}: no column {name!r}; it has: {present}", hint=hint)
        try:
            values.append(read_cell(role, value))
        except CellError as error:
            raise DataError(f"{where}: {name!r} {error}", hint=error.hint) from error
    return values


def check(data: Dataset, *, hint: str | None = None) -> None:
    """Refuse data that would train nothing: an empty split, or rows whose every label is masked.

    Raises
    ------
    DataError
        With the first such rows (counted from 1) and how many there are.
    """
    if len(data) == 0:
        raise DataError(f"{data.source or 'the data'}: no rows")
    idle = (data.items == 0).nonzero().flatten()
    if len(idle):
        where = data.where(idle, most=5)
        raise DataError(
            f"all labels are masked in {len(idle)} of {len(data)} rows: {where} would train nothing",
            hint=hint or "give every row at least one label",
        )


def _hold_out(
    rows: Rows, config: TrainConfig, tokenizer: Any, *, fraction: float, source: str
) -> tuple[Dataset, Dataset]:
    """Part of the training rows, by the seed; rows that say the same never straddle, a class keeps a row to learn from.

    Of few documents, part of the blocks.
    """
    # Rows that say the same stay together: one of them in training would tell the other's answer.
    groups: dict[str, list[int]] = {}
    roles = _read_of(rows, config)
    for index, row in enumerate(rows):
        groups.setdefault(_said(row, roles, config), []).append(index)
    # Groups are drawn in an order of the seed, while there is room and every class keeps a row to learn from.
    order = torch.randperm(len(groups), generator=generator(config.seed, "data", "held-out")).tolist()
    alike, held_out = list(groups.values()), set[int]()
    left = Counter(name for row in rows for name in _classes(row, config))
    for group in (alike[i] for i in order):
        classes = Counter(name for i in group for name in _classes(rows[i], config))
        if len(held_out) + len(group) <= round(len(rows) * fraction) and all(left[c] > n for c, n in classes.items()):
            held_out.update(group)
            left.subtract(classes)
    if len(held_out) == len(rows):
        raise DataError(f"{source}: all {len(rows)} rows would be held out", hint="a smaller data.eval, or a file")
    # Labels are numbered by the training rows; the held-out ones take their numbers.
    if held_out:
        training = [i for i in range(len(rows)) if i not in held_out]
        train = encode([rows[i] for i in training], config, tokenizer, source=source)
        names, part = train.labels, sorted(held_out)
        test = encode([rows[i] for i in part], config, tokenizer, labels=names, source=f"{source} (held out)")
        return _numbered(train, training), _numbered(test, part)
    # Too few rows to hold one out, such as a single long text: part of its blocks.
    whole = encode(rows, config, tokenizer, source=source)
    count = max(1, round(len(whole) * fraction))
    if count >= len(whole):
        raise DataError(f"{source}: {len(whole)} rows are too few to hold some out", hint="set data.eval=FILE")
    turn = torch.randperm(len(whole), generator=generator(config.seed, "data", "held-out"))
    return whole.select(turn[count:].sort().values), whole.select(turn[:count].sort().values)


def _classes(row: Mapping[str, Any], config: TrainConfig) -> set[str]:
    """The classes that a row is an example of."""
    role = {"classification": "label", "token_classification": "tags"}.get(config.task, "")
    names = row.get(config.columns.get(role, role))
    try:
        return set(read_cell("tags", names)) if role == "tags" else {class_name(names)} if role else set()
    except CellError:  # it is missing or no label, which is told when the rows are encoded
        return set()


def _numbered(data: Dataset, numbers: Sequence[int]) -> Dataset:
    """Remember row numbers of the file; blocks of text and packed rows are no rows of a file."""
    return replace(data, origin=torch.tensor(numbers)) if len(data) == len(numbers) else data


def _say_cut(cut: int, rows: int, max_length: int, source: str) -> None:
    if cut:
        log.warning("%s: %d of %d rows were cut to %d tokens (max_length)", source, cut, rows, max_length)
