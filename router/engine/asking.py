"""Requests from an event loop: the answer awaited, or the pieces of its text as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from hub.errors import HubError
from router.engine.job import Answer
from router.engine.prepare import PreparedRow
from router.engine.request import Piece, Request, Result
from router.engine.scheduler import Scheduler

Prepare: TypeAlias = Callable[[Request], PreparedRow]


async def stream_of(scheduler: Scheduler, prepare: Prepare, request: Request) -> AsyncIterator[Piece | Result]:
    """Pieces, then the result; see `Engine.stream`."""
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[Piece | Answer] = asyncio.Queue()

    def tell(what: Piece | Answer) -> None:  # in the engine's thread
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.put_nowait, what)

    job = scheduler.submit(await asyncio.to_thread(prepare, request), tell, tell)
    try:
        while True:
            what = await news.get()
            if isinstance(what, HubError):
                raise what
            yield what
            if isinstance(what, Result):
                return
    finally:
        scheduler.cancel(job)  # does nothing to a row that has ended


async def answer_of(scheduler: Scheduler, prepare: Prepare, request: Request) -> Result:
    """The result; see `Engine.answer`."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Answer] = loop.create_future()

    def settle(answer: Answer) -> None:
        if not answered.done():
            answered.set_result(answer)

    def tell(answer: Answer) -> None:  # in the engine's thread
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, answer)

    job = scheduler.submit(await asyncio.to_thread(prepare, request), tell)
    try:
        answer = await answered
    finally:
        scheduler.cancel(job)
    if isinstance(answer, HubError):
        raise answer
    return answer
