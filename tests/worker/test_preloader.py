"""The preloader's own parts: which threads there are, and a fork whose parent is somebody else."""

from __future__ import annotations

import subprocess
import sys
import threading

from trioserve.worker.preloader import running_threads


def test_threads_are_found_by_name() -> None:
    before = running_threads()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="collector")
    thread.start()
    try:
        found = running_threads()
    finally:
        end.set()
        thread.join()
    # Threads that other tests have left may end meanwhile.
    assert found.count("collector") == before.count("collector") + 1
    assert found == sorted(found)


def run(script: str) -> str:
    """What a process with one thread prints; it must end well."""
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_grandchild_is_the_subreapers_child_by_the_time_it_is_known() -> None:
    # Known to whom has forked it through a pipe, as in life: the subreaper is one process further up.
    script = """
import os
from trioserve.supervisor.reaper import become_subreaper
from trioserve.worker.preloader import fork_grandchild

become_subreaper()
top = os.getpid()
read, write = os.pipe()
go_on, go = os.pipe()
between = os.fork()
if between == 0:
    pid = fork_grandchild()
    if pid is None:
        os.read(go_on, 1)
        os._exit(7 if os.getppid() == top else 8)
    os.write(write, b"%d" % pid)
    os.read(go_on, 1)
    os._exit(0)
pid = int(os.read(read, 32))
# The one between still lives.
with open(f"/proc/{pid}/stat") as file:
    print("parent is the subreaper:", int(file.read().rpartition(")")[2].split()[1]) == os.getpid())
os.write(go, b"!!")
print("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.waitpid(between, 0)
"""
    assert run(script) == "parent is the subreaper: True\nexit code 7\n"


def test_a_fork_that_fails_is_told_where_it_was_asked_for() -> None:
    script = """
import os
from trioserve.worker import preloader

fork, parent = os.fork, os.getpid()
def fork_once():
    if os.getpid() != parent:
        raise OSError(11, "no more processes")
    return fork()
os.fork = fork_once
before = os.listdir("/proc/self/fd")
try:
    preloader.fork_grandchild()
except OSError as error:
    print(error.errno, os.getpid() == parent, len(os.listdir("/proc/self/fd")) == len(before))
"""
    assert run(script) == "11 True True\n"


def test_nobody_starts_it_by_hand() -> None:
    command = [sys.executable, "-m", "trioserve.worker", "preloader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "is started by the supervisor" in done.stderr
