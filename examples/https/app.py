"""What TLS tells an app: the version, the cipher suite, and who the client is, if it shows a certificate.

Make a certificate with `python -m examples.https`, which also says how to serve with it; then open
https://127.0.0.1:8443/ in a browser: it will say that it was asked over HTTP/2, which browsers speak over TLS only.

What it teaches: an app does not care how it is asked. What it may want to know is in `scope["extensions"]["tls"]`;
that is missing where there is no TLS, or a server that does not say. A client's name there has been verified by the
server, if that demands certificates (`--verify-mode CERT_REQUIRED`), and can be used to let somebody in.
"""

from __future__ import annotations

import json
from typing import Any

from examples.hello import answer_lifespan

# As ASGI gives them: numbers of the TLS registries.
VERSIONS = {0x0303: "TLS 1.2", 0x0304: "TLS 1.3"}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Say how the question came."""
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    tls = scope.get("extensions", {}).get("tls")
    answer: dict[str, Any] = {"scheme": scope["scheme"], "http": scope["http_version"], "tls": None}
    if tls is not None:
        suite = tls["cipher_suite"]
        answer["tls"] = {
            "version": VERSIONS.get(tls["tls_version"], "unknown"),
            "cipher_suite": None if suite is None else f"0x{suite:04x}",
            "client": tls["client_cert_name"],
        }
    body = json.dumps(answer).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
