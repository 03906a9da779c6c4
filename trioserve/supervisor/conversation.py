"""What passes over the link between the supervisor and one worker, and what it means if nothing does.

`pool.py` runs a `Conversation` beside each worker: first the orders, then whatever the worker says, in order. A worker
that is silent for too long hangs; one that has closed its link and does not end is stuck. Cancelling it ends the
listening, and nothing else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from trioserve.errors import EXIT_OK
from trioserve.net.json_lines import BadMessage
from trioserve.supervisor.worker_process import Orders, WorkerProcess, WorkerState, boot_patience

# What a process may take past its own deadlines before its parent ends it.
SLACK = 5.0

# What a worker that seems to hang gets before it is ended, in case it was this process that stood still.
_SECOND_LOOK = 2.0


class Conversation:
    """One worker's.

    Args:
        worker: who is listened to.
        note: called with each message.
        end_hung: called when the worker has been silent for too long.
        log: for what cannot be understood.

    Attributes:
        over: nothing more will be heard.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        note: Callable[[WorkerProcess, dict[str, Any]], None],
        end_hung: Callable[[WorkerProcess], Awaitable[None]],
        log: logging.Logger,
    ) -> None:
        self._worker = worker
        self._note = note
        self._end_hung = end_hung
        self._log = log
        self.over = trio.Event()

    async def run(self, orders: Orders) -> None:
        """Give the orders, then listen until the worker has ended or is to be ended."""
        worker = self._worker
        try:
            await worker.send_orders(orders)
            if not await self._listen():
                await self._end_hung(worker)
                return
            self.over.set()
            # It says nothing more, so it is about to end; who does not is stuck, and nobody else would notice.
            with trio.move_on_after(SLACK):
                await worker.gone.wait()
            if (
                worker.state is not WorkerState.DRAINING
            ):  # otherwise the end of a drain has a deadline of its own
                worker.kill("it closed its link and did not end")
        except BadMessage as error:
            self._log.error("worker %d sent what cannot be understood (%s); ending it", worker.id, error)
            worker.kill("it sent what cannot be understood")
        except (ValueError, TypeError, ArithmeticError) as error:
            self._log.error("worker %d sent what cannot be (%r); ending it", worker.id, error)
            worker.kill("it sent what cannot be understood")
        except (OSError, trio.ClosedResourceError):
            return  # it is gone: its exit status will say why
        finally:
            self.over.set()

    async def _listen(self) -> bool:
        """Note what the worker says until it has closed its link: True; or is silent for too long: False."""
        patience = self._patience()
        while True:
            with trio.move_on_after(patience) as waiting:
                message = await self._worker.link.receive()
                if message is None:
                    return True
                if message.get("is") == "answer":
                    self._worker.take_answer(str(message.get("to")), str(message.get("text", "")))
                else:
                    self._note(self._worker, message)
            if not waiting.cancelled_caught:
                patience = self._patience()
            elif patience == _SECOND_LOOK:
                return False
            else:
                patience = _SECOND_LOOK  # it may be us who stood still: what it said then is in the socket

    def _patience(self) -> float:
        """How long it may be silent: an import has no heartbeat, a serving loop has."""
        config = self._worker.config
        if self._worker.state is WorkerState.STARTING:
            return boot_patience(config)
        return math.inf if config.worker_timeout is None else config.worker_timeout


def figures_of(message: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a heartbeat: whatever has got hold of the link may say anything."""
    return {
        name: value for name, value in message.items() if type(value) in (int, float) and math.isfinite(value)
    }


def announced_code(message: dict[str, Any]) -> int:
    """The exit code that a worker says it will have, when it drains by itself: 0 unless it is for an error."""
    code = message.get("exit_code")
    return code & 0xFF if isinstance(code, int) else EXIT_OK
