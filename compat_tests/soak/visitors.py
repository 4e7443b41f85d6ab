"""What people do with a server: wait for an answer, read a stream, read it slowly, go away, break the connection.

Each visitor makes one request and says in a word how it ended, or raises `Complaint` where the server did what it must
not do.  Knows nothing about what else goes on at the same time.
"""

import asyncio
import json
import random
from contextlib import suppress
from urllib.parse import urlsplit

CODES = {400: None, 404: {"model_not_found", "not_found"}, 429: {"rate_limit_exceeded"}, 503: {"engine_unavailable"}}
"""Statuses that a request may get besides 200, and their codes (None: any)."""
RETRY = {429, 503}


class Complaint(Exception):
    """What the server must not do."""


def check_error(error, status):
    """An error object as WIRE.md has it; its code or type."""
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        raise Complaint(f"an error of another shape: {error}")
    allowed = CODES.get(status, set())
    if allowed is not None and error["code"] not in allowed:
        raise Complaint(f"{status} {error}")
    return error["code"] or error["type"]


def text_of(choice):
    """The text of a choice of any route."""
    if "message" in choice:
        return choice["message"]["content"] or ""
    return choice["text"]


def choices_of(body):
    """The choices of an answer of any route, by index."""
    return {choice.get("index", 0): choice for choice in body.get("choices", [body])}


class Visitor:
    """One connection pool, and one person's ways.

    Args:
        session: where connections come from.
        url: the server's root.
        dice: whence moods.
    """

    def __init__(self, session, url, dice):
        self._session = session
        self._url = url
        self._dice = dice
        self.last_error = None
        """The last error object that it got."""

    async def ask(self, ask):
        """Wait for the whole answer; its status, and {index: (text, finish reason)}."""
        async with self._post(ask) as response:
            if response.status != 200:
                return await self._refusal(response), {}
            choices = choices_of(await response.json())
        return "answered", {index: (text_of(choice), choice["finish_reason"]) for index, choice in choices.items()}

    async def read(self, ask, pause_s=0.0, sulk_s=0.0):
        """Read a stream to its end, with pauses; as `ask`."""
        async with self._post(ask) as response:
            if response.status != 200:
                return await self._refusal(response), {}
            await asyncio.sleep(sulk_s)
            stream = Stream()
            async for line in response.content:
                stream.take(line)
                if pause_s:
                    await asyncio.sleep(self._dice.uniform(0, pause_s))
        return stream.ending()

    async def leave(self, ask):
        """Go away in the middle of a stream, or of waiting."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._leave_after(ask, self._dice.choice([0, 1, 5, 20])), self._dice.uniform(0, 0.5))
        return "left", {}

    async def _leave_after(self, ask, num_lines):
        async with self._post(ask) as response:
            for _ in range(num_lines):
                await response.content.readline()
            response.close()

    async def cut(self, ask):
        """Break the connection, in the middle of the request or shortly after."""
        address = urlsplit(self._url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST {ask.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(ask.body)}\r\n\r\n"
        whole = head.encode() + ask.body
        writer.write(whole[: self._dice.choice([3, len(head), len(whole) - 1, len(whole)])])
        await asyncio.sleep(self._dice.choice([0.0, 0.01, 0.2]))
        writer.transport.abort()
        return "cut", {}

    def _post(self, ask):
        return self._session.post(self._url + ask.path, data=ask.body, headers={"Content-Type": "application/json"})

    async def _refusal(self, response):
        if "x-request-id" not in response.headers:
            raise Complaint("an answer without x-request-id")
        if response.status in RETRY and "Retry-After" not in response.headers:
            raise Complaint(f"{response.status} without Retry-After")
        error = self.last_error = (await response.json())["error"]
        return f"{response.status} {check_error(error, response.status)}"


class Stream:
    """What was read of one stream, of any route."""

    def __init__(self):
        self._texts = {}
        self._endings = {}
        self._error = None
        self._last = None

    def take(self, line):
        """One line."""
        if not line.startswith(b"data: "):
            return
        self._last = line.removeprefix(b"data: ").strip()
        if self._last == b"[DONE]":
            return
        event = json.loads(self._last)
        if "error" in event and event["error"] is not None:
            self._error = event["error"]
            return
        for choice in event.get("choices", [event]):
            self._take_choice(choice)

    def _take_choice(self, choice):
        index = choice.get("index", 0)
        if index in self._endings:
            raise Complaint("a choice goes on after its end")
        piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        self._texts[index] = self._texts.get(index, "") + (piece or "")
        if choice.get("finish_reason"):
            self._endings[index] = choice["finish_reason"]

    def ending(self):
        """How it ended, and {index: (text, finish reason)}."""
        if self._error is not None:
            if self._last == b"[DONE]":
                raise Complaint("[DONE] after an error")
            return f"stream ended by {check_error(self._error, 503)}", {}
        if self._last != b"[DONE]":
            raise Complaint(f"a stream without an end: {self._last!r}")
        return "streamed", {index: (text, self._endings.get(index)) for index, text in self._texts.items()}


def moods(visitor, asker, dice):
    """What a visitor does next: a name, what it asks, and the coroutine that does it."""
    mood = dice.choices(["ask", "read", "dawdle", "sulk", "leave", "cut", "err"], [30, 30, 3, 2, 15, 10, 10])[0]
    if mood == "err":
        ask = asker.bad()
        return mood, ask, visitor.ask(ask)
    ask = asker.good(stream=mood != "ask" and (mood not in ("leave", "cut") or dice.random() < 0.7))
    doing = {
        "ask": visitor.ask,
        "read": visitor.read,
        "dawdle": lambda ask: visitor.read(ask, pause_s=0.02),
        "sulk": lambda ask: visitor.read(ask, sulk_s=dice.uniform(0.5, 4)),
        "leave": visitor.leave,
        "cut": visitor.cut,
    }[mood]
    return mood, ask, doing(ask)


def make_dice(seed):
    """Chance that can be had again."""
    return random.Random(seed)
