"""What RFC 9113 section 8 and RFC 9110 say about the fields of a request, for both HTTP/2 engines.

The engines hand over decoded fields; these functions fill a `RequestHead` or say what is wrong. A request that breaks
HTTP/2's own rules is malformed: its stream is reset (RFC 9113 section 8.1.1). One that is well-formed, but breaks a
rule that HTTP/1 has as well, is refused with the status it would get there.

Written flat, because every request passes here: names that were found good are remembered, and values are looked at
all together, joined into one block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from trioserve.errors import RequestRefused
from trioserve.http.engine import METHODS, TOKEN
from trioserve.http.host import check_host, good_hosts
from trioserve.http.http2_codes import ErrorCode
from trioserve.http.http2_engine import Fields, Http2Limits, RequestHead

# Thrice the longest method that is registered, as in HTTP/1.
_METHOD_MAX = 64

# More than any file has, and no work for int().
_LENGTH_DIGITS = 18

# RFC 9113 section 8.2.1 with RFC 9110 section 5.6.2: a token without upper case.
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
# Origin-form with the characters that HTTP/1 takes; see `engine.py`.
_PATH = re.compile(rb"/[!\"$-~]*")
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*")
_SCHEMES = frozenset({b"http", b"https"})

_CONNECTION_SPECIFIC = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)  # RFC 9113 section 8.2.2

# Fields that decide something; all others only need a good name.
_SPECIAL = _CONNECTION_SPECIFIC | {b"host", b"content-length", b"te", b"cookie", b"expect", b"priority"}

# Plain names that were found valid. Bounded, because the peer chooses them.
_good_names: set[bytes] = set()
_GOOD_NAMES_MAX = 1024
_GOOD_NAME_LENGTH = 64

# What a `priority` field said, by its value; most are one of few.
_priorities: dict[bytes, tuple[int, bool]] = {}
_PRIORITIES_MAX = 64


class MalformedRequest(Exception):
    """The stream of this request is to be reset with `code`."""

    def __init__(self, reason: str, code: ErrorCode = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


def read_head(head: RequestHead, fields: Fields, size: int, limits: Http2Limits) -> None:
    """Fill `head`, whose `ended` is set, from decoded fields, whose values were checked and whose `size` is known.

    Raises:
        MalformedRequest: they break HTTP/2's rules.
        RequestRefused: they are well-formed, but not to be served; `head` holds what was understood.
    """
    count = 0
    method = scheme = path = authority = protocol = None
    for name, value in fields:
        if name == b":method" and method is None:
            method = value
        elif name == b":path" and path is None:
            path = value
        elif name == b":scheme" and scheme is None:
            scheme = value
        elif name == b":authority" and authority is None:
            authority = value
        elif name == b":protocol" and protocol is None:
            protocol = value
        elif name[:1] == b":":
            raise MalformedRequest(f"{name[:40].decode('latin-1')} is unknown, or there twice")
        else:
            break
        count += 1
    if method is None:
        raise MalformedRequest("no :method")
    head.method = METHODS.get(method) or _read_method(method)
    head.headers = headers = list(fields[count:])
    if size > limits.max_header_list_size:
        raise RequestRefused(431, f"head of {size} bytes")
    special = _look_at_names(headers)
    if head.ended:
        head.content_length = 0
    if special is not None:
        _read_special(head, special)
        headers = head.headers
    if authority:
        if authority not in good_hosts:
            check_host(authority)
        if head.authority:
            _drop_host(head, authority)
        headers.insert(0, (b"host", authority))
        head.authority = authority
    if len(headers) > limits.header_count:
        raise RequestRefused(431, f"{len(headers)} header fields")
    if protocol is not None or method == b"CONNECT":
        _check_connect(head, scheme, path, protocol)
        if protocol is None:
            return
    if scheme is None or not path:
        raise MalformedRequest("no :scheme" if scheme is None else "no :path, or an empty one")
    head.scheme = scheme
    head.target = path
    if scheme not in _SCHEMES or len(path) > limits.target_size or _PATH.fullmatch(path) is None:
        _check_scheme_and_target(head, limits)
    if not authority and (special is None or b"host" not in special):
        raise RequestRefused(400, "neither :authority nor a Host field")


def read_trailers(fields: Sequence[tuple[bytes, bytes]], size: int, limits: Http2Limits) -> Fields:
    """The same for fields that follow the body.

    Raises:
        MalformedRequest: they break the rules, or are over the limits: it is too late for a status.
    """
    if size > limits.max_header_list_size or len(fields) > limits.header_count:
        raise MalformedRequest(f"{len(fields)} trailers of {size} bytes", ErrorCode.ENHANCE_YOUR_CALM)
    for name, value in fields:
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
            raise MalformedRequest(f"{name.decode()} is specific to a connection")
        if name not in _good_names and name not in _SPECIAL:
            check_name(name)
    return list(fields)


def list_size(fields: Sequence[tuple[bytes, bytes]]) -> int:
    """How large a list is as RFC 9113 section 6.5.2 counts."""
    return sum(map(len, chain.from_iterable(fields))) + 32 * len(fields)


def are_values_valid(values: Sequence[bytes]) -> bool:
    """Whether values hold no CR, LF, NUL, nor white space around them (RFC 9113 section 8.2.1)."""
    block = b"\n%b\n" % b"\n".join(values)
    # Looking for an int in bytes is a memchr.
    return (
        0 not in block
        and 13 not in block
        and block.count(b"\n") == len(values) + 1
        and b" \n" not in block
        and b"\n " not in block
        and b"\t\n" not in block
        and b"\n\t" not in block
    ) or not values


def check_values(fields: Sequence[tuple[bytes, bytes]]) -> None:
    """`are_values_valid` for fields.

    Raises:
        MalformedRequest: they are not.
    """
    if not are_values_valid([value for _, value in fields]):
        raise MalformedRequest("CR, LF, NUL, or white space around a value")


def check_name(name: bytes) -> None:
    """Refuse what is no field name in HTTP/2; pseudo-fields are none, and come too late or in trailers."""
    if _NAME.fullmatch(name) is None:
        raise MalformedRequest(f"{name[:40]!r} is no field name here")
    if len(name) <= _GOOD_NAME_LENGTH:
        if len(_good_names) >= _GOOD_NAMES_MAX:
            _good_names.clear()
        _good_names.add(name)


def read_priority(value: bytes) -> tuple[int, bool]:
    """Urgency and incremental of a `priority` field or PRIORITY_UPDATE (RFC 9218); the rest of it is ignored."""
    known = _priorities.get(value)
    if known is None:
        urgency, incremental = 3, False
        for item in value[:256].split(b","):
            key, equals, given = item.partition(b";")[0].strip().partition(b"=")
            if key == b"u" and len(given) == 1 and b"0" <= given <= b"7":
                urgency = int(given)
            elif key == b"i":
                incremental = not equals or given == b"?1"
        known = (urgency, incremental)
        if len(value) <= _GOOD_NAME_LENGTH:
            if len(_priorities) >= _PRIORITIES_MAX:
                _priorities.clear()
            _priorities[value] = known
    return known


def _read_method(method: bytes) -> str:
    if TOKEN.fullmatch(method) is None:
        raise MalformedRequest("the method is no token")
    if len(method) > _METHOD_MAX:
        raise RequestRefused(501, f"method of {len(method)} characters")
    return method.decode("ascii")


def _look_at_names(headers: Fields) -> dict[bytes, list[bytes]] | None:
    """Check the names; the values of those fields that decide something, or None, which is common."""
    special: dict[bytes, list[bytes]] | None = None
    for name, value in headers:
        if name in _good_names:
            continue
        if name not in _SPECIAL:
            check_name(name)
        elif special is None:
            special = {name: [value]}
        else:
            special.setdefault(name, []).append(value)
    return special


def _drop_host(head: RequestHead, authority: bytes) -> None:
    """A Host field beside :authority may only say the same (RFC 9113 section 8.3.1)."""
    if head.authority.lower() != authority.lower():
        raise MalformedRequest("Host and :authority differ")
    head.headers[:] = [field for field in head.headers if field[0] != b"host"]


def _read_special(head: RequestHead, special: dict[bytes, list[bytes]]) -> None:
    """The fields that decide something. What makes a request malformed is looked at first."""
    for name in _CONNECTION_SPECIFIC:
        if name in special:
            raise MalformedRequest(f"{name.decode()} is specific to a connection")
    if b"te" in special:
        if any(value.lower() != b"trailers" for value in special[b"te"]):
            raise MalformedRequest("te other than trailers")
        head.wants_trailers = True
    if len(special.get(b"cookie", ())) > 1:
        _join_cookies(head, special[b"cookie"])
    if b"host" in special:
        hosts = special[b"host"]
        if len(hosts) > 1:
            raise RequestRefused(400, "repeated host field")
        if hosts[0] not in good_hosts:
            check_host(hosts[0])
        head.authority = hosts[0]
    if b"content-length" in special:
        lengths = special[b"content-length"]
        if len(lengths) > 1:
            raise RequestRefused(400, "repeated content-length field")
        if not lengths[0].isdigit() or len(lengths[0]) > _LENGTH_DIGITS:
            raise RequestRefused(400, "Content-Length is no number")
        head.content_length = int(lengths[0])
        if head.ended and head.content_length:
            raise MalformedRequest(f"Content-Length of {head.content_length} without a body")
    if b"expect" in special:
        if any(value.lower() != b"100-continue" for value in special[b"expect"]):
            raise RequestRefused(417, "an expectation that is not 100-continue")
        head.expects_continue = True
    if b"priority" in special:
        head.urgency, head.incremental = read_priority(b",".join(special[b"priority"]))


def _join_cookies(head: RequestHead, crumbs: list[bytes]) -> None:
    """One field, where the first of them was (RFC 9113 section 8.2.3)."""
    names = [name for name, _ in head.headers]
    first = names.index(b"cookie")
    head.headers[first] = (b"cookie", b"; ".join(crumbs))
    head.headers[first + 1 :] = [field for field in head.headers[first + 1 :] if field[0] != b"cookie"]


def _check_connect(
    head: RequestHead, scheme: bytes | None, path: bytes | None, protocol: bytes | None
) -> None:
    """RFC 9113 section 8.5 and RFC 8441."""
    if head.method != "CONNECT":
        raise MalformedRequest(":protocol in a request that is no CONNECT")
    if not head.authority:
        raise MalformedRequest("CONNECT without :authority")
    if protocol is None:
        if scheme is not None or path is not None:
            raise MalformedRequest("CONNECT with :scheme or :path")
    elif TOKEN.fullmatch(protocol) is None:
        raise MalformedRequest(":protocol is no token")
    head.protocol = protocol


def _check_scheme_and_target(head: RequestHead, limits: Http2Limits) -> None:
    """What is not the common form of them."""
    if len(head.target) > limits.target_size:
        raise RequestRefused(414, f"target of {len(head.target)} bytes")
    if _SCHEME.fullmatch(head.scheme) is None:
        raise MalformedRequest(":scheme is none")
    head.scheme = head.scheme.lower()
    if head.scheme not in _SCHEMES:
        raise RequestRefused(400, "a scheme that is not served here")
    if head.target == b"*":
        if head.method != "OPTIONS":
            raise RequestRefused(400, f"target * with {head.method}")
    elif _PATH.fullmatch(head.target) is None:
        raise RequestRefused(400, "invalid :path")
