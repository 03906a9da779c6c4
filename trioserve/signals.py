"""What signals do while nobody receives them: before the program is up, and once its end is decided.

In between they are trio's (`worker/command.py`, `supervisor/supervisor.py`). Imported before anything else, so it
imports next to nothing itself.

    enter_process()    the first thing in a process of ours
    enter_worker()     the same, in one that a supervisor has started
    interrupts_end()   a Ctrl-C ends the process without a word, until interrupts_raise(): modules of ours are imported
    overlook()         what is meant for others, or for later, does nothing
    Ending             what trio leaves behind when it no longer receives: nothing, once the end is decided
    end_with()         nothing is left to do but for the interpreter: a further signal need not wait for that
"""

from __future__ import annotations

import atexit
import os
import signal

TYPE_CHECKING = False  # as in the package's __init__
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: These ask a process to end.
STOPS = ("SIGTERM", "SIGINT", "SIGQUIT")

# And this ends one that knows nothing better to do.
_ENDING = (*STOPS, "SIGHUP")

#: Not meant to end anything, though they do by default (the last two stop a process), and often sent to a whole group:
#: `systemctl kill -s USR2`, `pkill -USR1`.
STRAYS = ("SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU")

#: What goes to a worker only because it goes to all, or because its supervisor is meant: SIGINT is a terminal's Ctrl-C,
#: SIGHUP its end. They are blocked when it is started.
STRAYS_OF_A_WORKER = ("SIGINT", "SIGHUP", *STRAYS)


def known(names: Iterable[str]) -> list[signal.Signals]:
    """Those of the signals that there are on this system."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def enter_process() -> None:
    """Have signals end this process from now on as they end any other, until somebody receives them.

    The kernel does not deliver to process number 1 what it has no handler for: a container would be deaf to SIGTERM as
    long as its app is being imported.
    """
    if os.getpid() == 1:
        for number in known(_ENDING):
            signal.signal(number, _end_at_once)
    atexit.register(_ignore_the_rest)  # what is registered first runs last


def enter_worker() -> None:
    """As `enter_process`, for a process that has been started with `STRAYS_OF_A_WORKER` blocked."""
    enter_process()
    overlook(STRAYS_OF_A_WORKER)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # neither it nor what the app starts: the supervisor decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, known(STRAYS_OF_A_WORKER))


def interrupts_end() -> None:
    """Have a Ctrl-C end this process at once, while there is nothing to clean up.

    A `KeyboardInterrupt` within an import shows all of it as a traceback, and one that is raised in a callback of the
    import system is printed and lost: the server starts all the same.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupts_raise() -> None:
    """Undo `interrupts_end`: from now on there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def overlook(names: Iterable[str]) -> None:
    """Do nothing on these until somebody receives them.

    By a handler: what is ignored (SIG_IGN) would be ignored by each program that the app starts.
    """
    for number in known(names):
        signal.signal(number, _do_nothing)


class Ending:
    """For who receives signals: what they do afterwards.

    To be made right before they are received, for trio puts back what it has found. Until `decide` they do what they
    did before, after it nothing: a second SIGTERM must not kill a process that is cleaning up.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._decided = False
        self._before: dict[int, Any] = {}
        for number in numbers:
            self._before[number] = signal.getsignal(number)
            signal.signal(number, self._handle)

    def decide(self) -> None:
        """The end has come so far that nothing can hurry it any more."""
        self._decided = True

    def restore(self) -> None:
        """Put back what was there before: the process goes on."""
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        before = self._before[number]
        if self._decided or before is signal.SIG_IGN:
            return
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def end_with(code: int) -> int:
    """All is done, and the exit code known: who asks once more need not wait for the app's threads and exit handlers.

    Returns the code.
    """

    def end(*_: Any) -> None:
        os._exit(code)

    for number in known(STOPS):
        signal.signal(number, end)
    return code


def _end_at_once(number: int, _: Any) -> None:
    os._exit(128 + number)


def _do_nothing(*_: Any) -> None:
    pass


def _ignore_the_rest() -> None:
    # The interpreter takes handlers back before it takes itself apart, and that takes long enough to be met.
    for number in known((*_ENDING, *STRAYS)):
        signal.signal(number, signal.SIG_IGN)
