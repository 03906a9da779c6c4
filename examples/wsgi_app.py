"""A Flask application: WSGI, synchronous, as it has always been.

Run it with `trioserve examples.wsgi_app:app`; needs `pip install flask`.

What it teaches: trioserve sees that this is no ASGI app and runs each request in a thread, at most `wsgi_threads` at
once. Blocking is fine in here: `time.sleep` holds up one thread, not the server. Bodies are read before the app is
called, up to `wsgi_max_body_size`; a generator's parts are sent as they come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from flask import Flask, Response, jsonify, request

app = Flask(__name__)


@app.get("/")
def index() -> str:
    """Greet."""
    return "Hello from Flask\n"


@app.post("/shout")
def shout() -> Response:
    """Send the body back in capitals."""
    return Response(request.get_data(as_text=True).upper(), mimetype="text/plain")


@app.get("/nap")
def nap() -> Response:
    """Block for a while, as database drivers do; other requests are served meanwhile."""
    seconds = max(0.0, min(5.0, request.args.get("seconds", 0.1, float)))
    time.sleep(seconds)
    return jsonify(slept=seconds, thread=threading.current_thread().name)


@app.get("/lines")
def lines() -> Response:
    """Stream a few lines."""

    def parts() -> Iterator[str]:
        for number in range(1, 4):
            yield f"line {number}\n"

    return Response(parts(), mimetype="text/plain")
