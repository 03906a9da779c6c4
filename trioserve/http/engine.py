"""The engine interface of HTTP/1, and the rules of RFC 9112 that hold whichever parser is underneath.

An engine turns bytes into a request head and body parts; `http1.py` feeds it and does all the waiting. A head is
collected here until it is whole and handed to the parser in one piece, so where the network split it cannot change
what it means, and its limits are exact. The two engines are `httptools_engine.py` (C, llhttp) and `h11_engine.py`
(pure Python, the reference); one conformance suite runs on both.
"""

from __future__ import annotations

import re

from trioserve.errors import RequestRefused
from trioserve.structure.context import Limits

Headers = list[tuple[bytes, bytes]]

_END_OF_HEAD = b"\r\n\r\n"

# RFC 9110 section 5.6.2: token. Also the grammar of method and field names.
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

# RFC 9112 section 3.2.1 with RFC 3986's characters; what real clients send raw (| " < > and so on) passes,
# control characters, spaces, the fragment's "#" and bytes over 0x7e do not.
_TARGET = re.compile(rb"[!\"$-~]+")

# RFC 9110 section 7.2 and RFC 3986: reg-name, IPv4 or [IPv6 literal], then an optional port. May be empty.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+(?:%25[0-9A-Za-z\-._~]+)?\]|[0-9A-Za-z\-._~!$&'()*+,;=%]*)(?::[0-9]{0,5})?"
)

_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*)://([^/?#]*)(.*)", re.DOTALL)

# A first line that can still become a request line; anything else is refused before the head is complete.
_LINE_PREFIX = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?: (?:[!\"$-~]+(?: [HTP/0-9.]{0,8}\r?)?)?)?)?")

_DIGITS = re.compile(rb"[0-9]{1,18}")

_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")}

# A request line of the common kind; all others take the longer way. RFC 9112 section 3.
_COMMON_LINE = re.compile(rb"(%b) (/[!\"$-~]*) HTTP/1\.([01])\r\n" % b"|".join(_METHODS)).match

# Fields that decide where the message ends or what becomes of the connection.
_DECISIVE = frozenset({b"content-length", b"transfer-encoding", b"connection", b"expect", b"te"})

# Host values that were found valid: clients repeat them, and the check costs more than the look-up. Bounded,
# because the peer chooses them.
_good_hosts: set[bytes] = set()
_GOOD_HOSTS_MAX = 512


class Engine:
    """One connection's parser. After `receive_head` has returned True the attributes describe the request.

    Attributes:
        method: as text. target: origin-form or `*` (an absolute-form is reduced, its authority replaces Host).
        version: "1.1" or "1.0". headers: fields in order, names in lower case.
        content_length: bytes of a body so framed, 0 without a body, None if chunked.
        keep_alive: the peer lets the connection stay open. expects_continue: it waits for a 100.
        wants_trailers: `TE: trailers` was sent. authority: of an absolute-form target, while the head is read.
        body: parts that have arrived and were not taken yet. body_complete: no more will come.
        body_bytes: how many bytes of body have arrived.
        leftover: bytes that came after this request, to be given to the next `receive_head`.
    """

    __slots__ = (
        "_limits", "_pending", "_raw_names", "authority", "body", "body_bytes", "body_complete", "content_length",
        "expects_continue", "headers", "keep_alive", "leftover", "method", "target", "version", "wants_trailers",
    )  # fmt: skip

    def __init__(self, limits: Limits, *, raw_names: bool = False) -> None:
        self._limits = limits
        self._raw_names = raw_names
        self._pending = bytearray()
        self.method = ""
        self.target = b""
        self.authority = b""
        self.version = "1.1"
        self.headers: Headers = []
        self.content_length: int | None = 0
        self.keep_alive = True
        self.expects_continue = False
        self.wants_trailers = False
        self.body: list[bytes] = []
        self.body_complete = True
        self.body_bytes = 0
        self.leftover = b""

    # -- the head --------------------------------------------------------------------------------------------

    def receive_head(self, data: bytes) -> bool:
        """Take bytes of a head; True when it is whole and valid, False when more must come.

        Raises:
            RequestRefused: it can never be served; `status` says why.
        """
        # Written flat: every call in here is paid by every request.
        if self._pending:
            return self._receive_more_head(data)
        end = data.find(_END_OF_HEAD) + 4
        if end <= 4:
            return self._receive_odd_head(data, end - 4)
        limits = self._limits
        if end > limits.head_size:
            raise RequestRefused(431, f"head of {end} bytes")
        if end == len(data):
            head, self.leftover = data, b""
        else:
            head, self.leftover = data[:end], data[end:]
        line = _COMMON_LINE(head)
        if line is not None:
            method, self.target, minor = line.groups()
            self.method = _METHODS[method]
            self.version = "1.1" if minor == b"1" else "1.0"
        elif data.startswith(b"\r\n"):
            return self._receive_odd_head(data, -1)
        else:
            self._read_rare_line(head)
        if len(self.target) > limits.target_size:
            raise RequestRefused(414, f"target of {len(self.target)} bytes")
        self.headers = headers = self.parse_fields(head)
        fields = dict(headers) if not self._raw_names else {n.lower(): v for n, v in headers}
        self.content_length = self.body_bytes = 0
        self.body_complete = True
        self.keep_alive = self.version == "1.1"
        self.expects_continue = self.wants_trailers = False
        if (
            len(fields) != len(headers)
            or len(headers) > limits.header_count
            or fields.get(b"host") not in _good_hosts
            or not _DECISIVE.isdisjoint(fields)
            or self.authority
        ):
            self._check_fields(fields)
            if self.content_length != 0:
                self.begin_body()
        return True

    def _receive_odd_head(self, data: bytes, end: int) -> bool:
        """A head that is not whole yet, or begins with an empty line."""
        if data.startswith(b"\r\n"):
            # RFC 9112 section 2.2: ignore an empty line or two before the request line; old clients end a POST so.
            data = data.removeprefix(b"\r\n").removeprefix(b"\r\n")
            if data.startswith(b"\r\n"):
                raise RequestRefused(400, "empty lines instead of a request line")
            return bool(data) and self.receive_head(data)
        if end >= 0:
            raise _refuse_request_line(data)
        self._pending += data
        self._check_partial(0)
        return False

    def _receive_more_head(self, data: bytes) -> bool:
        pending = self._pending
        searched = max(0, len(pending) - 3)
        pending += data
        if pending.find(_END_OF_HEAD, searched) < 0 and not pending.startswith(b"\r\n"):
            self._check_partial(searched)
            return False
        whole = bytes(pending)
        pending.clear()
        return self.receive_head(whole)

    @property
    def in_head(self) -> bool:
        """Some bytes of a head have arrived, but not all."""
        return bool(self._pending)

    def _check_partial(self, checked: int) -> None:
        """Refuse early what can never become a valid head, so that it is answered now and not when it is late.

        Bytes before `checked` have been seen by an earlier call.
        """
        pending = self._pending
        if pending == b"\r":
            return  # perhaps the first half of an empty line
        limits = self._limits
        line_end = pending.find(b"\n", 0, limits.target_size + 64)
        first = bytes(pending[: limits.target_size + 64] if line_end < 0 else pending[:line_end])
        if line_end < 0:
            if not _LINE_PREFIX.fullmatch(first):
                raise RequestRefused(400, "the first line is no HTTP request line")
            if len(first) >= limits.target_size + 64:
                raise RequestRefused(414, "request line over the limit")
        else:
            self._check_first_line(first)
            fresh = pending[checked:]
            if fresh.count(b"\n") - fresh.startswith(b"\n") != fresh.count(b"\r\n"):
                raise RequestRefused(400, "bare LF in the head")
        if len(pending) >= limits.head_size:
            raise RequestRefused(431, f"head over {limits.head_size} bytes")
        # A name and colon are at least two bytes of each line: the count is checked before the head is whole,
        # but only when its size alone does not settle the matter.
        if len(pending) > 4 * limits.header_count and pending.count(b"\n") > limits.header_count + 1:
            raise RequestRefused(431, f"over {limits.header_count} header fields")

    def _check_first_line(self, line: bytes) -> None:
        """The same checks as for a whole head, as soon as its first line is there."""
        parts = line.removesuffix(b"\r").split(b" ")
        if len(parts) != 3 or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0") or line[-1:] != b"\r":
            raise _refuse_request_line(line + b"\n")
        if len(parts[1]) > self._limits.target_size:
            raise RequestRefused(414, f"target of {len(parts[1])} bytes")

    def _read_rare_line(self, head: bytes) -> None:
        """A request line that is not the common kind: other methods, other forms of the target, or invalid."""
        parts = head[: head.find(b"\r\n")].split(b" ")
        if len(parts) != 3 or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0") or not TOKEN.fullmatch(parts[0]):
            raise _refuse_request_line(head)
        method, target, version = parts
        if method == b"CONNECT":
            raise RequestRefused(501, "CONNECT")
        self.method = method.decode("ascii")
        self.version = "1.1" if version == b"HTTP/1.1" else "1.0"
        self._read_target(target)

    def _check_fields(self, fields: dict[bytes, bytes]) -> None:
        """The rules of RFC 9112 sections 3.2, 6 and 9 that decide where this message ends and what it asks."""
        if len(self.headers) > self._limits.header_count:
            raise RequestRefused(431, f"{len(self.headers)} header fields")
        if len(fields) != len(self.headers):
            self._check_repeated(fields)
        host = fields.get(b"host")
        if self.authority:
            self.headers = [(n, self.authority if n.lower() == b"host" else v) for n, v in self.headers]
            self.authority = b""
        if host is None:
            if self.version == "1.1":
                raise RequestRefused(400, "no Host field")
        elif host not in _good_hosts:
            _check_host(host)
        if b"content-length" in fields or b"transfer-encoding" in fields:
            self._check_framing(fields.get(b"content-length"), fields.get(b"transfer-encoding"))
        connection = fields.get(b"connection")
        if connection is not None:
            self._read_connection(connection)
        if b"expect" in fields or b"te" in fields:
            self._read_expect_and_te(fields)

    def _check_repeated(self, fields: dict[bytes, bytes]) -> None:
        names = [name.lower() for name, _ in self.headers]
        for name in (b"host", b"content-length"):
            if names.count(name) > 1:
                raise RequestRefused(400, f"repeated {name.decode()} field")
        for name in (b"connection", b"transfer-encoding", b"te", b"expect"):
            if names.count(name) > 1:
                fields[name] = b", ".join(value for n, value in self.headers if n.lower() == name)

    def _check_framing(self, length: bytes | None, coding: bytes | None) -> None:
        if coding is not None:
            if length is not None:
                raise RequestRefused(400, "both Transfer-Encoding and Content-Length")
            if self.version == "1.0":
                raise RequestRefused(400, "Transfer-Encoding in HTTP/1.0")
            codings = [item.strip().lower() for item in coding.split(b",")]
            if codings.count(b"chunked") != 1 or codings[-1] != b"chunked":
                raise RequestRefused(400, "chunked is not the last transfer coding, and only once")
            if len(codings) > 1:
                raise RequestRefused(501, "a transfer coding that is not chunked")
            self.content_length = None
        elif length is not None:
            if not _DIGITS.fullmatch(length):
                raise RequestRefused(400, "Content-Length is no number")
            self.content_length = int(length)
            if self.content_length > self._limits.body_size:
                raise RequestRefused(413, f"Content-Length of {self.content_length}")

    def _read_connection(self, value: bytes) -> None:
        if value == b"keep-alive" and self.version == "1.1":
            return  # what browsers send, and what would hold anyway
        options = {option.strip() for option in value.lower().split(b",")}
        if b"close" in options:
            self.keep_alive = False
        elif b"keep-alive" in options:
            self.keep_alive = True

    def _read_expect_and_te(self, fields: dict[bytes, bytes]) -> None:
        expect = fields.get(b"expect")
        if expect is not None and self.version == "1.1":
            if expect.lower() != b"100-continue":
                raise RequestRefused(417, "an expectation that is not 100-continue")
            self.expects_continue = True
        self.wants_trailers = b"trailers" in fields.get(b"te", b"").lower()

    def _read_target(self, target: bytes) -> None:
        """RFC 9112 section 3.2: reduce the target to origin-form, or `*`."""
        self.authority = b""
        if not _TARGET.fullmatch(target):
            raise RequestRefused(400, "invalid character in the request target")
        self.target = target
        if target[:1] == b"/":
            return
        if target == b"*":
            if self.method != "OPTIONS":
                raise RequestRefused(400, f"target * with {self.method}")
            return
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or absolute[1].lower() not in (b"http", b"https"):
            raise RequestRefused(400, "the request target has no form that HTTP defines")
        # RFC 9112 section 3.2.2: the authority of an absolute-form wins over the Host field.
        authority, rest = absolute[2], absolute[3]
        if not authority:
            raise RequestRefused(400, "absolute-form without a host")
        _check_host(authority)
        self.authority = authority
        self.target = rest if rest[:1] == b"/" else b"/" + rest

    # -- what a parser supplies ------------------------------------------------------------------------------

    def parse_fields(self, head: bytes) -> Headers:
        """Parse the field lines of a whole head; names in lower case, values without surrounding white space."""
        raise NotImplementedError

    def begin_body(self) -> None:
        """Prepare for the body that `content_length` announces; sets `body_complete` and takes `leftover`."""
        self.body_complete = False
        if self.leftover:
            data, self.leftover = self.leftover, b""
            self.receive_body(data)

    def receive_body(self, data: bytes) -> None:
        """Take bytes of the body: adds to `body`, keeps what comes after it in `leftover`.

        Raises:
            RequestRefused: the chunked framing is broken, or the body is over the limit.
        """
        raise NotImplementedError

    def forget_body(self) -> None:
        """Drop parts that nobody will read."""
        self.body.clear()

    def _count_body(self, size: int) -> None:
        self.body_bytes += size
        if self.body_bytes > self._limits.body_size:
            raise RequestRefused(413, f"a body of over {self._limits.body_size:.0f} bytes")

    def _take_fixed(self, data: bytes) -> None:
        """`receive_body` for a body framed by Content-Length, where no parser is needed."""
        assert self.content_length is not None
        missing = self.content_length - self.body_bytes
        if len(data) > missing:
            self.leftover = data[missing:]
            data = data[:missing]
        self.body_bytes += len(data)
        if data:
            self.body.append(data)
        self.body_complete = self.body_bytes == self.content_length


def _refuse_request_line(head: bytes) -> RequestRefused:
    """Say what is wrong with a first line that is no request line of HTTP/1."""
    line = head[: head.find(b"\n")].removesuffix(b"\r")
    parts = line.split(b" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        return RequestRefused(400, "the first line is no HTTP request line")
    if re.fullmatch(rb"HTTP/[0-9]\.[0-9]", parts[2]) and parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        return RequestRefused(505, f"version {parts[2].decode('ascii')}")
    return RequestRefused(400, "no HTTP version in the request line")


def _check_host(host: bytes) -> None:
    if not _HOST.fullmatch(host):
        raise RequestRefused(400, "invalid Host")
    if len(_good_hosts) >= _GOOD_HOSTS_MAX:
        _good_hosts.clear()
    if len(host) <= 255:
        _good_hosts.add(host)
