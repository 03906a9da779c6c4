"""Which request paths name files, and which are refused before anything looks at the disk."""

from __future__ import annotations

import posixpath
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trioserve.static import request_path
from trioserve.static.request_path import MAX_NAME, MAX_PATH, PathRefused, RequestPath, parse_request_path


def refusal(raw_path: bytes, *, dotfiles: bool = False) -> str:
    with pytest.raises(PathRefused) as raised:
        parse_request_path(raw_path, dotfiles=dotfiles)
    assert str(raised.value) == raised.value.reason
    return raised.value.reason


# -- what is accepted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_path", "segments", "directory"),
    [
        (b"", (), True),
        (b"/", (), True),
        (b"/a", (b"a",), False),
        (b"/a/", (b"a",), True),
        (b"/a/b.txt", (b"a", b"b.txt"), False),
        (b"/a/b/", (b"a", b"b"), True),
        (b"/a%20b", (b"a b",), False),
        (b"/a+b", (b"a+b",), False),
        (b"/100%25.txt", (b"100%.txt",), False),
        (b"/caf%C3%A9", "café".encode(), False),
        ("/café".encode(), "café".encode(), False),
        (b"/%e2%82%AC", "€".encode(), False),
        (b"/what%3F", (b"what?",), False),
        (b"/c%23", (b"c#",), False),
        (b"/a:b", (b"a:b",), False),
        (b"/a;v=1", (b"a;v=1",), False),
        (b"/con", (b"con",), False),
        (b"/a.", (b"a.",), False),
        (b"/a..b", (b"a..b",), False),
        (b"/a..", (b"a..",), False),
        (b"/~user", (b"~user",), False),
        (b"/*.txt", (b"*.txt",), False),
        (b"/.well-known/security.txt", (b".well-known", b"security.txt"), False),
        (b"/%2Ewell-known", (b".well-known",), False),
    ],
)
def test_ordinary_paths(raw_path: bytes, segments: tuple[bytes, ...] | bytes, directory: bool) -> None:
    expected = (segments,) if isinstance(segments, bytes) else segments
    path = parse_request_path(raw_path)
    assert path == RequestPath(expected, directory)
    assert path.segments == expected
    assert path.directory is directory
    assert path.relative == b"/".join(expected)
    assert path.name == (expected[-1] if expected else b"")


def test_a_path_is_decoded_once_and_what_is_still_encoded_is_a_literal_name() -> None:
    assert parse_request_path(b"/%252e%252e/x").segments == (b"%2e%2e", b"x")
    assert parse_request_path(b"/a%252Fb").segments == (b"a%2Fb",)
    assert parse_request_path(b"/%25252e").segments == (b"%252e",)
    assert parse_request_path(b"/a%2500").segments == (b"a%00",)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_path", "reason"),
    [
        (b"a", "begin with a slash"),
        (b"..", "begin with a slash"),
        (b"%2Fa", "begin with a slash"),
        (b"*", "begin with a slash"),
        (b"http://example.org/", "begin with a slash"),
        # Separators in disguise.
        (b"/a%2Fb", "encoded slash"),
        (b"/a%2fb", "encoded slash"),
        (b"/..%2F..%2Fetc/passwd", "encoded slash"),
        (b"/a%5Cb", "encoded slash or backslash"),
        (b"/a%5cb", "encoded slash or backslash"),
        (b"/a\\b", "backslash"),
        (b"/..\\..\\x", "backslash"),
        # Bytes that no ordinary name has.
        (b"/a%00", "control byte"),
        (b"/a\0.png", "control byte"),
        (b"/a%00.png", "control byte"),
        (b"/a%0D%0AX: y", "control byte"),
        (b"/a%0a", "control byte"),
        (b"/a%09", "control byte"),
        (b"/a%1B[0m", "control byte"),
        (b"/a%7F", "control byte"),
        # Dot segments, raw and encoded, at each place.
        (b"/.", "dot segment"),
        (b"/..", "dot segment"),
        (b"/../x", "dot segment"),
        (b"/a/..", "dot segment"),
        (b"/a/../", "dot segment"),
        (b"/a/../b", "dot segment"),
        (b"/a/./b", "dot segment"),
        (b"/a/.", "dot segment"),
        (b"/%2e%2e/x", "dot segment"),
        (b"/%2E./x", "dot segment"),
        (b"/.%2e/x", "dot segment"),
        (b"/a/%2e", "dot segment"),
        (b"/.well-known/../x", "dot segment"),
        # Empty segments.
        (b"//", "empty segment"),
        (b"//a", "empty segment"),
        (b"//evil.example/%2e%2e", "empty segment"),
        (b"/a//b", "empty segment"),
        (b"/a//", "empty segment"),
        # Escapes and encodings.
        (b"/%", "hexadecimal"),
        (b"/%4", "hexadecimal"),
        (b"/a%zz", "hexadecimal"),
        (b"/%u002e", "hexadecimal"),
        (b"/%+1", "hexadecimal"),
        (b"/%\xb2\xb2", "hexadecimal"),
        (b"/\xff", "UTF-8"),
        (b"/%ff", "UTF-8"),
        (b"/%C0%AE%C0%AE/x", "UTF-8"),
        (b"/%c0%af", "UTF-8"),
        (b"/%ED%A0%80", "UTF-8"),
        (b"/%C3", "UTF-8"),
        (b"/%C3/%A9", "UTF-8"),
        (b"/\xc3%A9\xe9", "UTF-8"),
        # The rest of a URL.
        (b"/a?b", "'?'"),
        (b"/a#b", "'#'"),
    ],
)
@pytest.mark.parametrize("dotfiles", [False, True])
def test_refused(raw_path: bytes, reason: str, dotfiles: bool) -> None:
    assert reason in refusal(raw_path, dotfiles=dotfiles)


def test_every_control_byte_is_refused_raw_and_encoded() -> None:
    for byte in (*range(0x20), 0x7F):
        assert "control byte" in refusal(b"/a" + bytes([byte]))
        assert "control byte" in refusal(b"/a%%%02x" % byte)


@pytest.mark.parametrize(
    "raw_path", [b"/.env", b"/.git/config", b"/a/.htaccess", b"/%2Eenv", b"/...", b"/a/.b/"]
)
def test_names_that_begin_with_a_dot_are_served_only_where_asked_for(raw_path: bytes) -> None:
    assert "begins with a dot" in refusal(raw_path)
    assert parse_request_path(raw_path, dotfiles=True).segments


@pytest.mark.parametrize(
    "raw_path", [b"/a/.well-known/x", b"/.well-known/.secret", b"/.well-known2", b"/.Well-Known"]
)
def test_well_known_is_public_as_the_first_segment_and_nothing_hidden_in_it(raw_path: bytes) -> None:
    assert "begins with a dot" in refusal(raw_path)


def test_the_longest_name_is_one_that_file_systems_can_hold() -> None:
    assert parse_request_path(b"/" + b"n" * MAX_NAME).name == b"n" * MAX_NAME
    assert "longer than 255" in refusal(b"/" + b"n" * (MAX_NAME + 1))
    # Bytes count, not characters, and decoded ones.
    assert parse_request_path(b"/" + b"%C3%A9" * 127).name == "é".encode() * 127
    assert "longer than 255" in refusal(b"/" + b"%C3%A9" * 128)


def test_the_longest_path_fits_the_kernels_limit() -> None:
    whole = b"/" + b"/".join([b"n" * 255] * 16)
    assert len(whole) == MAX_PATH
    assert len(parse_request_path(whole).relative) == MAX_PATH - 1
    assert "longer than 4096" in refusal(whole + b"/")
    assert "longer than 4096" in refusal(b"/a" * (MAX_PATH // 2) + b"/")
    assert "longer than 4096" in refusal(b"%41" * (MAX_PATH + 1))


@pytest.mark.parametrize(
    "name",
    [b"a:b", b"a::$DATA", b"PROGRA~1", b"con", b"NUL.txt", b"aux.", b"com1", b"LPT9.log", b"com\xc2\xb9", b"conin$",
     b"con .txt", b"a.", b"a ", b"a<b", b"a|b", b"a*", b'a"'],
)  # fmt: skip
def test_names_that_windows_reads_as_something_else_are_refused_there(
    monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    # Longer than what is remembered, since the answer is not to outlive the patch.
    raw_path = b"/d" * 200 + b"/" + quote_from_bytes(name).encode()
    assert parse_request_path(raw_path).name == name
    monkeypatch.setattr(request_path, "_ON_WINDOWS", True)
    assert "Windows" in refusal(raw_path)
    assert parse_request_path(b"/d" * 200 + b"/console.log").name == b"console.log"


# -- memory --------------------------------------------------------------------------------------------------


def test_what_is_remembered_is_bounded_and_the_two_rules_for_dots_are_kept_apart() -> None:
    remember = request_path._parse_and_remember
    remember.cache_clear()
    first = parse_request_path(b"/kept")
    assert parse_request_path(b"/kept") is first
    assert parse_request_path(b"/.env", dotfiles=True).name == b".env"
    assert "begins with a dot" in refusal(b"/.env")
    for number in range(3 * request_path._REMEMBERED):
        parse_request_path(b"/%d" % number)
    assert remember.cache_info().currsize == request_path._REMEMBERED
    # Neither long paths nor refusals take anybody's place.
    before = remember.cache_info().currsize
    remember.cache_clear()
    parse_request_path(b"/d" * 200)
    refusal(b"/..")
    assert remember.cache_info().currsize == 0 < before


# -- for all paths -------------------------------------------------------------------------------------------

# Pieces of which attacks are made, and any bytes at all.
PIECES = st.sampled_from(
    [b"/", b"//", b".", b"..", b"%2e", b"%2E", b"%2f", b"%5c", b"\\", b"%00", b"\0", b"%", b"%25", b"2e", b"a", b"b.c",
     b".well-known", b"\xc3\xa9", b"%c3", b"%a9", b"%c0%ae", b"\n", b":", b" ", b"~"]
)  # fmt: skip
RAW_PATHS = st.one_of(
    st.lists(PIECES, max_size=12).map(b"".join).map(lambda path: b"/" + path),
    st.binary(max_size=40).map(lambda path: b"/" + path),
    st.binary(max_size=40),
)


@given(raw_path=RAW_PATHS, dotfiles=st.booleans())
@example(raw_path=b"/%2e%2e/%2e%2e/etc/passwd", dotfiles=True)
@example(raw_path=b"/a/..%00/b", dotfiles=True)
def test_what_is_accepted_stays_below_the_root_and_holds_no_forbidden_byte(
    raw_path: bytes, dotfiles: bool
) -> None:
    try:
        path = parse_request_path(raw_path, dotfiles=dotfiles)
    except PathRefused:
        return
    joined = posixpath.join(b"/srv/www", path.relative)
    assert posixpath.normpath(joined) == (joined if path.segments else b"/srv/www")
    assert joined.startswith(b"/srv/www/")
    assert not any(byte < 0x20 or byte in b"\x7f\\" for byte in path.relative)
    path.relative.decode()
    for place, segment in enumerate(path.segments):
        assert 0 < len(segment) <= MAX_NAME
        assert b"/" not in segment
        assert segment not in {b".", b".."}
        assert dotfiles or not segment.startswith(b".") or (place == 0 and segment == b".well-known")


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\\\x7f", min_codepoint=0x20),
    min_size=1,
    max_size=60,
).filter(lambda name: not name.startswith("."))


@given(
    names=st.lists(NAMES, max_size=5),
    slash=st.booleans(),
    safe=st.sampled_from(["", "~!$&'()*+,;=:@", ' |"<>']),
)
def test_every_ordinary_name_comes_through_its_quoting(names: list[str], slash: bool, safe: str) -> None:
    segments = tuple(name.encode() for name in names)
    raw_path = b"".join(b"/" + quote_from_bytes(segment, safe).encode() for segment in segments)
    path = parse_request_path(raw_path + (b"/" if slash else b""))
    assert path == RequestPath(segments, slash or not segments)
