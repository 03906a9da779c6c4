"""A child of ours, by its descriptor."""

from __future__ import annotations

import os
import signal
import sys

from trioserve.supervisor.child_process import ChildProcess


async def test_a_signal_after_its_end_and_after_close_is_no_error_and_reaches_nobody_else() -> None:
    first, second = (
        ChildProcess(os.posix_spawn(sys.executable, [sys.executable, "-c", "input()"], os.environ))
        for _ in range(2)
    )
    first.send_signal(signal.SIGKILL)
    assert await first.wait() == -signal.SIGKILL
    first.send_signal(signal.SIGTERM)
    first.close()
    # The number of its descriptor is another's now.
    third = ChildProcess(second.pid)
    first.send_signal(signal.SIGTERM)
    third.close()
    second.send_signal(signal.SIGKILL)
    assert await second.wait() == -signal.SIGKILL
    second.close()
    second.send_signal(signal.SIGKILL)
