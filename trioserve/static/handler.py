"""`StaticFiles`: a directory as an ASGI app.

Made by whoever serves files: an app that mounts it, `mounts.py` for the setting `static_mounts`, `command.py` for
`trioserve static`. A request's way: the path below the mount (`mount_path.py`), the names in it (`request_path.py`),
the file (`file_cache.py`, `variants.py`), the answer (`answers.py`), its bytes (`sending.py`). `quick_answer` is the
same for what is in the cache, without a wait or a scope.

    nothing here        spa page, else the fallthrough app, else 404 with the not_found page
    not to be read      the same, or 403 where the operator wants that
    GET, HEAD           200, 206, 304, 406, 412, 416; a directory without its slash is redirected to the one with it
    OPTIONS, others     204 and 405 with Allow, but only for what is here

Cancelling a request lets a thread that looks at a file finish, and gives back the file. It runs on trio and on asyncio,
on one event loop at a time.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack
from urllib.parse import quote

from trioserve.static import listing
from trioserve.static.accept import media_quality
from trioserve.static.answers import ALLOW, CONDITIONAL, Answer, error_answer, text_answer
from trioserve.static.confine import ConfinedRoot, NotServed, RootClosed
from trioserve.static.dictionaries import available_dictionary, may_reveal
from trioserve.static.field_rules import FieldRules
from trioserve.static.file_cache import FileCache, OutOfDescriptors
from trioserve.static.mount_path import path_below
from trioserve.static.options import StaticKeywords, StaticOptions
from trioserve.static.request_fields import pick_fields
from trioserve.static.request_path import PathRefused, RequestPath, parse_request_path
from trioserve.static.sending import send_answer
from trioserve.static.threads import in_thread
from trioserve.static.variants import Absent, Entry, Looker, WithDictionary
from trioserve.structure.context import Receive, Scope, Send

_log = logging.getLogger("trioserve.static")

_READING = ("GET", "HEAD")

_VARY_ACCEPT = (b"vary", b"accept")
_RETRY = (b"retry-after", b"1")

# What of a file's fields says nothing of the 404 whose body it is.
_NOT_ON_404 = frozenset(
    {
        b"etag", b"last-modified", b"accept-ranges", b"cache-control", b"content-disposition",
        b"use-as-dictionary",
    }
)  # fmt: skip

# Without one of these a request gets the whole of a form that Accept-Encoding alone has chosen.
_PARTICULAR = CONDITIONAL | {b"available-dictionary"}

# What may follow the "?" of a Location as it came.
_QUERY = re.compile(rb"[!-~]+")


@dataclass(slots=True)
class _Request:
    """What the handler wants to know of a request."""

    scope: Scope
    method: str
    fields: Mapping[bytes, bytes]
    below: bytes
    path: RequestPath | None = None


class StaticFiles:
    """Serves the files of a directory.

    The keyword arguments are described in `StaticOptions`. Descriptors are kept open between requests: `close()` gives
    them back, as does the lifespan's shutdown; a request after that opens the directory again.

    Attributes:
        directory: its real path.
        options: settled.
    """

    def __init__(self, directory: str | os.PathLike[str], **options: Unpack[StaticKeywords]) -> None:
        """Raises `ConfigError` for a directory that cannot be opened, and for an option that is wrong."""
        self.options = StaticOptions.checked(options)
        self._rules = FieldRules(self.options)
        self._given = os.path.abspath(directory)  # noqa: PTH100 - links are to be looked at when it is opened
        self._root: ConfinedRoot | None = None
        self._cache: FileCache
        self._open()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """A subclass with a `__call__` of its own (it asks for a password) sees every request."""
        super().__init_subclass__(**keywords)
        if cls.__call__ is not StaticFiles.__call__ and cls.quick_answer is StaticFiles.quick_answer:
            cls.quick_answer = None  # type: ignore[method-assign,assignment]

    def __repr__(self) -> str:
        return (
            f"<StaticFiles {self.directory}{f', {self._cache!r}' if self._root is not None else ', closed'}>"
        )

    def _open(self) -> ConfinedRoot:
        self._root = root = ConfinedRoot(self._given, symlinks=self.options.symlinks)
        self.directory = root.path
        self._cache = FileCache(Looker(root, self.options, self._rules, time.time))
        return root

    def close(self) -> None:
        """Give back all descriptors; those of files that are being sent when that is done."""
        if self._root is not None:
            self._cache.close()
            self._root.close()
            self._root = None

    # -- ASGI ------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; as an app of its own also a lifespan, and with 404 a WebSocket."""
        if scope["type"] == "http":
            # By its class: a subclass may have none for the server.
            fields = pick_fields(scope["headers"])
            answer = StaticFiles.quick_answer(
                self, scope["method"], scope.get("raw_path"), fields, scope.get("root_path", "")
            )
            if answer is None:
                answer = await self._answer(scope, fields)
            if answer is not None:
                await send_answer(answer, scope, send)
                return
        elif scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if self.options.fallthrough is not None:
            await self.options.fallthrough(scope, receive, send)
        elif scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
        else:
            raise ValueError(f"StaticFiles serves http, not {scope['type']!r:.40}")

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.options.fallthrough is not None:
                await self.options.fallthrough(scope, receive, send)
                return
            while True:
                event = (await receive())["type"].removeprefix("lifespan.")
                if event == "shutdown":
                    self.close()
                await send({"type": f"lifespan.{event}.complete"})
                if event == "shutdown":
                    return
        finally:
            self.close()

    def quick_answer(
        self,
        method: str,
        raw_path: bytes | None,
        fields: Mapping[bytes, bytes],
        root_path: str = "",
    ) -> Answer | None:
        """The answer to GET or HEAD for a file that is in the cache and fresh; None where more has to be done.

        For a server that has no scope yet, too, which thereby passes `__call__`: None in a subclass that has its own.
        `fields` are the request's by name, all of them or those that `pick_fields` returns.
        The caller takes a lease on the answer's `file`, if it has one, before anything else can run, and must not
        change its fields.
        """
        paths = self._cache.shortcuts.get(root_path)
        if paths is None:
            return None
        entry = paths.get(raw_path)  # type: ignore[arg-type] # None is no key of it
        if entry is None or self._cache.clock() >= entry.valid_until or method not in _READING:
            return None
        entry.used = True
        # Most requests, without the calls that find out the same.
        form = entry.choices.get(fields.get(b"accept-encoding"))
        if form is not None and method == "GET" and _PARTICULAR.isdisjoint(fields):
            return form.whole
        if b"available-dictionary" in fields and entry.by_dictionary:
            return None
        return entry.answer(method, fields) if form is None else form.answer(method, fields)

    # -- one request -----------------------------------------------------------------------------------------

    async def _answer(self, scope: Scope, fields: Mapping[bytes, bytes]) -> Answer | None:
        """The answer to a request; None for the fallthrough app."""
        if self._root is None:
            self._open()
        request = _Request(scope, scope["method"], fields, path_below(scope))
        try:
            found = await self._look_up(request)
            if isinstance(found, Entry):
                found = await self._preferred(found, request)
            if found is Absent.DENIED and self.options.forbidden == 403:
                return error_answer(403)
            if isinstance(found, Absent):
                return await self._nothing(request)
            return self._answer_with(found, request)
        except OutOfDescriptors as error:
            _log.warning("no descriptors left for files: %s", error)
            return error_answer(503, _RETRY)
        except RootClosed:
            return error_answer(503, _RETRY)
        except OSError as error:
            _log.error("%s: the file system has failed: %s", self.directory, error)
            return error_answer(500)

    def _answer_with(self, found: Entry | Answer, request: _Request) -> Answer:
        if request.method == "OPTIONS":
            return Answer(204, [ALLOW, *self.options.headers])
        if request.method not in _READING:
            return error_answer(405, ALLOW)
        return found.answer(request.method, request.fields) if isinstance(found, Entry) else found

    async def _preferred(self, entry: Entry, request: _Request) -> Entry | Absent:
        """What to answer from: a form made with the client's dictionary where that is there and wanted."""
        fields = request.fields
        given = fields.get(b"available-dictionary")
        if given is None or not entry.by_dictionary or request.method not in _READING:
            return entry
        if not entry.yields_to_dcz(fields.get(b"accept-encoding")):
            return entry
        dictionary = available_dictionary(given)
        if dictionary is None or not may_reveal(request.scope["headers"], dict(self.options.headers)):
            return entry
        assert isinstance(entry.relative, bytes)
        try:
            found = await self._cache.find(WithDictionary(entry.relative, dictionary))
        except (OutOfDescriptors, OSError) as error:
            _log.warning("%s: no form for a dictionary: %s", self.directory, error)
        else:
            if isinstance(found, Entry):
                return found
        # Meanwhile the cache may have evicted the entry, and closed its files.
        return await self._cache.find(entry.relative)

    async def _look_up(self, request: _Request) -> Entry | Answer | Absent:
        """What is at the path: a file, or the answer to a request for a directory."""
        below = request.below
        try:
            path = request.path = parse_request_path(below, dotfiles=self.options.dotfiles)
        except PathRefused:
            return Absent.MISSING
        if not path.directory:
            found = await self._cache.find(path.relative)
            if isinstance(found, Entry):
                self._remember(request, found)
            if found is Absent.DIRECTORY and await self._opens(path):
                return self._redirect(request.scope, path.name)
            # A directory that may be entered but not read: its page is served all the same.
            if found is Absent.DENIED and isinstance(await self._index(path), Entry):
                return self._redirect(request.scope, path.name)
            return found
        if not below and await self._opens(path):
            # The mount itself, without its slash: relative links on the page would lead beside it.
            root_path = request.scope.get("root_path", "").rstrip("/")
            return self._redirect(request.scope, root_path.rpartition("/")[2].encode())
        page = await self._index(path, request)
        if page is Absent.MISSING and self.options.listing:
            return await self._list(path, request.fields.get(b"accept"))
        return page

    async def _index(self, path: RequestPath, request: _Request | None = None) -> Entry | Absent:
        """The index page of a directory."""
        for place, name in enumerate(self.options.index):
            found = await self._cache.find(_join(path.relative, os.fsencode(name)))
            if isinstance(found, Entry):
                if place == 0 and request is not None:
                    # Of another one the cache could not tell that an earlier one has come since.
                    self._remember(request, found)
                return found
            if found is Absent.DENIED:
                return found
        return Absent.MISSING

    async def _opens(self, path: RequestPath) -> bool:
        """Whether something is to be seen at a directory; if not, it need not be known that there is one."""
        return self.options.listing or isinstance(await self._index(path), Entry)

    def _remember(self, request: _Request, entry: Entry) -> None:
        raw_path = request.scope.get("raw_path")
        # Where `root_path` was not all of it, the path does not tell by itself which file is meant.
        if raw_path is not None and "app_root_path" not in request.scope:
            self._cache.remember(request.scope.get("root_path", ""), raw_path, entry)

    def _redirect(self, scope: Scope, name: bytes) -> Answer:
        """To the same with a slash: relative, so that nothing of the request can become a host (`//evil`)."""
        location = b"./%b/" % quote(name, safe="").encode("ascii")
        query: bytes = scope.get("query_string") or b""
        if _QUERY.fullmatch(query):
            location += b"?" + query
        return Answer(308, [(b"location", location), (b"content-length", b"0")])

    # -- directories -----------------------------------------------------------------------------------------

    async def _list(self, path: RequestPath, accept: bytes | None) -> Answer | Absent:
        as_json = media_quality(accept, b"application/json") > media_quality(accept, b"text/html")
        # All of it in a thread: to write ten thousand names down takes longer than to read them.
        body = await in_thread(functools.partial(self._write_list, path.relative, as_json))
        if isinstance(body, Absent):
            return body
        kind = listing.JSON if as_json else listing.HTML
        return text_answer(200, kind, body, *listing.FIELDS, _VARY_ACCEPT, *self.options.headers)

    def _write_list(self, relative: bytes, as_json: bool) -> bytes | Absent:
        entries = self._read_directory(relative)
        if isinstance(entries, Absent):
            return entries
        if as_json:
            return listing.listing_json(entries)
        return listing.listing_page("/" + os.fsdecode(relative), entries)

    def _read_directory(self, relative: bytes) -> list[listing.Entry] | Absent:
        root = self._root
        if root is None:
            raise RootClosed
        try:
            opened = root.open(relative)
        except NotServed as refused:
            return Absent.DENIED if refused.denied else Absent.MISSING
        try:
            if not stat.S_ISDIR(opened.stat.st_mode):
                return Absent.MISSING
            look = functools.partial(_look_at, root, relative)
            return listing.list_directory(opened.fd, dotfiles=self.options.dotfiles, look=look)
        finally:
            os.close(opened.fd)

    # -- nothing here ----------------------------------------------------------------------------------------

    async def _nothing(self, request: _Request) -> Answer | None:
        """What a request gets that nothing is here for; None for the fallthrough app."""
        options = self.options
        varies = [_VARY_ACCEPT] if options.spa is not None else []
        if options.spa is not None and _wants_page(request):
            page = await self._cache.find(os.fsencode(options.spa))
            if isinstance(page, Entry):
                page = await self._preferred(page, request)
            if isinstance(page, Entry):
                answer = page.answer(request.method, request.fields)
                return replace(answer, fields=[*answer.fields, _VARY_ACCEPT], checked=None)
        if options.fallthrough is not None:
            return None
        if options.not_found is not None:
            page = await self._cache.find(os.fsencode(options.not_found))
            form = page.choose(request.fields.get(b"accept-encoding")) if isinstance(page, Entry) else None
            if form is not None:
                fields = [field for field in form.whole.fields if field[0] not in _NOT_ON_404]
                return replace(form.whole, status=404, fields=fields + varies, checked=None)
            if isinstance(page, Entry):
                varies.append(page.vary)
        return error_answer(404, *varies)


def _wants_page(request: _Request) -> bool:
    """Somebody goes to a place of a single-page app, and no script asks for a file of it."""
    path = request.path
    return (
        path is not None
        and request.method in _READING
        and (path.directory or b"." not in path.name)
        and media_quality(request.fields.get(b"accept"), b"text/html", named=True) > 0
    )


def _join(relative: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (relative, name) if relative else name


def _look_at(root: ConfinedRoot, relative: bytes, name: bytes) -> os.stat_result | None:
    """Where a link leads, if it may be followed."""
    try:
        opened = root.open(_join(relative, name))
    except NotServed:
        return None
    os.close(opened.fd)
    return opened.stat


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or {}):
        answer = error_answer(404)
        await send({"type": "websocket.http.response.start", "status": 404, "headers": answer.fields})
        await send({"type": "websocket.http.response.body", "body": answer.body})
    else:
        await send({"type": "websocket.close", "code": 1000})
