"""Limits of the service, and the middleware that every request passes first."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codebook.errors import CodebookError, quoted, unknown
from codebook.serving.errors import CLIENT_LEFT, ServiceError, response_to

if TYPE_CHECKING:
    from codebook.serving.state import State

LIVENESS = {"/health", "/ready"}
"""Paths that tell whether the service lives."""
KEYLESS = LIVENESS | {"/"}
"""Paths that need no API key; the page asks its reader for it."""
ANSWERED_WHILE_DRAINING = LIVENESS | {"/metrics"}
PORT = re.compile(r":[0-9]*$")
UPLOADS = 16
"""The bytes of all requests that are arriving together, as a multiple of the largest one."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for; what is beyond is refused by name.

    Attributes
    ----------
    body
        Bytes of a request, and of an image that is fetched for it.
    images, pixels
        Pictures of a request, and their pixels together.
    queue
        Requests that are accepted and not yet answered.
    new_tokens
        Tokens of an answer.
    seconds
        From the acceptance of a request to the end of its answer.
    upload_seconds
        For the head of a request to arrive, for its body, for an image to be fetched, and for a client to read on.
    drain_seconds
        To answer what is accepted when the service is told to end.
    """

    body: int = 20 * 2**20
    images: int = 16
    pixels: int = 2**26
    queue: int = 64
    new_tokens: int = 1024
    seconds: int = 120
    upload_seconds: int = 20
    drain_seconds: int = 60


def read_limits(changes: list[str]) -> Limits:
    """The default limits with changes such as `queue=128`.

    Raises
    ------
    CodebookError
        If a change has no known name, or no positive integer.
    """
    names = [field.name for field in fields(Limits)]
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise unknown("no limit", name, names, f"give NAME=VALUE, the names are {', '.join(names)}")
        if not (value.isascii() and value.isdigit() and 0 < int(value[:20]) < 2**40):
            raise CodebookError(f"the limit {name} must be a positive integer, not {quoted(value)}")
        values[name] = int(value)
    return replace(Limits(), **values)


class Guard:
    """ASGI middleware that every request passes first: it refuses what is beyond the limits, and counts the rest.

    The body is read here, whole, before anything else sees the request. From then on the request is accepted: it takes
    a place in the queue, and is answered even when the service is told to end.
    """

    def __init__(self, app: ASGIApp, state: State, routes: Sequence[BaseRoute]) -> None:
        self._app, self._state = app, state
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._arriving = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, begun = time.monotonic(), CLIENT_LEFT, False
        make_origin_form(scope)

        async def noting(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        except ServiceError as error:
            await response_to(error)(scope, receive, noting)
        except asyncio.CancelledError:  # the service ends, and waits no longer
            if not begun:
                ended = ServiceError(503, "the service ended before the answer was there: ask another one", "draining")
                await response_to(ended)(scope, receive, noting)
        except Exception:
            status = 500  # as what stands before this answers
            raise
        finally:
            # Refusals count for what was asked, which is not yet looked up then.
            matching = (route.path for route in self._routes if route.path_regex.match(scope["path"]))
            endpoint = next(matching, "other")
            self._state.metrics.requests.labels(endpoint, str(status)).inc()
            self._state.metrics.request_seconds.labels(endpoint).observe(time.monotonic() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        self._check_client(scope)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        waiting = [await self._read(scope, receive)]
        self._check_room(scope)  # again: it took time to arrive

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        state.active += 1
        try:
            await self._app(scope, replay, send)
        finally:
            state.active -= 1
            if not state.active:
                state.idle.set()

    def _check_client(self, scope: Scope) -> None:
        """Refuse who may not ask."""
        state, headers = self._state, dict(scope["headers"])
        if state.api_key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if state.local and host and not is_own_name(PORT.sub("", host)):
                raise ServiceError(403, "this service answers to names of this machine only, such as localhost")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if origin and origin.partition("://")[2] != host:
                raise ServiceError(403, "this service has no API key, and answers no pages of other sites")
        elif scope["path"] not in KEYLESS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), state.api_key.encode()):
                raise ServiceError(401, "no API key, or another one: send it as `Authorization: Bearer KEY`")
        self._check_room(scope)

    def _check_room(self, scope: Scope) -> None:
        """Refuse new work when the service is about to end, or its queue is full."""
        state = self._state
        if state.draining and scope["path"] not in ANSWERED_WHILE_DRAINING:
            raise ServiceError(503, "the service is about to end: ask another one", "draining")
        if scope["method"] == "POST" and state.active >= state.limits.queue:
            raise ServiceError(429, f"{state.active} requests are waiting: try again later", "queue_full")

    async def _read(self, scope: Scope, receive: Receive) -> Message:
        """The whole body of a request, as one message."""
        limits, headers = self._state.limits, dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ServiceError(415, "the body is encoded, as by gzip: send it as it is, without Content-Encoding")
        declared = headers.get(b"content-length", b"0")
        too_large = ServiceError(413, f"the request has more than {limits.body:,} bytes: send less", "too_large")
        if not declared.isdigit() or int(declared[:20]) > limits.body:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.upload_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ServiceError(CLIENT_LEFT, "the request ended before its body did")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._arriving += len(parts[-1])
                    if size > limits.body:
                        raise too_large
                    if self._arriving > UPLOADS * limits.body:
                        raise ServiceError(429, "too many requests are arriving: try again later", "queue_full")
                    if not message.get("more_body"):
                        return {"type": "http.request", "body": b"".join(parts), "more_body": False}
        except TimeoutError:
            raise ServiceError(
                408, f"the request did not arrive within {limits.upload_seconds} s: send it faster", "too_slow"
            ) from None
        finally:
            self._arriving -= size


def make_origin_form(scope: Scope) -> None:
    """Make a path of a target that is a whole URL, as in `GET http://host/path`; its host is the one that counts.

    Every server must take these, of which RFC 9112 (3.2.2) has the rules.
    """
    scheme, separator, rest = scope["path"].partition("://")
    if separator and scheme.lower() in ("http", "https"):
        host, _, path = rest.partition("/")
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["path"], scope["headers"] = f"/{path}", [*others, (b"host", host.encode())]


def is_own_name(host: str) -> bool:
    """Whether every machine calls itself so: a page of another name than these would be a web site's."""
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host).is_loopback
    return False


async def whole_body(request: Request) -> bytes:
    """The body of a request, which `Guard` has read; given once, so that nothing holds it any longer."""
    return bytes((await request.receive())["body"])


async def unless_left(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """The response, or an empty one when the client has left before; what answers is then cancelled."""
    answer = asyncio.ensure_future(answering)
    left = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        return Response(status_code=CLIENT_LEFT)
    finally:
        answer.cancel()
        left.cancel()


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
