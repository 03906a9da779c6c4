"""The directory that the supervisor was started in, when it may not enter that itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As `--user` does, where root was started in a directory of its own.
SCRIPT = """
import os, sys
os.chdir(sys.argv[1])
os.setresuid(65534, 65534, 65534)
from trioserve.supervisor.working_directory import WorkingDirectory
directory = WorkingDirectory({"PWD": sys.argv[1]})
with directory.entered() as stay:
    stay()
print(directory)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_one_that_may_not_be_entered_is_left_alone(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    command = [sys.executable, "-c", f"import trioserve.supervisor.working_directory\n{SCRIPT}", str(private)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "<WorkingDirectory None>\n", done.stderr
