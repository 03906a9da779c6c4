"""README is true: its examples run, its tables are current, the files it names exist.

`python -m tests.test_readme` writes the generated tables into README.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import signal
import sys
from pathlib import Path

import pytest

from trioserve import errors
from trioserve.config.settings import BY_NAME, default_with_unit, settings_table_markdown
from trioserve.static.options import StaticOptions
from trioserve.structure.boundary import ROWS, Verdict

from .e2e.process import REPOSITORY, run_to_end, start_process
from .e2e.static_differences import differences_markdown

README = REPOSITORY / "README.md"

_WORKERS = {
    Verdict.CONTAIN: "serves on",
    Verdict.REPLACE: "`on_app_error`",
    Verdict.FATAL: "short drain, exit",
    Verdict.EXIT: "drain, exit",
}


def boundary_table_markdown() -> str:
    """The rows of the boundary, for people."""
    lines = ["| row | what happened | answer | the worker | exit code |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        answer = str(row.status) if row.status else "none"
        code = str(row.exit_code) if row.exit_code else ""
        if name == "X1":
            code = "its own"
        worker = "ends at once" if name.startswith("H") else _WORKERS[row.verdict]
        lines.append(f"| {name} | {row.meaning} | {answer} | {worker} | {code} |")
    return "\n".join(lines) + "\n"


def static_options_markdown() -> str:
    """The options of `StaticFiles`, as its own docstring explains them."""
    about = inspect.getdoc(StaticOptions) or ""
    words = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", about, re.MULTILINE))
    lines = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(StaticOptions):
        default = getattr(StaticOptions(), field.name)
        if isinstance(default, tuple | dict):
            items = [item.decode() if isinstance(item, bytes) else item for item in default]
            default = ", ".join(items) or "none"
        text = " ".join(words[field.name].split())
        lines.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "boundary table": boundary_table_markdown,
    "settings table": settings_table_markdown,
    "static differences": differences_markdown,
    "static options": static_options_markdown,
}


def between_markers(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", re.DOTALL)


def write_tables() -> None:
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        text = between_markers(name).sub(lambda _: "\n" + make() + "\n", text)  # noqa: B023 - called at once
    README.write_text(text, encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


# -- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_generated_tables_are_current(name):
    found = between_markers(name).search(README.read_text(encoding="utf-8"))
    assert found, f"the markers of the {name} are gone"
    assert found.group().strip() == TABLES[name]().strip(), "run: python -m tests.test_readme"


def test_the_timeouts_table_names_settings_and_their_defaults():
    rows = re.findall(
        r"^\| [\w ]+ \| `(\w+)` \| ([^|]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) >= 12
    for name, default in rows:
        if name == "request_body_min_rate":
            default = default.replace("B/s after 30 s", "bytes/s")
        assert default == default_with_unit(BY_NAME[name]), name


def test_every_exit_code_is_explained():
    (table,) = re.findall(r"## Exit codes\n(.*?)## Signals", README.read_text(encoding="utf-8"), re.DOTALL)
    explained = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")
    }
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert explained == codes


def test_every_file_it_names_is_there():
    text = README.read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:trioserve|tests|bench|examples)/[\w/.]+)`", text)) | {
        "CHANGELOG.md",
        "LICENSE",
    }
    assert len(names) > 20
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


def test_every_setting_it_names_exists():
    text = README.read_text(encoding="utf-8")
    for name in re.findall(
        r"`(\w+_timeout|\w+_errors|max_\w+|on_app_error|crash_dir|\w+_grace|\w+_delay|block_\w+)`", text
    ):
        assert name in BY_NAME or name in StaticOptions.__dataclass_fields__, name


# -- examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [n for n, text in enumerate(python_blocks()) if '0"]' in text])
async def test_examples_that_serve_do_so_and_end_on_ctrl_c(block, tmp_path):
    example = tmp_path / "example.py"
    example.write_text(python_blocks()[block])
    async with start_process(sys.executable, "-W", "error", str(example)) as process:
        await process.wait_running()
        response = await process.get()
        assert response.status == 200
        if "hello\\n" in python_blocks()[block]:
            assert response.body == b"hello\n"
        process.send_signal(signal.SIGINT)
        code = await process.wait()
    assert "draining: " in process.stderr.text
    # run() hears a signal; in serve() Ctrl-C is the caller's KeyboardInterrupt, here in a group, which is Python's 1.
    assert code == (0 if "trioserve.run(" in python_blocks()[block] else 1)


@pytest.mark.parametrize("block", [n for n, text in enumerate(python_blocks()) if '0"]' not in text])
async def test_examples_that_end_run_to_their_end(block, tmp_path):
    example = tmp_path / "example.py"
    example.write_text(python_blocks()[block])
    process = await run_to_end(sys.executable, "-W", "error", str(example))
    assert process.returncode == 0, process.stderr.text


def test_there_are_examples_of_both_kinds():
    assert [('0"]' in text) for text in python_blocks()] == [True, True, False, True, True, True, True]


if __name__ == "__main__":
    write_tables()
    print(f"wrote {Path(README).name}")
