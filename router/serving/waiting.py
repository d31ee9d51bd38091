"""The rows of one HTTP request, between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TypeAlias

from starlette.requests import Request

from hub.errors import HubError
from router.engine.job import Answer, Job
from router.engine.prepare import PreparedRow
from router.engine.request import Piece, Result
from router.engine.scheduler import Scheduler

News: TypeAlias = Piece | Answer


class ClientGone(HubError):
    """The client has closed the connection."""


class Rows:
    """Rows that were queued; what becomes of them comes through :meth:`news` or :meth:`results`.

    Attributes
    ----------
    digest
        Of what answers them, as `Result.digest`; None where that has none.
    """

    def __init__(self, scheduler: Scheduler, rows: Sequence[PreparedRow]) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        self._scheduler = scheduler
        self.digest = rows[0].target.digest if rows else None  # one request names one model
        self._jobs: list[Job] = []
        try:
            for index, row in enumerate(rows):
                tell = partial(self._tell, index)
                self._jobs.append(scheduler.submit(row, tell, tell))
        except HubError:
            self.cancel()
            raise

    def __len__(self) -> int:
        return len(self._jobs)

    def cancel(self) -> None:
        """Compute no more of them."""
        for job in self._jobs:
            self._scheduler.cancel(job)

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """Pieces of text, then a result or an error for each row, by its index, as they come."""
        left = len(self._jobs)
        while left:
            index, news = await self._news.get()
            left -= not isinstance(news, Piece)
            yield index, news

    async def results(self, request: Request) -> list[Result]:
        """All results in order. Raises the first error, or ClientGone when the client leaves."""
        collect, leave = asyncio.ensure_future(self._collect()), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({collect, leave}, return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                raise ClientGone("the client has closed the connection")
            return collect.result()
        finally:
            collect.cancel()
            leave.cancel()
            self.cancel()

    async def _collect(self) -> list[Result]:
        results: dict[int, Result] = {}
        async for index, news in self.news():
            if isinstance(news, HubError):
                raise news
            if isinstance(news, Result):
                results[index] = news
        return [results[index] for index in range(len(self._jobs))]

    def _tell(self, index: int, news: News) -> None:
        """From the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, news))


async def _left(request: Request) -> None:
    """Return when the client has gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
