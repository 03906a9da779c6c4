"""Accept-Encoding: which content coding a client wants most (RFC 9110, 12.5.3), as pure functions.

Called by the compression middleware and by the static handler, which choose among what they can offer. Nothing here
waits. Field values are few and repeat for ever, so parsing and choosing are kept in small bounded caches.

What the field says, and what is made of it:

    no field            anything may be sent; identity is wanted, since who says nothing may understand nothing
    empty field         identity only
    br, gzip;q=0.5      what is not named is refused, except for identity
    *;q=0.3             stands for each coding that is not named, identity included
    gzip;q=0            refused; `identity;q=0`, or `*;q=0` without identity, refuses the plain form
    x-gzip              is gzip (8.4.1.3); names are compared without regard to case
    gzip;q=zero         what breaks the grammar is as good as not there; only that element
    gzip;q=0, gzip      said twice: the lower weight holds, a refusal stays one
    more than 64        what comes after them is as good as not there
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

IDENTITY = b"identity"

# The weight of what is acceptable but was not asked for: identity beside a list that does not name it, and any coding
# where there is no field at all. Below each weight that a client can state, since those have three decimals.
UNASKED = 0.0001

# Longer than any browser's by far; what is longer is parsed anew each time, which keeps the caches small in bytes, too.
_CACHED_LENGTH = 200
_CACHED_VALUES = 512

# Elements that are read; clients name three or four. 64 KiB of them would hold the event loop for a tenth of a second.
_MOST_ELEMENTS = 64

_ELEMENT = re.compile(
    rb"[ \t]*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*(?:;[ \t]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[ \t]*)?"
)

_OTHER_NAMES = {b"x-gzip": b"gzip", b"x-compress": b"compress"}


class AcceptedCodings:
    """What one Accept-Encoding value accepts.

    Attributes:
        identity_ok: whether the plain form, without any coding, is acceptable.
    """

    __slots__ = ("_others", "_weights", "identity_ok")

    def __init__(self, weights: Mapping[bytes, float], others: float) -> None:
        """`weights` by canonical name; `others` for all that is not in it."""
        self._weights = weights
        self._others = others
        self.identity_ok = self.quality(IDENTITY) > 0

    def __repr__(self) -> str:
        named = ", ".join(f"{name.decode()}: {weight:g}" for name, weight in self._weights.items())
        return f"<AcceptedCodings {named or 'none named'}; others: {self._others:g}>"

    def quality(self, coding: bytes) -> float:
        """How much `coding` is wanted, from 0 (refused) to 1; `UNASKED` if it is only tolerated."""
        weight = self._weights.get(coding)
        if weight is None:
            weight = self._weights.get(_canonical(coding), self._others)
        return weight

    def choose(self, offered: Sequence[bytes]) -> bytes | None:
        """The best of `offered`, as in `choose_coding`."""
        best, highest = None, 0.0
        for coding in offered:
            weight = self.quality(coding)
            if weight > highest:
                best, highest = coding, weight
        # The plain form can always be sent; where it is not offered in its own place, it comes last.
        if IDENTITY not in offered and self.quality(IDENTITY) > highest:
            return IDENTITY
        return best


def parse_accept_encoding(value: bytes | None) -> AcceptedCodings:
    """What a request with this Accept-Encoding accepts.

    Args:
        value: the field value, several fields joined by `, `; None if the request has none.
    """
    if value is None:
        return _NO_FIELD
    if len(value) > _CACHED_LENGTH:
        return _parse(value)
    return _parse_cached(value)


def choose_coding(value: bytes | None, offered: Sequence[bytes]) -> bytes | None:
    """The coding that the client wants most.

    Args:
        value: as for `parse_accept_encoding`.
        offered: what could be sent, best first: it decides among codings of equal weight. `b"identity"` may stand in
            it; where it does not, it is offered last.

    Returns:
        One of `offered`, or `b"identity"`; None if the client accepts none of them, not even identity (406).
    """
    if value is not None and len(value) > _CACHED_LENGTH:
        return _parse(value).choose(offered)
    return _choose_cached(value, tuple(offered))


def _parse(value: bytes) -> AcceptedCodings:
    weights: dict[bytes, float] = {}
    for element in value.split(b",", _MOST_ELEMENTS)[:_MOST_ELEMENTS]:
        match = _ELEMENT.fullmatch(element)
        if match is None:
            continue
        name = _canonical(match[1])
        weight = 1.0 if match[2] is None else float(match[2])
        weights[name] = min(weight, weights.get(name, 1.0))
    others = weights.pop(b"*", None)
    if others is None:
        others = 0.0
        weights.setdefault(IDENTITY, UNASKED)
    return AcceptedCodings(weights, others)


def _canonical(coding: bytes) -> bytes:
    coding = coding.lower()
    return _OTHER_NAMES.get(coding, coding)


@functools.lru_cache(_CACHED_VALUES)
def _parse_cached(value: bytes) -> AcceptedCodings:
    return _parse(value)


@functools.lru_cache(_CACHED_VALUES)
def _choose_cached(value: bytes | None, offered: tuple[bytes, ...]) -> bytes | None:
    return parse_accept_encoding(value).choose(offered)


_NO_FIELD = AcceptedCodings({IDENTITY: 1.0}, UNASKED)
