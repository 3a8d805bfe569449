"""Threads beside the event loop, for work that needs no model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")


class Threads:
    """A number of threads that requests take turns on.

    No more is handed to them than they can begin at once. What waits does so in the event loop, and is let go when its
    client leaves: a pool would hold it, with its body of megabytes, until a thread is free.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free = asyncio.Semaphore(count)

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """The result of a call on one of the threads; what has begun goes on when nobody waits for it any more."""
        await self._free.acquire()
        loop, work = asyncio.get_running_loop(), self._pool.submit(function, *args)

        def release(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._free.release)

        work.add_done_callback(release)
        return await asyncio.wrap_future(work)
