r"""The access log: a finished exchange becomes one line, in hypercorn's formats or as JSON.

Who calls it: `http1.py` (and every later protocol) builds an `AccessEntry` when an exchange is over, however
it ended, and calls `AccessLog.log(entry)`: an append to a queue. Everything that costs more happens in the
writer's thread (`log_writer.py`), with a formatter compiled once from `access_log_format`.

Where the atoms differ from hypercorn's, and why:

- `b`, `B` are the body bytes that were really sent (hypercorn prints the Content-Length header); `b` is `-`
  for none.
- `r`, `R`, `U`, `Uq`, `q` show the target as it was sent, still percent-encoded (hypercorn prints the decoded
  path, which may hold line ends and quotes). `u` is the user name of Basic credentials (hypercorn: always
  `-`).
- `h` puts an IPv6 address in brackets, so that its port can be told apart. `t` is when the request arrived.
- `{VAR}e` is the environment as it was when the server started.

A header of `{Header}i` or `{Header}o` that came several times is joined with commas; `f` and `a` show the
first. What a client can choose is escaped (`"`, `\`, control characters, everything outside ASCII as `\xNN`) and
cut at `VALUE_LIMIT`, so no request can forge a line.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from trioserve.errors import ConfigError
from trioserve.observe.log_file import LogFile
from trioserve.observe.log_writer import Lane, LogWriter

Headers = Sequence[tuple[bytes, bytes]]
Address = tuple[str, int | None]

# The value of `access_log_format` that asks for JSON lines.
JSON_FORMAT = "json"
# Characters of one value in a line. Targets are limited to 8 KiB anyway, other headers are not.
VALUE_LIMIT = 8192


class AccessEntry:
    """What is known of an exchange once it is over. Built on the hot path: positional, slots, no logic.

    `started_at` is wall time (seconds since the epoch), the durations come from the monotonic clock.
    `response_bytes` counts the body only. Headers are read later: the lists must not change any more.
    """

    __slots__ = (
        "client", "connection_id", "error", "head_seconds", "http_version", "method", "outcome",
        "request_bytes", "request_headers", "request_number", "response_bytes", "response_headers", "scheme",
        "seconds", "server", "started_at", "status", "target",
    )  # fmt: skip

    def __init__(
        self,
        started_at: float,
        client: Address | None,
        server: Address | None,
        scheme: str,
        method: str,
        target: bytes,
        http_version: str,
        request_headers: Headers,
        status: int | None,
        response_headers: Headers,
        request_bytes: int,
        response_bytes: int,
        seconds: float,
        head_seconds: float | None = None,
        outcome: str = "complete",
        connection_id: int = 0,
        request_number: int = 0,
        error: str | None = None,
    ) -> None:
        self.started_at = started_at
        self.client = client
        self.server = server
        self.scheme = scheme
        self.method = method
        self.target = target
        self.http_version = http_version
        self.request_headers = request_headers
        self.status = status
        self.response_headers = response_headers
        self.request_bytes = request_bytes
        self.response_bytes = response_bytes
        self.seconds = seconds
        self.head_seconds = head_seconds
        self.outcome = outcome
        self.connection_id = connection_id
        self.request_number = request_number
        self.error = error

    def __repr__(self) -> str:
        return f"<AccessEntry {self.method} {self.target!r} {self.status} {self.outcome!r}>"


class AccessLog:
    """Where finished exchanges go: a file, a logger, StatsD, or several of them."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)
        # One lane is the rule; then `log` is its `put` and costs no call of ours.
        self.log: Callable[[AccessEntry], None] = (
            self._lanes[0].put if len(self._lanes) == 1 else self._log_to_all
        )

    @classmethod
    def from_config(
        cls,
        config: Any,
        writer: LogWriter,
        *,
        default_stream: Any = None,
        logger: logging.Logger | None = None,
        extra_lanes: Sequence[Lane] = (),
    ) -> AccessLog | None:
        """The access log that `config` asks for, or None: then no entry need be built.

        Args:
            config: for `accesslog` and `access_log_format`.
            writer: does the writing; the caller closes it.
            default_stream: what `accesslog = "-"` means; None is off.
            logger: takes the lines instead of a file, where `logconfig` has set one up.
            extra_lanes: further receivers of the entries, such as StatsD's.
        """
        lanes: list[Lane] = []
        target = config.accesslog
        if isinstance(target, logging.Logger):
            logger = target
        if logger is not None:
            lanes.append(_add_logger_lane(writer, compile_format(config.access_log_format), logger))
        elif target == "-":
            if default_stream is not None:
                lanes.append(_add_file_lane(writer, config.access_log_format, writer.open(default_stream)))
        elif target:
            try:
                file = writer.open(target)
            except OSError as error:
                raise ConfigError(
                    f"accesslog = {str(target)!r} cannot be opened: {error.strerror}"
                ) from error
            lanes.append(_add_file_lane(writer, config.access_log_format, file))
        lanes += extra_lanes
        return cls(lanes) if lanes else None

    def __repr__(self) -> str:
        return f"<AccessLog {len(self._lanes)} lanes, {self.dropped} dropped>"

    @property
    def dropped(self) -> int:
        """Entries that were dropped because the queue, or what waits for a stalled file, was full."""
        return sum(lane.dropped for lane in self._lanes)

    def _log_to_all(self, entry: AccessEntry) -> None:
        for lane in self._lanes:
            lane.put(entry)


def compile_format(text: str) -> Callable[[AccessEntry], str]:
    """A formatter (without the line's end) for an `access_log_format`; ConfigError if it is not one."""
    if text == JSON_FORMAT:
        return format_json
    template: list[str] = []
    getters: list[Callable[[AccessEntry], object]] = []
    position = 0
    for match in _TOKEN.finditer(text):
        template.append(text[position : match.start()])
        position = match.end()
        if match.group() == "%%":
            template.append("%%")
            continue
        getter, kind = _find_atom(match, text)
        getters.append(getter)
        template.append(f"%{match['spec']}{kind}")
    template.append(text[position:])
    line_template = "".join(template)

    def format_line(entry: AccessEntry) -> str:
        return line_template % tuple([getter(entry) for getter in getters])

    return format_line


def format_json(entry: AccessEntry) -> str:
    """One JSON object: what happened, how long each phase took, and how it ended.

    Bytes of a header or target outside ASCII appear as their Latin-1 characters; nothing is decoded or lost.
    """
    path, _, query = _origin_form(entry.target).partition(b"?")
    head = entry.head_seconds
    # json.dumps of the same values takes three times as long, and this is done for each request.
    return (
        f'{{"time":"{format_utc(entry.started_at)}",{_json_address("client", entry.client)},'
        f'{_json_address("server", entry.server)},"scheme":{_quote(entry.scheme)},'
        f'"method":{_quote(entry.method[:VALUE_LIMIT])},"path":{_quote(_latin(path))},'
        f'"query":{_quote(_latin(query))},"http_version":{_quote(entry.http_version)},'
        f'"status":{"null" if entry.status is None else entry.status},'
        f'"request_bytes":{entry.request_bytes},"response_bytes":{entry.response_bytes},'
        f'"seconds":{entry.seconds:.6f},'
        f'"head_seconds":{"null" if head is None else f"{head:.6f}"},'
        f'"body_seconds":{"null" if head is None else f"{entry.seconds - head:.6f}"},'
        f'"outcome":{_quote(entry.outcome)},"connection":{entry.connection_id},'
        f'"request":{entry.request_number},'
        f'"user_agent":{_json_header(entry.request_headers, b"user-agent")},'
        f'"referer":{_json_header(entry.request_headers, b"referer")},"pid":{os.getpid()}'
        f'{"" if entry.error is None else f""","error":{_quote(entry.error[:VALUE_LIMIT])}"""}}}'
    )


def format_utc(seconds: float) -> str:
    """A moment as ISO 8601 in UTC, with microseconds."""
    microseconds = int(seconds * 1_000_000)
    return f"{_utc_second(microseconds // 1_000_000)}.{microseconds % 1_000_000:06}Z"


def escape(value: bytes | str) -> str:
    r"""A client's value for a line: printable ASCII without quotes, the rest as `\xNN`, cut when long."""
    text = value if isinstance(value, str) else value.decode("latin-1")
    if len(text) > VALUE_LIMIT:
        text = text[:VALUE_LIMIT] + "..."
    # Four C-level scans cost less than one translation, and nearly every value passes them.
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return _UNSAFE.sub(_escape_one, text)


# -- the lanes ----------------------------------------------------------------------------------------------


def _add_file_lane(writer: LogWriter, text: str, file: LogFile) -> Lane:
    format_line = compile_format(text)

    def deliver(batch: Sequence[AccessEntry | bytes]) -> int:
        lines = [
            entry
            if isinstance(entry, bytes)
            else f"{format_line(entry)}\n".encode("utf-8", "backslashreplace")
            for entry in batch
        ]
        return file.write_lines(lines)

    notice = _json_notice if text == JSON_FORMAT else _text_notice
    return writer.add_lane(deliver, notice=notice)


def _add_logger_lane(
    writer: LogWriter, format_line: Callable[[AccessEntry], str], logger: logging.Logger
) -> Lane:
    """For a Logger of the operator's: its handlers run in the writer's thread, never on the loop's."""

    def deliver(batch: Sequence[AccessEntry | str]) -> int:
        for entry in batch:
            if isinstance(entry, str):
                logger.warning("%s", entry)
            else:
                logger.info("%s", format_line(entry))
        return 0

    def notice(count: int) -> str:
        return f"{count} access log lines were dropped: the queue was full"

    return writer.add_lane(deliver, notice=notice)


def _text_notice(count: int) -> bytes:
    now = format_utc(time.time())
    return f"# {now} trioserve dropped {count} access log lines: too many were waiting\n".encode()


def _json_notice(count: int) -> bytes:
    now = format_utc(time.time())
    event = "access log lines dropped"
    return f'{{"time":"{now}","event":"{event}","count":{count},"pid":{os.getpid()}}}\n'.encode()


# -- the atoms ----------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"%%|%\((?P<atom>\{[^{}]*\}[^()]*|[^()]*)\)(?P<spec>[-+ #0]*\d*(?:\.\d+)?)(?P<kind>[a-zA-Z]?)|%"
)
# A JSON string of ASCII, quotes included, whatever the value.
_quote = json.encoder.encode_basestring_ascii
_COMMON_TOKENS = frozenset({
    "GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "1.1", "1.0", "2",
})  # fmt: skip
# strftime's month follows the locale, which an app may set.
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNSAFE = re.compile(r"[^ !#-\[\]-~]")


def _escape_one(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _latin(value: bytes) -> str:
    return value[:VALUE_LIMIT].decode("latin-1")


def _origin_form(target: bytes) -> bytes:
    """The path and query of any form of target: an absolute one loses its scheme and authority."""
    if target[:1] == b"/" or b"://" not in target:
        return target
    after = target.split(b"://", 1)[1]
    start = re.search(rb"[/?]", after)
    return after[start.start() :] if start else b"/"


def _address(entry: AccessEntry) -> str:
    client = entry.client
    if client is None or not client[0]:
        return "-"
    return _host(client[0]) if client[1] is None else f"{_host(client[0])}:{client[1]}"


@lru_cache(maxsize=1024)
def _host(host: str) -> str:
    return escape(f"[{host}]" if ":" in host else host)


def _json_address(name: str, address: Address | None) -> str:
    if address is None:
        return f'"{name}":null,"{name}_port":null'
    host, port = address
    return f'"{name}":{_quote(host)},"{name}_port":{"null" if port is None else port}'


def _user(entry: AccessEntry) -> str:
    credentials = _joined(entry.request_headers, b"authorization")
    if credentials is None or credentials[:6].lower() != b"basic ":
        return "-"
    try:
        name = base64.b64decode(credentials[6:], validate=True).partition(b":")[0]
    except binascii.Error:
        return "-"
    # Customarily not in quotes, where a space would shift the fields after it.
    return escape(name).replace(" ", "\\x20") or "-"


def _clf_time(entry: AccessEntry) -> str:
    return _clf_second(int(entry.started_at))


@lru_cache(maxsize=8)
def _clf_second(second: int) -> str:
    now = time.localtime(second)
    sign = "-" if now.tm_gmtoff < 0 else "+"
    hours, minutes = divmod(abs(now.tm_gmtoff) // 60, 60)
    return (
        f"[{now.tm_mday:02}/{_MONTHS[now.tm_mon - 1]}/{now.tm_year}:{now.tm_hour:02}:{now.tm_min:02}:"
        f"{now.tm_sec:02} {sign}{hours:02}{minutes:02}]"
    )


@lru_cache(maxsize=8)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _phrase(entry: AccessEntry) -> str:
    try:
        return HTTPStatus(entry.status).phrase if entry.status is not None else "-"
    except ValueError:
        return "-"


def _token(value: str) -> str:
    return value if value in _COMMON_TOKENS else escape(value)


def _path(entry: AccessEntry) -> str:
    return escape(_origin_form(entry.target).partition(b"?")[0])


# Getter, and whether `%d` or `%f` may format it.
_ATOMS: dict[str, tuple[Callable[[AccessEntry], object], bool]] = {
    "h": (_address, False),
    "l": (lambda _: "-", False),
    "u": (_user, False),
    "t": (_clf_time, False),
    "r": (lambda e: f"{_token(e.method)} {_path(e)} {_token(e.http_version)}", False),
    "R": (lambda e: f"{_token(e.method)} {escape(_origin_form(e.target))} {_token(e.http_version)}", False),
    "m": (lambda entry: _token(entry.method), False),
    "U": (_path, False),
    "Uq": (lambda entry: escape(_origin_form(entry.target)), False),
    "q": (lambda entry: escape(entry.target.partition(b"?")[2]), False),
    "H": (lambda entry: _token(entry.http_version), False),
    "s": (lambda entry: "-" if entry.status is None else str(entry.status), False),
    "st": (_phrase, False),
    "S": (lambda entry: escape(entry.scheme), False),
    "b": (lambda entry: str(entry.response_bytes) if entry.response_bytes else "-", False),
    "B": (lambda entry: entry.response_bytes, True),
    "f": (lambda entry: _first_header(entry.request_headers, b"referer"), False),
    "a": (lambda entry: _first_header(entry.request_headers, b"user-agent"), False),
    "T": (lambda entry: int(entry.seconds), True),
    "D": (lambda entry: int(entry.seconds * 1_000_000), True),
    "L": (lambda entry: f"{entry.seconds:.6f}", False),
    "p": (lambda _: f"<{os.getpid()}>", False),
}


# What people write who do not remember the letter.
_WORDS = {
    "address": "h", "agent": "a", "bytes": "B", "client": "h", "date": "t", "duration": "L",
    "host": "{Host}i", "length": "B", "method": "m", "path": "U", "phrase": "st", "pid": "p",
    "protocol": "H", "query": "q",
    "referrer": "f", "remote": "h", "request": "r", "scheme": "S", "size": "B", "status": "s", "time": "t",
    "url": "Uq", "user": "u", "version": "H",
}  # fmt: skip


def _find_atom(match: re.Match[str], text: str) -> tuple[Callable[[AccessEntry], object], str]:
    """The getter of one `%(atom)s`, and its conversion; ConfigError says what was meant."""
    atom, kind = match["atom"], match["kind"]
    if atom is None or not kind:
        raise ConfigError(
            f"access_log_format: {text[match.start() : match.start() + 20]!r} is not of the form %(atom)s; "
            "write %% for a percent sign"
        )
    if atom.startswith("{"):
        getter, is_number = _find_named(atom), False
    else:
        try:
            getter, is_number = _ATOMS[atom]
        except KeyError:
            known = [*_ATOMS, "{Header}i", "{Header}o", "{VAR}e"]
            nearest = difflib.get_close_matches(atom.lower(), [*_WORDS, *known], n=1)
            hint = f"; did you mean %({_WORDS.get(nearest[0], nearest[0])})s?" if nearest else "."
            raise ConfigError(
                f"access_log_format: unknown atom %({atom}){kind}{hint} Known: {', '.join(known)}"
            ) from None
    if kind not in ("s", "d", "f") or (kind != "s" and not is_number):
        raise ConfigError(
            f"access_log_format: %({atom}){kind} cannot be formatted as {kind!r}; write %({atom})s"
        )
    return getter, kind


def _find_named(atom: str) -> Callable[[AccessEntry], object]:
    """The getter of `{Header}i`, `{Header}o` or `{VAR}e`."""
    name, _, kind = atom[1:].partition("}")
    if kind not in ("i", "o", "e") or not name:
        raise ConfigError(
            f"access_log_format: unknown atom %({atom})s; "
            f"write %({{{name or 'Name'}}}i)s for a request header, "
            f"%({{{name or 'Name'}}}o)s for a response header, %({{{name or 'NAME'}}}e)s for the environment"
        )
    if kind == "e":
        # hypercorn copies the whole environment for each line, and looks names up without regard to case.
        value = escape({key.lower(): value for key, value in os.environ.items()}.get(name.lower(), "-"))
        return lambda _: value
    header = name.lower().encode("latin-1", "replace")
    if kind == "i":
        return lambda entry: _header(entry.request_headers, header)
    return lambda entry: _header(entry.response_headers, header)


def _first_header(headers: Headers, name: bytes) -> str:
    """For headers that come once: in every line, and looking for a second one doubles the cost."""
    value = _first(headers, name)
    return "-" if value is None else escape(value)


def _header(headers: Headers, name: bytes) -> str:
    value = _joined(headers, name)
    return "-" if value is None else escape(value)


def _json_header(headers: Headers, name: bytes) -> str:
    value = _first(headers, name)
    return "null" if value is None else _quote(_latin(value))


def _first(headers: Headers, name: bytes) -> bytes | None:
    size = len(name)
    for key, value in headers:
        # Names may be of any case (responses, `h11_pass_raw_headers`); lengths tell most of them apart.
        if len(key) == size and key.lower() == name:
            return value
    return None


def _joined(headers: Headers, name: bytes) -> bytes | None:
    found = [value for key, value in headers if key.lower() == name]
    if not found:
        return None
    return found[0] if len(found) == 1 else b", ".join(found)
