"""`trioserve precompress --dictionary`: siblings for who has an earlier release (RFC 9842)."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioserve.errors import UsageError
from trioserve.static import precompress, sibling_encoders, sibling_writer
from trioserve.static.codings import dcz_head, dcz_suffix
from trioserve.static.confine import ConfinedRoot
from trioserve.static.old_files import OldFile, OldFiles
from trioserve.static.precompress import run_precompress
from trioserve.static.sibling_encoders import dcz_window, make_dcz
from trioserve.static.sibling_writer import Outcome, Source, Task, Tree, write_sibling

from .test_precompress import OLD, files, make

zstandard = pytest.importorskip("zstandard")

MIB = 1 << 20


def text(seed: int, words: int = 4000) -> bytes:
    return " ".join(random.Random(seed).choices([f"word{number}" for number in range(500)], k=words)).encode()


#: Three releases of one file: each differs from the one before in a word.
FIRST = text(1)
SECOND = FIRST.replace(b"word7 ", b"second ", 1)
THIRD = SECOND.replace(b"word9 ", b"third ", 1)


def dcz(name: str, dictionary: bytes) -> str:
    return name + dcz_suffix(hashlib.sha256(dictionary).digest()).decode()


def decode(data: bytes, dictionary: bytes) -> bytes:
    """As a client does: the head first, then a Zstandard frame for which the dictionary is just bytes."""
    digest = hashlib.sha256(dictionary).digest()
    assert data[:40] == bytes.fromhex("5e2a4d1820000000") + digest == dcz_head(digest)
    known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    decoder = zstandard.ZstdDecompressor(dict_data=known, max_window_size=128 * MIB)
    decoded: bytes = decoder.decompressobj().decompress(data[40:])
    return decoded


def run(directory: Path, *flags: str) -> int:
    return run_precompress([str(directory), "--jobs", "2", *flags])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    make(tmp_path / "old" / "sub" / "app.js", FIRST)
    return tmp_path / "old"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    make(tmp_path / "new" / "sub" / "app.js", SECOND).chmod(0o640)
    return tmp_path / "new"


# -- what is written -----------------------------------------------------------------------------------------


def test_a_sibling_decodes_to_its_source_with_the_dictionary(old: Path, new: Path) -> None:
    make(old / "same.css", FIRST)
    make(new / "same.css", FIRST)
    make(new / "other.css", FIRST)
    assert run(new, "--codings", "dcz", "--dictionary", str(old)) == 0
    name = dcz("sub/app.js", FIRST)
    # Who has what has not changed needs nothing, and of what is new nobody has anything.
    assert files(new) == {"sub/app.js", "same.css", "other.css", name}
    found = (new / name).stat()
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o640, OLD)
    assert decode((new / name).read_bytes(), FIRST) == SECOND
    assert found.st_size < len(SECOND) / 100


def test_each_release_has_its_sibling_beside_the_others(
    old: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "last" / "sub" / "app.js", SECOND)
    make(tmp_path / "copy" / "sub" / "app.js", FIRST)
    make(new / "sub" / "app.js", THIRD)
    dictionaries = [f"--dictionary={tmp_path / name}" for name in ("old", "last", "copy")]
    names = {dcz("sub/app.js", FIRST), dcz("sub/app.js", SECOND)}
    assert run(new, *dictionaries) == 0
    assert files(new) == {"sub/app.js", "sub/app.js.br", "sub/app.js.zst", "sub/app.js.gz", *names}
    for dictionary in (FIRST, SECOND):
        assert decode((new / dcz("sub/app.js", dictionary)).read_bytes(), dictionary) == THIRD
    assert capsys.readouterr().out.splitlines()[-1].startswith(".dcz  2 written; ")
    before = {name: (new / name).stat().st_ino for name in names}
    assert run(new, *dictionaries) == 0
    assert capsys.readouterr().out.splitlines()[-1] == ".dcz  2 up to date"
    assert {name: (new / name).stat().st_ino for name in names} == before
    assert run(new, *dictionaries, "--force") == 0
    assert ".dcz  2 written" in capsys.readouterr().out
    # The source has changed since.
    make(new / "sub" / "app.js", THIRD + b"more", OLD + 1)
    assert run(new, *dictionaries) == 0
    assert decode((new / dcz("sub/app.js", FIRST)).read_bytes(), FIRST) == THIRD + b"more"


@settings(max_examples=30, deadline=None)
@given(
    st.binary(min_size=1, max_size=3000),
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.binary(max_size=500),
    st.booleans(),
)
def test_whatever_is_the_dictionary_it_gives_the_source(
    dictionary: bytes, begin: int, end: int, more: bytes, shared: bool
) -> None:
    coding = make_dcz(hashlib.sha256(dictionary).digest(), len(dictionary), lambda: dictionary, shared=shared)
    part = dictionary[begin:] + more + dictionary[:end]
    for source in (part * 3 + b".", part[:-1] + b".", b"."):
        encoder = coding.begin(len(source))
        parts = [encoder.feed(source[at : at + 700]) for at in range(0, len(source), 700)]
        assert decode(b"".join([encoder.head, *parts, encoder.finish()]), dictionary) == source


@pytest.mark.parametrize("size", [100_000, 2 * MIB], ids=["with a tree", "without"])
def test_what_many_sources_have_is_as_good_as_what_each_has_for_itself(size: int) -> None:
    dictionary = text(4, size // 8)
    digest = hashlib.sha256(dictionary).digest()
    reads: list[int] = []

    def read() -> bytes:
        reads.append(1)
        return dictionary

    own = make_dcz(digest, len(dictionary), read)
    shared = make_dcz(digest, len(dictionary), read, shared=True)
    assert (own.dictionary_size, shared.dictionary_size) == (len(dictionary), 0)
    for length in (1, 3000, 60_000):
        source = dictionary[size // 3 :][: length - 1] + b"!"
        made = []
        for coding in (own, shared):
            encoder = coding.begin(length)
            made.append(encoder.head + encoder.feed(source) + encoder.finish())
            assert decode(made[-1], dictionary) == source
        frames = [zstandard.get_frame_parameters(data[40:]) for data in made]
        assert frames[0].window_size == frames[1].window_size
        assert len(made[1]) <= len(made[0]) * 1.05 + 10
    assert len(reads) == 3 + 1
    shared.begin(len(dictionary) + 1)
    assert len(reads) == 5, "one that is larger is worth tables of its own"


def test_a_dictionary_that_would_stop_all_threads_for_long_is_not_kept() -> None:
    reads: list[int] = []

    def read() -> bytes:
        reads.append(1)
        return b"x"

    coding = make_dcz(FIRST[:32], 32 * MIB + 1, read, shared=True)
    assert coding.dictionary_size == 32 * MIB + 1
    for _ in range(2):
        coding.begin(10)
    assert len(reads) == 2


@pytest.mark.parametrize(("size", "kept"), [(10, 16), (9 * MIB, 3)], ids=["many", "large"])
def test_only_so_many_dictionaries_are_kept(size: int, kept: int) -> None:
    """Those with which most is saved: each is in memory to the end, with eighteen times its size in tables."""
    olds: list[Any] = [SimpleNamespace(size=size, read=bytes) for _ in range(40)]
    found: Any = [(None, {b"%d" % n: olds[n]}) for n in range(40) for _ in range(n + 1)]
    codings = precompress._dcz_codings(found)
    assert len(codings) == 40
    assert {digest for digest, coding in codings.items() if not coding.dictionary_size} == {
        b"%d" % n for n in range(40 - kept, 40)
    }


def test_a_dictionary_of_many_files_is_read_once(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[bytes] = []
    real = OldFile.read

    def read(file: OldFile) -> bytes:
        reads.append(file.path)
        return real(file)

    monkeypatch.setattr(OldFile, "read", read)
    words = make(old / "words.dat", FIRST)
    pages = [
        make(new / f"{number}.html", FIRST.replace(b"word7 ", b"new%d " % number)) for number in range(6)
    ]
    assert run(new, "--codings", "dcz", "--dictionary", f"{words}=*.html") == 0
    assert reads == [b"words.dat"]
    for page in pages:
        assert decode((new / dcz(page.name, FIRST)).read_bytes(), FIRST) == page.read_bytes()


@pytest.mark.parametrize(
    ("dictionary", "source", "window"),
    [
        (1, 1, 10),
        (1, 1 << 20, 20),
        (1, (1 << 20) + 1, 21),
        (1, 8 * MIB, 23),
        # The source is too long for all of it to see the dictionary.
        (1, 8 * MIB + 1, 23),
        (6 * MIB, 9 * MIB, 23),
        # 5/4 of the dictionary: room for a source that has grown by so much, and no more.
        (8 * MIB, 10 * MIB, 24),
        (8 * MIB, 10 * MIB + 1, 23),
        (16 * MIB, 100 * MIB, 24),
        (110 * MIB, 128 * MIB, 27),
        (110 * MIB, 128 * MIB + 1, 27),
        (500 * MIB, 500 * MIB, 27),
    ],
)
def test_the_window_is_one_that_clients_must_take(dictionary: int, source: int, window: int) -> None:
    assert dcz_window(dictionary, source) == window
    # RFC 9842 section 5. A frame whose window holds all of the source tells the size of that instead (RFC 8878).
    told = min(1 << window, max(source, 1024))
    assert told <= min(max(8 * MIB, dictionary * 5 / 4), 128 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize(("dictionary", "source"), [(6 * MIB, 8 * MIB + 1000), (8 * MIB, 9 * MIB)])
def test_the_frame_asks_for_no_larger_window(dictionary: int, source: int) -> None:
    old = random.Random(3).randbytes(dictionary)
    new = (old + old)[:source]
    encoder = make_dcz(hashlib.sha256(old).digest(), len(old), lambda: old).begin(source)
    data = encoder.head + encoder.feed(new) + encoder.finish()
    assert decode(data, old) == new
    frame = zstandard.get_frame_parameters(data[40:])
    assert frame.content_size == source
    assert frame.window_size == (source if source <= dictionary * 5 / 4 else 8 * MIB)
    assert len(data) < source / 100


@pytest.mark.parametrize(("size", "level"), [(3, 19), (MIB, 19), (MIB + 1, 12)])
def test_the_standard_librarys_zstd_does_as_well(
    size: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kinds:
        compression_level, window_log = "level", "window"

    class Dictionary:
        def __init__(self, content: bytes, *, is_raw: bool) -> None:
            assert is_raw
            self.as_prefix = (len(content), "prefix")
            self.as_digested_dict = (len(content), "digested")

    class Stdlib:
        """As `compression.zstd`."""

        def __init__(self, *, options: Any, zstd_dict: Any) -> None:
            self.made = (options, zstd_dict)

        def set_pledged_input_size(self, size: int) -> None:
            self.made += (size,)

        def compress(self, data: bytes) -> bytes:
            return repr(self.made).encode()

        flush = compress

    class Module:
        ZstdCompressor, ZstdDict, CompressionParameter = Stdlib, Dictionary, Kinds

    monkeypatch.setattr(sibling_encoders, "find_zstd", lambda: Module)
    made = make_dcz(FIRST[:32], size, lambda: bytes(size)).begin(5000).feed(b"x")
    assert made == repr(({"level": level, "window": 13}, (size, "prefix"), 5000)).encode()
    coding = make_dcz(FIRST[:32], size, lambda: bytes(size), shared=True)
    for _ in range(2):
        made = coding.begin(3).feed(b"x")
        assert made == repr(({"level": level, "window": 10}, (size, "digested"), 3)).encode()
    # What `zstd --train` has made is no trained dictionary to who takes it as a file: digested, it would be one.
    trained = b"\x37\xa4\x30\xec" + bytes(size)
    made = make_dcz(FIRST[:32], len(trained), lambda: trained, shared=True).begin(3).feed(b"x")
    assert b"prefix" in made


def test_what_is_not_smaller_than_the_others_is_not_written(old: Path, new: Path) -> None:
    make(old / "sub" / "app.js", text(5))
    flags = ["--codings", "dcz", "--dictionary", str(old)]
    name = dcz("sub/app.js", text(5))
    assert run(new, *flags) == 0
    assert files(new) == {"sub/app.js", name}, "smaller than the file itself"
    # In the same run, too, where they are made first. One that was there goes.
    os.utime(new / name, ns=(OLD - 1, OLD - 1))
    assert run(new, "--codings", "gz,br,dcz", "--dictionary", str(old)) == 0
    assert files(new) == {"sub/app.js", "sub/app.js.gz", "sub/app.js.br"}
    # One of another state of the file says nothing.
    for suffix in (".gz", ".br"):
        os.utime(new / f"sub/app.js{suffix}", ns=(OLD - 1, OLD - 1))
    assert run(new, *flags) == 0
    assert name in files(new)


@pytest.mark.parametrize(
    ("flags", "removed"),
    [
        ([], True),
        (["--codings", "gz"], False),
        (["--min-size", "1000000"], False),
        (["--exclude", "sub"], False),
    ],
)
def test_what_was_made_of_another_state_is_removed(
    old: Path, new: Path, capsys: pytest.CaptureFixture[str], flags: list[str], removed: bool
) -> None:
    assert run(new, "--codings", "dcz", "--dictionary", str(old)) == 0
    names = [dcz("sub/app.js", FIRST), dcz("sub/app.js", THIRD)]
    # The file is put back to an older state.
    make(new / "sub" / "app.js", SECOND + b"older", OLD - 5 * 10**9)
    current = make(new / names[1], b"x", OLD - 5 * 10**9)
    capsys.readouterr()
    assert run(new, *flags) == 0
    assert (new / names[0]).exists() is not removed
    assert current.exists()
    assert ("1 siblings removed" in capsys.readouterr().out) is removed
    # Those of a dictionary that is given are written anew.
    make(new / names[0], b"x", OLD)
    assert run(new, "--codings", "dcz", "--dictionary", str(old)) == 0
    assert decode((new / names[0]).read_bytes(), FIRST) == SECOND + b"older"
    assert "removed" not in capsys.readouterr().out


# -- what is the dictionary of what --------------------------------------------------------------------------


def find(directory: Path, dictionary: str) -> dict[str, str]:
    """The old path for each new one that has one."""
    root = ConfinedRoot(directory)
    old = OldFiles(dictionary)
    pairs = [(source, old.find(root, source)) for source in Tree(root, lambda path: False).sources()]
    old.close()
    root.close()
    return {source.path.decode(): found.path.decode() for source, found in pairs if found is not None}


def test_a_file_of_the_same_path_or_with_another_hash(old: Path, new: Path) -> None:
    for number, name in enumerate(["app.8f3a2b1c.js", "app.2b1c8f3a.js", "x/app.1c8f3a2b.js"]):
        make(old / name, b"%d" % number, OLD + number)
    make(old / "both.8f3a2b1c.css", b"by pattern", OLD + 9)
    make(old / "both.9a3b1c7d.css", b"by path")
    make(old / "empty.css", b"")
    for name in ("app.3a2b1c8f.js", "both.9a3b1c7d.css", "new.3a2b1c8f.js", "y/app.3a2b1c8f.js", "empty.css"):
        make(new / name, b"new")
    assert find(new, str(old)) == {
        "sub/app.js": "sub/app.js",
        "app.3a2b1c8f.js": "app.2b1c8f3a.js",
        "both.9a3b1c7d.css": "both.9a3b1c7d.css",
    }


def test_a_file_is_for_those_of_its_name_or_for_those_that_are_named(old: Path, new: Path) -> None:
    for name in ("a.html", "docs/b.html", "app.3a2b1c8f.js", "x/app.1c8f3a2b.js", "app.js"):
        make(new / name, b"new")
    hashed = make(old / "app.8f3a2b1c.js", b"old")
    words = make(old / "words=1.dat", b"words")
    assert find(new, str(old / "sub" / "app.js")) == {"app.js": "app.js", "sub/app.js": "app.js"}
    assert find(new, str(hashed)) == {
        "app.3a2b1c8f.js": "app.8f3a2b1c.js",
        "x/app.1c8f3a2b.js": "app.8f3a2b1c.js",
    }
    assert set(find(new, f"{words}=*.html")) == {"a.html", "docs/b.html"}
    assert set(find(new, f"{words}=docs/*")) == {"docs/b.html"}
    assert find(new, str(words)) == {}
    (old / "link.html").symlink_to("words=1.dat")
    assert find(new, f"{old}/link.html=a.html") == {"a.html": "words=1.dat"}
    (old / "app.js").symlink_to(hashed)
    assert set(find(new, str(old / "app.js"))) == {"app.js", "sub/app.js"}


def test_no_link_leads_out_of_an_old_release(old: Path, new: Path) -> None:
    make(old.parent / "secret.js", SECOND + b"secret")
    (old / "sub" / "app.js").unlink()
    (old / "sub" / "app.js").symlink_to("../../secret.js")
    assert find(new, str(old)) == {}


def test_who_finds_nothing_is_told(old: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(old / "sub" / "app.js", SECOND)
    assert run(new, "--codings", "dcz", "--dictionary", str(old)) == 0
    assert files(new) == {"sub/app.js"}
    assert f"--dictionary {old}: nothing here is a later state of it" in capsys.readouterr().err


def test_a_dictionary_that_no_window_reaches_back_over_is_refused_once(
    old: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = make(tmp_path / "words.dat", b"")
    os.truncate(words, 128 * MIB + 1)
    for name in ("a.html", "b.html"):
        make(new / name, FIRST)
    flags = ["--codings", "dcz", "--dictionary", f"{words}=*.html", "--dictionary", str(old)]
    assert run(new, *flags) == precompress.EXIT_FAILED
    assert files(new) == {"a.html", "b.html", "sub/app.js", dcz("sub/app.js", FIRST)}
    assert capsys.readouterr().err == "words.dat: too large for a dictionary, which has up to 128.0 MiB\n"


def test_a_large_dictionary_takes_its_time() -> None:
    source = Source(b"", b"a.html", 5000, OLD, {})
    small, large = (Task(source, make_dcz(FIRST[:32], size, bytes)).weight for size in (0, MIB))
    assert large - small == 20 * MIB


# -- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dictionary", "/no/such"],
            "there is no file or directory '/no/such'; give what was served before",
        ),
        (["--dictionary", "/no/such=*.js"], "there is no file or directory '/no/such=*.js'"),
        (["--dictionary", ".=*.js"], "there is no file or directory '.=*.js'"),
        (["--dictionary", "/dev/null"], "there is no file or directory '/dev/null'"),
        (["--dictionary", ""], "there is no file or directory ''"),
        (["--codings", "br,dcz"], "--codings: dcz needs a dictionary: --dictionary OLD"),
        (["--codings", "br", "--dictionary", "."], "--dictionary is for dcz, and --codings has none"),
        (["--clean", "--dictionary", "."], "--clean removes dcz siblings whatever their dictionary"),
    ],
)
def test_what_cannot_be_understood_is_said(new: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(new, *flags)
    assert message in str(caught.value)
    assert files(new) == {"sub/app.js"}


def test_without_zstd_it_is_said_what_is_missing(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sibling_encoders, "find_zstd", lambda: None)
    with pytest.raises(UsageError, match=r"--dictionary: zstd needs Python 3.14, or the package zstandard"):
        run(new, "--dictionary", str(old))


def test_a_dictionary_that_is_not_what_it_was_makes_no_sibling(old: Path, new: Path) -> None:
    root, before = ConfinedRoot(new), OldFiles(str(old))
    source = Source(b"sub", b"app.js", len(SECOND), OLD, {})
    found = before.find(root, source)
    assert found is not None
    make(old / "sub" / "app.js", FIRST + b"changed")
    result = write_sibling(root, Task(source, make_dcz(found.digest, found.size, found.read)), Event())
    assert (result.outcome, result.reason) == (
        Outcome.FAILED,
        "its dictionary changed meanwhile; run this again",
    )
    before.close()
    root.close()
    assert files(new) == {"sub/app.js"}


def test_a_dictionary_that_cannot_be_read_is_a_problem_of_that_file(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(old / "a.css", FIRST)
    make(new / "a.css", SECOND)

    def broken(self: OldFiles, root: ConfinedRoot, source: Source) -> Any:
        if source.name == b"a.css":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, root, source)

    real = OldFiles.find
    monkeypatch.setattr(OldFiles, "find", broken)
    assert run(new, "--codings", "dcz", "--dictionary", str(old)) == precompress.EXIT_FAILED
    assert "a.css: no dictionary: Input/output error" in capsys.readouterr().err
    assert files(new) == {"a.css", "sub/app.js", dcz("sub/app.js", FIRST)}


def test_a_full_disk_ends_it_before_the_dictionaries(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(target: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sibling_writer, "_write", full)
    assert run(new, "--codings", "gz,dcz", "--dictionary", str(old)) == precompress.EXIT_FAILED
    told = capsys.readouterr()
    assert told.err.count("No space left on device") == 1
    assert "sub/app.js.gz: No space left on device" in told.err
    assert files(new) == {"sub/app.js"}


def test_clean_removes_those_of_all_dictionaries(old: Path, new: Path) -> None:
    kept = {"gone.js.0123456789abcdef.dcz", "sub/app.js.old.dcz", "sub/app.js.gz"}
    for name in {*kept, "sub/app.js.0123456789abcdef.dcz"}:
        make(new / name, b"x")
    assert run(new, "--codings", "dcz", "--dictionary", str(old)) == 0
    assert run(new, "--clean", "--codings", "dcz") == 0
    assert files(new) == {"sub/app.js", *kept}
    make(new / "sub/app.js.0123456789abcdef.dcz", b"x")
    assert run(new, "--clean") == 0
    assert files(new) == {"sub/app.js", *kept - {"sub/app.js.gz"}}
