"""POST /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import ConfigDict

from router.engine.request import Piece, Result
from router.serving.server import Server, answer
from router.serving.tool_reader import Argued, Called, News, Said
from router.serving.wire.body import Answer, Usage, identifier, said
from router.serving.wire.chat import ChosenToken, chosen
from router.serving.wire.responses import OutputCall, OutputMessage, OutputText, Respond, begun, ended, whole
from router.serving.wire.tools import Toolbox


async def responses(server: Server, request: Request) -> Response:
    """An answer to what is brought along; nothing is stored."""
    asked = await server.body(request, Respond)
    tokenizer = server.engine.host.tokenizer
    chat = asked.chat()
    tools = chat.toolbox(tokenizer, server.tool_format)
    rows = await server.rows([asked.request(chat, tokenizer, tools)])
    if asked.stream:
        return server.stream(rows, ResponseWords(asked, tools))
    (result,) = await rows.results(request)
    server.count([result])
    return answer(whole(asked, result, tools), rows)


class Event(Answer):
    """An event; what it has depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class ResponseWords:
    """A stream of it: items are added, filled and done one after the other."""

    field, done = "input", ""

    def __init__(self, asked: Respond, tools: Toolbox | None) -> None:
        self._asked, self._answer = asked, begun(asked)
        self._reader = None if tools is None else tools.reader()
        self._number = 0
        self._output: list[OutputMessage | OutputCall] = []
        self._open = False  # whether the last item is being filled
        self._tokens: list[ChosenToken] = []

    def begin(self, _rows: int) -> Iterator[Answer]:
        """That it has begun."""
        yield self._event("response.created", response=self._answer.model_dump())
        yield self._event("response.in_progress", response=self._answer.model_dump())

    def piece(self, _index: int, part: Piece) -> Iterator[Answer]:
        """Text and calls."""
        self._tokens += [chosen(token, self._asked.top_logprobs or 0) for token in part.tokens]
        if self._reader is None:
            news: list[News] = [Said(part.text)] if part.text else []
        else:
            news = self._reader.add(part.text)
        yield from self._read(news)

    def end(self, _index: int, result: Result) -> Iterator[Answer]:
        """What was held back, and all of it."""
        if self._reader is not None:
            yield from self._read(self._reader.close())
        if result.text is None:  # a router has chosen an adapter that answers with a label
            yield from self._read([Said(said(result))])
        if not self._output:
            yield from self._message()
        status = "incomplete" if result.finish == "length" else "completed"
        yield from self._close(status)
        self._answer = ended(self._answer, self._output, result)
        yield self._event(f"response.{self._answer.status}", response=self._answer.model_dump())

    def close(self, _usage: Usage) -> Iterator[Answer]:
        """Nothing: usage is in the answer."""
        yield from ()

    def broke(self, error: dict[str, Any]) -> dict[str, Any]:
        """An event of its own."""
        told = {name: error["error"][name] for name in ("code", "message", "param")}
        return self._event("error", **told).model_dump()

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return Event(type=kind, sequence_number=number, **fields)

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._output[-1].id, "output_index": len(self._output) - 1}

    def _read(self, news: list[News]) -> Iterator[Answer]:
        for one in news:
            item = self._output[-1] if self._open else None
            if isinstance(one, Called):
                yield from self._close("completed")
                told = {"call_id": one.id, "name": one.name, "arguments": ""}
                yield self._add(OutputCall(id=identifier("fc", "_"), status="in_progress", **told))
            elif isinstance(one, Argued):
                assert isinstance(item, OutputCall)  # noqa: S101 - arguments follow their call
                item.arguments += one.text
                yield self._event("response.function_call_arguments.delta", **self._at, delta=one.text)
            else:
                if not isinstance(item, OutputMessage):
                    yield from self._close("completed")
                    yield from self._message()
                yield self._text(one.text)

    def _add(self, item: OutputMessage | OutputCall) -> Event:
        self._output.append(item)
        self._open = True
        told = item.model_dump()
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=told)

    def _message(self) -> Iterator[Answer]:
        yield self._add(OutputMessage(id=identifier("msg", "_"), status="in_progress", content=[]))
        message = self._output[-1]
        assert isinstance(message, OutputMessage)  # noqa: S101 - as it was added
        message.content.append(OutputText(text=""))
        part = message.content[0].model_dump()
        yield self._event("response.content_part.added", **self._at, content_index=0, part=part)

    def _text(self, text: str) -> Event:
        message = self._output[-1]
        assert isinstance(message, OutputMessage)  # noqa: S101 - the caller has looked
        tokens, self._tokens = self._tokens, []
        message.content[0].text += text
        message.content[0].logprobs += tokens
        told = _without_bytes(tokens)
        return self._event("response.output_text.delta", **self._at, content_index=0, delta=text, logprobs=told)

    def _close(self, status: str) -> Iterator[Answer]:
        """The item that was being filled is done."""
        if not self._open:
            return
        self._open, item = False, self._output[-1]
        item.status = status
        if isinstance(item, OutputCall):
            yield self._event("response.function_call_arguments.done", **self._at, arguments=item.arguments)
        else:
            part, at = item.content[0], {**self._at, "content_index": 0}
            part.logprobs += self._tokens
            self._tokens = []
            scores = _without_bytes(part.logprobs)
            yield self._event("response.output_text.done", **at, text=part.text, logprobs=scores)
            yield self._event("response.content_part.done", **at, part=part.model_dump())
        told = item.model_dump()
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=told)


def _without_bytes(tokens: list[ChosenToken]) -> list[dict[str, Any]]:
    """Scores as events have them."""
    return [
        {
            "token": token.token,
            "logprob": token.logprob,
            "top_logprobs": [{"token": best.token, "logprob": best.logprob} for best in token.top_logprobs],
        }
        for token in tokens
    ]
