"""Requests and answers in OpenAI's words."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from hub.errors import UsageError, suggest
from router.engine.job import BREAKDOWNS
from router.engine.request import Piece, Request, Result, Token
from router.serving.errors import FieldError

MOST_ROWS = 256  # prompts times n of one request


# Fields that do not change an answer, whatever they hold.
_IDLE = {
    *("user", "name", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "request_id", "priority"),
}
# Fields that would change it, with the values that ask for what is done anyway; nothing and zero are among them.
_AS_IT_IS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "min_tokens": (),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "parallel_tool_calls": (True,),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}


class Body(BaseModel):
    """A JSON body. A field that is not known must be one that changes nothing."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """A field that is null is one that was left out."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    def refuse(self) -> None:
        """Refuse what would be ignored silently. Raises FieldError with the field's name, and the nearest known one."""
        for name, value in (self.model_extra or {}).items():
            near = None if name in _AS_IT_IS else suggest(name, type(self).model_fields)
            idle = name in _IDLE or value is None or value in _AS_IT_IS.get(name, ())
            if not idle and (value or near):  # a misspelt `temperatur: 0` asks for something
                raise FieldError(name, f"{name} is not supported", hint=near or "leave it out")


class Sampled(Body):
    """Fields of both completion endpoints."""

    model: str = ""
    n: int = Field(1, ge=1, le=16)
    temperature: float = Field(1.0, ge=0.0, le=10.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    task: str | None = None

    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=1024)

    def request(
        self,
        text: str | list[int],
        room: int | None,
        scores: int,
        copy: int,
        *,
        special: bool = True,
        echo: bool = False,
    ) -> Request:
        """One row; the n copies of a prompt draw from streams of their own."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(62) if self.seed is None else self.seed + copy
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise FieldError("logit_bias", f"the logit_bias of {token} is {bias}", hint="-100 to 100")
        return Request(
            text=text if isinstance(text, str) else "",
            ids=None if isinstance(text, str) else tuple(text),
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            prompt_scores=echo and scores > 0,
            adapter=self.model,
            task=self.task,
            max_new_tokens=room,
            stop=stop,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            scores=scores,
            special=special,
        )


class Completion(Sampled):
    """POST /v1/completions."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    def requests(self) -> list[Request]:
        """All rows: the n copies of the first prompt, of the second, ..."""
        if self.echo and self.stream:
            raise FieldError("echo", "echo is not supported with stream", hint="stream: false")
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "max_tokens is 0, and nothing is echoed", hint="echo: true")
        prompts = prompts_of(self.prompt)
        _bounded(len(prompts) * self.n)
        scores = 0 if self.logprobs is None else max(1, self.logprobs)
        room = None if self.max_tokens is None else max(1, self.max_tokens)
        return [self.request(p, room, scores, i, echo=self.echo) for p in prompts for i in range(self.n)]


class Message(Body):
    """One turn of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, str]:
        """With its content as text. Raises FieldError for images, calls of tools and the like."""
        self.refuse()
        if isinstance(self.content, list):
            return {"role": self.role, "content": "".join(map(_part, self.content))}
        if self.content is None and self.role != "assistant":
            raise FieldError("messages", f"a turn of {self.role!r} has no content", hint='content: "..."')
        return {"role": self.role, "content": self.content or ""}


def _part(part: Mapping[str, Any]) -> str:
    """The text of a part of a turn's content."""
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise FieldError("messages", f"content of type {kind!r} is not supported", hint="send text")
    if not isinstance(text, str):
        raise FieldError("messages", "a part of type 'text' has no text", hint='{"type": "text", "text": "..."}')
    if other := [name for name, value in part.items() if name not in ("type", "text") and value]:
        raise FieldError("messages", f"{other[0]} of a part is not supported", hint="leave it out")
    return text


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def requests(self, tokenizer: Any) -> list[Request]:
        """One row a copy, its text made by the tokenizer's chat template."""
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs are given with logprobs", hint="logprobs: true")
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "this base has no chat template", hint="POST /v1/completions, or serve --chat-template FILE"
            )
        turns = [message.plain() for message in self.messages]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except (TemplateError, AttributeError, ArithmeticError, *BREAKDOWNS) as error:
            raise FieldError("messages", f"the base's chat template refuses them: {error}") from error
        room = self.max_completion_tokens or self.max_tokens
        scores = max(1, self.top_logprobs or 0) if self.logprobs else 0
        return [self.request(text, room, scores, i, special=False) for i in range(self.n)]


class Classify(Body):
    """POST /v1/classify: texts, or pairs of texts as lists of two."""

    model: str = ""
    input: str | list[str | Annotated[list[str], Field(min_length=2, max_length=2)]]
    task: str | None = None

    def requests(self) -> list[Request]:
        """One row a text."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        _bounded(len(texts))
        pairs = [(text, None) if isinstance(text, str) else (text[0], text[1]) for text in texts]
        shared: dict[str, Any] = {"adapter": self.model, "task": self.task, "scores": 1000}
        return [Request(text=text, pair=pair, **shared) for text, pair in pairs]


class Tokenize(Body):
    """POST /tokenize."""

    model: str = ""
    prompt: str
    add_special_tokens: bool = True

    def request(self) -> Request:
        """A row that would read them."""
        return Request(text=self.prompt, adapter=self.model, special=self.add_special_tokens, max_new_tokens=1)


class Detokenize(Body):
    """POST /detokenize."""

    model: str = ""
    tokens: list[StrictInt]


class Load(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class Unload(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def prompts_of(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Prompts, each a text or tokens."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)  # type: ignore[arg-type]


def _bounded(rows: int) -> None:
    if not 1 <= rows <= MOST_ROWS:
        raise UsageError(f"{rows} rows in one request; 1 to {MOST_ROWS} are taken")


def identifier(prefix: str) -> str:
    """A fresh id."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(results: Sequence[Result], copies: int = 1) -> dict[str, int]:
    """Counts of tokens; a prompt of several copies counts once."""
    read, written = sum(r.read for r in results[::copies]), sum(r.written for r in results)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def frame(kind: str, ident: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What completions and their pieces share."""
    return {"id": ident, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def completion_choice(index: int, result: Result) -> dict[str, Any]:
    """A choice of /v1/completions."""
    found = {"index": index, "text": said(result), "logprobs": _columns(result.tokens, 0)}
    return _routed({**found, "finish_reason": result.finish or "stop"}, result)


def echoed(choice: dict[str, Any], result: Result, prompt: str, *, nothing_new: bool) -> dict[str, Any]:
    """A choice of /v1/completions with its prompt in front; `nothing_new` leaves out what was written."""
    if nothing_new:
        choice |= {"text": "", "finish_reason": "length"}
    choice["text"] = prompt + choice["text"]
    columns = _columns(result.prompt + (() if nothing_new else result.tokens), 0)
    if columns is not None:  # nothing is said of the first token
        columns["token_logprobs"][0] = columns["top_logprobs"][0] = None
        choice["logprobs"] = columns
    return choice


def completion_piece(piece: Piece, start: int) -> dict[str, Any]:
    """What a piece adds to a streamed choice; its tokens' text begins `start` characters after the prompt."""
    return {"text": piece.text, "logprobs": _columns(piece.tokens, start)}


def chat_choice(index: int, result: Result) -> dict[str, Any]:
    """A choice of /v1/chat/completions."""
    message = {"role": "assistant", "content": said(result)}
    found = {"index": index, "message": message, "logprobs": _content(result.tokens)}
    return _routed({**found, "finish_reason": result.finish or "stop"}, result)


def chat_piece(piece: Piece, _start: int) -> dict[str, Any]:
    """What a piece adds to a streamed choice."""
    return {"delta": {"content": piece.text} if piece.text else {}, "logprobs": _content(piece.tokens)}


def _columns(tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
    """Scores in the words of /v1/completions; None where none were asked for."""
    if not tokens:
        return None
    lengths = [len(t.text) for t in tokens]
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.log_prob for t in tokens],
        "top_logprobs": [{**dict(t.best), t.text: t.log_prob} for t in tokens],  # the chosen one among them
        "text_offset": [start + sum(lengths[:i]) for i in range(len(tokens))],
    }


def _content(tokens: Sequence[Token]) -> dict[str, Any] | None:
    """Scores in the words of /v1/chat/completions."""
    if not tokens:
        return None
    best = [[_token(text, log_prob) for text, log_prob in t.best] for t in tokens]
    return {"content": [{**_token(t.text, t.log_prob), "top_logprobs": b} for t, b in zip(tokens, best, strict=True)]}


def classified(index: int, result: Result) -> dict[str, Any]:
    """An entry of /v1/classify."""
    if result.text is not None:
        return _routed({"index": index, "text": result.text}, result)
    if result.value is not None:
        return _routed({"index": index, "value": result.value}, result)
    if result.labels is not None:
        return _routed({"index": index, "labels": list(result.labels), "scores": dict(result.scores)}, result)
    return _routed({"index": index, "label": result.label, "scores": dict(result.scores)}, result)


def _token(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


def said(result: Result) -> str:
    """The text of a row; a router may have chosen an adapter that answers with a label or a number instead."""
    if result.text is not None:
        return result.text
    labels = (result.label,) if result.label is not None else result.labels
    return str(result.value) if labels is None else ", ".join(labels)


def _routed(choice: dict[str, Any], result: Result) -> dict[str, Any]:
    return {**choice, "route_weights": dict(result.weights)} if result.weights else choice
