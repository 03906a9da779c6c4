"""nginx and `StaticFiles` answer the same requests over the same directory: every difference is declared.

nginx runs as people configure it for files, with one worker. Both serve as somebody who may not read everything, also
where root runs the tests.
"""

from __future__ import annotations

import grp
import gzip
import os
import pwd
import random
import re
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import pytest
import trio

from trioserve.static.conditional import http_date, parse_http_date
from trioserve.testing import Response

from ..static.asking import OLD, put
from .process import PATIENCE, connect, require_tool, serve_command, start_process, wait_listening
from .static_differences import DIFFERENCES, differences_markdown
from .static_rows import ROWS, Row
from .test_privileges import command as root_command

IS_ROOT = os.geteuid() == 0
NOBODY = pwd.getpwnam("nobody")

# Of all answers with the same status; the body too.
COMPARED = (
    "content-length", "content-range", "content-type", "charset", "content-encoding", "etag", "last-modified", "vary",
    "location", "allow", "accept-ranges", "cache-control", "x-content-type-options", "preamble", "body",
)  # fmt: skip

# Of answers whose statuses differ.
COMPARED_ANYWAY = ("location", "allow", "content-range")

SCRIPT = b"let a = 1;\n" * 100

# Without its file's name and time, and so the same at each run.
SIBLING = gzip.compress(SCRIPT, mtime=0)

Values = dict[str, str]


def plant(root: Path) -> None:
    put(root / "index.html", b"<h1>home</h1>\n")
    put(root / "plain.txt", b"0123456789")
    put(root / "data.bin", random.Random(4).randbytes(10_000))
    put(root / "unknown.xyz", b"?")
    put(root / "empty.txt", b"")
    put(root / "docs" / "index.html", b"<h1>docs</h1>\n")
    put(root / "bare" / "one.txt", b"1")
    put(root / ".env", b"SECRET=1")
    put(root / ".well-known" / "security.txt", b"Contact: me")
    for name in ("a b.txt", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.txt", "100%.txt", "que?.txt"):
        put(root / name, name.encode())
    put(root / "app.js", SCRIPT)
    put(root / "app.js.gz", SIBLING)
    put(root / "stale.js", SCRIPT)
    put(root / "stale.js.gz", SIBLING, OLD - 60)
    put(root / "old.txt", b"from a store", 1)
    put(root / "future.txt", b"from tomorrow", OLD + 86_400)
    put(root / "denied.txt", b"SECRET=2").chmod(0)
    put(root.parent / "outside.txt", b"SECRET=3")
    (root / "link.txt").symlink_to("plain.txt")
    (root / "escape.txt").symlink_to("../outside.txt")
    os.mkfifo(root / "fifo")


# -- the servers ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def run_nginx(folder: Path, root: Path) -> AsyncIterator[str]:
    user = f"user nobody {grp.getgrgid(NOBODY.pw_gid).gr_name};" if IS_ROOT else ""
    (folder / "nginx.conf").write_text(
        textwrap.dedent(f"""\
            daemon off;
            worker_processes 1;
            {user}
            pid {folder}/nginx.pid;
            error_log {folder}/nginx-error.log info;
            events {{ worker_connections 64; }}
            http {{
                access_log off;
                client_body_temp_path {folder}/body;
                proxy_temp_path {folder}/proxy;
                fastcgi_temp_path {folder}/fastcgi;
                uwsgi_temp_path {folder}/uwsgi;
                scgi_temp_path {folder}/scgi;
                types {{
                    text/html html; text/plain txt; text/javascript js; application/gzip gz;
                }}
                default_type application/octet-stream;
                sendfile on;
                tcp_nopush on;
                etag on;
                gzip_static on;
                gzip_vary on;
                autoindex off;
                index index.html;
                server {{ listen unix:{folder}/nginx.sock; root {root}; }}
            }}
        """)
    )
    async with start_process(
        require_tool("nginx"), "-c", str(folder / "nginx.conf"), "-e", f"{folder}/nginx-error.log"
    ):
        await wait_listening(f"unix:{folder}/nginx.sock")
        yield f"unix:{folder}/nginx.sock"


@asynccontextmanager
async def run_ours(root: Path) -> AsyncIterator[str]:
    app = f"trioserve.static.command:make_app('{root}')"
    if not IS_ROOT:
        async with serve_command(app) as server:
            yield server.address
        return
    flags = ("--user", "nobody", "--bind", "127.0.0.1:0", app)
    async with start_process(*root_command(*flags)) as server:
        await server.wait_running()
        yield server.address


# -- what is compared ----------------------------------------------------------------------------------------


def seen(response: Response, row: Row, root: Path) -> Values:
    """An answer in the words of the table; what is wrong with it in itself fails here."""
    found = {"status": str(response.status)}
    for name in COMPARED:
        value = response.header(name)
        if value is not None:
            found[name] = value
    kind, _, charset = found.pop("content-type", "").partition(";")
    if kind:
        found["content-type"] = kind
    if charset.strip().startswith("charset="):
        found["charset"] = charset.strip().removeprefix("charset=")
    if "etag" in found:
        assert re.fullmatch(r'(W/)?"[0-9a-z-]+"', found["etag"])
        found["etag"] = "weak" if found["etag"].startswith("W/") else "strong"
    if "cache-control" in found:
        found["cache-control"] = "yes"
    if "vary" in found:
        found["vary"] = found["vary"].lower()
    if response.status >= 300:
        # The length is that of its own words.
        found.pop("content-length", None)
    plain, sibling = _forms(row, root)
    if "last-modified" in found:
        found["last-modified"] = _time_of(found["last-modified"], response, plain, sibling)
    if row.method != "HEAD":
        found |= _body(response, plain, sibling)
    else:
        assert response.body == b""
    if response.status in (200, 206):
        _measure(found, plain, sibling)
    return found


def _forms(row: Row, root: Path) -> tuple[Path, Path]:
    """The file that a row is about, and where its compressed sibling is."""
    path = root / unquote(row.target.partition("?")[0]).lstrip("/")
    if row.target.endswith("/"):
        path /= "index.html"
    return path, path.with_name(path.name + ".gz")


def _time_of(text: str, response: Response, plain: Path, sibling: Path) -> str:
    moment = parse_http_date(text.encode())
    if plain.exists() and moment == int(plain.stat().st_mtime):
        return "the file's"
    if sibling.exists() and moment == int(sibling.stat().st_mtime):
        return "the sibling's"
    date = parse_http_date((response.header("date") or "").encode())
    assert date is not None
    assert moment is not None
    return "now" if date - 5 <= moment <= date else text


def _body(response: Response, plain: Path, sibling: Path) -> Values:
    if response.status >= 300 or response.status == 204:
        page = response.body.startswith(b"<html>")
        return {"body": "a page" if page else "a line"} if response.body else {}
    content = (sibling if response.header("content-encoding") == "gzip" else plain).read_bytes()
    if response.status == 200:
        assert response.body == content
        return {"body": "the sibling" if content.startswith(b"\x1f\x8b") else "the file"}
    ours = response.header("content-range")
    if ours is not None:
        assert response.body == _part(ours, content)
        return {"body": "its part"}
    boundary = (response.header("content-type") or "").partition("boundary=")[2].encode()
    before, *parts, last = response.body.split(b"--" + boundary)
    assert before in (b"", b"\r\n")
    assert last == b"--\r\n"
    kinds = set()
    for part in parts:
        head, _, data = part.removeprefix(b"\r\n").removesuffix(b"\r\n").partition(b"\r\n\r\n")
        about = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        assert data == _part(about.pop("Content-Range"), content)
        kinds.add(about.pop("Content-Type"))
        assert not about
    return {
        "preamble": "CRLF" if before else "none",
        "body": f"{len(parts)} parts, {', '.join(sorted(kinds))}",
    }


def _part(content_range: str, content: bytes) -> bytes:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
    assert found, content_range
    assert int(found[3]) == len(content)
    return content[int(found[1]) : int(found[2]) + 1]


def _measure(found: Values, plain: Path, sibling: Path) -> None:
    """Lengths in words where they are those of a file."""
    if "multipart" in found.get("content-type", ""):
        # Of delimiters and heads as well; that it is the body's is known, since the client has read it by it.
        del found["content-length"]
    elif found["status"] == "200":
        names = {str(plain.stat().st_size): "the file's"}
        if sibling.exists():
            names[str(sibling.stat().st_size)] = "the sibling's"
        found["content-length"] = names.get(found["content-length"], found["content-length"])


def differing(nginx: Values, ours: Values) -> dict[str, tuple[str | None, str | None]]:
    names = COMPARED
    found: dict[str, tuple[str | None, str | None]] = {}
    if nginx["status"] != ours["status"]:
        names = COMPARED_ANYWAY
        found["status"] = (nginx["status"], ours["status"])
    for name in names:
        values = (nginx.get(name), ours.get(name))
        if name == "content-range":
            values = tuple(value and re.sub(r"/\d+$", "/all", value) for value in values)  # type: ignore[assignment]
        if values[0] != values[1]:
            found[name] = values
    return found


# -- asking --------------------------------------------------------------------------------------------------


async def ask(address: str, row: Row) -> Response:
    """Ask for the row on a connection of its own, after what it needs to know."""
    accepts = [(name, value) for name, value in row.fields.items() if name == "accept-encoding"]
    etag = ""
    if any("{etag}" in value for value in row.fields.values()):
        async with connect(address) as client:
            etag = (await client.get(row.target, accepts)).header("etag") or ""
        assert etag
    same = time.gmtime(OLD)
    words = {
        "etag": etag,
        "same": http_date(OLD).decode(),
        "earlier": http_date(OLD - 60).decode(),
        "later": http_date(OLD + 60).decode(),
        "same850": time.strftime("%A, %d-%b-%y %H:%M:%S GMT", same),
        "sameasc": time.asctime(same),
    }
    fields = [(name, value.format_map(words)) for name, value in row.fields.items()]
    async with connect(address) as client:
        with trio.fail_after(PATIENCE):
            response = await client.get(row.target, fields, method=row.method)
    assert response.complete
    return response


@dataclass
class Answers:
    """What nginx has answered to each row, and ours to the first and to the second request."""

    root: Path
    by_row: dict[str, tuple[Response, Response, Response]] = field(default_factory=dict)


async def ask_both(folder: Path, answers: Answers) -> None:
    async with run_nginx(folder, answers.root) as nginx, run_ours(answers.root) as ours:
        for row in ROWS:
            answers.by_row[row.name] = (await ask(nginx, row), await ask(ours, row), await ask(ours, row))


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    # pytest's own folder is for its user only.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        plant(folder / "site")
        answers = Answers(folder / "site")
        trio.run(ask_both, folder, answers)
        yield answers


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name[:80])
def test_answers_differ_as_declared_and_no_further(row, answers):
    nginx, ours, again = (seen(response, row, answers.root) for response in answers.by_row[row.name])
    declared = {name: values for one in row.differs for name, values in one.values.items()}
    if row.method == "HEAD":
        declared.pop("body", None)
    assert differing(nginx, ours) == declared
    # From the cache as from the disk.
    assert again == ours


def test_every_difference_occurs():
    named = [one for row in ROWS for one in row.differs]
    assert [one.request for one in DIFFERENCES if one not in named] == []


def test_no_row_is_there_twice():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) > 120


def test_each_difference_is_a_row_of_the_table():
    lines = differences_markdown().splitlines()
    assert len(lines) == len(DIFFERENCES) + 2
    assert [line.count(" | ") for line in lines if line[1] == " "] == [3] * (len(lines) - 1)
