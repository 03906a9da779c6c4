"""`trioserve precompress DIR`: write compressed siblings of the files below a directory, for the server to send.

Called by `cli.py`. A plain blocking program: threads compress (brotli, zlib and zstd leave the interpreter to others
while they work, so that processes would only cost memory and a harder end), the main thread looks on. Ctrl-C and
SIGTERM stop it within about a second: what is finished stays, what is not leaves no trace.

Exit codes: 0 done, 1 some could not be written, 2 usage, 74 it cannot print what it says, 130 and 143 after Ctrl-C
and SIGTERM.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import signal
import stat
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from trioserve.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, ConfigError, UsageError
from trioserve.observe.command_line import CommandParser, say
from trioserve.static.codings import DCZ, SUFFIXES, coding_of
from trioserve.static.confine import ConfinedRoot, NotServed
from trioserve.static.old_files import OldFile, OldFiles, matcher
from trioserve.static.precompress_report import Report
from trioserve.static.sibling_encoders import (
    LARGEST_DICTIONARY,
    LARGEST_KEPT,
    Coding,
    available_codings,
    make_dcz,
)
from trioserve.static.sibling_writer import (
    Outcome,
    Result,
    Source,
    Task,
    Tree,
    reason_of,
    remove_below,
    write_sibling,
)
from trioserve.static.text import name_as_text, size_as_text

EXIT_FAILED = 1

_COMMAND: Final = "trioserve precompress"

#: With its head, a response of up to a kibibyte leaves in one packet as it is: smaller would not be sooner.
MIN_SIZE: Final = 1024

# How people call the codings.
_NAMES: Final[dict[str, bytes]] = {
    "br": b"br",
    "brotli": b"br",
    "zst": b"zstd",
    "zstd": b"zstd",
    "gz": b"gzip",
    "gzip": b"gzip",
    "dcz": DCZ,
}

_NO_ZSTD: Final = "zstd needs Python 3.14, or the package zstandard (pip install trioserve[compression])"

# Dictionaries that are worked through once for all their files: beyond these, little is saved for the memory.
_MOST_SHARED: Final = 16

# Seconds between two looks at what the threads are doing.
_LOOK: Final = 0.1


def run_precompress(argv: Sequence[str]) -> int:
    """Carry out `trioserve precompress` with these arguments; returns the exit code.

    Raises:
        UsageError: for `cli.main` to print.
        SystemExit: after --help.
    """
    try:
        return _run(build_precompress_parser().parse(argv))
    except UsageError as error:
        error.command = _COMMAND
        raise


def _run(asked: argparse.Namespace) -> int:
    if asked.clean and asked.dictionary:
        raise UsageError("--clean removes dcz siblings whatever their dictionary: leave --dictionary out")
    # To remove siblings takes their names only.
    codings = [] if asked.clean else _chosen_codings(asked)
    report = Report(quiet=asked.quiet)
    code = EXIT_OK
    with ExitStack() as stack:
        root = stack.enter_context(closing(_open_root(asked.directory)))
        tree = Tree(root, matcher(asked.exclude))
        try:
            with _sigterm_interrupts():
                if asked.clean:
                    _clean(tree, asked.codings or [*SUFFIXES, DCZ], report)
                else:
                    old_files = [stack.enter_context(closing(OldFiles(text))) for text in asked.dictionary]
                    _precompress(tree, codings, old_files, asked, report)
        except KeyboardInterrupt as interrupt:
            code = EXIT_SIGTERM if isinstance(interrupt, _Terminated) else EXIT_SIGINT
            report.remark("stopped; what had been finished stays")
        finally:
            report.end()
    report.summarise(asked)
    return code or (EXIT_FAILED if report.failed else EXIT_OK)


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, so that it leaves no half files either."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # where handlers cannot be set
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- arguments -----------------------------------------------------------------------------------------------

_EPILOG: Final = f"""\
Of app.js it makes app.js.br, app.js.zst and app.js.gz, each at its highest level, with the mode and the time of app.js.
The server sends the one that a client prefers among those it accepts, and ignores siblings that are older than their
source: copy the tree with its times (cp -a, rsync -a, tar). Run it again after each build; only what has changed is
compressed. A file of such a name that you have made yourself is taken for a sibling, here and by the server.

With --dictionary it makes app.js.<hash>.dcz as well: app.js for who has an old file, in a tenth of the bytes or less
if they are alike (RFC 9842). StaticFiles sends it with use_as_dictionary; see README. Of a directory it takes the file
of the same path, or the last one whose name differs only in the hash that the build has put into it. The server
ignores a .dcz that has not the very time of its source, and this removes it, whatever its dictionary.

Left alone: types that are compressed already, dot files, what is under --min-size, directories behind links. A sibling
that would not save 5 % is not written, and removed if it is there; .dcz by comparison with the smallest of the others.

examples:
  trioserve precompress dist
  trioserve precompress dist --codings br,gz --exclude '*.map' --exclude drafts
  trioserve precompress dist --dictionary ../releases/41 --dictionary ../releases/42
  trioserve precompress dist --dictionary 'words.dat=*.html'
  trioserve precompress dist --clean

Exit codes: 0 done, {EXIT_FAILED} some could not be written, 2 usage.
"""


def build_precompress_parser() -> CommandParser:
    """The parser of `trioserve precompress`."""
    parser = CommandParser(
        prog=_COMMAND,
        description="Write compressed siblings of the files below a directory, for the server to send.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.surplus = "only one directory can be compressed, but there is also {!r}"
    parser.add_argument("directory", metavar="DIR", help="the directory that is served")
    parser.add_argument(
        "--codings",
        metavar="LIST",
        type=_codings,
        help="which siblings, of br, zst, gz and, with --dictionary, dcz, separated by commas; all of them by default",
    )
    parser.add_argument(
        "--dictionary",
        metavar="OLD",
        action="append",
        default=[],
        help="what clients may have: the directory of an earlier release, a file, or FILE=PATTERN to name the files "
        f"that it is the dictionary of (repeatable); up to {size_as_text(LARGEST_DICTIONARY)}",
    )
    parser.add_argument(
        "--min-size",
        metavar="BYTES",
        type=_number(0, 2**63),
        default=MIN_SIZE,
        help=f"leave smaller files alone; {MIN_SIZE} bytes by default, which go in one packet anyway",
    )
    parser.add_argument(
        "--exclude",
        metavar="PATTERN",
        action="append",
        default=[],
        help="leave files and directories of this name alone; with a slash, of this path below DIR (repeatable)",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_number(1, 1024),
        default=_processors(),
        help="compress so many files at a time, as many as there are processors by default; brotli needs some "
        "100 MB for one of 8 MB",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--force", action="store_true", help="write siblings anew that are up to date")
    how.add_argument("--clean", action="store_true", help="remove the siblings of such files instead")
    parser.add_argument("--quiet", action="store_true", help="say nothing but what went wrong")
    return parser


def _number(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")

    return check


def _codings(text: str) -> list[bytes]:
    words = [word.strip().lower().removeprefix(".") for word in text.split(",")]
    for word in words:
        if word not in _NAMES:
            raise argparse.ArgumentTypeError(f"{word!r} is no coding; choose among br, zst, gz and dcz")
    return [_NAMES[word] for word in words]


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chosen_codings(asked: argparse.Namespace) -> list[Coding]:
    available = available_codings()
    named: list[bytes] | None = asked.codings
    if named and DCZ in named and not asked.dictionary:
        raise UsageError("--codings: dcz needs a dictionary: --dictionary OLD")
    if asked.dictionary and named and DCZ not in named:
        raise UsageError("--dictionary is for dcz, and --codings has none")
    if asked.dictionary and b"zstd" not in available:
        raise UsageError(f"--dictionary: {_NO_ZSTD}")
    if any(name not in available for name in named or SUFFIXES if name != DCZ):
        if named:
            raise UsageError(f"--codings: {_NO_ZSTD}")
        if not asked.quiet:
            say(f"no .zst siblings are written: {_NO_ZSTD}", sys.stderr)
    return [available[name] for name in SUFFIXES if name in available and name in (named or SUFFIXES)]


def _open_root(directory: str) -> ConfinedRoot:
    path = Path(directory)
    advice = "give the directory whose files are served"
    if not directory or not path.exists():
        raise UsageError(f"there is no directory {name_as_text(directory)!r}; {advice}")
    if not path.is_dir():
        raise UsageError(f"{name_as_text(directory)!r} is not a directory; {advice}")
    try:
        return ConfinedRoot(directory)
    except ConfigError as error:
        raise UsageError(str(error)) from None


# -- compressing ---------------------------------------------------------------------------------------------


def _precompress(
    tree: Tree,
    codings: Sequence[Coding],
    old_files: Sequence[OldFiles],
    asked: argparse.Namespace,
    report: Report,
) -> None:
    tasks: list[Task] = []
    later: list[Task] = []
    found: list[tuple[Source, dict[bytes, OldFile]]] = []
    for source in tree.sources():
        if source.size >= asked.min_size:
            tasks += _due(source, codings, asked, report)
            found.append((source, _old_files_of(tree, source, old_files, report)))
    by_digest = _dcz_codings(found)
    for source, olds in found:
        by_dictionary = [by_digest[digest] for digest in olds]
        later += _due(source, by_dictionary, asked, report)
        if not asked.codings or DCZ in asked.codings:
            # What was made of another state of it, with dictionaries that are not given now.
            due = {coding.suffix for coding in by_dictionary}
            past = [s for s in source.siblings if s not in due and not source.has_current(s)]
            _remove_siblings(tree, source, [s for s in past if coding_of(s) == DCZ], report)
    for path, reason in itertools.chain(tree.problems, *(each.problems for each in old_files)):
        report.problem(path, reason)
    for each in old_files:
        if not each.found and not each.problems:
            report.remark(f"--dictionary {name_as_text(each.text)}: nothing here is a later state of it")
    # Whether a sibling that needs a dictionary is worth it is seen by the others.
    if _Crew(tree.root, tasks, asked.jobs).run(report):
        _Crew(tree.root, later, asked.jobs).run(report)


def _due(
    source: Source, codings: Sequence[Coding], asked: argparse.Namespace, report: Report
) -> Iterator[Task]:
    for coding in codings:
        if source.has_current(coding.suffix) and not asked.force:
            report.tally(coding.name).current += 1
        else:
            yield Task(source, coding)


def _old_files_of(
    tree: Tree, source: Source, old_files: Sequence[OldFiles], report: Report
) -> dict[bytes, OldFile]:
    """By their digests: several releases may have the same."""
    found: dict[bytes, OldFile] = {}
    for each in old_files:
        try:
            old = each.find(tree.root, source)
        except NotServed as problem:
            report.problem(source.path, f"no dictionary: {problem.reason}")
        except OSError as problem:
            report.problem(source.path, f"no dictionary: {reason_of(problem)}")
        else:
            if old is not None:
                found[old.digest] = old
    return found


def _dcz_codings(found: Sequence[tuple[Source, dict[bytes, OldFile]]]) -> dict[bytes, Coding]:
    """One coding for each old file, by its digest."""
    users = Counter(digest for _, olds in found for digest in olds)
    old_files = {digest: old for _, olds in found for digest, old in olds.items()}
    # To the end of the run they are in memory: those with which most is saved, together no more than one may have.
    shared: set[bytes] = set()
    left = LARGEST_KEPT
    several = [digest for digest, count in users.items() if count > 1]
    several.sort(key=lambda digest: users[digest] * old_files[digest].size, reverse=True)
    for digest in several[:_MOST_SHARED]:
        if old_files[digest].size <= left:
            left -= old_files[digest].size
            shared.add(digest)
    return {
        digest: make_dcz(digest, old.size, old.read, shared=digest in shared)
        for digest, old in old_files.items()
    }


class _Crew:
    """The threads that work through the tasks; the main thread collects what came of them."""

    def __init__(self, root: ConfinedRoot, tasks: Sequence[Task], jobs: int) -> None:
        self._root = root
        self._total = len(tasks)
        self._weight = sum(task.weight for task in tasks)
        # What takes longest goes first, or in the end all would wait for it.
        self._waiting = deque(sorted(tasks, key=lambda task: task.weight, reverse=True))
        self._results: queue.SimpleQueue[tuple[Task, Result]] = queue.SimpleQueue()
        self._running: dict[int, Task] = {}
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"precompress-{number}")
            for number in range(min(jobs, len(tasks)))
        ]

    def run(self, report: Report) -> bool:
        """Until all is done, the disk fails, or Ctrl-C; returns whether the disk has not failed."""
        finished = weight = 0
        try:
            for thread in self._threads:
                thread.start()
            while finished < self._total:
                running = list(self._running.values())
                done = weight + sum(task.weight_done for task in running)
                report.show(done / self._weight, f"{finished:,} of {self._total:,}", running)
                try:
                    task, result = self._results.get(timeout=_LOOK)
                except queue.Empty:
                    continue
                finished, weight = finished + 1, weight + task.weight
                report.note(task, result)
                if result.outcome is Outcome.DISK_FAILED:
                    report.remark("stopped: the others would fail in the same way")
                    return False
            return True
        finally:
            self._stop()
            while not self._results.empty():
                report.note(*self._results.get())

    def _stop(self) -> None:
        while True:
            try:
                self._stopped.set()
                for thread in self._threads:
                    if thread.ident is not None:
                        thread.join()
                return
            except KeyboardInterrupt:
                continue  # they are ending already; to leave now would leave their files behind

    def _work(self, number: int) -> None:
        while not self._stopped.is_set():
            try:
                task = self._waiting.popleft()
            except IndexError:
                return
            self._running[number] = task
            result = write_sibling(self._root, task, self._stopped)
            if result.outcome is Outcome.DISK_FAILED:
                self._stopped.set()
            self._results.put((task, result))
            self._running.pop(number)


# -- cleaning ------------------------------------------------------------------------------------------------


def _clean(tree: Tree, codings: Sequence[bytes], report: Report) -> None:
    """Remove the siblings of files that would get some, whatever their size is now."""
    for source in tree.sources():
        _remove_siblings(tree, source, [s for s in source.siblings if coding_of(s) in codings], report)
    for path in tree.leftovers:
        _remove(tree, path, 0, report)
    for path, reason in tree.problems:
        report.problem(path, reason)


def _remove_siblings(tree: Tree, source: Source, suffixes: Iterable[bytes], report: Report) -> None:
    for suffix in suffixes:
        found = source.siblings[suffix]
        if stat.S_ISREG(found.st_mode):
            _remove(tree, source.path + suffix, found.st_size, report)


def _remove(tree: Tree, path: bytes, size: int, report: Report) -> None:
    try:
        removed = remove_below(tree.root, path)
    except NotServed as problem:
        report.problem(path, problem.reason)
    except OSError as problem:
        report.problem(path, reason_of(problem))
    else:
        if removed:
            report.removed(path, size)
