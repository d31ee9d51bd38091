"""Whose turn it is: everything that has work gets an equal share of the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

W = TypeVar("W")


class Turns:
    """Fair queueing by start times: what has had the least time goes next.

    What is new begins even with the one that has had the least, and goes first among those that are even, so that it
    waits for the step under way and no more; but after `ahead` newcomers in a row it is the turn of one that was there
    before. So with n that have work, none waits for more than about n steps, and newcomers without end starve nobody.
    """

    ahead = 2

    def __init__(self) -> None:
        self._spent: dict[object, float] = {}
        self._row = 0  # newcomers that went first

    def next(self, work: Sequence[W]) -> W:
        """The one of these whose turn it is; the first of those that are even."""
        known = [self._spent[one] for one in work if one in self._spent]
        begin = min(known, default=0.0)
        came = {one for one in work if one not in self._spent}
        self._spent = {one: self._spent.get(one, begin) for one in work}
        least = min(self._spent.values())
        even = [one for one in work if self._spent[one] == least]
        new, old = [one for one in even if one in came], [one for one in even if one not in came]
        chosen = new if new and (self._row < self.ahead or not old) else old
        self._row = self._row + 1 if chosen is new and old else 0
        return chosen[0]

    def charge(self, one: object, seconds: float) -> None:
        """It has had so many seconds."""
        self._spent[one] += seconds


class Pace:
    """How many tokens are read in the time of a decoding step, as measured of late."""

    least, most, first = 32, 4096, 64

    def __init__(self) -> None:
        self._step: float | None = None  # seconds
        self._token: float | None = None

    def stepped(self, seconds: float) -> None:
        """A decoding step took so long."""
        self._step = _smoothed(self._step, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """So many tokens were read."""
        self._token = _smoothed(self._token, seconds / max(1, tokens))

    @property
    def chunk(self) -> int:
        """Tokens to read at once."""
        if self._step is None or not self._token:
            return self.first
        return int(min(self.most, max(self.least, self._step / self._token)))


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else 0.8 * before + 0.2 * value
