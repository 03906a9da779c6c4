"""The value of Host, and of HTTP/2's `:authority`: what is one, for all engines. Pure; it never waits."""

from __future__ import annotations

import ipaddress
import re

from trioserve.errors import RequestRefused

# RFC 9110 section 7.2 and RFC 3986: reg-name, IPv4 or [IPv6 literal], then an optional port. May be empty.
_HOST = re.compile(
    rb"(?:\[([0-9A-Fa-f:.]+(?:%25[0-9A-Za-z\-._~]+)?)\]|(?:[0-9A-Za-z\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)"
    rb"(?::[0-9]{0,5})?"
)

# Host values that were found valid: clients repeat them, and the check costs more than the look-up. Bounded,
# because the peer chooses them.
good_hosts: set[bytes] = set()
_GOOD_HOSTS_MAX = 512


def check_host(host: bytes) -> None:
    """Refuse a value of Host (or HTTP/2's :authority) that is none; a good one is remembered in `good_hosts`."""
    valid = _HOST.fullmatch(host)
    if valid is None or (valid[1] is not None and not _is_ipv6(valid[1])):
        raise RequestRefused(400, "invalid Host")
    if len(good_hosts) >= _GOOD_HOSTS_MAX:
        good_hosts.clear()
    if len(host) <= 255:
        good_hosts.add(host)


def _is_ipv6(literal: bytes) -> bool:
    try:
        ipaddress.IPv6Address(literal.partition(b"%")[0].decode("ascii"))
    except ValueError:
        return False
    return True
