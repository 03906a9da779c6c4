"""A file and its precompressed siblings: found, opened, and chosen between.

`file_cache.py` calls `look` when it does not know a path or has not looked at it for a while, on the event loop first
(`nonblocking`) and in a thread where that does not do. Everything is opened through the same confined root, siblings
included. What comes out is an `Entry`, which never changes again: a file that has changed gets a new one.

    sibling                         is
    older than the file             stale, and ignored: somebody has changed the file and not run the build
    empty, while the file is not    the rest of a build that failed, and ignored
    for a dictionary, of another    made of another state of the file: `trioserve precompress`, which alone makes them,
    time than the file              gives them its time. A file may be put back to an older state

A sibling that was made with a dictionary is looked for when a client has that dictionary: its form is an `Entry` by
itself, which comes and goes as others do, and nobody else pays for it.
"""

from __future__ import annotations

import enum
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from trioserve.asgi.content_coding import IDENTITY, choose_coding
from trioserve.asgi.media_types import is_compressible
from trioserve.static.answers import NOSNIFF, VARY, VARY_DICTIONARY, Answer, Representation, error_answer
from trioserve.static.codings import DCZ, SUFFIXES, dcz_head, dcz_suffix, dcz_tag, source_of
from trioserve.static.conditional import Validators, make_validators
from trioserve.static.confine import ConfinedRoot, NeedsThread, NotServed, Opened
from trioserve.static.field_rules import FieldRules
from trioserve.static.open_file import OpenFile, read_start, read_whole, stamp
from trioserve.static.options import StaticOptions

# Values of Accept-Encoding whose choice an entry remembers: browsers send two or three, none of them longer than this.
# What a client may send else, times the files of a cache, would be gigabytes.
_MOST_CHOICES = 16
_LONGEST_CHOICE = 100


class WithDictionary(NamedTuple):
    """A file for who has a certain dictionary.

    Attributes:
        relative: the file's path below the root.
        dictionary: SHA-256 of the dictionary.
    """

    relative: bytes
    dictionary: bytes


#: What can be looked at: a path below the root, or the same with a dictionary.
Place = bytes | WithDictionary


class Absent(enum.Enum):
    """Why a path has no `Entry`."""

    #: There is nothing that is served.
    MISSING = enum.auto()
    #: There is something that the server's user may not read.
    DENIED = enum.auto()
    #: There is a directory.
    DIRECTORY = enum.auto()


class Entry:
    """One file in all its forms, as it was when it was looked at.

    Attributes:
        relative: its path below the root; where a dictionary is needed, with that.
        forms: by coding, the preferred first and the plain one last; of those that need a dictionary, one.
        by_dictionary: there may be forms that need a dictionary.
        stamp: changes with any of the files.
        settled: its validators cannot become stronger any more.
        valid_until: until when it is served without another look (the cache's clock).
        choices: forms by the values of Accept-Encoding that have been seen.
        used: it was asked for since the cache last thought of evicting it.
        paths: where the cache's shortcuts lead to it.
    """

    __slots__ = (
        "_codings", "by_dictionary", "choices", "forms", "paths", "relative", "settled", "stamp", "used",
        "valid_until",
    )  # fmt: skip

    def __init__(
        self, relative: Place, forms: Sequence[Representation], mark: tuple[Any, ...], *, by_dictionary: bool
    ) -> None:
        self.relative = relative
        self.by_dictionary = by_dictionary
        self.forms: Mapping[bytes, Representation] = {form.coding: form for form in forms}
        self._codings = tuple(self.forms)
        self.stamp = mark
        self.settled = all(form.validators.settled for form in forms)
        self.valid_until = 0.0
        self.used = False
        self.paths: list[tuple[dict[bytes, Entry], bytes]] = []
        self.choices: dict[bytes | None, Representation] = {}

    def __repr__(self) -> str:
        return f"<Entry {self.relative!r} as {', '.join(coding.decode() for coding in self._codings)}>"

    @property
    def memory(self) -> int:
        """Bytes of contents that it keeps."""
        return sum(len(form.content) for form in self.forms.values())

    @property
    def descriptors(self) -> int:
        """Files that it keeps open."""
        return sum(form.file is not None for form in self.forms.values())

    @property
    def vary(self) -> tuple[bytes, bytes]:
        """What an answer depends on for which a form had to be chosen."""
        return VARY_DICTIONARY if self.by_dictionary else VARY

    def yields_to_dcz(self, accept_encoding: bytes | None) -> bool:
        """Whether the client wants none of these forms more than one that was made with its dictionary."""
        return choose_coding(accept_encoding, (DCZ, *self._codings)) == DCZ

    def choose(self, accept_encoding: bytes | None) -> Representation | None:
        """The form that the client wants most (RFC 9110 section 12.5.3); None if it accepts none of them."""
        form = self.choices.get(accept_encoding)
        if form is None:
            coding = choose_coding(accept_encoding, self._codings)
            if coding is None:
                return None
            form = self.forms[coding]
            if accept_encoding is None or len(accept_encoding) <= _LONGEST_CHOICE:
                if len(self.choices) >= _MOST_CHOICES:
                    self.choices.clear()
                self.choices[accept_encoding] = form
        return form

    def answer(self, method: str, fields: Mapping[bytes, bytes]) -> Answer:
        """The answer to GET or HEAD; `fields` are the request's, at least those that `pick_fields` returns."""
        form = self.choose(fields.get(b"accept-encoding"))
        if form is None:
            return error_answer(406, self.vary)
        return form.answer(method, fields)

    def release(self) -> None:
        """Give back the files."""
        for form in self.forms.values():
            if form.file is not None:
                form.file.release()


@dataclass(frozen=True, slots=True)
class Looker:
    """Looks at paths for one mount.

    Attributes:
        root: everything is opened below it.
        wall: the time of day, as file times are.
    """

    root: ConfinedRoot
    options: StaticOptions
    rules: FieldRules
    wall: Callable[[], float]

    def look(self, place: Place, known: Entry | None, *, nonblocking: bool) -> Entry | Absent:
        """What lies at a place now; `known` itself if that is still what lies there.

        A new entry holds leases, which are the caller's.

        Raises:
            NeedsThread: only with `nonblocking`.
            OSError: the machine's fault: no descriptors left, a broken disk.
        """
        try:
            found = self._open(place, nonblocking=nonblocking)
        except NotServed as refused:
            return Absent.DENIED if refused.denied else Absent.MISSING
        try:
            if stat.S_ISDIR(found[IDENTITY].stat.st_mode):
                return Absent.DIRECTORY
            if known is not None and known.settled and known.stamp == _mark(found):
                return known
            return self._entry(place, found, nonblocking=nonblocking)
        finally:
            for file in found.values():
                file.release()

    def _open(self, place: Place, *, nonblocking: bool) -> dict[bytes, OpenFile]:
        """The file and those of its usable siblings that are asked for, by coding, the file last."""
        relative, dictionary = _parts(place)
        plain = _taken(self.root.open(relative, nonblocking=nonblocking))
        found: dict[bytes, OpenFile] = {}
        try:
            if stat.S_ISREG(plain.stat.st_mode) and source_of(relative) is None:
                if dictionary is None:
                    wanted = [(coding, SUFFIXES[coding], b"") for coding in self.options.codings]
                else:
                    wanted = [(DCZ, dcz_suffix(dictionary), dcz_head(dictionary))]
                for coding, suffix, head in wanted:
                    sibling = self._open_sibling(relative + suffix, plain.stat, head, nonblocking=nonblocking)
                    if sibling is not None:
                        found[coding] = sibling
            if dictionary is not None and not found:
                raise NotServed("a file that has not been compressed with this dictionary")
        except BaseException:
            for file in (plain, *found.values()):
                file.release()
            raise
        found[IDENTITY] = plain
        return found

    def _open_sibling(self, path: bytes, plain: Any, head: bytes, *, nonblocking: bool) -> OpenFile | None:
        """The sibling at this path, if it is usable and begins with `head`, as those for a dictionary do."""
        try:
            sibling = _taken(self.root.open(path, nonblocking=nonblocking))
        except NotServed:
            return None
        about = sibling.stat
        newer_by = about.st_mtime_ns - plain.st_mtime_ns
        usable = stat.S_ISREG(about.st_mode) and (newer_by == 0 if head else newer_by >= 0)
        try:
            if usable and (about.st_size or not plain.st_size) and _begins_with(sibling, head, nonblocking):
                return sibling
        except BaseException:
            sibling.release()
            raise
        sibling.release()
        return None

    def _entry(self, place: Place, found: Mapping[bytes, OpenFile], *, nonblocking: bool) -> Entry:
        relative, dictionary = _parts(place)
        mark = _mark(found)
        if dictionary is not None:
            # The others have an entry of their own.
            found = {DCZ: found[DCZ]}
        rules, options = self.rules, self.options
        kind = rules.content_type(relative)
        fields = [NOSNIFF, *rules.others(relative)]
        cache_control = rules.cache_control(relative)
        if cache_control:
            fields.append((b"cache-control", cache_control))
        by_dictionary = options.use_as_dictionary is not None
        # Also where there is no sibling yet: a cache that has the plain form must ask again for another coding.
        thinkable = (options.codings or by_dictionary) and is_compressible(kind)
        negotiated = bool(thinkable or dictionary or len(found) > 1)
        if negotiated:
            fields.append(VARY_DICTIONARY if by_dictionary else VARY)
        validators = _validators(found, dictionary, self.wall(), date_shared=negotiated and by_dictionary)
        # Contents first: what must be read in a thread leaves nothing half made here.
        contents = {
            coding: read_content(file, options.small_file, nonblocking=nonblocking)
            for coding, file in found.items()
        }
        forms = []
        for coding, file in found.items():
            content = contents[coding]
            if content is None:
                file.acquire()
            coded = [] if coding == IDENTITY else [(b"content-encoding", coding)]
            forms.append(
                Representation(
                    coding,
                    validators[coding],
                    file if content is None else content,
                    [(b"content-type", kind), *coded, *fields],
                    most_ranges=options.max_ranges,
                )
            )
        return Entry(place, forms, mark, by_dictionary=negotiated and by_dictionary)


def read_content(file: OpenFile, limit: int, *, nonblocking: bool) -> bytes | None:
    """The contents of a file of up to `limit` bytes; None where they are not kept in memory.

    Raises:
        NeedsThread: `nonblocking`, and they would have to be waited for.
        OSError: the file cannot be read.
    """
    if file.stat.st_size > limit:
        return None
    content = read_whole(file.fd, file.stat, nonblocking=nonblocking)
    if content is None and nonblocking:
        raise NeedsThread
    return content


def _parts(place: Place) -> tuple[bytes, bytes | None]:
    return place if isinstance(place, WithDictionary) else (place, None)


def _begins_with(file: OpenFile, head: bytes, nonblocking: bool) -> bool:
    if not head:
        return True
    start = read_start(file.fd, len(head), nonblocking=nonblocking)
    if start is None:
        raise NeedsThread
    return start == head


def _validators(
    found: Mapping[bytes, OpenFile], dictionary: bytes | None, now: float, *, date_shared: bool
) -> dict[bytes, Validators]:
    each = {}
    for coding, file in found.items():
        # Of one size and time, but made with different dictionaries, they are different bytes.
        by = coding if coding != DCZ or dictionary is None else b"%b-%b" % (coding, dcz_tag(dictionary))
        each[coding] = make_validators(file.stat, coding=by, now=now)
    # A build gives its files one time, `trioserve precompress` siblings that of their source. Of forms that need a
    # dictionary there may be any number, none of them here.
    dates = [validators.modified for validators in each.values()]
    return {
        coding: replace(validators, modified_shared=date_shared or dates.count(validators.modified) > 1)
        for coding, validators in each.items()
    }


def _taken(opened: Opened) -> OpenFile:
    return OpenFile(opened.fd, opened.stat)


def _mark(found: Mapping[bytes, OpenFile]) -> tuple[Any, ...]:
    return tuple((coding, stamp(file.stat)) for coding, file in found.items())
