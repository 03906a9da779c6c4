"""The library's way in: `serve()` in the caller's nursery, `run()` for scripts.

`serve` lives where it is called: cancelling it drains and stops it, an error that is ours or the app's comes out of
it after the drain, and it touches no signal handlers, no root logger and no process state. `run` is a whole
process: it handles signals and returns an exit code.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal

import hypercorn.config
import trio

from trioserve.asgi.load import detect_mode, wrap_app
from trioserve.config import Config
from trioserve.structure.boundary import leaves
from trioserve.structure.context import ASGIApp
from trioserve.worker.worker import Worker, serve_worker


async def serve(
    app: Any,
    config: hypercorn.config.Config | None = None,
    *,
    shutdown_trigger: Callable[..., Awaitable[object]] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    mode: Literal["asgi", "wsgi"] | None = None,
    sockets: Iterable[socket.socket] | None = None,
) -> None:
    """Serve `app` until told to stop; hypercorn's signature and meaning.

    Args:
        app: an ASGI 3 or WSGI application.
        config: ours, or a `hypercorn.config.Config` (whose `graceful_timeout` of 3 s then holds); None for defaults.
        shutdown_trigger: the server drains when this returns. Without it, only cancellation or a failure ends it.
        task_status: `started()` gets the bound addresses (`http://host:port`, `unix:path`) once the app's startup is
            complete and connections are accepted, so port 0 can be found out with `await nursery.start(serve, …)`.
        mode: "asgi" or "wsgi"; None finds out.
        sockets: bound stream sockets to use instead of `config.bind`; they stay open and the caller's.

    Cancelling drains: requests in flight get `graceful_timeout` seconds, then are cancelled; the app's lifespan gets
    its shutdown. Set `graceful_timeout = 0` where cancelling must not wait for requests. So does Ctrl-C where
    `serve` is all that `trio.run` runs; the `KeyboardInterrupt` comes out after that.

    Raises:
        ConfigError, BindError, LifespanFailed: it could not start.
        Exception: the app's own, which ended the worker by the rules of `on_app_error`, after the drain.
    """
    config = _as_config(config, library=True)
    workers: list[Worker] = []
    try:
        await serve_worker(
            as_asgi(app, mode, config),
            config,
            sockets=sockets,
            shutdown_trigger=shutdown_trigger,
            task_status=task_status,
            on_worker=workers.append,
            library=True,
        )
    finally:
        # Also when the caller has cancelled meanwhile: a fault is not lost in a cancellation.
        failure = workers[0].context.boundary.failure if workers else None
        if failure is not None:
            if all(isinstance(leaf, trio.Cancelled) for leaf in leaves(failure.error)):
                # The caller's nursery would take it for its own cancellation, and end as if all were well.
                raise RuntimeError("the app raised a Cancelled that nobody had asked for") from failure.error
            raise failure.error


def run(app: Any, config: hypercorn.config.Config | None = None) -> int:
    """Serve `app` in this process until a signal ends it; returns the exit code, for `sys.exit(run(app))`.

    There is one process, whatever `workers` says; only the command has more, which imports the app in each of them.
    """
    from trioserve import streams
    from trioserve.worker.command import run_app

    streams.open_missing()
    config = _as_config(config, library=False)
    config.advise_of_supervisor()
    return run_app(as_asgi(app, None, config), config)


def as_asgi(app: Any, mode: Literal["asgi", "wsgi"] | None, config: Config) -> ASGIApp:
    """The app as a plain ASGI 3 callable, whatever it was."""
    return wrap_app(app, detect_mode(app) if mode is None else mode, config)


def _as_config(config: hypercorn.config.Config | None, *, library: bool) -> Config:
    if config is None:
        config = Config()
    elif not isinstance(config, Config):
        config = Config.from_hypercorn(config)
    config.validate(library=library)
    return config
