"""What signals do while nobody receives them, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trioserve.signals import STRAYS

PREPARED = """
import os, signal, subprocess, sys, threading
import trio
from trioserve import signals

def signal_me(name, pid=os.getpid()):
    os.kill(pid, getattr(signal, name))
"""


def run(script: str, *, entered: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; `entered` is the process's number in its own eyes when it begins."""
    entering = "" if entered is None else f"os.getpid = lambda: {entered}\nsignals.enter_process()\n"
    command = [sys.executable, "-W", "error", "-c", PREPARED + entering + script]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"])
def test_process_number_1_ends_by_a_signal_with_the_code_that_a_shell_gives(name: str) -> None:
    done = run(f"signal.raise_signal(signal.{name})\nprint('goes on')\n", entered=1)
    assert (done.returncode, done.stdout) == (128 + signal.Signals[name], "")


def test_in_any_other_process_they_do_what_they_did() -> None:
    assert run("signal_me('SIGTERM')", entered=2).returncode == -signal.SIGTERM
    assert "KeyboardInterrupt" in run("signal_me('SIGINT')", entered=2).stderr


# A module that is interrupted where Python can only print a KeyboardInterrupt, as in a callback of its import system.
INTERRUPTED = """
import os, signal, weakref

class Lock: ...

lock = Lock()
callback = weakref.ref(lock, lambda _: signal.raise_signal(signal.SIGINT))
del lock
os.write(2, b"goes on")
"""


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("module", ["argparse", "trio"])
def test_an_interrupt_while_the_server_is_imported_ends_it_without_a_word(
    tmp_path: Path, module: str, workers: str
) -> None:
    (tmp_path / f"{module}.py").write_text(INTERRUPTED)
    command = [sys.executable, "-m", "trioserve", "--workers", workers, "nothing:app"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_what_is_overlooked_does_nothing_here_and_is_not_ignored_by_what_is_started() -> None:
    done = run(
        """
signals.overlook(signals.STRAYS)
for name in signals.STRAYS:
    signal_me(name)
subprocess.run(["cat", "/proc/self/status"])
"""
    )
    assert done.returncode == 0
    ignored = next(line for line in done.stdout.splitlines() if line.startswith("SigIgn"))
    for name in STRAYS:
        assert not int(ignored.split()[1], 16) >> (signal.Signals[name] - 1) & 1, name


ENDING = """
async def main():
    ending = signals.Ending([signal.SIGTERM])
    with trio.open_signal_receiver(signal.SIGTERM):
        signal_me("SIGTERM")
        {decide}

trio.run(main)
signal_me("SIGTERM")
print("goes on")
"""


def test_after_the_end_is_decided_a_signal_does_nothing_also_one_that_came_before() -> None:
    done = run(ENDING.format(decide="ending.decide()"))
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_as_long_as_it_is_not_a_signal_does_what_it_did_before() -> None:
    assert run(ENDING.format(decide="")).returncode == -signal.SIGTERM
    assert (
        run("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENDING.format(decide="")).stdout
        == "goes on\n"
    )
    handled = run("signal.signal(signal.SIGTERM, lambda *_: print('mine'))\n" + ENDING.format(decide=""))
    assert handled.stdout == "mine\nmine\ngoes on\n"


def test_who_goes_on_has_its_handlers_back() -> None:
    done = run(
        """
signal.signal(signal.SIGTERM, lambda *_: print("mine"))
mine = signal.getsignal(signal.SIGTERM)
ending = signals.Ending([signal.SIGTERM])
ending.decide()
signal_me("SIGTERM")
ending.restore()
print(signal.getsignal(signal.SIGTERM) is mine)
"""
    )
    assert done.stdout == "True\n"


def test_at_the_very_end_a_signal_ends_the_process_with_its_own_code_whatever_holds_it_up() -> None:
    done = run(
        """
def ask_again():
    threading.main_thread().join()
    while True:  # one that comes just before the interpreter begins to wait for this thread is not heard
        signal_me("SIGTERM")
        threading.Event().wait(0.1)

threading.Thread(target=ask_again).start()
sys.exit(signals.end_with(7))
"""
    )
    assert done.returncode == 7, done.stderr


def test_while_the_interpreter_takes_itself_apart_signals_are_ignored() -> None:
    done = run(
        """
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGHUP):
        kill(pid, number)

last = Last()
sys.modules["last"] = last
sys.exit(signals.end_with(0))
""",
        entered=2,
    )
    assert done.returncode == 0, done.stderr


def test_the_package_is_imported_without_what_it_consists_of() -> None:
    code = "import sys; from trioserve import signals; print([name for name in sys.modules if 'trioserve.' in name])"
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert listed.stdout == "['trioserve.signals']\n"
