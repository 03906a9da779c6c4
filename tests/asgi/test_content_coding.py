"""Accept-Encoding: RFC 9110, 12.5.3, rule by rule, and against a slow model."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trioserve.asgi.content_coding import IDENTITY, UNASKED, choose_coding, parse_accept_encoding

OURS = (b"br", b"zstd", b"gzip")


@pytest.mark.parametrize(
    "value, chosen",
    [
        (b"gzip", b"gzip"),
        (b"gzip, deflate, br, zstd", b"br"),
        (b"gzip, zstd", b"zstd"),
        (b"br;q=0.8, gzip;q=0.9", b"gzip"),
        (b"br;q=0.801,gzip;q=0.8", b"br"),
        (b"GZip", b"gzip"),
        (b"x-gzip", b"gzip"),
        (b"gzip ;\tQ=0.5 , identity;q=0.4", b"gzip"),
        (b"gzip;q=0.001", b"gzip"),
        # Identity is wanted where it weighs more, and only tolerated where it is not named.
        (b"gzip;q=0.5, identity;q=0.6", IDENTITY),
        (b"identity", IDENTITY),
        (b"deflate", IDENTITY),
        (b"", IDENTITY),
        (b" , ,", IDENTITY),
        # The star stands for what is not named.
        (b"*", b"br"),
        (b"br;q=0, *", b"zstd"),
        (b"*;q=0.5, gzip", b"gzip"),
        (b"*;q=0.5, br;q=0.1", b"zstd"),
        (b"*;q=0, gzip", b"gzip"),
        (b"*;q=0, identity;q=0.1", IDENTITY),
        # Nothing is acceptable.
        (b"identity;q=0", None),
        (b"*;q=0", None),
        (b"deflate, identity;q=0.000", None),
        # What breaks the grammar is as good as not there.
        (b"gzip;q=two, br;q=0.1", b"br"),
        (b"gzip;q=1.1", IDENTITY),
        (b"gzip;q=0.1234", IDENTITY),
        (b"gzip;q=-1", IDENTITY),
        (b"gzip;level=5", IDENTITY),
        (b"gz ip, br", b"br"),
        (b"gzip;q=, br", b"br"),
        (b"\xff, br", b"br"),
        # Said twice: a refusal stays one, in whatever order.
        (b"br;q=0, br, gzip;q=0.2", b"gzip"),
        (b"br, br;q=0, gzip;q=0.2", b"gzip"),
        (b"gzip, x-gzip;q=0", IDENTITY),
    ],
)
def test_the_coding_with_the_highest_weight_is_chosen(value, chosen):
    assert choose_coding(value, OURS) == chosen


def test_without_the_field_everything_is_acceptable_and_identity_is_sent():
    assert choose_coding(None, OURS) == IDENTITY
    assert choose_coding(None, []) == IDENTITY
    accepted = parse_accept_encoding(None)
    assert accepted.identity_ok
    assert accepted.quality(b"br") == accepted.quality(b"unheard-of") == UNASKED


def test_our_order_decides_among_equals():
    assert choose_coding(b"gzip, br", [b"gzip", b"br"]) == b"gzip"
    assert choose_coding(b"gzip, br", [b"br", b"gzip"]) == b"br"
    assert choose_coding(b"*", [IDENTITY, b"br"]) == IDENTITY
    assert choose_coding(b"*", [b"br", IDENTITY]) == b"br"
    assert choose_coding(b"*", [b"br"]) == b"br", "not offered in its own place, identity comes last"


def test_identity_is_acceptable_unless_it_is_refused():
    for value in (None, b"", b"br", b"*", b"*;q=0, identity", b"identity;q=0.001"):
        assert parse_accept_encoding(value).identity_ok, value
    for value in (b"identity;q=0", b"*;q=0", b"br, *;q=0", b"*, identity;q=0.0"):
        assert not parse_accept_encoding(value).identity_ok, value


def test_quality_knows_other_names_and_any_case():
    accepted = parse_accept_encoding(b"x-compress;q=0.3, X-GZIP;q=0.25")
    assert accepted.quality(b"compress") == accepted.quality(b"X-Compress") == 0.3
    assert accepted.quality(b"gzip") == accepted.quality(b"x-gzip") == 0.25
    assert accepted.quality(b"br") == 0


def test_a_long_value_is_understood_without_being_kept():
    value = b", ".join(b"coding%d-%b;q=0" % (n, b"x" * 50) for n in range(60)) + b", gzip;q=0.7"
    assert choose_coding(value, OURS) == b"gzip"
    assert parse_accept_encoding(value) is not parse_accept_encoding(value)
    assert parse_accept_encoding(b"br") is parse_accept_encoding(b"br")


def test_a_value_is_not_read_without_end():
    assert choose_coding(b"a," * 63 + b"gzip", OURS) == b"gzip"
    assert choose_coding(b"a," * 64 + b"gzip", OURS) == IDENTITY
    assert "a: 1" in repr(parse_accept_encoding(b"a," * 30_000))


def test_it_describes_itself():
    assert (
        repr(parse_accept_encoding(b"br;q=0.5")) == "<AcceptedCodings br: 0.5, identity: 0.0001; others: 0>"
    )
    assert repr(parse_accept_encoding(b"*")) == "<AcceptedCodings none named; others: 1>"


# -- against a model ----------------------------------------------------------------------------------------

TOKEN = set(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def model_weight(text: str) -> int | None:
    """A qvalue in thousandths."""
    whole, _dot, decimals = text.partition(".")
    if whole not in ("0", "1") or len(decimals) > 3 or any(d not in "0123456789" for d in decimals):
        return None
    thousandths = int(whole) * 1000 + int(decimals.ljust(3, "0"))
    return thousandths if thousandths <= 1000 else None


def model(value: bytes, offered: list[str]) -> str | None:
    stated: list[tuple[str, int]] = []
    for element in value.decode("latin-1").split(","):
        name, semicolon, parameter = (part.strip(" \t") for part in element.partition(";"))
        if not name or not set(name.encode("latin-1")) <= TOKEN:
            continue
        weight: int | None = 1000
        if semicolon:
            if parameter[:2] not in ("q=", "Q="):
                continue
            weight = model_weight(parameter[2:])
        if weight is not None:
            stated.append(({"x-gzip": "gzip"}.get(name.lower(), name.lower()), weight))

    def rank(coding: str) -> tuple[int, int]:
        """Weight, then what is not asked for but tolerated."""
        for wanted in (coding, "*"):
            found = [weight for name, weight in stated if name == wanted]
            if found:
                return min(found), 0
        return (0, 1) if coding == "identity" else (0, 0)

    candidates = [*offered, *(["identity"] if "identity" not in offered else [])]
    best = max(candidates, key=rank)  # the first of equals
    return best if rank(best) > (0, 0) else None


SPACE = st.sampled_from(["", "", " ", "\t", " \t "])
NAME = st.sampled_from(["br", "gzip", "x-gzip", "zstd", "identity", "*", "BR", "deflate", "b r", "", "é"])
WEIGHT = st.one_of(
    st.integers(0, 1000).map(lambda n: f"{n / 1000:.3f}"),
    st.sampled_from(
        ["0", "1", "0.", "1.", "0.0", "1.000", "0.5", "1.001", "2", "", ".5", "0.1234", "-0", "x"]
    ),
)
ELEMENT = st.builds(
    lambda a, name, b, rest, c: a + name + b + rest + c,
    SPACE,
    NAME,
    SPACE,
    st.one_of(
        st.just(""),
        st.builds(lambda s, q, w: f";{s}{q}{w}", SPACE, st.sampled_from(["q=", "Q=", "q =", "a="]), WEIGHT),
    ),
    SPACE,
)
VALUE = st.lists(ELEMENT, max_size=6).map(lambda elements: ",".join(elements).encode("latin-1"))
OFFERED = st.lists(st.sampled_from(["br", "zstd", "gzip", "identity"]), unique=True)


@given(value=VALUE | st.binary(max_size=30), offered=OFFERED)
@example(value=b"br;q=0.001, *;q=0", offered=["br"])
@example(value=b"*;q=0.000", offered=["identity"])
def test_it_chooses_as_the_model_does(value: bytes, offered: list[str]) -> None:
    chosen = choose_coding(value, [name.encode() for name in offered])
    assert (None if chosen is None else chosen.decode()) == model(value, offered)
    assert parse_accept_encoding(value).identity_ok == (model(value, []) == "identity")
