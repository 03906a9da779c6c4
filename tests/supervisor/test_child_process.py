"""A child of ours, by its descriptor, and what it takes to start one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from trioserve.errors import ConfigError
from trioserve.supervisor import child_process
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


def test_workers_need_an_interpreter_and_their_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child_process.check_workers_can_run()
    monkeypatch.setattr(child_process, "_WORKER", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path / 'none'}; install"):
        child_process.check_workers_can_run()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=f"cannot execute {tmp_path / 'python'}; install"):
        child_process.check_workers_can_run()
