"""A WSGI app (PEP 3333) as an ASGI app: `WSGIApp`.

Made by `load.wrap_app`, called like any ASGI app by the exchange. The request body is read whole (bounded),
then the app runs in one of a bounded number of threads, and what it yields is sent by the connection's own
task, so that deadlines and back-pressure hold as for ASGI.

It takes the place of hypercorn's `WSGIWrapper`, with its limits and semantics, where that one goes wrong: it
never starts a response without a body (HEAD, 204, 304: Flask yields nothing there), runs the app with half a
body when the client has gone, and loses chunked bodies for apps that ask for CONTENT_LENGTH.

Cancelling a request ends it at once. A thread cannot be cancelled: it is left to finish, keeps its place
among the threads until then, and its next `yield` raises `ClientDisconnected`; what it raises otherwise is
logged.
"""

from __future__ import annotations

import contextvars
import io
import logging
import os
import queue
import stat
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, unquote_to_bytes

import trio

from trioserve.errors import ClientDisconnected, UnexpectedMessage
from trioserve.structure.context import Message, Receive, Scope, Send

if TYPE_CHECKING:
    from outcome import Outcome

StartResponse = Callable[..., Callable[[bytes], None]]
WSGICallable = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

_log = logging.getLogger("trioserve.wsgi")

# Bytes of a file on disk that a thread reads at once. 64 KiB: 50 MB take 0.2 s, in parts of 8 KiB 1.9 s; larger parts
# save little more, and are held for each download.
_FILE_BLOCK = 65536


class WSGIApp:
    """Serves a WSGI app to ASGI's http and lifespan scopes; WebSockets are refused."""

    def __init__(self, app: WSGICallable, max_body_size: int, threads: int) -> None:
        self.app = app
        self.max_body_size = max_body_size
        self._limiter = trio.CapacityLimiter(threads)

    def __repr__(self) -> str:
        busy, total = self._limiter.borrowed_tokens, self._limiter.total_tokens
        return f"<WSGIApp {self.app!r}, {busy:g} of {total:g} threads busy>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] == "http":
            await self._serve_http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "lifespan":
            # There is nothing to start: the app was ready when it was imported.
            for _ in range(2):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})

    async def _serve_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
        too_large = declared.isdigit() and int(declared) > self.max_body_size
        body = None if too_large else await self._read_body(receive)
        if body is None:
            await _respond_empty(send, 413)
            return
        environ = build_environ(scope, body)
        if environ is None:
            await _respond_empty(send, 404)
            return
        await _ThreadedCall(send).run(self.app, environ, self._limiter)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """The whole body, or None when it is too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected("the client has gone before its request body was complete")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_size:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


async def _respond_empty(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


# -- between the task and the thread ------------------------------------------------------------------------


class _ThreadedCall:
    """One request in one thread, which hands batches of messages to the task and waits for each."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._token = trio.lowlevel.current_trio_token()
        # One batch that the thread waits for, and the outcome at its end.
        self._arrived, self._inbox = trio.open_memory_channel["list[Message] | Outcome[None]"](2)
        self._replies: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._limiter: trio.CapacityLimiter

    async def run(self, app: WSGICallable, environ: dict[str, Any], limiter: trio.CapacityLimiter) -> None:
        """Serve until the app is done; raises what it raises. Cancelling leaves the thread behind."""
        await limiter.acquire_on_behalf_of(self)
        self._limiter = limiter
        context = contextvars.copy_context()
        try:
            trio.lowlevel.start_thread_soon(
                lambda: context.run(_Response(self.send_from_thread).run, app, environ), self._deliver
            )
        except RuntimeError:
            limiter.release_on_behalf_of(self)  # no thread can be started (pids.max, TasksMax)
            raise
        with self._inbox:
            while True:
                item = await self._inbox.receive()
                if not isinstance(item, list):
                    item.unwrap()
                    return
                await self._send_batch(item)

    async def _send_batch(self, batch: list[Message]) -> None:
        failure: Exception | None = _gone()
        try:
            for message in batch:
                await self._send(message)
            failure = None
        except Exception as error:  # the app's generator may clean up; it comes back as the outcome
            failure = error
        finally:
            # Also when cancelled: a thread must never be left waiting.
            self._replies.put(failure)

    # In the thread:

    def send_from_thread(self, batch: list[Message]) -> None:
        """Have the task send these messages, and wait for that; raises what `send()` raised."""
        self._token.run_sync_soon(self._post, batch)
        failure = self._replies.get()
        if failure is not None:
            raise failure

    def _deliver(self, result: Outcome[None]) -> None:
        try:
            self._token.run_sync_soon(self._finish, result)
        except trio.RunFinishedError:
            pass

    # Back in trio:

    def _post(self, batch: list[Message]) -> None:
        try:
            self._arrived.send_nowait(batch)
        except trio.BrokenResourceError:
            self._replies.put(_gone())

    def _finish(self, result: Outcome[None]) -> None:
        self._limiter.release_on_behalf_of(self)
        try:
            self._arrived.send_nowait(result)
        except trio.BrokenResourceError:
            error = getattr(result, "error", None)
            if error is not None and not isinstance(error, ClientDisconnected):
                _log.error("a WSGI app failed after its request had been cancelled", exc_info=error)


def _gone() -> ClientDisconnected:
    return ClientDisconnected("the request was cancelled while the WSGI app was running")


# -- WSGI ---------------------------------------------------------------------------------------------------


class FileWrapper:
    """`wsgi.file_wrapper` (PEP 3333): a file as the parts of a response.

    Each part is handed from the thread to the task and waited for, so that the 4 or 8 KiB that frameworks suggest cost
    more in going to and fro than in being sent. A file on disk has larger ones; what may give its bytes little by
    little, such as a pipe, has what was asked for.
    """

    def __init__(self, file: Any, block_size: int = 8192) -> None:
        self.file = file
        self.block_size = max(block_size, _FILE_BLOCK) if _is_on_disk(file) else block_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        part: bytes = self.file.read(self.block_size)
        if not part:
            raise StopIteration
        return part

    def close(self) -> None:
        """Close the file; Django sets its own `close` on it only after this is made."""
        close = getattr(self.file, "close", None)
        if close is not None:
            close()

    # Werkzeug asks its iterator for these, to send a range without reading what is before it.

    def seekable(self) -> bool:
        """Whether `seek` can be used."""
        return bool(getattr(self.file, "seekable", lambda: False)())

    def seek(self, *where: int) -> None:
        """Go on from there."""
        self.file.seek(*where)

    def tell(self) -> int | None:
        """Where it stands."""
        return int(self.file.tell()) if self.seekable() else None


def _is_on_disk(file: Any) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return False  # in memory, or closed: io.UnsupportedOperation is an OSError


class _Response:
    """What the app has said so far about its response; lives in the thread."""

    def __init__(self, send: Callable[[list[Message]], None]) -> None:
        self._send = send
        self._start: Message | None = None
        self._started = False
        self._left: int | None = None  # of the declared Content-Length
        self._ended = False

    def run(self, app: WSGICallable, environ: dict[str, Any]) -> None:
        """Call the app and send all it yields; its iterable is always closed."""
        body = app(environ, self._start_response)
        try:
            for part in body:
                # PEP 3333: the head may still change until there is a byte of body.
                if part and not self._write_within_length(part):
                    break
            if not self._ended:
                self._send_part(b"", more=False)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        try:
            if exc_info is not None and self._started:
                raise exc_info[1].with_traceback(exc_info[2])
        finally:
            exc_info = None if exc_info is None else ()  # no cycle through the frame
        if self._start is not None and exc_info is None:
            raise UnexpectedMessage("the WSGI app called start_response twice without exc_info")
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        code = int(status.split(maxsplit=1)[0])
        self._start = {"type": "http.response.start", "status": code, "headers": raw}
        length = next((value for name, value in raw if name == b"content-length"), b"")
        self._left = int(length) if length.isdigit() else None
        return self._write

    def _write_within_length(self, part: bytes) -> bool:
        """Write what the declared length has room for; False if there was more (PEP 3333: stop iterating then)."""
        left = self._left
        if left is None or len(part) <= left:
            self._write(part)
            return True
        # Most often a file that has grown since its length was taken; but a length may also be wrong.
        if not self._ended:
            self._write(part[:left])
        declared = dict(self._start["headers"])[b"content-length"].decode() if self._start else ""
        _log.warning(
            "a WSGI app yielded more than its Content-Length of %s bytes; the rest is not sent", declared
        )
        return False

    def _write(self, part: bytes) -> None:
        if self._left is not None:
            self._left -= len(part)
        # Knowing the end saves the trip that would only say so.
        self._send_part(part, more=self._left is None or self._left > 0)

    def _send_part(self, part: bytes, *, more: bool) -> None:
        if self._start is None:
            raise UnexpectedMessage("the WSGI app yielded its body, or ended, without calling start_response")
        batch: list[Message] = [] if self._started else [self._start]
        batch.append({"type": "http.response.body", "body": part, "more_body": more})
        self._started, self._ended = True, not more
        self._send(batch)


def build_environ(scope: Scope, body: bytes) -> dict[str, Any] | None:
    """The environ of a request, or None when its path is not below `root_path`."""
    path, script_name = _path_bytes(scope).decode("latin-1"), _wsgi_text(scope.get("root_path", ""))
    if script_name:
        if path != script_name and not path.startswith(f"{script_name}/"):
            return None
        path = path[len(script_name) :]
    server = scope.get("server") or ("localhost", None)
    secure = scope.get("scheme") == "https"
    # A unix socket has a path and no port, and WSGI has to have both.
    host, port = ("localhost", 443 if secure else 80) if server[1] is None else server
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": script_name,
        "PATH_INFO": path or "/",
        "QUERY_STRING": scope.get("query_string", b"").decode("latin-1"),
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.file_wrapper": FileWrapper,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    if scope.get("client") is not None:
        environ["REMOTE_ADDR"] = scope["client"][0]
        environ["REMOTE_PORT"] = str(scope["client"][1] or "")
    _add_headers(environ, scope["headers"])
    if body:
        # A chunked body has no length of its own, and apps do not read without one.
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
    return environ


def _add_headers(environ: dict[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> None:
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").upper(), raw_value.decode("latin-1")
        # `X_Y` would become the same variable as `X-Y`, and `Proxy` the one that CGI-minded clients obey.
        if "_" in name or name == "PROXY":
            continue
        key = name.replace("-", "_")
        if key not in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            key = f"HTTP_{key}"
        if key in environ:
            value = environ[key] + ("; " if key == "HTTP_COOKIE" else ",") + value
        environ[key] = value


def _path_bytes(scope: Scope) -> bytes:
    path, raw = scope["path"], scope.get("raw_path")
    # Bytes that are no UTF-8 survive only in raw_path, which counts while no middleware has changed the path.
    if "\ufffd" in path and raw is not None and unquote(raw.decode("latin-1")) == path:
        return unquote_to_bytes(raw)
    return bytes(path.encode("utf-8", "replace"))


def _wsgi_text(text: str) -> str:
    return text.encode("utf-8", "replace").decode("latin-1")
