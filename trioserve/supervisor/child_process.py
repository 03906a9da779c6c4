"""A process of ours: started without a fork, signalled and waited for by descriptor, so that no number is mistaken.

The supervisor has three kinds of them: workers (`worker_process.py`), what preloads the app for them (`preload.py`),
and the supervisor that is to take over (`upgrade.py`). Cancelling `wait` leaves the process as it is.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import trio

import trioserve
from trioserve.errors import ConfigError
from trioserve.signals import STRAYS_OF_A_WORKER, known

# What a process inherits begins here, behind the standard streams; sd_listen_fds(3) numbers sockets so.
FIRST_INHERITED = 3

# Not resolved, as `sys.executable` is not: where a link to the whole installation is swapped, both are the new one's.
_WORKER = str(Path(trioserve.__file__).absolute().parent / "worker" / "__main__.py")


class ChildProcess:
    """One child, or one that `reaper.become_subreaper` has made ours.

    Attributes:
        pid: its number.
        status: its exit code, or minus the number of the signal that ended it; None until it has been waited for.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except OSError:
            # Nobody could wait for it: without a descriptor it may not live.
            os.kill(pid, signal.SIGKILL)
            _read_status(pid)
            raise

    def send_signal(self, number: signal.Signals) -> None:
        """Signal this process and no other that may have got its number since; no error if it is gone."""
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def wait(self) -> int:
        """Return its status once it has ended."""
        while self.status is None:
            await trio.lowlevel.wait_readable(self._descriptor)
            if self.status is None:
                self.status = _read_status(self.pid)
        return self.status

    def close(self) -> None:
        """Give back the descriptor."""
        os.close(self._descriptor)
        self._descriptor = -1


def _read_status(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 1  # somebody has read it before us


# -- starting ------------------------------------------------------------------------------------------------


def check_workers_can_run() -> None:
    """What root has started may be where nobody else gets: to be asked once this process is whom workers will be.

    Raises:
        ConfigError: it cannot run the interpreter, or read what a worker runs.
    """
    for path, mode, what in ((sys.executable, os.X_OK, "execute"), (_WORKER, os.R_OK, "read")):
        if not os.access(path, mode):
            raise ConfigError(
                f"workers cannot be started: user {os.geteuid()} cannot {what} {path}; install Python and trioserve "
                "where this user may read them (not below /root), or choose another user"
            )


def spawn_worker(
    role: Literal["worker", "preloader"], environment: Mapping[str, str], inherited: Sequence[int], link: int
) -> int:
    """Run `trioserve.worker` with `inherited` as descriptors 3, 4, ..., of which `link` is the one to its parent.

    By its path: so it finds this very trioserve, also where it is not installed, and no PYTHONPATH has to say where,
    which the app and all that it starts would have, too. It does not import from the directory of the file, nor from
    the working directory (-P), which may be one of files to serve; loading the app adds what the app needs.

    Returns the process id.
    """
    return _spawn(["-P", _WORKER, role, str(link)], environment, inherited, known(STRAYS_OF_A_WORKER))


def spawn_ourselves(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], inherited: Sequence[int]
) -> int:
    """Run a module as its user has run it, with `inherited` as descriptors 3, 4, ...; returns the process id.

    From the working directory it imports only if we have been able to: `python -m` does, our script does not.
    """
    by_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    safely = [] if by_module else ["-P"]
    return _spawn([*safely, "-m", module, *arguments], environment, inherited, ())


def _spawn(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    inherited: Sequence[int],
    blocked: Iterable[signal.Signals],
) -> int:
    """Run this interpreter with `inherited` as descriptors 3, 4, ...; returns the process id.

    Never forks (posix_spawn(3)).

    Raises:
        OSError: the machine is out of processes or descriptors.
    """
    # They wait behind the numbers that they are to be moved to, so that no move destroys another's source.
    behind = FIRST_INHERITED + len(inherited)
    parked: list[int] = []
    try:
        for fd in inherited:
            parked.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, behind))  # noqa: PERF401 - may fail midway
        moves = [(os.POSIX_SPAWN_DUP2, fd, FIRST_INHERITED + index) for index, fd in enumerate(parked)]
        return os.posix_spawn(
            sys.executable,
            [sys.executable, *_interpreter_flags(), *arguments],
            environment,
            file_actions=moves,
            # Whatever this process ignores or blocks is its own affair.
            setsigmask=blocked,
            setsigdef=(signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP),
        )
    finally:
        for fd in parked:
            os.close(fd)


def _interpreter_flags() -> list[str]:
    """-W, -X, -O and so on, as this interpreter was given them."""
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]
