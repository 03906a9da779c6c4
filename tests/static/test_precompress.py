"""`trioserve precompress`: a sibling is whole, decodes to its source, looks as old as it, or is not there."""

from __future__ import annotations

import _thread
import errno
import gzip
import io
import os
import pty
import random
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import brotli
import pytest

from trioserve.errors import UsageError
from trioserve.static import precompress, sibling_encoders, sibling_writer
from trioserve.static.codings import SUFFIXES
from trioserve.static.confine import ConfinedRoot, NotServed
from trioserve.static.precompress import EXIT_FAILED, run_precompress
from trioserve.static.progress import ProgressLine, progress_text
from trioserve.static.sibling_encoders import Coding, Encoder, available_codings
from trioserve.static.sibling_writer import (
    LEFTOVER,
    Outcome,
    Result,
    Source,
    Task,
    Tree,
    remove_below,
    write_sibling,
)

TEXT = b"It was the best of times, it was the worst of times; " * 200
OLD = 1_700_000_000_123_456_789

# The command, as `trioserve.cli` would run it.
COMMAND = (
    "import sys; from trioserve.static.precompress import run_precompress as r; sys.exit(r(sys.argv[1:]))"
)

HAS_ZSTD = b"zstd" in available_codings()


def unzstd(data: bytes) -> bytes:
    module = sibling_encoders.find_zstd()
    assert module is not None
    return module.decompress(data)  # type: ignore[no-any-return]


DECODE = {".br": brotli.decompress, ".gz": gzip.decompress, ".zst": unzstd}


def make(path: Path, data: bytes = TEXT, mtime_ns: int = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def run(directory: Path, *flags: str) -> int:
    """Without zstd, which is not everywhere."""
    return run_precompress([str(directory), "--codings", "br,gz", "--jobs", "2", *flags])


def write(directory: Path, name: str, coding: Coding) -> Result:
    """One sibling of a file in this directory."""
    source = Source(b"", name.encode(), len(TEXT), OLD, {})
    root = ConfinedRoot(directory)
    try:
        return write_sibling(root, Task(source, coding), Event())
    finally:
        root.close()


def meddling(feed: Callable[[bytes], bytes]) -> Coding:
    """A coding during whose work something happens."""
    return Coding(b"br", lambda size: Encoder(feed, lambda: b"end"), 1)


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coding", ["br", "gz", pytest.param("zst", marks=pytest.mark.skipif(not HAS_ZSTD, reason="no zstd here"))]
)
def test_a_sibling_decodes_to_its_source_and_has_its_mode_and_time(tmp_path, coding):
    source = make(tmp_path / "sub" / "app.js", TEXT * 40)
    source.chmod(0o4751)
    assert run_precompress([str(tmp_path), "--codings", coding]) == 0
    sibling = source.with_name(f"app.js.{coding}")
    assert files(tmp_path) == {"sub/app.js", f"sub/app.js.{coding}"}
    assert DECODE[f".{coding}"](sibling.read_bytes()) == TEXT * 40
    found = sibling.stat()
    assert stat.S_IMODE(found.st_mode) == 0o751
    assert found.st_mtime_ns == OLD
    assert (found.st_uid, found.st_gid) == (source.stat().st_uid, source.stat().st_gid)


def test_all_codings_that_are_there_are_made(tmp_path):
    make(tmp_path / "a.css")
    assert run_precompress([str(tmp_path), "--quiet"]) == 0
    made = {SUFFIXES[coding].decode() for coding in available_codings()}
    assert files(tmp_path) == {"a.css"} | {f"a.css{suffix}" for suffix in made}
    assert made >= {".br", ".gz"}


def test_the_same_source_makes_the_same_bytes(tmp_path):
    for name in ("a.txt", "b.txt"):
        make(tmp_path / name, mtime_ns=OLD + len(files(tmp_path)))
    assert run(tmp_path) == 0
    head = (tmp_path / "a.txt.gz").read_bytes()[:10]
    assert head[3] == 0, "flags: no name"
    assert head[4:8] == b"\0\0\0\0", "no time"
    for suffix in (".br", ".gz"):
        assert (tmp_path / f"a.txt{suffix}").read_bytes() == (tmp_path / f"b.txt{suffix}").read_bytes()


def test_siblings_are_as_small_as_it_gets(tmp_path):
    words = random.Random(1).choices([f"word{number}" for number in range(500)], k=10_000)
    data = " ".join(words).encode()
    make(tmp_path / "a.txt", data)
    assert run(tmp_path) == 0
    assert (tmp_path / "a.txt.gz").stat().st_size <= len(zlib.compress(data, 9)) + 32
    assert (tmp_path / "a.txt.br").stat().st_size <= len(brotli.compress(data, quality=11)) + 32


@pytest.mark.parametrize(("size", "window"), [(0, 16), (65_519, 16), (65_520, 17), (2**20, 21), (2**30, 24)])
def test_brotlis_window_covers_the_source_and_no_more(size, window, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sibling_encoders.brotli, "Compressor", lambda **options: asked.append(options) or Nothing()
    )
    available_codings()[b"br"].begin(size)
    assert asked == [{"quality": 11, "lgwin": window}]


class Nothing:
    process = finish = None


@pytest.mark.skipif(not HAS_ZSTD, reason="no zstd here")
def test_zstd_asks_no_larger_window_of_the_client_than_the_source_fills(tmp_path):
    make(tmp_path / "a.txt")
    assert run_precompress([str(tmp_path), "--codings", "zst", "--quiet"]) == 0
    descriptor = (tmp_path / "a.txt.zst").read_bytes()[4]
    assert descriptor & 0x20, "RFC 8878, 3.1.1.1.1: a single segment, with the content's size for a window"


def test_a_sibling_has_no_more_readers_than_its_source(tmp_path, monkeypatch):
    """Where the source's group cannot be given to it."""
    source = make(tmp_path / "a.txt")
    source.chmod(0o664)
    found = list(source.stat())
    found[5] = source.stat().st_gid + 1
    strange = os.stat_result(found, {"st_mtime_ns": OLD})

    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    fd = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    try:
        sibling_writer._finish(fd, strange)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o644
    finally:
        os.close(fd)


# -- which files ---------------------------------------------------------------------------------------------


def test_only_types_that_shrink_get_siblings_and_siblings_never_do(tmp_path):
    for name in ("a.html", "a.svg", "a.wasm", "a.png", "a.woff2", "a.zip", "a.html.gz", "a.bin", "a.html.br"):
        make(tmp_path / name)
    assert run(tmp_path) == 0
    assert run(tmp_path, "--force") == 0
    made = {name for name in files(tmp_path) if name.endswith((".br", ".gz"))}
    assert made == {f"a.{kind}.{coding}" for kind in ("html", "svg", "wasm") for coding in ("br", "gz")}


def test_small_files_are_left_alone(tmp_path):
    make(tmp_path / "1023.txt", b"x" * 1023)
    make(tmp_path / "1024.txt", b"x" * 1024)
    make(tmp_path / "empty.txt", b"")
    assert run(tmp_path) == 0
    assert files(tmp_path) == {"1023.txt", "1024.txt", "empty.txt", "1024.txt.br", "1024.txt.gz"}
    assert run(tmp_path, "--min-size", "0") == 0
    assert "1023.txt.br" in files(tmp_path)
    assert "empty.txt.br" not in files(tmp_path)


def test_dot_files_are_left_alone_but_for_well_known(tmp_path):
    for name in (
        ".env.txt",
        ".git/a.txt",
        "sub/.well-known/a.txt",
        ".well-known/a.json",
        ".well-known/.b.json",
    ):
        make(tmp_path / name)
    assert run(tmp_path, "--codings", "gz") == 0
    assert {name for name in files(tmp_path) if name.endswith(".gz")} == {".well-known/a.json.gz"}


def test_exclusions_go_by_name_or_by_path(tmp_path):
    for name in ("a.js", "a.js.map", "drafts/a.js", "docs/drafts/a.js", "docs/api/a.js", "api/a.js"):
        make(tmp_path / name)
    flags = [
        flag for pattern in ("*.map", "drafts/", "/api", "docs/a*/*.css") for flag in ("--exclude", pattern)
    ]
    assert run(tmp_path, "--codings", "gz", *flags) == 0
    assert {name for name in files(tmp_path) if name.endswith(".gz")} == {"a.js.gz", "docs/api/a.js.gz"}


def test_links_lead_to_nothing_outside(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    make(outside / "secret.txt")
    make(root / "sub" / "real.txt")
    (root / "file.txt").symlink_to(outside / "secret.txt")
    (root / "up.txt").symlink_to("../outside/secret.txt")
    (root / "directory").symlink_to(outside)
    (root / "again").symlink_to("sub")
    (root / "loop").symlink_to(".")
    (root / "dangling.txt").symlink_to("nowhere.txt")
    (root / "inside.txt").symlink_to("sub/real.txt")
    os.mkfifo(root / "pipe.txt")
    before = files(root)
    assert run(root, "--codings", "gz") == 0
    assert files(root) - before == {"inside.txt.gz", "sub/real.txt.gz"}
    assert files(outside) == {"secret.txt"}
    assert not (root / "inside.txt.gz").is_symlink()
    assert (root / "inside.txt.gz").stat().st_mtime_ns == OLD


def test_a_link_in_the_siblings_place_is_replaced_not_followed(tmp_path):
    make(tmp_path / "a.txt")
    victim = make(tmp_path / "victim.bin", b"precious")
    (tmp_path / "a.txt.gz").symlink_to("victim.bin")
    assert run(tmp_path) == 0
    assert victim.read_bytes() == b"precious"
    assert gzip.decompress((tmp_path / "a.txt.gz").read_bytes()) == TEXT


@pytest.mark.parametrize(
    "name", [b"caf\xe9.txt", b"new\nline.txt", "日本.txt".encode(), b"\x1b[31m.txt", b" .txt"]
)
def test_any_name_will_do(tmp_path, name, capfd):
    path = os.path.join(os.fsencode(tmp_path), name)
    make(Path(os.fsdecode(path)))
    assert run(tmp_path) == 0
    assert os.path.exists(path + b".br")
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert out.count("\n") == 4


# -- again ---------------------------------------------------------------------------------------------------


def written_at(directory: Path) -> dict[str, int]:
    return {
        name: (directory / name).stat().st_ctime_ns
        for name in files(directory)
        if name.endswith((".br", ".gz"))
    }


def test_what_is_up_to_date_is_left_as_it_is(tmp_path, capsys):
    make(tmp_path / "a.txt")
    make(tmp_path / "b.txt")
    assert run(tmp_path) == 0
    before = written_at(tmp_path)
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert written_at(tmp_path) == before
    assert capsys.readouterr().out == ".br   2 up to date\n.gz   2 up to date\n"
    assert run(tmp_path, "--force") == 0
    assert not set(written_at(tmp_path).values()) & set(before.values())


@pytest.mark.parametrize("step", [1, -1, 10**9, -(10**9)])
def test_a_source_that_was_changed_or_put_back_gets_new_ones(tmp_path, step):
    make(tmp_path / "a.txt")
    assert run(tmp_path) == 0
    make(tmp_path / "a.txt", TEXT[::-1], OLD + step)
    assert run(tmp_path) == 0
    assert gzip.decompress((tmp_path / "a.txt.gz").read_bytes()) == TEXT[::-1]
    assert (tmp_path / "a.txt.gz").stat().st_mtime_ns == OLD + step


def test_an_empty_file_in_the_siblings_place_is_no_sibling(tmp_path):
    make(tmp_path / "a.txt")
    make(tmp_path / "a.txt.br", b"")
    assert run(tmp_path) == 0
    assert brotli.decompress((tmp_path / "a.txt.br").read_bytes()) == TEXT


def test_what_does_not_shrink_gets_none_and_loses_an_old_one(tmp_path, capsys):
    noise = random.Random(1).randbytes(100_000)
    make(tmp_path / "noise.json", noise)
    make(tmp_path / "noise.json.br", b"of another state", OLD - 1)
    # 4 % are not enough, 6 % are.
    make(tmp_path / "four.json", noise[:96_000] + bytes(4_000))
    make(tmp_path / "six.json", noise[:94_000] + bytes(6_000))
    assert run(tmp_path) == 0
    assert files(tmp_path) == {"noise.json", "four.json", "six.json", "six.json.br", "six.json.gz"}
    out = capsys.readouterr().out
    assert "noise.json.br: not smaller\n" in out
    assert ".gz   1 written, 2 not smaller; 97.7 KiB -> " in out


# -- what goes wrong -----------------------------------------------------------------------------------------


def change_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"that")


def change_and_set_the_time_back(path: Path) -> None:
    change_in_place(path)
    os.utime(path, ns=(OLD, OLD))


def replace(path: Path) -> None:
    make(path.with_name("new"), TEXT)
    path.with_name("new").rename(path)


CHANGES = [
    change_in_place,
    change_and_set_the_time_back,
    replace,
    lambda path: os.truncate(path, 10),
    lambda path: os.truncate(path, 10**6),
    lambda path: path.unlink(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_meanwhile_gets_no_sibling(tmp_path, change):
    source = make(tmp_path / "a.txt", TEXT * 20)

    def feed(part: bytes) -> bytes:
        if source.exists():
            change(source)
        return b""

    result = write(tmp_path, "a.txt", meddling(feed))
    assert result.outcome is Outcome.FAILED
    assert "changed while it was being compressed" in result.reason
    assert files(tmp_path) <= {"a.txt"}


def test_reading_begins_when_a_write_can_no_longer_leave_the_time_as_it_is(tmp_path):
    """The clock that files get their times from may stand still for some milliseconds."""
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(TEXT)
        file.flush()
        found = sibling_writer._settled_stat(file.fileno())
        assert time.time_ns() - found.st_mtime_ns >= sibling_writer._TICK
        assert found.st_size == len(TEXT)


@pytest.mark.parametrize("distance", [-(10**9), 10**12])
def test_a_source_with_another_time_than_now_is_not_waited_for(tmp_path, distance):
    """Far in the past or, by a wrong clock, in the future."""
    make(tmp_path / "a.txt", mtime_ns=time.time_ns() + distance)
    begun = time.monotonic()
    assert write(tmp_path, "a.txt", available_codings()[b"gzip"]).outcome is Outcome.WRITTEN
    assert time.monotonic() - begun < 30


def test_a_source_that_changes_later_makes_its_sibling_older(tmp_path):
    source = make(tmp_path / "a.txt", mtime_ns=time.time_ns())
    assert run(tmp_path) == 0
    change_in_place(source)
    assert (tmp_path / "a.txt.br").stat().st_mtime_ns < source.stat().st_mtime_ns


@pytest.mark.parametrize("name", ["gone.txt", "sub/gone.txt"])
def test_a_source_that_has_gone_is_named(tmp_path, name):
    directory, _, file = name.rpartition("/")
    source = Source(directory.encode(), file.encode(), 5000, OLD, {})
    root = ConfinedRoot(tmp_path)
    result = write_sibling(root, Task(source, available_codings()[b"br"]), Event())
    root.close()
    assert (result.outcome, result.reason) == (Outcome.FAILED, "no such file or directory")


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch, capsys):
    for number in range(20):
        make(tmp_path / f"{number}.txt")

    def feed(part: bytes) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(precompress, "available_codings", lambda: {b"br": meddling(feed)})
    assert run_precompress([str(tmp_path), "--codings", "br", "--jobs", "1"]) == EXIT_FAILED
    shown = capsys.readouterr()
    first, second = shown.err.splitlines()
    assert first.endswith(".txt.br: No space left on device")
    assert second == "stopped: the others would fail in the same way"
    assert not [name for name in files(tmp_path) if not name.endswith(".txt")]


def test_a_write_that_the_system_refuses_is_named_and_leaves_nothing(tmp_path):
    """A limit on the size of files, which a real system enforces in the middle of the writing."""
    data = random.Random(2).randbytes(60_000).hex().encode()
    make(tmp_path / "a.txt", data)
    limited = (
        "import resource, sys; from trioserve.static.precompress import run_precompress as r; "
        "before = resource.getrlimit(resource.RLIMIT_FSIZE); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1])); code = r(sys.argv[1:]); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, before); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path), "--codings", "br,gz"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == EXIT_FAILED, done
    assert sorted(done.stderr.splitlines()) == ["a.txt.br: File too large", "a.txt.gz: File too large"]
    assert done.stdout == "2 failed\n"
    assert files(tmp_path) == {"a.txt"}


def test_one_failure_does_not_keep_the_others(tmp_path, capsys):
    make(tmp_path / "a.txt")
    make(tmp_path / "b.txt")
    (tmp_path / "a.txt.br" / "in the way").mkdir(parents=True)
    assert run(tmp_path) == EXIT_FAILED
    shown = capsys.readouterr()
    assert shown.err == f"a.txt.br: {os.strerror(errno.EISDIR)}\n"
    assert shown.out.endswith("1 failed\n")
    assert files(tmp_path) == {"a.txt", "b.txt", "a.txt.gz", "b.txt.br", "b.txt.gz"}


def test_a_name_that_has_no_room_for_a_suffix_is_a_failure(tmp_path, capsys):
    make(tmp_path / ("x" * 251 + ".txt"))
    assert run(tmp_path, "--codings", "br") == EXIT_FAILED
    assert capsys.readouterr().err.endswith(f".br: {os.strerror(errno.ENAMETOOLONG)}\n")
    assert len(files(tmp_path)) == 1


def test_an_encoder_that_breaks_is_named(tmp_path):
    def feed(part: bytes) -> bytes:
        raise brotli.error("encoder failed")

    make(tmp_path / "a.txt")
    result = write(tmp_path, "a.txt", meddling(feed))
    assert (result.outcome, result.reason) == (Outcome.FAILED, "error: encoder failed")
    assert files(tmp_path) == {"a.txt"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path, capsys):
    make(tmp_path / "a.txt").chmod(0)
    make(tmp_path / "closed" / "b.txt").parent.chmod(0)
    try:
        assert run(tmp_path, "--codings", "br") == EXIT_FAILED
        assert sorted(capsys.readouterr().err.splitlines()) == [
            "a.txt.br: permission denied",
            "closed: permission denied",
        ]
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_directory_that_goes_away_while_it_is_looked_for_is_named(tmp_path):
    (tmp_path / "sub").mkdir()

    def is_excluded(path: bytes) -> bool:
        (tmp_path / "sub").rmdir()
        return False

    root = ConfinedRoot(tmp_path)
    tree = Tree(root, is_excluded)
    assert list(tree.sources()) == []
    root.close()
    assert tree.problems == [(b"sub", "no such file or directory")]


def test_a_sibling_that_goes_away_while_it_is_looked_for_is_none(tmp_path):
    for name in ("a.txt", "a.txt.br", "a.txt.gz", "b.txt"):
        make(tmp_path / name)

    def is_excluded(path: bytes) -> bool:
        if path == b"a.txt":
            (tmp_path / "a.txt.br").unlink()
        return False

    root = ConfinedRoot(tmp_path)
    tree = Tree(root, is_excluded)
    sources = {source.name: list(source.siblings) for source in tree.sources()}
    root.close()
    assert sources == {b"a.txt": [b".gz"], b"b.txt": []}
    assert tree.problems == []


# -- being stopped -------------------------------------------------------------------------------------------


@pytest.fixture
def slow_site(tmp_path: Path) -> Path:
    """Half a minute of work."""
    data = random.Random(3).randbytes(4_000_000).hex().encode()
    for number in range(3):
        make(tmp_path / f"{number}.txt", data)
    make(tmp_path / "short.txt")
    return tmp_path


# A signal that raises in coverage's tracer leaves its lock held, and the process hangs.
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half_files(slow_site, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(slow_site), "--codings", "br", "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, ExitStack() as at_end:
        at_end.callback(process.kill)
        deadline = time.monotonic() + 60
        while not any(LEFTOVER.fullmatch(os.fsencode(path.name)) for path in slow_site.iterdir()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert err == "stopped; what had been finished stays\n"
    assert files(slow_site) == {"0.txt", "1.txt", "2.txt", "short.txt"}


def test_ctrl_c_again_and_again_still_leaves_no_half_files(tmp_path, monkeypatch):
    for number in range(4):
        make(tmp_path / f"{number}.txt", TEXT * 30)

    def feed(part: bytes) -> bytes:
        _thread.interrupt_main()
        return b"x"

    monkeypatch.setattr(precompress, "available_codings", lambda: {b"br": meddling(feed)})
    handler = signal.getsignal(signal.SIGTERM)
    assert run_precompress([str(tmp_path), "--codings", "br", "--jobs", "4", "--quiet"]) == 130
    left = files(tmp_path) - {f"{number}.txt" for number in range(4)}
    # What was complete when it was heard is allowed.
    assert left <= {f"{number}.txt.br" for number in range(4)}
    assert signal.getsignal(signal.SIGTERM) is handler


def test_it_may_be_called_in_any_thread(tmp_path):
    """Where no handler of signals can be set."""
    make(tmp_path / "a.txt")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, tmp_path).result() == 0
    assert "a.txt.br" in files(tmp_path)


def test_a_run_that_is_stopped_between_two_parts_leaves_nothing(tmp_path):
    make(tmp_path / "a.txt", TEXT * 20)
    stopped, fed = Event(), []

    def feed(part: bytes) -> bytes:
        fed.append(part)
        stopped.set()
        return b"x"

    root = ConfinedRoot(tmp_path)
    for length in (len(TEXT) * 20, len(TEXT)):
        stopped.clear()
        make(tmp_path / "a.txt", TEXT[:1] * length)
        task = Task(Source(b"", b"a.txt", length, OLD, {}), meddling(feed))
        assert write_sibling(root, task, stopped).outcome is Outcome.STOPPED
    root.close()
    assert len(fed) == 2
    assert files(tmp_path) == {"a.txt"}


# -- cleaning ------------------------------------------------------------------------------------------------


def test_clean_removes_what_it_would_have_written_and_nothing_else(tmp_path, capsys):
    make(tmp_path / "sub" / "a.txt")
    make(tmp_path / "small.txt", b"small")
    make(tmp_path / "photo.png")
    kept = {"photo.png.gz", "gone.txt.gz", "alone.tar.gz", "sub/other.br", "a.txt.gz.sig"}
    for name in {*kept, "small.txt.gz", "sub/a.txt.zst", ".trioserve-precompress-12-3.tmp"}:
        make(tmp_path / name, b"x")
    (tmp_path / "small.txt.br").symlink_to("photo.png")
    (tmp_path / "small.txt.zst").mkdir()
    assert run(tmp_path) == 0
    capsys.readouterr()
    assert run_precompress([str(tmp_path), "--clean"]) == 0
    assert files(tmp_path) == {"sub/a.txt", "small.txt", "small.txt.br", "photo.png", *kept}
    assert capsys.readouterr().out.splitlines()[-1].startswith("5 siblings removed, ")


def test_clean_takes_only_the_codings_it_is_told(tmp_path):
    for name in ("a.txt", "a.txt.br", "a.txt.gz", "a.txt.zst"):
        make(tmp_path / name)
    assert run_precompress([str(tmp_path), "--clean", "--codings", "zst,gzip", "--quiet"]) == 0
    assert files(tmp_path) == {"a.txt", "a.txt.br"}


@pytest.mark.parametrize(
    ("problem", "reason"),
    [(PermissionError(errno.EACCES, "Permission denied"), "Permission denied"), (NotServed("gone"), "gone")],
)
def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys, problem, reason):
    for name in ("a.txt", "a.txt.br"):
        make(tmp_path / name)

    def refuse(root: ConfinedRoot, path: bytes) -> bool:
        raise problem

    monkeypatch.setattr(precompress, "remove_below", refuse)
    assert run_precompress([str(tmp_path), "--clean"]) == EXIT_FAILED
    assert capsys.readouterr() == ("0 siblings removed, 0 B\n1 failed\n", f"a.txt.br: {reason}\n")


def test_what_is_gone_already_is_not_counted_as_removed(tmp_path):
    root = ConfinedRoot(tmp_path)
    (tmp_path / "directory").mkdir()
    make(tmp_path / "sub" / "file")
    assert [remove_below(root, path) for path in (b"gone", b"directory", b"sub/file")] == [False, False, True]
    root.close()


def test_clean_needs_no_zstd(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sibling_encoders, "find_zstd", lambda: None)
    for name in ("a.txt", "a.txt.zst"):
        make(tmp_path / name)
    assert run_precompress([str(tmp_path), "--clean"]) == 0
    assert files(tmp_path) == {"a.txt"}
    assert capsys.readouterr().err == ""


# -- the command line ----------------------------------------------------------------------------------------


def test_without_zstd_the_others_are_made_and_it_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sibling_encoders, "find_zstd", lambda: None)
    for name in ("a.txt", "b.txt"):
        make(tmp_path / name)
    assert run_precompress([str(tmp_path)]) == 0
    assert {name[-3:] for name in files(tmp_path)} == {"txt", ".br", ".gz"}
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install trioserve[compression]" in err
    with pytest.raises(UsageError, match="zstd needs Python"):
        run_precompress([str(tmp_path), "--codings", "br,zst"])


def test_zstd_of_either_making_is_used(monkeypatch):
    class Stdlib:
        """As `compression.zstd`."""

        pledged = 0

        def __init__(self, level: int) -> None:
            assert level == 19

        def set_pledged_input_size(self, size: int) -> None:
            Stdlib.pledged = size

        compress = flush = staticmethod(lambda data=b"": b"")

    class Module:
        ZstdCompressor = Stdlib

    monkeypatch.setattr(sibling_encoders, "find_zstd", lambda: Module)
    available_codings()[b"zstd"].begin(77)
    assert Stdlib.pledged == 77


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["/no/such"], "there is no directory '/no/such'"),
        ([""], "there is no directory ''"),
        ([__file__], "is not a directory"),
        ([], "DIR"),
        ([".", "--jobs", "0"], "'0' is not a whole number of at least 1"),
        ([".", "--min-size", "-1"], "'-1' is not a whole number"),
        ([".", "--min-size", "9" * 30], "is not a whole number"),
        ([".", "--codings", "br,lzma"], "'lzma' is no coding; choose among br, zst, gz and dcz"),
        ([".", "--codings", ""], "'' is no coding"),
        ([".", "--clean", "--force"], "not allowed with"),
        ([".", "--cle"], "unknown flag --cle"),
        ([".", "dist"], "only one directory can be compressed, but there is also 'dist'"),
    ],
)
def test_what_cannot_be_understood_is_said(flags, message):
    with pytest.raises(UsageError) as caught:
        run_precompress(flags)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_help_tells_what_is_left_alone(capsys):
    with pytest.raises(SystemExit) as caught:
        run_precompress(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--min-size BYTES" in out
    assert "dot files" in out


def test_nothing_to_do_is_said(tmp_path, capsys):
    make(tmp_path / "a.png")
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.startswith("nothing to compress: no file of 1,024 bytes or more")


def test_quiet_is_quiet(tmp_path, capsys):
    make(tmp_path / "a.txt")
    (tmp_path / "b.txt.br").mkdir()
    make(tmp_path / "b.txt")
    assert run(tmp_path, "--quiet") == EXIT_FAILED
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"b.txt.br: {os.strerror(errno.EISDIR)}\n")


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each(tmp_path, capsys):
    make(tmp_path / "a.txt")
    assert run(tmp_path, "--codings", "gz") == 0
    shown = capsys.readouterr()
    size = (tmp_path / "a.txt.gz").stat().st_size
    assert shown.out == (
        f"a.txt.gz: 10.4 KiB -> {size} B, 99 % saved\n.gz   1 written; 10.4 KiB -> {size} B, 99 % saved\n"
    )
    assert shown.err == ""


def test_a_reader_that_has_enough_does_not_end_the_work(tmp_path):
    for number in range(30):
        make(tmp_path / f"{number}.txt")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(tmp_path), "--codings", "gz"],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(files(tmp_path)) == 60


def test_a_terminal_of_another_encoding_does_not_end_the_work(tmp_path):
    make(tmp_path / "日本.txt")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path), "--codings", "gz"],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "latin-1:strict"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"\u65e5\u672c.txt.gz: ")


# -- progress ------------------------------------------------------------------------------------------------


def test_a_terminal_has_a_bar_and_no_lines(tmp_path):
    data = random.Random(3).randbytes(15_000).hex().encode()
    make(tmp_path / "a.txt", data)
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(tmp_path), "--codings", "br"],
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=120,
            text=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.set_blocking(ours, False)
        drawn = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "] " in drawn
    assert "0 of 1" in drawn
    assert drawn.endswith("\r\x1b[K"), "nothing of it is left"
    assert "\n" not in drawn


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def xterm(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_the_line_is_drawn_no_more_often_than_can_be_seen(xterm):
    line = ProgressLine(xterm)
    for _ in range(1000):
        line.show(0.5, "x")
    assert 1 <= xterm.getvalue().count("\r") < 20
    line.clear()
    line.clear()
    assert xterm.getvalue().endswith("x\r\x1b[K")


def test_a_terminal_that_goes_away_does_not_end_the_work(xterm):
    line = ProgressLine(xterm)
    xterm.close()
    line.show(0.5, "x")
    assert not line.is_shown


def test_there_is_no_line_where_the_cursor_cannot_go_back(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not ProgressLine(Terminal()).is_shown
    monkeypatch.setenv("TERM", "xterm")
    assert not ProgressLine(io.StringIO()).is_shown
    quiet = io.StringIO()
    ProgressLine(quiet).show(0.5, "x")
    assert quiet.getvalue() == ""


@pytest.mark.parametrize(
    ("share", "text", "width", "shown"),
    [
        (0.0, "a", 60, "[....................]   0 %  a"),
        (0.5, "a", 60, "[##########..........]  50 %  a"),
        (0.999, "a", 60, "[###################.]  99 %  a"),
        (1.0, "a", 60, "[####################] 100 %  a"),
        (7.0, "a", 20, "100 %  a"),
        (0.5, "a long text", 12, " 50 %  a lon"),
        (0.5, "日本語", 12, " 50 %  日本"),
        (0.5, "e\u0301e\u0301e\u0301", 10, " 50 %  e\u0301e\u0301e\u0301"),
        (0.5, "x", 0, ""),
        (-1.0, "x", 3, "  0"),
    ],
)
def test_the_line_fits_the_terminal(share, text, width, shown):
    assert progress_text(share, text, width) == shown
