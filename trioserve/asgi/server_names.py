"""`server_names`: requests for other hosts are answered with 404 and never reach the app.

`worker.py` puts it between the exchange and the app, only where the setting is given, so that it costs nothing
elsewhere. Cancelling it cancels the app.
"""

from __future__ import annotations

from collections.abc import Iterable

from trioserve.structure.context import ASGIApp, Receive, Scope, Send


def serve_only(app: ASGIApp, server_names: Iterable[str]) -> ASGIApp:
    """`app`, for requests whose Host is one of the names; it is compared whole, with its port, in any case."""
    known = frozenset(name.lower().encode("latin-1") for name in server_names)

    async def check_host(scope: Scope, receive: Receive, send: Send) -> None:
        host = next((value for name, value in scope["headers"] if name.lower() == b"host"), b"")
        if host.lower() in known:
            await app(scope, receive, send)
            return
        fields = [(b"content-length", b"0"), (b"connection", b"close")]
        event = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
        await send({"type": f"{event}.start", "status": 404, "headers": fields})
        await send({"type": f"{event}.body", "body": b""})

    return check_host
