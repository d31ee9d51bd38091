"""Whose turn it is: everything that has work gets an equal share of the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

W = TypeVar("W")


class Turns:
    """Fair queueing by virtual time, which passes for each at the rate at which all are served.

    What has had the least time goes next. What is new begins at the virtual time of now: it has nothing to catch up
    with, and nobody else has to catch up with it. So with n that have work, none waits for more than about n steps.
    """

    def __init__(self) -> None:
        self._spent: dict[object, float] = {}
        self._now = 0.0

    def next(self, work: Sequence[W]) -> W:
        """The one of these whose turn it is; the first of those that are even."""
        self._spent = {one: self._spent.get(one, self._now) for one in work}
        return min(work, key=self._spent.__getitem__)

    def charge(self, one: object, seconds: float) -> None:
        """It has had so many seconds."""
        self._spent[one] += seconds
        self._now += seconds / len(self._spent)


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
