"""The background writer: real files, real pipes with stalled readers, a real full device."""

from __future__ import annotations

import gc
import io
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trioserve.observe.log_file import PENDING_LIMIT
from trioserve.observe.log_writer import SLICE, LineHandler, LogWriter

LINGER = 0.005


@pytest.fixture
def writer() -> Iterator[LogWriter]:
    made = LogWriter(linger=LINGER)
    yield made
    made.close(10)
    assert not made.statistics().alive


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.002)


def open_fds() -> int:
    return len(os.listdir("/dev/fd"))


def notice(count: int) -> bytes:
    return f"dropped {count}\n".encode()


def test_lines_arrive_in_order(writer: LogWriter, tmp_path: Path) -> None:
    lane = writer.add_lane(writer.open(tmp_path / "log").write_lines)
    expected = [f"line {number}\n".encode() for number in range(5000)]
    for line in expected:
        lane.put(line)
    assert writer.close(30)
    assert (tmp_path / "log").read_bytes() == b"".join(expected)
    now = writer.statistics()
    assert (now.lines_written, now.dropped, now.errors, now.queued, now.pending_bytes) == (5000, 0, 0, 0, 0)
    assert now.bytes_written == len(b"".join(expected))
    assert "closed" in repr(writer)


def test_an_existing_file_is_appended_to_and_new_ones_are_not_writable_by_others(
    writer: LogWriter, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("old\n")
    lane = writer.add_lane(writer.open(str(tmp_path / "log")).write_lines)
    writer.open(tmp_path / "fresh")
    lane.put(b"new\n")
    assert writer.close(30)
    assert (tmp_path / "log").read_text() == "old\nnew\n"
    assert (tmp_path / "fresh").stat().st_mode & 0o022 == 0


def test_one_thread_and_few_writes_for_many_lines_in_two_files(writer: LogWriter, tmp_path: Path) -> None:
    before = threading.active_count()
    lanes = [writer.add_lane(writer.open(tmp_path / name).write_lines) for name in ("a", "b")]
    began = time.monotonic()
    for _ in range(2000):
        for lane in lanes:
            lane.put(b"x\n")
    assert writer.close(30)
    assert threading.active_count() <= before
    now = writer.statistics()
    assert now.lines_written == 4000
    # The thread lets lines gather for as long as it lingers; a busy machine takes longer to make them.
    rounds = 3 + (time.monotonic() - began) / LINGER
    assert now.writes <= 4000 / SLICE + 2 * rounds
    # A line wakes the thread only when it sleeps.
    assert now.wakeups <= rounds


def test_the_thread_sleeps_while_there_is_nothing_to_do(writer: LogWriter, tmp_path: Path) -> None:
    lane = writer.add_lane(writer.open(tmp_path / "log").write_lines, notice=notice)
    lane.put(b"x\n")
    wait_until(lambda: writer.statistics().lines_written == 1 and writer.asleep)
    before = writer.statistics().wakeups
    time.sleep(0.15)
    assert writer.statistics().wakeups == before


def test_the_same_path_is_opened_once(writer: LogWriter, tmp_path: Path) -> None:
    assert writer.open(tmp_path / "log") is writer.open(str(tmp_path / "log"))
    assert writer.open(tmp_path / "log") is not writer.open(tmp_path / "other")
    with pytest.raises(OSError):
        writer.open(tmp_path / "no such folder" / "log")


def test_a_full_queue_drops_the_new_line_and_says_how_many(writer: LogWriter, tmp_path: Path) -> None:
    file = writer.open(tmp_path / "log")
    release = threading.Event()
    entered = threading.Event()

    def deliver(batch: list[bytes]) -> int:
        entered.set()
        release.wait(60)
        return file.write_lines(batch)

    lane = writer.add_lane(deliver, notice=notice, capacity=10)
    lane.put(b"first\n")
    assert entered.wait(30)
    for number in range(25):
        lane.put(f"{number}\n".encode())
    assert (len(lane), lane.dropped) == (10, 15)
    release.set()
    wait_until(lambda: writer.statistics().lines_written == 12)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["first", *map(str, range(10)), "dropped 15"]
    lane.put(b"after\n")
    assert writer.close(30)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "after"


def test_a_stalled_pipe_blocks_neither_put_nor_other_files_nor_close(tmp_path: Path) -> None:
    reader, sender = os.pipe()
    writer = LogWriter(linger=0)
    stream = os.fdopen(sender, "w")
    stalled = writer.open(stream, pending_limit=10_000)
    pipe_lane = writer.add_lane(stalled.write_lines, notice=notice)
    file_lane = writer.add_lane(writer.open(tmp_path / "log").write_lines)
    line = b"x" * 99 + b"\n"
    slowest = 0.0
    for _ in range(5000):
        start = time.perf_counter()
        pipe_lane.put(line)
        slowest = max(slowest, time.perf_counter() - start)
    file_lane.put(b"still alive\n")
    wait_until(lambda: (tmp_path / "log").read_text() == "still alive\n")
    assert slowest < 5
    wait_until(lambda: not len(pipe_lane))
    assert pipe_lane.dropped > 3000
    start = time.monotonic()
    assert not writer.close(0.3)
    assert 0.2 < time.monotonic() - start < 10
    wait_until(lambda: not writer.statistics().alive)
    stream.close()
    with os.fdopen(reader, "rb") as rest:
        content = rest.read()
    # What the reader finds are whole lines.
    assert set(content.splitlines(keepends=True)) == {line}


def test_a_pipe_that_is_read_again_gets_everything_that_was_kept(writer: LogWriter) -> None:
    reader, sender = os.pipe()
    with os.fdopen(sender, "w") as stream, os.fdopen(reader, "rb", buffering=0) as end:
        lane = writer.add_lane(writer.open(stream).write_lines)
        expected = b"".join(f"{number:0>90}\n".encode() for number in range(5000))
        for line in expected.splitlines(keepends=True):
            lane.put(line)
        wait_until(lambda: not len(lane) and writer.statistics().pending_bytes > 0)
        received = b""
        while len(received) < len(expected):
            received += end.read(65536)
        assert received == expected
        assert writer.statistics().dropped == 0


def test_a_non_blocking_pipe_and_lines_longer_than_its_buffer(writer: LogWriter) -> None:
    reader, sender = os.pipe()
    os.set_blocking(sender, False)
    with os.fdopen(sender, "w") as stream, os.fdopen(reader, "rb", buffering=0) as end:
        lane = writer.add_lane(writer.open(stream).write_lines)
        line = b"y" * 300_000 + b"\n"
        lane.put(line)
        received = b""
        while len(received) < len(line):
            received += end.read(65536)
        assert received == line


def test_a_reader_that_has_gone_is_told_once_and_does_not_delay_the_exit(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reader, sender = os.pipe()
    os.close(reader)
    writer = LogWriter(linger=0)
    with os.fdopen(sender, "w") as stream:
        lane = writer.add_lane(writer.open(stream).write_lines)
        for _ in range(20):
            lane.put(b"into the void\n")
        wait_until(lambda: writer.statistics().errors > 0)
        lane.put(b"and again\n")
        start = time.monotonic()
        assert not writer.close(60)
        assert time.monotonic() - start < 30
    assert capfd.readouterr().err.count("Broken pipe") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
def test_a_full_disk_is_counted_and_survived(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trioserve.observe.log_file.RETRY_FIRST", 0.02)
    link = tmp_path / "log"
    link.symlink_to("/dev/full")
    writer = LogWriter(linger=0)
    lane = writer.add_lane(writer.open(link).write_lines)
    lane.put(b"one\n")
    wait_until(lambda: writer.statistics().errors >= 2)
    # The disk has room again: as a new file under the same name.
    link.unlink()
    writer.reopen()
    lane.put(b"two\n")
    assert writer.close(30)
    assert link.read_text() == "one\ntwo\n"
    error = capfd.readouterr().err
    assert error.count("No space left on device") == 1
    assert str(link) in error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
def test_a_stream_that_cannot_be_written_is_told_by_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    writer = LogWriter(linger=0)
    with Path("/dev/full").open("w") as stream:
        writer.add_lane(writer.open(stream).write_lines).put(b"one\n")
        assert not writer.close(30)
    assert "trioserve: cannot write the log /dev/full: " in capfd.readouterr().err


def test_a_half_written_line_is_written_as_a_whole_into_a_reopened_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel take a part of the write, as a disk does that is just getting full."""
    script = """
import os, resource, signal, sys, time
from pathlib import Path
from trioserve.observe.log_writer import LogWriter
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1050, 1 << 20))
writer = LogWriter(linger=0)
lane = writer.add_lane(writer.open(folder / "log").write_lines)
for number in range(20):
    lane.put(b"%099d\\n" % number)
while not writer.statistics().errors:
    time.sleep(0.005)
(folder / "log").rename(folder / "log.1")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
writer.reopen()
assert writer.close(30)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, stderr=subprocess.DEVNULL)
    old, new = (tmp_path / "log.1").read_bytes(), (tmp_path / "log").read_bytes()
    assert len(old) == 1050
    assert [int(line) for line in new.splitlines()] == list(range(10, 20))


def test_rotation_under_concurrent_writing_loses_nothing(writer: LogWriter, tmp_path: Path) -> None:
    log = tmp_path / "log"
    lane = writer.add_lane(writer.open(log).write_lines, capacity=1_000_000)
    done = threading.Event()

    def produce(name: int) -> None:
        for number in range(8000):
            lane.put(f"{name} {number}\n".encode())
            if number % 200 == 0:
                time.sleep(0.001)

    threads = [threading.Thread(target=produce, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    rotations = 0
    while not done.is_set():
        # As logrotate does: move, signal, go on.
        log.rename(tmp_path / f"log.{rotations}")
        rotations += 1
        writer.reopen()
        wait_until(log.exists)
        if not any(thread.is_alive() for thread in threads):
            done.set()
    for thread in threads:
        thread.join()
    assert writer.close(30)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for path in [*(tmp_path / f"log.{number}" for number in range(rotations)), log]:
        for line in path.read_text().splitlines():
            name, number = line.split()
            seen[int(name)].append(int(number))
    assert rotations > 2
    assert all(numbers == list(range(8000)) for numbers in seen.values())


def test_a_reopen_that_fails_keeps_the_old_file(
    writer: LogWriter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    lane = writer.add_lane(writer.open(folder / "log").write_lines)
    folder.rename(tmp_path / "moved")
    writer.reopen()
    wait_until(lambda: writer.statistics().errors == 1)
    lane.put(b"kept\n")
    assert writer.close(30)
    assert (tmp_path / "moved" / "log").read_text() == "kept\n"
    assert "cannot reopen" in capfd.readouterr().err


def test_a_stream_without_a_descriptor_is_written_to(writer: LogWriter) -> None:
    stream = io.StringIO()
    lane = writer.add_lane(writer.open(stream).write_lines)
    lane.put("grün\n".encode())
    wait_until(lambda: stream.getvalue() == "grün\n")
    writer.reopen()
    assert writer.close(30)
    assert not stream.closed


def test_the_descriptor_of_a_stream_is_duplicated(writer: LogWriter) -> None:
    """Or closing the original would let our lines into whatever gets its number next."""
    reader, sender = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as end:
        with os.fdopen(sender, "w") as stream:
            lane = writer.add_lane(writer.open(stream).write_lines)
        lane.put(b"x\n")
        assert end.read(10) == b"x\n"


def test_an_urgent_lane_does_not_linger(tmp_path: Path) -> None:
    writer = LogWriter(linger=300)
    lane = writer.add_lane(writer.open(tmp_path / "log").write_lines)
    urgent = writer.add_lane(writer.open(tmp_path / "urgent").write_lines, urgent=True)
    lane.put(b"patient\n")
    urgent.put(b"now\n")
    wait_until(lambda: (tmp_path / "urgent").read_text() == "now\n")
    lane.put(b"more\n")
    # Nor does close(), also when the thread lingers: it would not be done in this time.
    assert writer.close(30)
    assert (tmp_path / "log").read_text() == "patient\nmore\n"


def test_a_receiver_that_raises_costs_its_lines_only(
    writer: LogWriter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def deliver(batch: list[object]) -> int:
        raise ZeroDivisionError("in the formatter")

    bad = writer.add_lane(deliver, notice=lambda count: count)
    good = writer.add_lane(writer.open(tmp_path / "log").write_lines)
    bad.put(1)
    wait_until(lambda: bad.dropped == 1)
    bad.put(1)
    wait_until(lambda: bad.dropped == 2)
    good.put(b"fine\n")
    assert writer.close(30)
    assert (tmp_path / "log").read_text() == "fine\n"
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1


def test_close_is_idempotent_and_later_lines_are_counted(tmp_path: Path) -> None:
    before = open_fds()
    writer = LogWriter()
    lane = writer.add_lane(writer.open(tmp_path / "log").write_lines)
    assert writer.close(30)
    assert writer.close(30)
    lane.put(b"too late\n")
    writer.reopen()
    assert lane.dropped == 1
    assert (tmp_path / "log").read_bytes() == b""
    assert open_fds() == before


def test_a_line_just_before_close_is_never_lost(tmp_path: Path) -> None:
    """The thread is in the midst of a pass, or asleep, or lingering, at that moment."""
    for number in range(300):
        writer = LogWriter(linger=0.0005)
        path = tmp_path / f"log{number}"
        lane = writer.add_lane(writer.open(path).write_lines, urgent=bool(number % 2))
        lane.put(b"one\n")
        for _ in range(number % 7 * 100):
            pass
        lane.put(b"two\n")
        assert writer.close(30)
        assert path.read_bytes() == b"one\ntwo\n"


def test_lines_are_written_when_the_interpreter_ends_without_close(tmp_path: Path) -> None:
    script = """
import sys
from trioserve.observe.log_writer import LogWriter
writer = LogWriter(linger=10)
writer.add_lane(writer.open(sys.argv[1]).write_lines).put(b"last words\\n")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "log")], check=True)
    assert (tmp_path / "log").read_text() == "last words\n"


def test_what_does_not_fit_is_dropped_line_by_line(tmp_path: Path) -> None:
    writer = LogWriter()
    file = writer.open(tmp_path / "log", pending_limit=10)
    writer.close(30)  # from here on the file is ours alone
    assert file.write_lines([b"12345\n", b"123456\n", b"12\n", b"1\n"]) == 2
    assert file.pending_bytes == 9
    assert PENDING_LIMIT > 1_000_000


class Local:
    """Something that a frame holds."""


def test_the_handler_keeps_no_frames_alive(writer: LogWriter, tmp_path: Path) -> None:
    release = threading.Event()
    file = writer.open(tmp_path / "log")

    def deliver(batch: list[bytes]) -> int:
        release.wait(60)
        return file.write_lines(batch)

    handler = LineHandler(writer.add_lane(deliver))
    logger = logging.Logger("test")  # noqa: LOG001 - one that nobody else knows
    logger.addHandler(handler)

    def fail() -> weakref.ref[Local]:
        local = Local()
        try:
            raise ValueError("boom")
        except ValueError:
            logger.exception("it %s", "broke")
        return weakref.ref(local)

    held = fail()
    gc.collect()
    assert held() is None
    release.set()
    assert writer.close(30)
    text = (tmp_path / "log").read_text()
    assert text.startswith("it broke\nTraceback")
    assert text.endswith("ValueError: boom\n")


def test_the_handler_reports_a_record_that_cannot_be_formatted(
    writer: LogWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = LineHandler(writer.add_lane(writer.open(tmp_path / "log").write_lines))
    logger = logging.Logger("test")  # noqa: LOG001
    logger.addHandler(handler)
    logger.error("%d", "no number")
    logger.error("fine \udcff")
    logger.info("", extra={"metric": "app.jobs", "value": 1, "mtype": "counter"})
    assert writer.close(30)
    assert (tmp_path / "log").read_text() == "fine \\udcff\n"
    assert "--- Logging error ---" in capsys.readouterr().err
