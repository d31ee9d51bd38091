"""/v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, StrictInt

from router.engine.request import Piece, Request, Result, Token
from router.serving.errors import FieldError
from router.serving.wire.body import Answer, Usage, bounded, brief, said, weights_of
from router.serving.wire.sampled import Sampled, best_of, shown


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
        bounded(len(prompts) * self.n)
        scores = 0 if self.logprobs is None else max(1, self.logprobs)
        room = None if self.max_tokens is None else max(1, self.max_tokens)
        told = {"scores": scores, "prompt_scores": self.echo and scores > 0}
        return [self.request(p, room, i, **told) for p in prompts for i in range(self.n)]


def prompts_of(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Prompts, each a text or tokens."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)  # type: ignore[arg-type]


class Columns(Answer):
    """Scores of tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: Columns | None = None
    finish_reason: str | None = None
    route_weights: dict[str, float] | None = brief()


class CompletionChunk(Answer):
    """A piece of an answer."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = None


class CompletionAnswer(CompletionChunk):
    """A whole answer, or a piece of one whose usage was asked for."""

    usage: Usage | None = None


def choice(index: int, result: Result) -> CompletionChoice:
    """A whole choice."""
    told = {"logprobs": columns(result.tokens, 0), "route_weights": weights_of(result)}
    return CompletionChoice(index=index, text=said(result), finish_reason=result.finish or "stop", **told)


def echoed(told: CompletionChoice, result: Result, prompt: str, *, nothing_new: bool) -> CompletionChoice:
    """A choice with its prompt in front; `nothing_new` leaves out what was written."""
    text, finish = ("", "length") if nothing_new else (told.text, told.finish_reason)
    scores = columns(result.prompt + (() if nothing_new else result.tokens), 0)
    if scores is not None:  # nothing is said of the first token
        scores.token_logprobs[0] = scores.top_logprobs[0] = None
    return told.model_copy(update={"text": prompt + text, "finish_reason": finish, "logprobs": scores})


def piece(index: int, part: Piece, start: int) -> CompletionChoice:
    """What a piece adds to a streamed choice; its tokens' text begins `start` characters after the prompt."""
    return CompletionChoice(index=index, text=part.text, logprobs=columns(part.tokens, start))


def columns(tokens: Sequence[Token], start: int) -> Columns | None:
    """Scores of tokens; None where none were asked for."""
    if not tokens:
        return None
    lengths = [len(t.text) for t in tokens]
    best = [{shown(*name, "bytes:"): p for name, p in best_of(t, len(t.best)).items()} for t in tokens]
    return Columns(
        tokens=[shown(t.text, t.raw, "bytes:") for t in tokens],
        token_logprobs=[t.log_prob for t in tokens],
        top_logprobs=list(best),
        text_offset=[start + sum(lengths[:i]) for i in range(len(tokens))],
    )
