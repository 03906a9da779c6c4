"""Compression: an ASGI middleware that codes responses with brotli, zstd or gzip as the client asks.

    app = Compression(app)

Plain ASGI: the same under trioserve, under another server on trio, and on asyncio. Only `http` scopes are looked at.

What is coded: a response whose type is worth it (`types`), from `minimum_size` bytes on where the size is known (a
body in one message, or a Content-Length), in the coding that Accept-Encoding weighs highest, ours breaking ties. The
head is held until the first part of the body. A body in one message leaves with its new Content-Length (up to 1 MiB;
plain if coding does not make it smaller). One in several leaves as a stream, and whatever each message brought can be
decoded at once, so that server-sent events arrive when they are sent.

What is changed: Content-Encoding and Content-Length; an ETag becomes weak, since the bytes are others; Accept-Ranges
goes. A client hands the weak ETag back in If-None-Match, where apps must compare weakly (RFC 9110, 13.1.2) and so know
their own again; in If-Match it never matches (13.1.1): opt out where clients write with preconditions. `Vary:
accept-encoding` is added to each response that could have been coded, plain or not, files, parts and 304 included. A
304 has no type as a rule: it gets Vary unless its type says otherwise, and its ETag becomes weak if it is the weak form
that the client holds, so that caches find what they are to freshen (RFC 9111, 4.3.4).

What is left as it is: responses with a Content-Encoding, `Cache-Control: no-transform`, or a digest of their bytes;
1xx, 204, 205, and 206 or whatever has a Content-Range; bodies sent as files (`http.response.pathsend`,
`http.response.zerocopysend`), which is faster than any coding: code files beforehand, `trioserve precompress` does.

HEAD has the fields that GET would have, without Content-Length, which is known only by coding (9.3.2). Where the server
takes files and the app sends no body, GET might be either, and only what holds for both is said.

`identity;q=0` drops the minimum size and the fallback under load, but no type is coded that is not to be: if nothing
acceptable can be made, the plain response is sent. RFC 9110 allows a 406 there, and to disregard the field (12.1).

To opt out, say `Content-Encoding: identity`: the field is removed and the response is left alone. Do so for pages that
hold a secret (a CSRF token, a session id) next to something that the request can choose. BREACH (CVE-2013-3587): who
can make a browser send many requests, and sees how long the encrypted answers are, guesses the secret byte by byte,
since a right guess compresses better. Masking the secret anew in each response helps as well.

Where it runs: below `threaded_size` bytes on the event loop (about 2 ms at the default levels; slower levels have less,
so that the loop is held for less than 5 ms), the rest in `threads` threads. When these are busy and others wait, or
`streams` coded streams are open already, new responses leave plain; `shed` counts them.

Cancelling: a thread is never left behind with an encoder in use, so that a cancellation may have to wait until at most
1 MiB is coded. What a cancelled `send()` was coding is lost, therefore the response cannot go on, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

from trioserve.asgi.content_coding import IDENTITY, choose_coding, parse_accept_encoding
from trioserve.asgi.media_types import is_compressible
from trioserve.errors import ConfigError
from trioserve.middleware.coded_response import CodedResponse
from trioserve.middleware.encoders import LEVELS, Codec, make_codec
from trioserve.middleware.offload import Offload

# How many calls may wait for each thread before new responses leave plain: some 30 ms of work.
_WAITING_PER_THREAD = 8

TypeFilter = Callable[[bytes], bool]


class Compression:
    """The middleware; see the module for what it does.

    Attributes:
        app: the app it wraps.
        codings: what it offers, best first; `codecs` makes them.
        shed: responses that left plain because of load.
        open_streams: coded bodies that are being sent in parts now.
    """

    def __init__(
        self,
        app: Any,
        *,
        codings: Iterable[str] = ("br", "zstd", "gzip"),
        brotli_level: int = 4,
        zstd_level: int = 3,
        gzip_level: int = 5,
        minimum_size: int = 1024,
        types: TypeFilter | Collection[str] | None = None,
        threaded_size: int = 64 * 1024,
        threads: int | None = None,
        streams: int = 256,
        flush: bool = True,
    ) -> None:
        """Each value has its default for a reason.

        Args:
            app: an ASGI application.
            codings: of "br", "zstd" and "gzip", the one to prefer first. zstd is left out where Python (3.14) or the
                package zstandard does not have it.
            brotli_level: 0 to 11; 4 is as fast as gzip 5 and makes less. From 6 on it is for files, not for responses.
            zstd_level: 1 to 19; 3 is five times faster than the other two and makes about as much as brotli 4.
            gzip_level: 1 to 9.
            minimum_size: bytes below which a body of known size stays plain: it fits into one packet anyway.
            types: which types to code: None for the built-in list; media types, "text/*" for a whole kind; or a
                function of the Content-Type.
            threaded_size: bytes from which on it is done in a thread.
            threads: how many; None for one per core.
            streams: coded streams that may be open at once. Each has up to 1 MB of memory: 256 MB in the worst case.
            flush: False lets a stream wait until it has enough to compress well; event streams do not wait.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        levels = {"br": brotli_level, "zstd": zstd_level, "gzip": gzip_level}
        self.app = app
        self.codecs = _make_codecs(codings, levels)
        self.codings = tuple(self.codecs)
        self.minimum_size = _at_least(0, minimum_size=minimum_size)
        self.threaded_size = _at_least(1, threaded_size=threaded_size)
        self.streams = _at_least(0, streams=streams)
        self.is_coded_type = _type_filter(types)
        self.flush = flush
        threads = _at_least(1, threads=_core_count() if threads is None else threads)
        self.offload = Offload(threads, threads * _WAITING_PER_THREAD)
        self.shed = 0
        self.open_streams = 0

    def __repr__(self) -> str:
        codings = ", ".join(coding.decode() for coding in self.codings)
        return f"<Compression {codings}; {self.open_streams} streams open, {self.shed} shed>"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app with a `send` that codes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = CodedResponse(self, scope, send)
        try:
            await self.app(scope, receive, response.send)
        finally:
            response.close()

    # -- what a response asks --------------------------------------------------------------------------------

    def choose(self, accept_encoding: bytes | None) -> tuple[Codec | None, bool]:
        """The codec that the client wants most, None for the plain form; and whether it takes the plain form."""
        chosen = choose_coding(accept_encoding, self.codings)
        codec = None if chosen is None or chosen == IDENTITY else self.codecs[chosen]
        return codec, codec is None or parse_accept_encoding(accept_encoding).identity_ok

    def try_admit(self, *, stream: bool) -> bool:
        """Whether there is room to code one more response; if not, it is counted."""
        if self.offload.overloaded or (stream and self.open_streams >= self.streams):
            self.shed += 1
            return False
        return True

    def is_threaded(self, codec: Codec, size: int) -> bool:
        """Whether coding `size` bytes takes too long for the event loop."""
        return size * codec.slowness >= self.threaded_size

    async def encode(self, codec: Codec, size: int, function: Callable[..., bytes], *args: Any) -> bytes:
        """`function(*args)`, which is to code `size` bytes, where that belongs."""
        if self.is_threaded(codec, size):
            return await self.offload.run(function, *args)
        return function(*args)


# -- settings -----------------------------------------------------------------------------------------------


def _make_codecs(codings: Iterable[str], levels: dict[str, int]) -> dict[bytes, Codec]:
    codecs: dict[bytes, Codec] = {}
    for coding in [codings] if isinstance(codings, str) else codings:
        if coding not in LEVELS:
            raise ConfigError(f"codings: {coding!r} is not among {', '.join(LEVELS)}")
        allowed, level = LEVELS[coding], levels[coding]
        if level not in allowed:
            name = "brotli" if coding == "br" else coding
            raise ConfigError(f"{name}_level is {level!r}, but goes from {allowed[0]} to {allowed[-1]}")
        codec = make_codec(coding, level)
        if codec is not None:
            codecs[codec.coding] = codec
    return codecs


def _at_least(minimum: int, **setting: Any) -> int:
    ((name, value),) = setting.items()
    if not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number from {minimum} on")
    return int(value)


def _type_filter(types: Any) -> TypeFilter:
    if types is None:
        return is_compressible
    if callable(types):
        given: TypeFilter = types
        return given
    if isinstance(types, (str, bytes)) or not all(isinstance(name, str) and "/" in name for name in types):
        raise ConfigError(f'types is {types!r}, but must be media types such as ["text/*", "image/svg+xml"]')
    names = frozenset(name.strip().lower().encode("latin-1") for name in types)

    def is_named(content_type: bytes) -> bool:
        name = content_type.partition(b";")[0].strip().lower()
        return name in names or name.partition(b"/")[0] + b"/*" in names

    return is_named


def _core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
