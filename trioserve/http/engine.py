"""The engine interface of HTTP/1, and the rules of RFC 9112 that hold whichever parser is underneath.

An engine turns bytes into a request head and body parts; `http1.py` feeds it and does all the waiting. A head is
collected here until it is whole and handed to the parser in one piece, so where the network split it cannot change
what it means, and its limits are exact. The engines are `h1c_engine.py` (C, picohttpparser), `httptools_engine.py`
(C, llhttp) and `h11_engine.py` (pure Python, the reference); one conformance suite runs on all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from trioserve.errors import RequestRefused
from trioserve.http.chunked import ChunkedDecoder
from trioserve.http.host import check_host, good_hosts
from trioserve.structure.context import Limits

Headers = list[tuple[bytes, bytes]]

END_OF_HEAD = b"\r\n\r\n"
NO_FIELDS: Headers = []  #: of no request
_CR = 13

# RFC 9110 section 5.6.2: token. Also the grammar of method and field names.
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

# RFC 9112 section 3.2.1 with RFC 3986's characters; what real clients send raw (| " < > and so on) passes,
# control characters, spaces, the fragment's "#" and bytes over 0x7e do not.
_TARGET = re.compile(rb"[!\"$-~]+")

_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*)://([^/?#]*)(.*)", re.DOTALL)

# RFC 9112 section 3: a method longer than any that is known gets a 501. Thrice the longest that is registered.
_METHOD_MAX = 64

# The end of a request line; to be compared with one whose digits have been made 0.
_LINE_END = b"HTTP/0.0\r"
_DIGITS_TO_0 = bytes.maketrans(b"123456789", b"0" * 9)

# More than any file has, and no work for int().
_LENGTH_DIGITS = 18

_LINE_STARTS = re.compile(rb"\r\n(?=[^\r])")
_MARK = b"~"

METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")}

# A request line of the common kind; all others take the longer way. RFC 9112 section 3.
_COMMON_LINE = re.compile(rb"(%b) (/[!\"$-~]*) HTTP/1\.([01])\r\n" % b"|".join(METHODS)).match

# Values of Connection that say what would hold anyway in HTTP/1.1: none, and what browsers send.
_NO_NEWS = frozenset({None, b"keep-alive"})


class Engine:
    """One connection's parser. After `receive_head` has returned True the attributes describe the request.

    Attributes:
        parses_at_once: `begin_head` does what `parse_head` does, too.
        method: as text. target: origin-form or `*` (an absolute-form is reduced, its authority replaces Host).
        version: "1.1" or "1.0". headers: fields in order, names in lower case.
        keeps_fields: whether `fields` is wanted. fields: `headers` by name; None if it is not, if one is repeated, or
            Host was replaced.
        is_odd: it has a body, asks for something, or is not as most are. Otherwise `content_length`, `keep_alive`,
            `expects_continue`, `wants_trailers`, `upgrade` and `body_complete` are as they were at first.
        content_length: bytes of a body so framed, 0 without a body, None if chunked.
        keep_alive: the peer lets the connection stay open. expects_continue: it waits for a 100.
        wants_trailers: `TE: trailers` was sent. upgrade: the protocols that the peer would change to, in lower case, or
            None. authority: of an absolute-form target, while the head is read.
        body: parts that have arrived and were not taken yet. body_complete: no more will come.
        body_bytes: how many bytes of body have arrived.
        leftover: bytes that came after this request, to be given to the next `receive_head`.
    """

    __slots__ = (
        "_checked", "_chunks", "_head", "_limits", "_lines", "_pending", "_raw_names", "authority",
        "body", "body_bytes", "body_complete", "content_length", "expects_continue", "fields", "headers", "is_odd",
        "keep_alive", "keeps_fields", "leftover", "method", "target", "upgrade", "version", "wants_trailers",
    )  # fmt: skip

    parses_at_once: ClassVar[bool] = False

    def __init__(self, limits: Limits, *, raw_names: bool = False) -> None:
        self._limits = limits
        self._raw_names = raw_names
        self._pending = bytearray()  # of a head that is not whole: up to two empty lines, then the head
        self._checked = 0  # bytes of it that were found good, up to the end of a line
        self._lines = 0  # lines therein
        self._chunks: ChunkedDecoder | None = None
        self._head = b""  # while it is read
        self.is_odd = False
        self.method = ""
        self.target = b""
        self.authority = b""
        self.version = "1.1"
        self.headers: Headers = []
        self.keeps_fields = False
        self.fields: dict[bytes, bytes] | None = None
        self.content_length: int | None = 0
        self.keep_alive = True
        self.expects_continue = False
        self.wants_trailers = False
        self.upgrade: bytes | None = None
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
        if not self.begin_head(data):
            return self._receive_in_parts(data)
        self.parse_head()
        self.end_head()
        return True

    # Reading a whole head in three steps, for who has many to read and takes each step of all before the next: the code
    # of all three does not fit into the first cache of a processor.
    def begin_head(self, data: bytes) -> bool:
        """Step 1: find the end of the head and read its first line; False if that is for `receive_head` to do.

        Raises:
            RequestRefused: as `receive_head`, in each step.
        """
        end = data.find(END_OF_HEAD) + 4
        if end <= 4 or self._pending:
            return False
        if end == len(data):
            head = data
            self.leftover = b""
        else:
            head = data[:end]
            self.leftover = data[end:]
        self._head = head
        limits = self._limits
        try:
            if end > limits.head_size:
                raise RequestRefused(431, f"head of {end} bytes")
            line = _COMMON_LINE(head)
            if line is not None:
                method, target, minor = line.groups()
                self.method = METHODS[method]
                self.target = target
                self.version = "1.1" if minor == b"1" else "1.0"
                if len(target) > limits.target_size:
                    raise RequestRefused(414, f"target of {len(target)} bytes")
            elif data.startswith(b"\r\n"):
                self._head = self.leftover = b""
                return False
            else:
                self._read_line(head[: head.find(b"\n") + 1])
        except RequestRefused:
            self._check_refused()
            raise
        return True

    def parse_head(self) -> None:
        """Step 2: parse the field lines."""
        try:
            self.headers = self.parse_fields(self._head)
        except RequestRefused:
            self._check_refused()
            raise

    def end_head(self) -> None:
        """Step 3: see what the fields ask for, and whether it may be asked."""
        headers = self.headers
        fields = dict(headers) if not self._raw_names else {n.lower(): v for n, v in headers}
        if self.keeps_fields:
            self.fields = fields
        if self.is_odd:
            self.is_odd = False
            self.content_length = self.body_bytes = 0
            self.body_complete = self.keep_alive = True
            self.expects_continue = self.wants_trailers = False
            self.upgrade = None
        try:
            if (
                len(fields) != len(headers)
                or len(headers) > self._limits.header_count
                or fields.get(b"host") not in good_hosts
                or fields.get(b"connection") not in _NO_NEWS
                or self.version != "1.1"
                or b"transfer-encoding" in fields
                or b"expect" in fields
                or b"te" in fields
                or self.authority
            ):
                self.is_odd = True
                self.keep_alive = self.version == "1.1"
                self._check_fields(fields)
            elif b"content-length" in fields:
                self.is_odd = True
                self._check_framing(fields[b"content-length"], None)
        except RequestRefused:
            self._check_refused()
            raise
        self._head = b""
        if self.content_length != 0:
            self.begin_body()

    def _receive_in_parts(self, data: bytes) -> bool:
        """A head that is not whole yet, or begins with an empty line."""
        pending = self._pending
        searched = max(0, len(pending) - 3)
        pending += data
        if pending.startswith(b"\r"):
            if not self._skip_empty_lines():
                return False
            searched = 0
        if pending.find(END_OF_HEAD, searched) < 0:
            self._check_part()
            return False
        whole = bytes(pending)
        pending.clear()
        self._checked = self._lines = 0
        return self.receive_head(whole)

    @property
    def in_head(self) -> bool:
        """Some bytes of a head have arrived, but not all. Empty lines before it are none of it."""
        return bool(self._pending) and not self._pending.startswith(b"\r")

    def _skip_empty_lines(self) -> bool:
        """Drop empty lines before the request line; False while there is nothing else.

        RFC 9112 section 2.2: ignore at least one; old clients end the body of a POST so.
        """
        pending = self._pending
        empty = 0
        while empty < 6 and pending.startswith(b"\r\n", empty):
            empty += 2
        if empty == 6:
            raise RequestRefused(400, "empty lines instead of a request line")
        if b"\r".startswith(pending[empty:]):
            return False
        del pending[:empty]
        return True

    def _check_part(self) -> None:
        """Refuse early what can never become a valid head, so that it is answered now and not when it is late.

        Faults are found in the order of the bytes that make them, so it does not matter how many arrive at once.
        """
        pending, limits = self._pending, self._limits
        stop = min(len(pending), limits.head_size)
        while (at := pending.find(b"\n", self._checked, stop)) >= 0:
            if not self._lines:
                self._read_line(bytes(pending[: at + 1]))
            elif pending[at - 1] != _CR:
                raise RequestRefused(400, "bare LF in the head")
            elif self._lines > limits.header_count:
                raise RequestRefused(431, f"over {limits.header_count} header fields")
            self._lines += 1
            self._checked = at + 1
        if not self._lines:
            self._check_line_start(bytes(pending[:stop]))
        if len(pending) >= limits.head_size:
            raise RequestRefused(431, f"head over {limits.head_size} bytes")

    def _check_refused(self) -> None:
        """A whole head is refused: raise what an earlier byte of it would have been refused for, if any."""
        head, self._head = self._head, b""
        if head.startswith(b"\r\n"):
            return  # that one has been there
        # For the log: not the previous request's.
        self.method, self.target, self.headers, self.fields = "", b"", [], None
        self._pending += head[:-2]
        self._checked = self._lines = 0
        self._check_part()

    def _check_line_start(self, line: bytes) -> None:
        """Refuse a request line by its bytes in their order; it may be cut anywhere."""
        method, space, rest = line.partition(b" ")
        valid = _valid_length(TOKEN, method)
        if valid > _METHOD_MAX:
            raise RequestRefused(501, f"method of over {_METHOD_MAX} characters")
        if valid < len(method) or (space and not valid):
            raise RequestRefused(400, "the first line is no HTTP request line")
        target, space, version = rest.partition(b" ")
        valid = _valid_length(_TARGET, target)
        if valid > self._limits.target_size:
            raise RequestRefused(414, f"target over {self._limits.target_size} bytes")
        if valid < len(target) or (space and not valid):
            raise RequestRefused(400, "invalid request target, or none")
        if not _LINE_END.startswith(version.translate(_DIGITS_TO_0)):
            raise RequestRefused(400, "no HTTP version at the end of the request line")

    def _read_line(self, line: bytes) -> None:
        """A request line that is not the common kind, or of a head that is not whole; with its LF."""
        self._check_line_start(line[:-1])
        method, _, rest = line.partition(b" ")
        target, _, version = rest.partition(b" ")
        if version[-2:] != b"\r\n":
            raise RequestRefused(400, "no HTTP version at the end of the request line")
        if version not in (b"HTTP/1.1\r\n", b"HTTP/1.0\r\n"):
            raise RequestRefused(505, f"version {version[5:8].decode('ascii')}")
        if method == b"CONNECT":
            raise RequestRefused(501, "CONNECT")
        self.method = method.decode("ascii")
        self.version = version[5:8].decode("ascii")
        self._read_target(target)

    def _check_fields(self, fields: dict[bytes, bytes]) -> None:
        """The rules of RFC 9112 sections 3.2, 6 and 9 that decide where this message ends and what it asks."""
        if len(self.headers) > self._limits.header_count:
            raise RequestRefused(431, f"{len(self.headers)} header fields")
        if len(fields) != len(self.headers):
            self._check_repeated(fields)
        host = fields.get(b"host")
        if self.authority:
            self.fields = None
            self.headers = [(n, self.authority if n.lower() == b"host" else v) for n, v in self.headers]
            if host is None:
                self.headers.append((b"host", self.authority))
            self.authority = b""
        if host is None:
            if self.version == "1.1":
                raise RequestRefused(400, "no Host field")
        elif host not in good_hosts:
            check_host(host)
        if b"content-length" in fields or b"transfer-encoding" in fields:
            self._check_framing(fields.get(b"content-length"), fields.get(b"transfer-encoding"))
        connection = fields.get(b"connection")
        if connection is not None:
            self._read_connection(connection, fields.get(b"upgrade"))
        if b"expect" in fields or b"te" in fields:
            self._read_expect_and_te(fields)

    def _check_repeated(self, fields: dict[bytes, bytes]) -> None:
        self.fields = None
        names = [name.lower() for name, _ in self.headers]
        for name in (b"host", b"content-length"):
            if names.count(name) > 1:
                raise RequestRefused(400, f"repeated {name.decode()} field")
        for name in (b"connection", b"transfer-encoding", b"te", b"expect", b"upgrade"):
            if names.count(name) > 1:
                fields[name] = b", ".join(value for n, value in self.headers if n.lower() == name)

    def _check_framing(self, length: bytes | None, coding: bytes | None) -> None:
        if coding is not None:
            if length is not None:
                raise RequestRefused(400, "both Transfer-Encoding and Content-Length")
            if self.version == "1.0":
                raise RequestRefused(400, "Transfer-Encoding in HTTP/1.0")
            codings = [item.strip().lower() for item in coding.split(b",")]
            if codings.count(b"chunked") != 1 or codings[-1] != b"chunked" or b"" in codings:
                raise RequestRefused(400, "chunked is not the last transfer coding, and only once")
            if len(codings) > 1:
                raise RequestRefused(501, "a transfer coding that is not chunked")
            self.content_length = None
        elif length is not None:
            if not length.isdigit() or len(length) > _LENGTH_DIGITS:
                raise RequestRefused(400, "Content-Length is no number")
            self.content_length = int(length)
            if self.content_length > self._limits.body_size:
                raise RequestRefused(413, f"Content-Length of {self.content_length}")

    def _read_connection(self, value: bytes, upgrade: bytes | None) -> None:
        options = {option.strip() for option in value.lower().split(b",")}
        if b"close" in options:
            self.keep_alive = False
        elif b"keep-alive" in options:
            self.keep_alive = True
        if upgrade is not None and b"upgrade" in options and self.version == "1.1":
            self.upgrade = upgrade.lower()  # RFC 9110 section 7.8: not from HTTP/1.0

    def _read_expect_and_te(self, fields: dict[bytes, bytes]) -> None:
        expect = fields.get(b"expect")
        if expect is not None and self.version == "1.1":
            if expect.lower() != b"100-continue":
                raise RequestRefused(417, "an expectation that is not 100-continue")
            self.expects_continue = True
        # Trailers need chunks, which HTTP/1.0 does not have.
        codings = fields.get(b"te", b"").lower().split(b",") if self.version == "1.1" else ()
        self.wants_trailers = b"trailers" in [coding.strip() for coding in codings]

    def _read_target(self, target: bytes) -> None:
        """RFC 9112 section 3.2: reduce the target to origin-form, or `*`."""
        self.authority = b""
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
        if authority[:1] in (b"", b":"):
            raise RequestRefused(400, "absolute-form without a host")
        check_host(authority)
        self.authority = authority
        if not rest and self.method == "OPTIONS":
            rest = b"*"  # RFC 9112 section 3.2.4
        self.target = rest if rest[:1] in (b"/", b"*") else b"/" + rest

    def request_facts(self) -> tuple[str, bytes, str, Headers, int]:
        """Method, target, version, fields and bytes of body so far, for logs and reports; also of what was refused."""
        return self.method, self.target, self.version, self.headers, self.body_bytes

    # -- what a parser supplies ------------------------------------------------------------------------------

    def parse_fields(self, head: bytes) -> Headers:
        """Parse the field lines of a whole head; names in lower case, values without surrounding white space."""
        raise NotImplementedError

    def begin_body(self) -> None:
        """Prepare for the body that `content_length` announces; sets `body_complete` and takes `leftover`."""
        data, self.leftover = self.leftover, b""
        if len(data) == self.content_length:
            # A small one that came with its head, as most do.
            self.body.append(data)
            self.body_bytes = self.content_length
            return
        self.body_complete = False
        self._chunks = ChunkedDecoder(self._limits) if self.content_length is None else None
        if data:
            self.receive_body(data)

    def receive_body(self, data: bytes) -> None:
        """Take bytes of the body: adds to `body`, keeps what comes after it in `leftover`.

        Raises:
            RequestRefused: the chunked framing is broken, or the body is over the limit.
        """
        if self._chunks is None:
            self._take_fixed(data)
            return
        known = len(self.body)
        try:
            self.leftover = self._chunks.receive(data, self.body)
        finally:
            self.body_bytes += sum(map(len, self.body[known:]))
        if self._chunks.complete:
            self.body_complete = True
            self._chunks = None

    def forget_body(self) -> None:
        """Drop parts that nobody will read."""
        self.body.clear()

    def _take_fixed(self, data: bytes) -> None:
        """A body framed by Content-Length: only counted."""
        assert self.content_length is not None
        missing = self.content_length - self.body_bytes
        if len(data) > missing:
            self.leftover = data[missing:]
            data = data[:missing]
        self.body_bytes += len(data)
        if data:
            self.body.append(data)
        self.body_complete = self.body_bytes == self.content_length


def neutral_head(head: bytes) -> bytes:
    """The head as one that a parser judges by its syntax alone.

    Parsers know some methods and fields (Host, Content-Length, Transfer-Encoding, Connection, Upgrade) and refuse,
    merge or change what they dislike; under names with a mark they leave all that to `Engine`, which has one rule and
    one status for both.
    """
    return b"GET / HTTP/1.0" + _LINE_STARTS.sub(b"\r\n" + _MARK, head[head.find(b"\r\n") :])


def unmark(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The fields of a `neutral_head` under their own names."""
    unmarked = [(name[1:], value) for name, value in fields]
    if any(not name for name, _ in unmarked):
        raise RequestRefused(400, "field without a name")
    return unmarked


def _valid_length(pattern: re.Pattern[bytes], text: bytes) -> int:
    """How many of the first bytes of `text` match `pattern`."""
    found = pattern.match(text)
    return 0 if found is None else found.end()
