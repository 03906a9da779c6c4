"""The ASGI http scope of one request (https://asgi.readthedocs.io/en/latest/specs/www.html, version 2.5)."""

from __future__ import annotations

from urllib.parse import unquote

from trioserve.structure.context import Scope, Served


def http_scope(
    connection: Served,
    method: str,
    target: bytes,
    http_version: str,
    headers: list[tuple[bytes, bytes]],
    wants_trailers: bool,
) -> Scope:
    """Build the scope for one request.

    Args:
        connection: where it came from, or the stream of one.
        method: upper-case request method.
        target: path and query in origin-form, or `*`; already checked to be printable ASCII.
        http_version: "1.0", "1.1" or "2".
        headers: names in lower case (unless the operator asked for raw ones), order and duplicates kept.
        wants_trailers: the peer takes trailers.

    `path` is decoded from percent-encoding as UTF-8 with U+FFFD for what is no UTF-8; `raw_path` has the bytes.
    Dictionaries are fresh for each request, since apps and middleware write to them.
    """
    worker = connection.worker
    raw_path, _, query = target.partition(b"?")
    path = raw_path.decode("ascii")
    if "%" in path:
        path = unquote(path)
    extensions: dict[str, dict[object, object]] = {
        "http.response.zerocopysend": {},
        "http.response.pathsend": {"ranges": True},
    }
    if http_version != "1.0":
        extensions["http.response.early_hint"] = {}  # RFC 9110 section 15.2: never to such a peer
    if wants_trailers:
        extensions["http.response.trailers"] = {}
    if connection.tls is not None:
        extensions["tls"] = connection.tls.extension()
    if worker.debug_extension:
        extensions["http.response.debug"] = {}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": http_version,
        "method": method,
        "scheme": connection.scheme,
        "path": path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": worker.root_path,
        "headers": headers,
        "client": connection.client,
        "server": connection.server,
        "state": worker.state.copy(),
        "extensions": extensions,
    }


def websocket_scope(scope: Scope, subprotocols: list[str]) -> Scope:
    """Make the http scope of a request into that of the WebSocket which it would open; it is changed in place."""
    tls = scope["extensions"].get("tls")
    del scope["method"]
    scope["type"] = "websocket"
    scope["scheme"] = "wss" if scope["scheme"] == "https" else "ws"
    scope["subprotocols"] = subprotocols
    scope["extensions"] = {"websocket.http.response": {}}
    if tls is not None:
        scope["extensions"]["tls"] = tls
    return scope
