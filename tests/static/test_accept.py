"""`Accept`: RFC 9110 section 12.5.1."""

from __future__ import annotations

import pytest

from trioserve.static.accept import media_quality

HTML = b"text/html"


@pytest.mark.parametrize(
    ("accept", "weight", "named"),
    [
        (None, 1, 0),
        (b"", 0, 0),
        (b"*/*", 1, 0),
        (b"text/*;q=0.5", 0.5, 0),
        (b"text/html", 1, 1),
        (b"TEXT/HTML ; q=0.3", 0.3, 0.3),
        (b"text/html;q=0, */*", 0, 0),
        (b"*/*, text/html;q=0.2", 0.2, 0.2),
        (b"text/*, */*;q=0.1", 1, 0),
        (b"application/json", 0, 0),
        (b"text/html;level=1;q=0.4", 0.4, 0.4),
        (b"text/html;q=high", 0, 0),
        (b"text/html;q=1.001", 0, 0),
        (b"text/htmlx", 0, 0),
        (b",,;,text/html", 1, 1),
        (b"text/html;q=0.1, text/html;q=0.7", 0.7, 0.7),
    ],
)
def test_the_most_specific_range_decides(accept: bytes | None, weight: float, named: float) -> None:
    for _ in range(2):
        assert media_quality(accept, HTML) == weight
        assert media_quality(accept, HTML, named=True) == named


def test_a_long_value_is_read_but_not_kept() -> None:
    assert media_quality(b"a/b;charset=something-long, " * 60 + b"text/html", HTML) == 1


def test_a_value_is_not_read_without_end() -> None:
    assert media_quality(b"a/b," * 64 + b"text/html", HTML) == 0
    assert media_quality(b"text/html" + b";a" * 7 + b";q=0.5", HTML) == 0.5
    assert media_quality(b"text/html" + b";a" * 30_000 + b";q=0.5", HTML) == 1
