"""A client for the redundancy scores of a service: on the standard library, and without torch for those without it."""

from __future__ import annotations

import contextlib
import http.client
import numbers
import sys
import urllib.parse
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from codebook.errors import CodebookError, quoted
from codebook.serving.wire import FEATURES_NAME, KEPT_NAME, LONGEST_HEADER, MEDIA_TYPE, REDUNDANCY_NAME, ServedCodebook

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    Array = TypeVar("Array", numpy.ndarray[Any, Any], Tensor)
else:
    Array = TypeVar("Array")

LARGEST_LISTING = 2**24
"""Bytes of an answer that is JSON, such as an error."""
LONGEST_WAIT = 10**6
"""Seconds; the longest that every system can wait."""
NUMBER_TYPES = ("float16", "float32", "bfloat16")
"""Number types of features, in the words of NumPy and torch; NumPy itself has no bfloat16."""


class Listing(TypedDict):
    """The answer of `GET /v1/codebooks`."""

    data: list[ServedCodebook]


class Fault(TypedDict):
    """What is wrong with a request."""

    message: str


class Refusal(TypedDict):
    """The answer to a request that is refused."""

    error: Fault


_LISTING, _REFUSAL = TypeAdapter(Listing), TypeAdapter(Refusal)


class TokenScores(NamedTuple, Generic[Array]):
    """What a codebook says of visual tokens, in the kind of array that they came in."""

    redundancy: Array
    """(n,) or (images, n) float32: each token's highest cosine similarity to any prototype; the highest go first."""
    kept: Array
    """(k,) or (images, k) int64: the tokens that stay, as indices into the n, ascending."""


class Client:
    """Asks a running `codebook serve` for redundancy scores.

    Any number of threads may share one: each call has a connection of its own.

    Parameters
    ----------
    url
        Where the service is, as in `http://localhost:8000`; a path in it comes before those of the service.
    api_key
        The key that the service was started with.
    timeout
        Seconds to wait for a connection, and for each part of an answer.

    Raises
    ------
    CodebookError
        If the address is none, or one of the others is not what it must be.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        none = CodebookError(f"{quoted(url)} is no address: write one such as http://localhost:8000")
        if not isinstance(url, str) or not url.isprintable() or " " in url:
            raise none
        try:
            parts = urllib.parse.urlsplit(url)
            self._port = parts.port
        except ValueError:
            raise none from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise none
        if not parts.path.isascii():
            raise none
        if parts.username is not None:
            raise CodebookError("the address holds a user's name: give the service's key as api_key")
        if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
            raise CodebookError("api_key is no text that a header can have: give the service's key as it is")
        if not _is_wait(timeout):
            raise CodebookError(f"timeout is {quoted(timeout)}: give seconds, above 0 and at most {LONGEST_WAIT:,}")
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = float(timeout)

    def __repr__(self) -> str:
        return f"Client({self._where!r})"

    def codebooks(self) -> list[ServedCodebook]:
        """The service's codebooks: for each its name, model, dimension, prototypes, fingerprint and SHA-256.

        Raises
        ------
        CodebookError
            If the service cannot be reached, or refuses: with what it says.
        """
        body = self._ask("GET", "/v1/codebooks", None, LARGEST_LISTING)
        try:
            return _LISTING.validate_json(body, strict=True)["data"]
        except ValidationError:
            raise self._strange("lists no codebooks") from None

    def score(
        self, name: str, features: Array, keep: int | float = 0.2, method: str = "seeded-middle"
    ) -> TokenScores[Array]:
        """Redundancy of visual tokens, and which of them stay.

        Parameters
        ----------
        name
            One of `codebooks`.
        features : (n, d) or (images, n, d), float16 or float32; torch's also bfloat16
            Projector outputs of the codebook's model: an array of NumPy, or a tensor of torch on any device.
        keep
            A float in (0, 1]: that share of each image's tokens stays. An int: so many.
        method
            `seeded`: farthest points, seeded by the codebook. `seeded-middle`: the middle of what each stands for.
            `codebook`: the least redundant.

        Returns
        -------
        TokenScores of two arrays of the kind that was given, on the tensor's device

        Raises
        ------
        CodebookError
            If the features are of another type, or the service cannot be reached or refuses: with what it says.
        """
        if not isinstance(name, str) or not name:
            raise CodebookError(f"the codebook's name is {quoted(name)}: give one that codebooks() lists")
        question = urllib.parse.urlencode({"keep": _keep_text(keep), "method": method}, errors="replace")
        path = f"/v1/codebooks/{urllib.parse.quote(name, safe='', errors='replace')}/score?{question}"
        body, like = _packed(features)
        # 4 bytes and at most 8 for each token, which itself has 2 at least
        answer = self._ask("POST", path, body, 6 * len(body) + LONGEST_HEADER)
        try:
            found = _unpacked(answer, like)
            redundancy, kept = found[REDUNDANCY_NAME], found[KEPT_NAME]
        except Exception:  # safetensors, numpy and torch raise half a dozen types
            raise self._strange("answered with no scores") from None
        shape = tuple(features.shape[:-1])
        if tuple(redundancy.shape) != shape or tuple(kept.shape[:-1]) != shape[:-1]:
            raise self._strange(f"answered with scores of {tuple(redundancy.shape)} for features of {shape}")
        return TokenScores(redundancy, kept)

    @property
    def _where(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = "" if self._port is None else f":{self._port}"
        return f"{'https' if self._secure else 'http'}://{host}{port}{self._path}"

    def _strange(self, what: str) -> CodebookError:
        return CodebookError(f"{self._where} {what}: check that `codebook serve` of this version runs there")

    def _ask(self, verb: str, path: str, body: bytes | None, largest: int) -> bytes:
        """The body of an answer; anything but 200 is a CodebookError. Nothing is followed elsewhere."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            headers = self._headers if body is None else {**self._headers, "Content-Type": MEDIA_TYPE}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(verb, self._path + path, body, headers)
            # A service that refuses a body may have answered before all of it was sent.
            answer = connection.getresponse()
            data = answer.read(largest + 1)
        except TimeoutError:
            raise CodebookError(f"{self._where} did not answer for {self._timeout:g} s: raise timeout") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: a host that can be no name
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise CodebookError(f"cannot reach {self._where}: {reason}; is `codebook serve` running there?") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise CodebookError(_refusal(data) or f"{self._where} answered {answer.status} {answer.reason[:80]}: "
                                "check the address, and that `codebook serve` runs there")  # fmt: skip
        if len(data) > largest:
            raise self._strange(f"answered with more than {largest:,} bytes")
        if answer.length:  # bytes that were announced and did not come
            raise CodebookError(f"the answer of {self._where} was cut off: ask again")
        return data


def _refusal(data: bytes) -> str | None:
    """The sentence of an error in OpenAI's shape; None if this is none."""
    try:
        return _REFUSAL.validate_json(data)["error"]["message"]
    except ValidationError:
        return None


def _is_wait(timeout: Any) -> bool:
    return isinstance(timeout, int | float) and not isinstance(timeout, bool) and 0 < timeout <= LONGEST_WAIT


def _keep_text(keep: int | float) -> str:
    """A share with its decimal point, a count without one."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise CodebookError(f"keep is {quoted(keep)}: give a share such as 0.2, or a count such as 64")
    return str(int(keep)) if isinstance(keep, numbers.Integral) else repr(float(keep))


def _packed(features: Any) -> tuple[bytes, Any]:
    """Features as a safetensors file, and what its answer is to be like: a tensor, or None for NumPy."""
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(features, torch.Tensor):
        from safetensors.torch import save as save_torch

        _check_numbers(str(features.dtype).removeprefix("torch."))
        if features.layout is not torch.strided or features.is_nested or features.is_meta:
            raise CodebookError("features are a sparse or nested tensor, or one of no values: give a dense one")
        return save_torch({FEATURES_NAME: features.detach().cpu().contiguous()}), features
    import numpy
    from safetensors.numpy import save as save_numpy

    if not isinstance(features, numpy.ndarray) or isinstance(features, numpy.ma.MaskedArray):  # its mask would be lost
        raise CodebookError(f"features are {type(features).__name__}: give an array of NumPy or a tensor of torch")
    _check_numbers(features.dtype.name)
    return save_numpy({FEATURES_NAME: numpy.ascontiguousarray(features, features.dtype.newbyteorder("="))}), None


def _unpacked(answer: bytes, like: Any) -> dict[str, Any]:
    if like is None:
        from safetensors.numpy import load as load_numpy

        return load_numpy(answer)
    from safetensors.torch import load as load_torch

    return {name: tensor.to(like.device) for name, tensor in load_torch(answer).items()}


def _check_numbers(name: str) -> None:
    if name not in NUMBER_TYPES:
        raise CodebookError(f"features are {name}: give {', '.join(NUMBER_TYPES)}, such as features.astype('float32')")
