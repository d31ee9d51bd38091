"""What one training run is: a flat, frozen set of values that alone decides its result.

Where a run writes, what its artifact is called and how often it saves change nothing that is learned: they are
options of `hub train` and of `train.loop.fit`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compose.base.request import Quantization
from hub import errors
from train.errors import ConfigError

__all__ = [
    "ROLES",
    "Task",
    "TrainConfig",
    "load_config",
    "make_config",
    "parse_pairs",
    "read_words",
    "refuse_unmeasured",
    "span_in_steps",
]

Task = Literal["causal_lm", "seq2seq", "classification", "token_classification", "regression"]
ROLES = ("text", "text_pair", "label", "prompt", "completion", "messages", "tokens", "tags")
_METRICS = {
    "causal_lm": ("loss",),
    "seq2seq": ("loss",),
    "classification": ("accuracy", "f1", "loss"),
    "token_classification": ("accuracy", "f1", "loss"),
    "regression": ("loss", "pearson", "spearman"),
}  # the first is the default
_READ = {
    "causal_lm": ("text", "prompt", "completion", "messages"),
    "seq2seq": ("prompt", "completion"),
    "classification": ("text", "text_pair", "label"),
    "token_classification": ("tokens", "tags"),
    "regression": ("text", "text_pair", "label"),
}
_SPAN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?)\s*$")


class TrainConfig(BaseModel):
    """One run. Spans of training are a number of steps (`200`) or a text with a unit (`"3 epochs"`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: str = Field("builtin:tiny-lm", description="frozen model: builtin:tiny-lm, a directory or a Hugging Face id")
    quantize: Quantization = Field("none", description="how the base's linear weights are held")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward and backward pass")
    method: str = Field("lora", description="how it is learned: hub methods lists them")
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the method and of its kind, such as {r: 16}"
    )
    task: Task = Field(
        "causal_lm",
        description="causal_lm (text; prompt and completion; chat messages), seq2seq (prompt, completion), "
        "classification of texts or pairs (text, text_pair, label), token_classification (tokens, tags), "
        "regression (text, text_pair, label)",
    )
    data: dict[str, str | float | bool] = Field(
        default_factory=dict,
        description="train: a jsonl, csv, parquet or text file, a folder of texts, or hf:NAME[@CONFIG][:SPLIT]; of a "
        "folder, files called test, dev, valid, ... are left out; eval: another one, or the "
        "fraction of the training rows to hold out (0.1), or absent; packing: true puts several "
        "rows of completions or messages into one of max_length, apart from each other",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description=f"the file's names for: {', '.join(ROLES)} (default: these names)"
    )
    max_length: int = Field(256, ge=2, description="tokens per row; longer documents are cut into blocks")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step, over all processes")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="rows per forward pass and process; smaller saves memory, the result stays the same",
    )
    duration: int | str = Field("3 epochs", description="how long to train: 200, '200 steps' or '3 epochs'")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    head_lr: float | None = Field(
        None, gt=0, description="peak learning rate of modules that train whole, such as a fresh head (default: lr)"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="decay after the warmup")
    warmup: float = Field(0.03, ge=0, lt=1, description="fraction of the steps over which the rate rises from 0")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw", description="adamw (torch), or one of bitsandbytes"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of the adapter's matrices")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    group_by_length: bool = Field(False, description="batch rows of similar length together")
    eval_every: int | str = Field("1 epochs", description="span between evaluations; 0 evaluates at the end only")
    patience: int = Field(0, ge=0, description="stop after this many evaluations without a better one; 0 never stops")
    metric: Literal["loss", "accuracy", "f1", "pearson", "spearman"] | None = Field(
        None,
        description="what makes an evaluation the best (default: accuracy where there are classes, else loss)",
    )
    seed: int = Field(0, ge=0, description="root of the separate streams for init, data, dropout and masks")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {str(key)!r}{did_you_mean(str(key), cls.model_fields)}")
        return values

    @field_validator("duration", "eval_every")
    @classmethod
    def _a_span(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, int):
            if value < 0:
                raise ValueError("a number of steps cannot be negative")
            return value
        if not _SPAN.match(value):
            raise ValueError(f"{value!r} is not a span: write a number of steps, or such as '3 epochs'")
        return value

    @field_validator("data")
    @classmethod
    def _data_keys(cls, value: dict[str, str | float | bool]) -> dict[str, str | float | bool]:
        parts = ("train", "eval", "packing")
        for key, source in value.items():
            if key not in parts:
                raise ValueError(f"unknown part {key!r}{did_you_mean(key, parts)}; parts are {', '.join(parts)}")
            if key == "packing":
                if not isinstance(source, bool):
                    raise ValueError(f"packing: {source!r} is neither true nor false")
            elif not isinstance(source, str) and (key != "eval" or isinstance(source, bool) or not 0 < source < 1):
                raise ValueError(f"{key}: {source} is neither a path nor, for eval, a fraction between 0 and 1")
        return value

    @field_validator("columns")
    @classmethod
    def _column_roles(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if key not in ROLES:
                raise ValueError(f"unknown role {key!r}{did_you_mean(key, ROLES)}; roles are {', '.join(ROLES)}")
        return value

    @model_validator(mode="after")
    def _metric_fits_task(self) -> TrainConfig:
        if self.metric is not None and self.metric not in _METRICS[self.task]:
            raise ValueError(f"metric {self.metric!r} is not one of task {self.task}: {', '.join(_METRICS[self.task])}")
        if self.data.get("packing") and self.task != "causal_lm":
            raise ValueError(f"data.packing puts rows of language modelling together; task {self.task} has none")
        unread = sorted(self.columns.keys() - _READ[self.task])
        if unread:
            raise ValueError(f"columns.{unread[0]}: task {self.task} reads {', '.join(_READ[self.task])}")
        if span_in_steps(self.duration, 1_000_000) == 0:
            raise ValueError("duration is zero: nothing would be trained")
        return self

    @property
    def best_metric(self) -> str:
        """The metric that decides which evaluation is the best one."""
        return self.metric or _METRICS[self.task][0]

    @property
    def digest(self) -> str:
        """`sha256:...` of the canonical JSON of all fields: equal configurations train equal adapters."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def span_in_steps(span: int | str, steps_per_epoch: int) -> int:
    """Optimizer steps in a span; a span that is not zero has at least one.

    Examples
    --------
    >>> span_in_steps(200, 50), span_in_steps("3 epochs", 50), span_in_steps("0.5 epochs", 5)
    (200, 150, 3)
    """
    if isinstance(span, int):
        return span
    match = _SPAN.match(span)
    if match is None:
        raise ConfigError(f"{span!r} is not a span", hint="write a number of steps, or such as '3 epochs'")
    amount = float(match[1]) * (steps_per_epoch if match[2].startswith("epoch") else 1)
    return max(1, int(amount + 0.5)) if amount > 0 else 0


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known word, or nothing."""
    near = errors.did_you_mean(key, known, count=1)
    return f", did you mean {near[0]!r}?" if near else ""


def refuse_unmeasured(config: TrainConfig) -> None:
    """Raise ConfigError for what a run says of its evaluations, where it has no rows to measure on."""
    idle = [name for name in ("patience", "metric") if getattr(config, name)]
    if idle:
        hint = "set data.eval=FILE, or a fraction such as data.eval=0.1"
        raise ConfigError(f"{idle[0]} without held-out rows: nothing is measured", hint=hint)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML (or JSON) file and apply `key=value` overrides, dotted for nested ones (`options.r=16`).

    Raises
    ------
    ConfigError
        The file is missing or not YAML (with line and column), a key is unknown (with the nearest known one),
        or a value does not fit; each problem is named by its key.
    """
    values = _read_yaml(path) if path is not None else {}
    for text in overrides:
        _override(values, text)
    return make_config(values, path=path)


def make_config(values: Mapping[str, Any], *, path: Path | None = None) -> TrainConfig:
    """The run of these values; ConfigError names each problem by its key."""
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error), path=path, hint="hub train --fields lists every key") from error


def read_words(words: Sequence[str]) -> tuple[Path | None, TrainConfig]:
    """The run file among a command's words, if one is, and the run it and the `key=value` words make.

    Raises
    ------
    ConfigError
        Two files, nothing at all, or what `load_config` refuses.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one run file, not {len(files)}: {', '.join(files)}", hint="overrides are key=value")
    if not words:
        raise ConfigError("nothing to train", hint="hub train RUN.yaml, or hub train data.train=FILE")
    path = Path(files[0]) if files else None
    return path, load_config(path, [word for word in words if "=" in word])


def parse_pairs(words: Iterable[str]) -> dict[str, str]:
    """`role=name` words as a dictionary.

    Raises
    ------
    ConfigError
        A word without `=`.
    """
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{word!r} is not ROLE=NAME", hint=f"roles are {', '.join(ROLES)}")
        pairs[key] = value
    return pairs


class _Loader(yaml.SafeLoader):
    """YAML in which a key is given once: the first of two would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands there twice; what is merged in (`<<`) may be overridden."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a safe loader
    except FileNotFoundError as error:
        raise ConfigError(f"no such run file: {path}", path=path, hint="hub train RUN.yaml [key=value ...]") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", path=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not YAML{where}: {getattr(error, 'problem', error)}", path=path) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not `key: value` lines", path=path)
    return values


def _override(values: dict[str, Any], text: str) -> None:
    """Set one `key=value` in place; the value is read as YAML: numbers, lists and null are what they look like."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not key=value", hint="such as lr=1e-4 or options.r=16")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not YAML", hint="quote it, or write a plain word") from error
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key!r}: {parent!r} holds a {type(inner).__name__}, which has no {last!r}")
        place = inner
    place[last] = value


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
        message = item["msg"].removeprefix("Value error, ")
        given = f" (given {item['input']!r})" if where and not isinstance(item["input"], dict) else ""
        problems.append(f"{where}: {message}{given}" if where else message)
    return "; ".join(problems)
