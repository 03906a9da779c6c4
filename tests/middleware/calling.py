"""Call an ASGI app by hand, under trio or asyncio, and decode what it sends with real decoders."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import brotli

from trioserve.asgi.zstd import find_zstd

ZSTD = find_zstd()

#: What this installation can code and decode.
CODINGS = ["br", "zstd", "gzip"] if ZSTD is not None else ["br", "gzip"]

TEXT = [(b"content-type", b"text/plain")]

#: 30 kB that shrink.
PROSE = b"".join(b"Line %d says much the same as the line before it.\n" % n for n in range(600))


class Decoder:
    """Decodes a body as it comes; `decode()` returns all that can be known by now."""

    def __init__(self, coding: str | None) -> None:
        self.coding = coding
        if coding == "br":
            self._decode = brotli.Decompressor().process
        elif coding == "gzip":
            self._decode = zlib.decompressobj(31).decompress
        elif coding == "zstd":
            module: Any = ZSTD
            decompressor = module.ZstdDecompressor()
            self._decode = getattr(decompressor, "decompressobj", lambda: decompressor)().decompress
        else:
            assert coding is None, coding
            self._decode = bytes

    def decode(self, data: bytes) -> bytes:
        return bytes(self._decode(data))


@dataclass
class Answer:
    """What the server would have been given."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    @property
    def start(self) -> dict[str, Any]:
        (start,) = [message for message in self.messages if message["type"] == "http.response.start"]
        return start

    @property
    def fields(self) -> dict[str, str]:
        pairs = [(name.decode().lower(), value.decode("latin-1")) for name, value in self.start["headers"]]
        assert len(dict(pairs)) == len(pairs), f"a field is there twice: {pairs}"
        return dict(pairs)

    @property
    def coding(self) -> str | None:
        return self.fields.get("content-encoding")

    @property
    def parts(self) -> list[bytes]:
        bodies = [message for message in self.messages if message["type"] == "http.response.body"]
        assert [m.get("more_body", False) for m in bodies] == [True] * (len(bodies) - 1) + [False]
        return [message.get("body", b"") for message in bodies]

    @property
    def raw(self) -> bytes:
        return b"".join(self.parts)

    @property
    def body(self) -> bytes:
        """The body as a client reads it, its length checked against the head."""
        declared = self.fields.get("content-length")
        assert declared is None or int(declared) == len(self.raw)
        return Decoder(self.coding).decode(self.raw)


def http_scope(accept: str | None = None, method: str = "GET", **fields: str) -> dict[str, Any]:
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    if accept is not None:
        headers.append((b"accept-encoding", accept.encode()))
    return {"type": "http", "method": method, "path": "/", "headers": headers, "extensions": {}}


async def call(
    app: Any, accept: str | None = None, *, extensions: Iterable[str] = (), **request: str
) -> Answer:
    """One request to `app`; other keywords are `method` and request fields."""
    scope = http_scope(accept, **request)
    scope["extensions"] = {name: {} for name in extensions}
    answer = Answer()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(scope, receive, answer.send)
    return answer


def start(headers: Iterable[tuple[bytes, bytes]] = TEXT, status: int = 200, **more: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers), **more}


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def app_sending(*messages: dict[str, Any]) -> Any:
    """An app that sends just these."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(dict(message))

    return app


def text(data: bytes = PROSE, headers: Iterable[tuple[bytes, bytes]] = (), status: int = 200) -> Any:
    """An app whose answer is one text in one message."""
    length = (b"content-length", b"%d" % len(data))
    return app_sending(start([*TEXT, length, *headers], status), body(data))
