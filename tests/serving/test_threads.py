"""Threads beside the event loop."""

import asyncio
import gc
import threading
import weakref

from codebook.serving.threads import Threads


class Body:
    pass


def test_what_waits_for_a_thread_is_let_go_when_its_client_leaves():
    """And what it came with; what runs keeps its thread until it has ended, and the next one waits for that."""
    begun, end, done = threading.Event(), threading.Event(), []

    def work(number, body):
        begun.set()
        end.wait(30)
        done.append(number)
        return number

    async def main():
        threads = Threads(1, "test")
        running = asyncio.ensure_future(threads.run(work, 0, Body()))
        await asyncio.to_thread(begun.wait, 30)
        running.cancel()
        left = Body()
        gone, waiting = weakref.ref(left), asyncio.ensure_future(threads.run(work, 1, left))
        del left
        stays = asyncio.ensure_future(threads.run(work, 2, Body()))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({running, waiting})
        del waiting
        gc.collect()
        assert gone() is None and not done
        end.set()
        assert await stays == 2 and done == [0, 2]

    asyncio.run(main())
