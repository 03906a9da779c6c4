"""What people install: the wheel holds the package and nothing else, and serves from an empty environment."""

from __future__ import annotations

import os
import sys
import zipfile

import pytest

import trioserve

from .process import REPOSITORY, run_to_end, start_process

PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


async def run_checked(*command: str, **options) -> str:
    process = await run_to_end(*command, **options)
    assert process.returncode == 0, process.stderr.text
    return process.stdout.text


@pytest.mark.slow
async def test_the_wheel_holds_the_package_alone_and_serves_from_an_empty_environment(tmp_path):
    await run_checked(
        sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"trioserve-{trioserve.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"trioserve-{trioserve.__version__}.dist-info/"
    assert [name for name in names if not name.startswith(("trioserve/", dist_info))] == []
    package = REPOSITORY / "trioserve"
    sources = {f"trioserve/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert {name for name in names if not name.startswith(dist_info)} == sources | {"trioserve/py.typed"}
    assert f"{dist_info}licenses/LICENSE" in names

    await run_checked(sys.executable, "-m", "venv", str(tmp_path / "env"))
    python = str(tmp_path / "env" / "bin" / "python")
    await run_checked(python, *PIP, "install", str(wheel))
    (tmp_path / "service.py").write_text((REPOSITORY / "examples" / "hello.py").read_text())
    script = str(tmp_path / "env" / "bin" / "trioserve")
    # Nothing of the repository may be found by way of the environment or the working directory.
    outside = {"env": {"PYTHONPATH": os.devnull}, "cwd": tmp_path}
    version = await run_checked(script, "--version", **outside)
    assert version.startswith(f"trioserve {trioserve.__version__} ")
    assert "absent" not in version
    async with start_process(script, "--bind", "127.0.0.1:0", "service.py:app", **outside) as server:
        await server.wait_running()
        assert (await server.get()).body == b"Hello from trioserve\n"
