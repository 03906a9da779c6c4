"""Feed bytes to an engine as the keep-alive loop does, and note what comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trioserve.errors import RequestRefused
from trioserve.http.engine import Engine
from trioserve.http.engines import factory, installed
from trioserve.structure.context import Limits

#: Those of HTTP/1 that are here, the fastest first.
ENGINES = tuple(installed())


def make_limits(**changed: Any) -> Limits:
    """The defaults of `Config`, or what the test changes of them."""
    values: dict[str, Any] = {
        "head_size": 65536,
        "header_count": 100,
        "target_size": 8192,
        "body_size": math.inf,
        "keep_alive_requests": 1000,
    }
    return Limits(**values | changed)


def make_engine(kind: str, *, raw_names: bool = False, **limits: Any) -> Engine:
    engine = factory(kind, make_limits(**limits), raw_names=raw_names)()  # type: ignore[arg-type]
    assert type(engine).__name__.lower() == f"{kind}engine"
    return engine


@dataclass
class Message:
    """What an engine made of one request."""

    method: str
    target: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    content_length: int | None
    keep_alive: bool
    expects_continue: bool
    wants_trailers: bool
    body: bytes = b""
    complete: bool = False


@dataclass
class Outcome:
    """What came of a whole connection's bytes: requests in order, the last perhaps not whole; or a refusal.

    A request whose body was refused is not among the messages: how much of it was seen before is a matter of splits.
    """

    messages: list[Message] = field(default_factory=list)
    refused: int | None = None
    in_head: bool = False


def feed(engine: Engine, pieces: Iterable[bytes]) -> Outcome:
    """Whatever is no `RequestRefused` comes out of here and fails the test."""
    outcome = Outcome()
    current: Message | None = None
    try:
        for piece in pieces:
            data = piece
            while data:
                if current is None:
                    if not engine.receive_head(data):
                        break
                    current = _message(engine)
                else:
                    engine.receive_body(data)
                current.body += b"".join(engine.body)
                engine.forget_body()
                assert engine.body_bytes == len(current.body)
                if not engine.body_complete:
                    break
                current.complete = True
                outcome.messages.append(current)
                current = None
                data = engine.leftover
    except RequestRefused as refusal:
        outcome.refused = refusal.status
        return outcome
    if current is not None:
        outcome.messages.append(current)
    outcome.in_head = engine.in_head
    return outcome


def _message(engine: Engine) -> Message:
    return Message(
        engine.method,
        engine.target,
        engine.version,
        list(engine.headers),
        engine.content_length,
        engine.keep_alive,
        engine.expects_continue,
        engine.wants_trailers,
    )


def run(kind: str, data: bytes | Iterable[bytes], **limits: Any) -> Outcome:
    """`feed` with a fresh engine; bytes are fed whole."""
    return feed(make_engine(kind, **limits), [data] if isinstance(data, bytes) else data)


def refusal_of(kind: str, data: bytes, **limits: Any) -> int | None:
    return run(kind, data, **limits).refused


def by_byte(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def in_two(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every way to cut `data` in two."""
    return ((data[:at], data[at:]) for at in range(1, len(data)))


def head(line: str | bytes = "GET / HTTP/1.1", *fields: str | bytes, host: str | None = "a") -> bytes:
    """A whole head: the request line, Host (unless None or the version has none), and field lines as they are."""
    lines = [line, *([] if host is None else [f"Host: {host}"]), *fields]
    return b"".join((x if isinstance(x, bytes) else x.encode("latin-1")) + b"\r\n" for x in lines) + b"\r\n"
