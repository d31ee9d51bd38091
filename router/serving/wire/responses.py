"""/v1/responses: requests, and whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError

from router.engine.request import Request, Result
from router.serving.errors import FieldError
from router.serving.wire.body import Answer, Body, identifier, now, said
from router.serving.wire.chat import Chat, ChosenToken, chosen, message_of
from router.serving.wire.tools import Toolbox

_SCORES = "message.output_text.logprobs"  # what `include` may ask for


class ResponseTool(Body):
    """A function of `tools`."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False

    def chat(self) -> dict[str, Any]:
        """As /v1/chat/completions takes it."""
        self.refuse()
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {**told, "strict": self.strict}}


class ResponseTextFormat(Body):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def chat(self) -> dict[str, Any]:
        """As /v1/chat/completions takes it."""
        self.refuse()
        if self.type != "json_schema":
            return {"type": self.type}
        told = {"name": self.name, "description": self.description, "strict": self.strict}
        return {"type": "json_schema", "json_schema": {**told, "schema": self.schema_}}

    def told(self) -> dict[str, Any]:
        """As the answer repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        told = {"name": self.name or "", "description": self.description, "strict": self.strict}
        return {"type": "json_schema", **told, "schema": self.schema_ or {}}


class ResponseText(Body):
    """`text`."""

    format: ResponseTextFormat = Field(default_factory=ResponseTextFormat)


class ResponseNamed(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    name: str


class Respond(Body):
    """POST /v1/responses. Nothing is stored: each request brings the whole conversation."""

    model: str = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    text: ResponseText = Field(default_factory=ResponseText)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=10.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] = Field(default_factory=list)
    tools: list[ResponseTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ResponseNamed = "auto"
    parallel_tool_calls: bool = True
    stream: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)
    task: str | None = None

    def chat(self) -> Chat:
        """The same as a conversation of /v1/chat/completions. Raises FieldError."""
        if other := [name for name in self.include if name != _SCORES]:
            raise FieldError("include", f"include: {other[0]} is not supported", hint=_SCORES)
        self.text.refuse()
        turns = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        choice = self.tool_choice
        fields = {
            "model": self.model,
            "messages": [*turns, *_turns(given)],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": _SCORES in self.include or bool(self.top_logprobs),
            "top_logprobs": self.top_logprobs,
            "tools": [tool.chat() for tool in self.tools],
            "tool_choice": choice
            if isinstance(choice, str)
            else {"type": "function", "function": {"name": choice.name}},
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.format.chat(),
            "task": self.task,
        }
        try:
            return Chat.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise FieldError(_param(str(first["loc"][0])), f"{first['loc']}: {first['msg']}") from error

    def request(self, chat: Chat, tokenizer: Any, tools: Toolbox | None) -> Request:
        """Its row."""
        try:
            (row,) = chat.requests(tokenizer, tools)
        except FieldError as error:
            raise FieldError(_param(error.param), error.message, hint=error.hint) from error
        grammar = row.grammar
        return row if grammar is None else replace(row, grammar=replace(grammar, param=_param(grammar.param)))


def _param(chat: str) -> str:
    """What a field of /v1/chat/completions is called here."""
    return {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}.get(
        chat, chat
    )


def _turns(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of a conversation from items of `input`."""
    turns: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type") or "message"
        if kind == "message":
            turns.append({"role": item.get("role", "user"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": None})
            turns[-1].setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
        elif kind == "function_call_output":
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        else:
            raise FieldError("input", f"an item of type {kind!r} is not supported", hint="messages and function calls")
    return turns


class OutputText(Answer):
    """A part of a message."""

    type: str = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ChosenToken] = Field(default_factory=list)


class OutputMessage(Answer):
    """What the assistant says."""

    id: str
    type: str = "message"
    role: str = "assistant"
    status: str
    content: list[OutputText]


class OutputCall(Answer):
    """A call of a function."""

    id: str
    type: str = "function_call"
    status: str
    call_id: str
    name: str
    arguments: str


class Details(Answer):
    """Of tokens read: those that a cache had, and those that were kept in one."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(Answer):
    """Of tokens written: those that nobody sees."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: Details = Field(default_factory=Details)
    output_tokens: int
    output_tokens_details: OutputDetails = Field(default_factory=OutputDetails)
    total_tokens: int


class ResponseAnswer(Answer):
    """An answer: whole, or as it stands while it is written."""

    id: str
    object: str = "response"
    created_at: float
    completed_at: float | None = None
    status: str
    background: bool = False
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


def begun(asked: Respond) -> ResponseAnswer:
    """An answer of which nothing is there yet."""
    choice = asked.tool_choice
    functions = [
        {
            "type": "function",
            "strict": t.strict,
            "name": t.name,
            "description": t.description,
            "parameters": t.parameters,
        }
        for t in asked.tools
    ]
    return ResponseAnswer(
        id=identifier("resp", "_"),
        created_at=float(now()),
        status="in_progress",
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata,
        model=asked.model,
        output=[],
        parallel_tool_calls=asked.parallel_tool_calls,
        temperature=asked.temperature,
        text={"format": asked.text.format.told()},
        tool_choice=choice if isinstance(choice, str) else {"type": "function", "name": choice.name},
        tools=functions,
        top_logprobs=asked.top_logprobs or 0,
        top_p=asked.top_p,
    )


def ended(answer: ResponseAnswer, output: Sequence[OutputMessage | OutputCall], result: Result) -> ResponseAnswer:
    """The answer with its output and its usage."""
    cut = result.finish == "length"
    counts = {"input_tokens": result.read, "output_tokens": result.written}
    return answer.model_copy(
        update={
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else float(now()),
            "output": list(output),
            "usage": ResponseUsage(**counts, total_tokens=result.read + result.written),
        }
    )


def whole(asked: Respond, result: Result, tools: Toolbox | None) -> ResponseAnswer:
    """The answer of a row that has ended."""
    message, called = message_of(said(result), tools)
    status = "incomplete" if result.finish == "length" else "completed"
    output: list[OutputMessage | OutputCall] = []
    if message.content or not called:
        scores = [chosen(token, asked.top_logprobs or 0) for token in result.tokens]
        text = OutputText(text=message.content or "", logprobs=scores)
        output.append(OutputMessage(id=identifier("msg", "_"), status=status, content=[text]))
    for call in message.tool_calls or ():
        told = {"name": call.function.name, "arguments": call.function.arguments}
        output.append(OutputCall(id=identifier("fc", "_"), status=status, call_id=call.id, **told))
    return ended(begun(asked), output, result)
