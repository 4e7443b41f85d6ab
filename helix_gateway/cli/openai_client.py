"""A client of any OpenAI-compatible server, of the few calls that the commands need: which models, and streams.

What a stream brings is read line by line as it arrives, with the time at which it did, and as little work a token as
Python allows, since `helix bench` shares its cores with the server that it measures.  Knows nothing about what the
answers are for.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec

from helix_gateway.core.errors import HelixError

Api = Literal["chat", "completions"]
PATHS: dict[Api, str] = {"chat": "/chat/completions", "completions": "/completions"}

_ERROR_BYTES_SHOWN = 300


class ServerError(HelixError):
    """The server refused, failed, or could not be reached; the message is one line.

    Args:
        status: the HTTP status; None where no answer came at all, or the stream broke off.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What the server counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the server found in its cache, as far as it tells."""
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


@dataclass(slots=True)
class Piece:
    """One event of a stream."""

    at_s: float
    """``time.perf_counter()`` when its bytes were read."""
    text: str = ""
    reasoning: str = ""
    """What some servers send of a model's thoughts, apart from its answer."""
    finish_reason: str | None = None
    usage: Usage | None = None


def normalised(base_url: str) -> str:
    """The URL without a slash at the end, and with ``/v1`` where it names no path at all.

    Raises:
        ServerError: it is no HTTP URL.
    """
    try:
        parts = urlsplit(base_url.strip())
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ServerError(f"{base_url!r} is not the URL of a server; write it like http://127.0.0.1:8000/v1.")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or "/v1", "", ""))


class OpenAIClient:
    """A session with one server: ``async with OpenAIClient(url, key) as client: ...``

    Args:
        base_url: with or without ``/v1``.
        api_key: None where the server asks for none.
        timeout_s: the longest that one answer may take; None: as long as it likes.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, timeout_s: float | None = None) -> None:
        self.base_url = normalised(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=30.0)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "OpenAIClient":
        self._session = aiohttp.ClientSession(
            headers={"Content-Type": "application/json", **self._headers},
            timeout=self._timeout,
            # A connection a request: llama.cpp's server ends a kept one as it is used again, which is no answer's fault.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            auto_decompress=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def models(self) -> list[str]:
        """The names of the models that the server serves.

        Raises:
            ServerError: it cannot be reached, or says something else.
        """
        return list(await self._roots())

    async def _roots(self) -> dict[str, str]:
        """Each name, and the name of the model behind it where the server tells that several are of one."""
        assert self._session is not None
        try:
            async with self._session.get(self.base_url + "/models") as response:
                body = await response.read()
                if response.status != 200:
                    raise _refusal(response.status, body)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self._unreachable(error) from error
        try:
            entries = msgspec.json.decode(body)["data"]
            return {str(entry["id"]): str(entry.get("root") or entry["id"]) for entry in entries}
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            raise ServerError(f"{self.base_url}/models does not answer as OpenAI's API does.") from None

    async def only_model(self, wanted: str | None) -> str:
        """The model that was named, or the one that the server serves.

        Raises:
            ServerError: none was named and the server serves none or several; the message names them.
        """
        if wanted:
            return wanted
        roots = await self._roots()
        if not roots:
            raise ServerError(f"{self.base_url} serves no model.")
        if len(set(roots.values())) == 1:
            return next(iter(roots))
        raise ServerError(f"{self.base_url} serves several models; name one of them: {', '.join(roots)}.")

    async def stream(self, api: Api, body: bytes) -> AsyncGenerator[Piece, None]:
        """Send a request whose body asks for a stream, and yield what comes, until ``[DONE]``.

        Closing the generator (or cancelling the task that reads it) closes the connection, so that the server knows
        that nobody waits any more.

        Raises:
            ServerError: the request was refused, or the stream ended with an error or before its end.
        """
        assert self._session is not None
        try:
            async with self._session.post(self.base_url + PATHS[api], data=body) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.read())
                try:
                    async for piece in _pieces(response):
                        yield piece
                except BaseException:
                    response.close()
                    raise
        except asyncio.TimeoutError as error:
            raise ServerError(f"No whole answer within {self._timeout.total:g} s.") from error
        except aiohttp.ClientConnectorError as error:
            raise self._unreachable(error) from error
        except aiohttp.ClientError as error:
            raise ServerError(f"The connection broke: {_first_line(error)}.") from error

    def _unreachable(self, error: Exception) -> ServerError:
        reason = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else None
        return ServerError(f"No server answers at {self.base_url}: {reason or _first_line(error)}.")


async def _pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[Piece, None]:
    """The events of a stream of server-sent events; comments and other fields than ``data`` are passed over."""
    rest = b""
    async for data in response.content.iter_any():
        at_s = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                return
            yield _piece(payload, at_s)
    raise ServerError("The stream broke off before its end.")


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def _piece(payload: bytes, at_s: float) -> Piece:
    try:
        chunk = _decode_chunk(payload)
    except msgspec.DecodeError as error:
        raise ServerError(f"The stream holds what is not a chunk of OpenAI's: {error}.") from None
    if chunk.error is not None:
        raise ServerError(_message_of(payload))
    piece = Piece(at_s, usage=chunk.usage)
    for choice in chunk.choices:
        if choice.delta is not None:
            piece.text += choice.delta.content or ""
            piece.reasoning += choice.delta.reasoning_content or ""
        piece.text += choice.text or ""
        piece.finish_reason = choice.finish_reason or piece.finish_reason
    return piece


def _refusal(status: int, body: bytes) -> ServerError:
    return ServerError(f"{status}: {_message_of(body)}", status=status)


def _message_of(body: bytes) -> str:
    """What an error's JSON says, or the beginning of whatever else came."""
    try:
        content: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body[:_ERROR_BYTES_SHOWN].decode(errors="replace").strip() or "no reason given"
    if isinstance(content, Mapping):
        error = content.get("error", content)
        content = error.get("message", error) if isinstance(error, Mapping) else error
    return str(content)


def _first_line(error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    return reason.splitlines()[0].rstrip(".")
