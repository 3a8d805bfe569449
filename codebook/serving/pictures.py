"""Pictures of requests: in a data URL, or fetched from a host that whoever runs the service has named."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from PIL import Image as Picture

from codebook.errors import CodebookError, one_line, quoted
from codebook.serving.errors import ServiceError, too_late
from codebook.serving.limits import Limits
from codebook.store.pictures import MOST_PIXELS, decode_image

PORTS, LAST_PORT = {"http": 80, "https": 443}, 65535
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE)


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that end with an IPv4 one, to which gateways lead (RFC 6052)."""


def read_hosts(names: Iterable[str]) -> tuple[str, ...]:
    """Hosts as `--allow-urls` names them: `images.example.com`, or with a port, `10.0.0.5:8080`.

    Raises
    ------
    CodebookError
        If a name is none, such as a whole URL.
    """
    names = tuple(name.lower() for name in names)
    for name in names:
        if not HOST.fullmatch(name) or int(name.rpartition("]")[2].partition(":")[2] or 0) > LAST_PORT:
            raise CodebookError(f"{quoted(name)} is no host: give a name or an address, with a port if need be")
    return names


def read_pictures(
    urls: Iterable[str], limits: Limits, hosts: tuple[str, ...], deadline: float = math.inf
) -> list[Picture.Image]:
    """The pictures of one request, in order, as RGB and upright; none is waited for beyond a time of `time.monotonic`.

    Raises
    ------
    ServiceError
        If there are too many, or too many pixels; if one cannot be read, or its URL is not allowed; if time is over.
    """
    pictures: list[Picture.Image] = []
    left = limits.pixels
    for number, url in enumerate(urls, 1):
        if number > limits.images:
            raise ServiceError(422, f"more than {limits.images} images: send fewer", "too_many_images", "messages")
        if (seconds := min(limits.upload_seconds, deadline - time.monotonic())) <= 0:
            raise too_late()
        try:
            data = _data(url) if url[:5].lower() == "data:" else fetch(url, limits.body, seconds, hosts)
            pictures.append(decode_image(data, min(left, MOST_PIXELS)))
        except (CodebookError, ValueError) as error:
            code = error.code if isinstance(error, ServiceError) else "invalid_image"
            raise ServiceError(422, f"image {number}: {one_line(error)}", code, "messages") from None
        left -= pictures[-1].width * pictures[-1].height
    return pictures


def _data(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("the data URL is not of the form data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"the data URL is no base64: {one_line(error)}; write + and /, the = at the end, no line ends, no escapes"
        ) from None


def fetch(url: str, largest: int, seconds: float, hosts: tuple[str, ...]) -> bytes:
    """The contents of a URL of one of `hosts`, of so many bytes and seconds at most; redirects are not followed.

    The address is looked up once, checked, and that very address is asked. A name that leads to an address which is
    not public is refused: private hosts must be named by their addresses.

    Raises
    ------
    CodebookError
        If the URL is not allowed, or what it names cannot be had.
    """
    parts = _allowed(url, hosts)
    try:
        port = parts.port or PORTS[parts.scheme]
        place = _public_address(parts.hostname or "", port)
        return _Pinned(parts, place, seconds).fetch(largest)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CodebookError(f"cannot fetch it: {one_line(error)}") from None


def _allowed(url: str, hosts: tuple[str, ...]) -> SplitResult:
    """The parts of a URL, if its host is one of those that are named."""
    remedy = "send it as a data URL, data:image/png;base64,..."
    try:
        parts = urlsplit(url)
        netloc = parts.netloc.lower()
        usual = parts.port in (None, PORTS.get(parts.scheme))
    except ValueError:
        raise ServiceError(422, f"its URL is none: {remedy}", "invalid_image_url") from None
    if parts.scheme not in PORTS:
        raise ServiceError(422, f"its URL is not allowed: {remedy}", "invalid_image_url")
    names = {netloc} | ({netloc.rpartition(":")[0]} if usual and parts.port else set())
    if not names & set(hosts) or not url.isascii() or not url.isprintable() or " " in url:
        raise ServiceError(422, f"URLs of its host are not fetched here: {remedy}", "invalid_image_url")
    return parts


def _public_address(host: str, port: int) -> tuple[str, int]:
    """The address of a host; a host that is itself an address, or `localhost`, may be private."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    named = host == "localhost" or _is_address(host)
    for *_, place in found:
        address = ipaddress.ip_address(str(place[0]).partition("%")[0])
        if not named and not _behind(address).is_global:
            raise CodebookError(f"{host} leads to a private address, which is not asked")
    return str(found[0][4][0]), int(found[0][4][1])


def _behind(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, and to which the network may lead; else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    translated = ipaddress.IPv4Address(int(address) % 2**32) if address in TRANSLATED else None
    return address.ipv4_mapped or address.sixtofour or translated or address


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, for one request, cut off after some seconds."""

    def __init__(self, parts: SplitResult, place: tuple[str, int], seconds: float) -> None:
        super().__init__(parts.hostname or "", parts.port or PORTS[parts.scheme], timeout=seconds)
        self._parts, self._place, self._seconds = parts, place, seconds
        self._open: socket.socket | None = None

    def connect(self) -> None:
        self.sock = self._open = socket.create_connection(self._place, timeout=self._seconds)
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            self.sock = self._open = context.wrap_socket(self._open, server_hostname=self._parts.hostname)

    def fetch(self, largest: int) -> bytes:
        """What the URL names, at most `largest` bytes."""
        target = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
        timer = threading.Timer(self._seconds, self._cut)  # each part that trickles in would restart the socket's own
        timer.start()
        try:
            self.request("GET", target, headers={"Accept": "image/*"})
            response = self.getresponse()
            if response.status != 200:
                raise ValueError(f"its host answers with status {response.status}")
            data = response.read(largest + 1)
        finally:
            timer.cancel()
            self.close()
        if len(data) > largest:
            raise ValueError(f"it has more than {largest:,} bytes")
        return data

    def _cut(self) -> None:
        if self._open is not None:
            with contextlib.suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)
