"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError
from pydantic import Field

from hub.errors import UsageError
from router.engine.job import BREAKDOWNS
from router.engine.request import Request, Result, Token
from router.serving.errors import FieldError
from router.serving.tool_reader import Argued, Called, News, Said
from router.serving.wire.body import Answer, Body, Usage, brief, said, weights_of
from router.serving.wire.sampled import Sampled, best_of, shown
from router.serving.wire.tools import CalledFunction, GivenCall, NamedTool, Tool, Toolbox, ToolCall, toolbox

_SILENT = ("assistant",)  # roles whose turns may have no content


class Message(Body):
    """One turn of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[GivenCall] = Field(default_factory=list)
    tool_call_id: str = ""

    def templated(self) -> dict[str, Any]:
        """As chat templates take it, its content as text. Raises FieldError for images and the like."""
        self.refuse()
        if self.content is None and self.role not in _SILENT:
            raise FieldError("messages", f"a turn of {self.role!r} has no content", hint='content: "..."')
        content = "".join(map(_part, self.content)) if isinstance(self.content, list) else self.content or ""
        role = "system" if self.role == "developer" else self.role  # what OpenAI calls it since
        told: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            told["tool_calls"] = [call.templated() for call in self.tool_calls]
        if self.role == "tool":
            told |= {"tool_call_id": self.tool_call_id, "name": (self.model_extra or {}).get("name") or ""}
        return told


def _part(part: Mapping[str, Any]) -> str:
    """The text of a part of a turn's content."""
    kind, text = part.get("type"), part.get("text")
    if kind not in ("text", "input_text", "output_text"):
        raise FieldError("messages", f"content of type {kind!r} is not supported", hint="send text")
    if not isinstance(text, str):
        raise FieldError("messages", f"a part of type {kind!r} has no text", hint='{"type": "text", "text": "..."}')
    known = ("type", "text", "annotations", "logprobs") if kind == "output_text" else ("type", "text")
    if other := [name for name, value in part.items() if name not in known and value]:
        raise FieldError("messages", f"{other[0]} of a part is not supported", hint="leave it out")
    return text


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    def toolbox(self, tokenizer: Any, form: str | None) -> Toolbox | None:
        """What may be called. Raises FieldError."""
        _need_template(tokenizer)
        return toolbox(tokenizer, self.tools, self.tool_choice, several=self.parallel_tool_calls, form=form)

    def requests(self, tokenizer: Any, tools: Toolbox | None) -> list[Request]:
        """One row a copy, its text made by the tokenizer's chat template."""
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs are given with logprobs", hint="logprobs: true")
        _need_template(tokenizer)
        text = templated(tokenizer, [message.templated() for message in self.messages], self.tools)
        room = self.max_completion_tokens or self.max_tokens
        told: dict[str, Any] = {"special": False, "scores": max(1, self.top_logprobs or 0) if self.logprobs else 0}
        if tools is not None:
            told |= {"grammar": tools.grammar(self.grammar()), "keep": tools.keep}
        return [self.request(text, room, i, **told) for i in range(self.n)]


def _need_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        hint = "POST /v1/completions, or serve --chat-template FILE"
        raise UsageError("this base has no chat template", hint=hint)


def templated(tokenizer: Any, turns: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> str:
    """The text of a conversation, which the assistant is to continue. Raises FieldError where it has none."""
    given = [tool.templated() for tool in tools] or None
    try:
        return str(tokenizer.apply_chat_template(turns, tools=given, tokenize=False, add_generation_prompt=True))
    except (TemplateError, AttributeError, ArithmeticError, *BREAKDOWNS) as error:
        raise FieldError("messages", f"the base's chat template refuses them: {error}") from error


class ChatToken(Answer):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(ChatToken):
    """A token that was chosen, and the best at its place."""

    top_logprobs: list[ChatToken]


class Scores(Answer):
    """Scores of tokens."""

    content: list[ChosenToken]
    refusal: list[ChosenToken] | None = None


class ChatMessage(Answer):
    """What the assistant says."""

    role: str = "assistant"
    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = brief()


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: Scores | None
    finish_reason: str
    route_weights: dict[str, float] | None = brief()


class ChatAnswer(Answer):
    """All answers."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str | None = None
    usage: Usage


class PartialFunction(Answer):
    """What is new of a function."""

    name: str | None = brief()
    arguments: str = ""


class PartialCall(Answer):
    """What is new of a call."""

    index: int
    id: str | None = brief()
    type: str | None = brief()
    function: PartialFunction


class Delta(Answer):
    """What is new."""

    role: str | None = brief()
    content: str | None = brief()
    tool_calls: list[PartialCall] | None = brief()


class ChatPiece(Answer):
    """A piece of an answer."""

    index: int
    delta: Delta
    logprobs: Scores | None = None
    finish_reason: str | None = None


class ChatChunk(Answer):
    """A piece of the answers."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatPiece]
    system_fingerprint: str | None = None


class ChatChunkWithUsage(ChatChunk):
    """A piece of answers whose usage was asked for, which stands in the last one."""

    usage: Usage | None = None


def choice(index: int, result: Result, asked: int | None, tools: Toolbox | None) -> ChatChoice:
    """A whole answer."""
    message, called = message_of(said(result), tools)
    finish = "tool_calls" if called and result.finish == "stop" else result.finish or "stop"
    return ChatChoice(
        index=index,
        message=message,
        logprobs=scores(result.tokens, asked),
        finish_reason=finish,
        route_weights=weights_of(result),
    )


def message_of(text: str, tools: Toolbox | None) -> tuple[ChatMessage, bool]:
    """What a text says, with the calls in it; whether there are any."""
    if tools is None:
        return ChatMessage(content=text), False
    reader = tools.reader()
    content, calls = "", list[ToolCall]()
    for news in (*reader.add(text), *reader.close()):
        if isinstance(news, Said):
            content += news.text
        elif isinstance(news, Called):
            calls.append(ToolCall(id=news.id, function=CalledFunction(name=news.name, arguments="")))
        else:
            calls[news.index].function.arguments += news.text
    if not calls:
        return ChatMessage(content=content), False
    return ChatMessage(content=content or None, tool_calls=calls), True


def delta_of(news: News) -> Delta:
    """A piece in OpenAI's words."""
    if isinstance(news, Said):
        return Delta(content=news.text)
    if isinstance(news, Argued):
        return Delta(tool_calls=[PartialCall(index=news.index, function=PartialFunction(arguments=news.text))])
    begun = PartialCall(index=news.index, id=news.id, type="function", function=PartialFunction(name=news.name))
    return Delta(tool_calls=[begun])


def scores(tokens: Sequence[Token], asked: int | None) -> Scores | None:
    """Scores of tokens with the `asked` best at each place; None where none were asked for."""
    return Scores(content=[chosen(token, asked or 0) for token in tokens]) if tokens else None


def chosen(token: Token, asked: int) -> ChosenToken:
    """A token with the best at its place; it is among them, unless none were asked for."""
    best = best_of(token, asked).items() if asked else ()
    top = [ChatToken(token=shown(*name), logprob=p, bytes=list(name[1])) for name, p in best]
    own = {"token": shown(token.text, token.raw), "logprob": token.log_prob, "bytes": list(token.raw)}
    return ChosenToken(**own, top_logprobs=top)
