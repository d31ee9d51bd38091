"""A request under way, and why the engine may refuse one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from hub.errors import HubError
from router.engine.batches.running_row import RunningRow
from router.engine.prepare import PreparedRow
from router.engine.request import Result

Answer: TypeAlias = Result | HubError
# What a library may raise over one batch (out of memory among them): it belongs to some row, and not to the others.
BREAKDOWNS = (RuntimeError, ValueError, TypeError, LookupError, OSError)


def as_hub_error(error: Exception) -> HubError:
    """The error as one of ours."""
    return error if isinstance(error, HubError) else BrokeDown(f"it broke down: {type(error).__name__}: {error}")


class BrokeDown(HubError):
    """Something failed that nothing in the request explains."""


class ServerBusy(HubError):
    """More requests wait than the engine takes."""


class ServerStopped(HubError):
    """Nothing is computed any more."""


class TooLarge(HubError):
    """A request that can never fit within the engine's bounds."""


@dataclass(eq=False)
class Job:
    """A request under way; times are `time.monotonic` seconds, None before they have come.

    Attributes
    ----------
    row
        What is computed. Its ``on_piece``, and `on_done`, are called in the engine's thread.
    since, began, ended
        When it was submitted, when its prompt began to be read, and when it was answered.
    together
        The jobs of a file's batch that it is one of.
    passed, unready
        How many others began while it did not fit, and turns in which its adapters were not there.
    following
        Rows that will be submitted next: their adapters are read while this one is computed.
    """

    row: RunningRow
    on_done: Callable[[Answer], None]
    since: float
    began: float | None = None
    ended: float | None = None
    acquired: bool = False
    together: list[Job] | None = None
    passed: int = 0
    unready: int = 0
    following: Sequence[PreparedRow] = ()

    def tell(self, answer: Answer) -> None:
        """Say what became of it, unless nobody listens any more."""
        if not self.row.cancelled:
            self.on_done(answer)


class Watcher(Protocol):
    """Is told what happens, in the engine's thread."""

    def joined(self, rows: int) -> None:
        """So many rows are computed together, now that some have joined."""

    def ended(self, job: Job) -> None:
        """A row has been answered, and was not given up."""
