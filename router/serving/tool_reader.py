"""Calls of tools read back from what a model writes, while it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from router.serving.tool_format import ToolFormat, call_of

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_BETWEEN = " \t\r\n,;"  # what may stand between two calls


@dataclass(frozen=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class Called:
    """A call has begun."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Argued:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


News = Said | Called | Argued


class _Object:
    """One JSON object that comes in pieces: what it is called, where its arguments stand, and where it ends."""

    def __init__(self) -> None:
        self.raw, self.name, self.ended = "", "", False
        self._depth, self._in_string, self._escaped = 0, False, False
        self._from, self._to, self._told = -1, -1, -1  # where the arguments begin and end, and what was told of them

    def add(self, text: str) -> str:
        """Take a text; returns what stands behind the object's end."""
        for place, letter in enumerate(text):
            self.raw += letter
            if self._in_string:
                self._in_string = letter != '"' or self._escaped
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._open()
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 1 and self._to < 0 <= self._from:
                    self._to = len(self.raw)
                if self._depth == 0:
                    self.ended = True
                    return text[place + 1 :]
        return ""

    def _open(self) -> None:
        self._depth += 1
        if self._depth == 2 and self._from < 0 and (found := _HEAD.fullmatch(self.raw[:-1])):
            with suppress(ValueError):  # a model may write what is no JSON
                self.name = str(json.loads(found[1]))
                self._from = self._told = found.end()

    def more(self) -> str:
        """Arguments that have not been told yet."""
        end = self._to if self._to >= 0 else len(self.raw)
        told, self._told = self._told, end
        return self.raw[told:end]


class ToolReader:
    """Reads one answer.

    Parameters
    ----------
    names
        Functions that can be called; an object with another name is text.
    single
        Whether only the first call counts.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, single: bool = False) -> None:
        self._form, self._names, self._single = form, list(names), single
        self._held = ""  # text that is not understood yet
        self._inside = False  # behind `begin`
        self._since = ""  # what was read since then, in case it is no call
        self._object: _Object | None = None
        self._live = False  # whether the object's call has been told
        self._texted = False
        self.calls = 0

    def add(self, text: str) -> list[News]:
        """Take what was written next."""
        self._held += text
        news: list[News] = []
        while self._step(news):
            pass
        return news

    def close(self) -> list[News]:
        """Nothing more comes: what was held back."""
        news = self.add("")
        if not self._live:
            rest = ("" if self._object is None else self._object.raw) + self._held
            if self._inside and not self.calls:
                rest = self._since + rest
            if rest.strip(_BETWEEN + "]") or (rest and not self.calls):
                news.append(Said(rest))
        self._held = ""
        return news

    def _step(self, news: list[News]) -> bool:
        """Whether something was understood and more may follow."""
        if self._object is not None:
            return self._in_object(self._object, news)
        return self._in_calls(news) if self._inside else self._in_text(news)

    def _in_text(self, news: list[News]) -> bool:
        if self._form.bare and not self._texted and self._held.lstrip()[:1] == "{":
            self._enter("", self._held)
            return True
        place = self._held.find(self._form.begin)
        if place >= 0:
            self._say(self._held[:place], news)
            self._enter(self._form.begin, self._held[place + len(self._form.begin) :])
            return True
        ends = range(min(len(self._form.begin) - 1, len(self._held)), 0, -1)
        keep = next((n for n in ends if self._form.begin.startswith(self._held[-n:])), 0)
        if not self._held.strip() and not self._texted:
            return False  # blanks in front of a call are nobody's
        self._say(self._held[: len(self._held) - keep], news)
        self._held = self._held[len(self._held) - keep :]
        return False

    def _enter(self, mark: str, rest: str) -> None:
        self._inside, self._since, self._held = True, mark, rest

    def _say(self, text: str, news: list[News]) -> None:
        if text and (text.strip() or self._texted):
            self._texted = True
            news.append(Said(text))

    def _in_calls(self, news: list[News]) -> bool:
        """Between `begin` and the next object, or what ends the calls."""
        rest = self._held.lstrip(_BETWEEN + "[" + ("]" if self.calls else ""))
        self._since += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest:
            return False
        end = self._form.end
        if end and (rest.startswith(end) or end.startswith(rest)):
            if len(rest) < len(end):
                return False
            self._inside, self._held = False, rest[len(end) :].lstrip()
            return bool(self._held)
        if rest[0] == "{":
            self._object, self._live = _Object(), False
            return True
        self._inside, self._texted = False, True  # no call after all
        news.append(Said(("" if self.calls else self._since) + rest[0]))
        self._held = rest[1:]
        return True

    def _in_object(self, one: _Object, news: list[News]) -> bool:
        self._held = one.add(self._held)
        told = self._live or not (self._single and self.calls)
        if told and not self._live and one.name in self._names:
            self._begin(one.name, news)
        if self._live and (more := one.more()):
            news.append(Argued(self.calls - 1, more))
        if not one.ended:
            return False
        self._object = None
        if not self._live and told:
            self._whole(one.raw, news)
        self._live = False
        return True

    def _begin(self, name: str, news: list[News]) -> None:
        self._live = True
        self.calls += 1
        news.append(Called(self.calls - 1, self._form.identifier(), name))

    def _whole(self, raw: str, news: list[News]) -> None:
        """An object whose name came late, or that is no call."""
        try:
            call = call_of(json.loads(raw), self._names)
        except ValueError:
            call = None
        if call is None:
            self._inside, self._texted = False, True
            news.append(Said(("" if self.calls else self._since) + raw))
            return
        self._begin(call[0], news)
        news.append(Argued(self.calls - 1, call[1]))
