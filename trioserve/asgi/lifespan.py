"""The app's lifespan (ASGI lifespan 2.0): startup before the first connection, shutdown after the last.

`worker.py` starts `Lifespan.run` as a task of its own and calls `startup` and `shutdown`. The app's lifespan callable
lives in that task for as long as the worker does; its context at `startup.complete` is the template for requests.
Cancelling the task cancels the app's lifespan. An exception after startup, or one that is no `Exception` at any time,
is handed to `on_death` with a word on when it was raised.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable
from typing import Any, Literal

import trio

from trioserve.errors import LifespanFailed, UnexpectedMessage
from trioserve.structure.boundary import is_cancellation, leaves, without_cancelled
from trioserve.structure.context import ASGIApp, Message
from trioserve.structure.error_tree import find_leaf, safe_message, signature

# How long the lifespan callable may take to return after it has said `lifespan.shutdown.complete`.
_UNWIND_SECONDS = 1.0


class Lifespan:
    """One app's lifespan.

    Attributes:
        supported: the app has completed startup and so will be told of the shutdown.
        context: the context of the lifespan task when startup was complete, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        mode: Literal["auto", "on", "off"],
        state: dict[str, Any],
        log: logging.Logger,
        on_death: Callable[[BaseException, str], object],
    ) -> None:
        self._app = app
        self._mode = mode
        self._state = state
        self._log = log
        self._on_death = on_death
        self._startup_asked = False
        self._given_up = False  # nobody waits for the startup any more
        self._shutdown_asked = trio.Event()
        self._started = trio.Event()
        self._stopped = trio.Event()
        self._ended = trio.Event()
        self._failure: LifespanFailed | None = None
        self._shutdown_failure = ""
        self.supported = False
        self.context: contextvars.Context | None = None

    async def startup(self, nursery: trio.Nursery, timeout: float) -> None:
        """Start the lifespan task in `nursery` and wait until the app is ready to serve.

        Raises:
            LifespanFailed: it said so, took longer than `timeout` seconds, or (mode "on") has no lifespan.
        """
        if self._mode == "off":
            return
        nursery.start_soon(self.run, name="lifespan")
        try:
            with trio.move_on_after(timeout) as scope:
                await self._started.wait()
        finally:
            self._given_up = not self._started.is_set()
        if scope.cancelled_caught:
            raise LifespanFailed(f"lifespan startup took longer than {timeout:g} s (startup_timeout)")
        if self._failure is not None:
            raise self._failure

    async def shutdown(self, timeout: float) -> None:
        """Tell the app to shut down and wait for it, for at most `timeout` seconds; problems are logged."""
        if not self.supported or self._stopped.is_set():
            return
        self._shutdown_asked.set()
        with trio.move_on_after(timeout) as scope:
            await self._stopped.wait()
        if scope.cancelled_caught:
            self._log.error("lifespan shutdown took longer than %g s (shutdown_timeout); cancelled", timeout)
        elif self._shutdown_failure:
            self._log.error("the app's lifespan shutdown failed: %s", self._shutdown_failure)
        # It has said that it is done; let its context managers unwind before the task is cancelled.
        with trio.move_on_after(_UNWIND_SECONDS):
            await self._ended.wait()

    async def run(self) -> None:
        """Run the app's lifespan callable to its end; the task that `startup` starts."""
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self._state,
        }
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as error:
            if is_cancellation(error):
                raise
            self._note_exception(without_cancelled(error))
        else:
            self._note_return()
        finally:
            self._started.set()
            self._stopped.set()
            self._ended.set()

    def _note_exception(self, error: BaseException) -> None:
        if not all(isinstance(leaf, Exception | trio.Cancelled) for leaf in leaves(error)):
            # SystemExit, KeyboardInterrupt and groups with them are never taken for "no lifespan support".
            self._on_death(error, self._now())
        elif self._given_up:
            self._log.error("the app raised when its startup was given up", exc_info=error)
        elif self._started.is_set():
            if self._failure is None:
                self._on_death(error, self._now())
        elif self._mode == "on":
            leaf = find_leaf(error)
            self._failure = LifespanFailed(
                'the app raised during lifespan startup, and lifespan is "on": '
                f"{signature(leaf)}: {safe_message(leaf)}"
            )
            self._failure.__cause__ = error
        else:
            # The specification reads an exception as "no lifespan support"; a bug looks the same, so it is shown.
            self._log.warning(
                'the app raised during lifespan startup; serving without lifespan (lifespan = "on" makes this fatal, '
                '"off" silences it)',
                exc_info=error,
            )

    def _now(self) -> str:
        """When in the app's life this is, for the message of an error."""
        if self._shutdown_asked.is_set():
            return "in its shutdown"
        return "while serving" if self._started.is_set() else "in its startup"

    def _note_return(self) -> None:
        if self._given_up:
            return
        if not self._started.is_set():
            if self._mode == "on":
                self._failure = LifespanFailed(
                    'the app returned before startup was complete, and lifespan is "on"'
                )
            else:
                self._log.info("the app has no lifespan: its lifespan callable returned at once")
        elif not self._shutdown_asked.is_set() and self._failure is None:
            if self._shutdown_failure:
                self._log.error("the app's lifespan failed: %s", self._shutdown_failure)
            self._log.info("the app's lifespan callable returned while the worker was serving")
            self.supported = False

    async def _receive(self) -> Message:
        if not self._startup_asked:
            self._startup_asked = True
            await trio.lowlevel.checkpoint()
            return {"type": "lifespan.startup"}
        await self._shutdown_asked.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        try:
            event = message["type"]
        except (KeyError, TypeError):
            raise UnexpectedMessage(
                f"lifespan send() takes a dict with a 'type', not {message!r:.100}"
            ) from None
        if event == "lifespan.startup.complete" and not self._started.is_set():
            self.context = trio.lowlevel.current_task().context.copy()
            self.supported = True
            self._started.set()
        elif event == "lifespan.startup.failed" and not self._started.is_set():
            self._failure = LifespanFailed(f"the app's lifespan startup failed: {message.get('message', '')}")
            self._started.set()
        elif event == "lifespan.shutdown.complete" and self._shutdown_asked.is_set():
            self._stopped.set()
        elif event == "lifespan.shutdown.failed" and self._started.is_set():
            # Starlette says so of whatever ends it, also before the shutdown: of a cancellation, and of an error, which
            # follows and is told as what it is.
            self._shutdown_failure = str(message.get("message", "")) or "no message"
            if self._shutdown_asked.is_set():
                self._stopped.set()
        else:
            raise UnexpectedMessage(f"lifespan send() got {event!r}, which does not belong here")
        await trio.lowlevel.checkpoint()
