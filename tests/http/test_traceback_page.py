"""The page for the app's author: what it shows, to whom, and that nothing in it comes alive."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.apps import respond
from trioserve.http.traceback_page import FIELDS, SIZE_LIMIT, accepts_html, traceback_page
from trioserve.testing import Response, serving

BROWSER = [("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8")]
AS_HTML = [(b"accept", b"text/html")]

EVIL = """<script>alert("1")</script><img src=x onerror='alert(2)'></pre></section>&lt;"""


class Parsed(HTMLParser):
    """Every element and attribute that a browser would see, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed where it is not open"

    def handle_data(self, data: str) -> None:
        self.text += data


def raised(fail: Callable[[], object]) -> BaseException:
    try:
        fail()
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


def html_of(error: BaseException) -> str:
    kind, body = traceback_page(error, "the app raised", "GET /x", AS_HTML)
    assert kind == b"text/html; charset=utf-8"
    return body.decode()


def plain_of(error: BaseException) -> str:
    kind, body = traceback_page(error, "the app raised", "GET /x", [])
    assert kind == b"text/plain; charset=utf-8"
    return body.decode()


def check_harmless(page: str) -> Parsed:
    """Only our own elements, properly nested, with no attribute that loads or runs anything."""
    parsed = Parsed(page)
    assert parsed.open == []
    assert parsed.elements <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "code", "section", "details",
        "summary", "span",
    }  # fmt: skip
    assert parsed.attributes <= {"lang", "charset", "name", "content", "class", "open"}
    return parsed


# -- what it shows -------------------------------------------------------------------------------------------


def fails_deeper(value: object) -> None:
    raise LookupError(f"nothing for {value}")


def fails_with_a_cause() -> None:
    try:
        fails_deeper("x")
    except LookupError as error:
        raise ValueError("because of it") from error


def fails_in_passing() -> None:
    try:
        fails_deeper("x")
    except LookupError:
        raise ValueError("on the way") from None.nothing  # type: ignore[attr-defined]


def fails_as_a_group() -> None:
    inner = ExceptionGroup("inner", [raised(lambda: fails_deeper(1)), TypeError("of another kind")])
    raise ExceptionGroup("outer", [inner, OSError("beside it")])


@pytest.mark.parametrize("render", [html_of, plain_of])
def test_it_has_type_message_place_and_source_of_cause_and_effect(
    render: Callable[[BaseException], str],
) -> None:
    text = render(raised(fails_with_a_cause))
    if render is html_of:
        text = check_harmless(text).text
    for expected in (
        "500 for GET /x: the app raised",
        "ValueError",
        "because of it",
        "caused by",
        "LookupError",
        "nothing for x",
        __file__,
        "fails_with_a_cause",
        'raise ValueError("because of it") from error',
        "fails_deeper",
    ):
        assert expected in text, expected
    assert text.index("because of it") < text.index("nothing for x")


@pytest.mark.parametrize("render", [html_of, plain_of])
def test_what_was_being_handled_is_told_apart_from_a_cause(render: Callable[[BaseException], str]) -> None:
    text = render(raised(fails_in_passing))
    assert "while handling" in text
    assert "caused by" not in text


@pytest.mark.parametrize("render", [html_of, plain_of])
def test_groups_are_shown_as_the_tree_they_are(render: Callable[[BaseException], str]) -> None:
    text = render(raised(fails_as_a_group))
    if render is html_of:
        text = check_harmless(text).text
    for expected in ("outer", "inner", "nothing for 1", "of another kind", "beside it"):
        assert expected in text
    assert text.count("in the group, no. 1") == 2
    assert text.count("in the group, no. 2") == 2


def test_members_that_are_alike_are_shown_once_with_their_number() -> None:
    assert "no. 1, 3 times" in plain_of(ExceptionGroup("many", [ValueError("same") for _ in range(3)]))


def test_the_apps_frames_are_unfolded_with_their_source_and_the_libraries_are_folded() -> None:
    page = html_of(raised(lambda: re.sub("x", lambda match: fails_deeper("in a callback"), "x")))  # type: ignore[arg-type, return-value]
    frames = re.findall(r"<details class=\"(\w+)\"( open)?><summary><code>(.*?)</code>", page)
    assert {(kind, bool(unfolded)) for kind, unfolded, _ in frames} == {("app", True), ("library", False)}
    for kind, _, place in frames:
        assert (place == __file__) == (kind == "app")
    (here,) = re.findall(r'<span class="here"> *(\d+)  (.*?)</span>', page.split("fails_deeper</code>")[1])
    assert here[1].strip() == "raise LookupError(f&quot;nothing for {value}&quot;)"
    assert Path(__file__).read_text().splitlines()[int(here[0]) - 1].strip().startswith("raise LookupError(")


def test_without_code_of_the_apps_own_the_innermost_frame_is_unfolded() -> None:
    error = raised(lambda: json.loads("{"))
    error.__traceback__ = error.__traceback__.tb_next.tb_next  # type: ignore[union-attr]  # without this file's
    kinds = re.findall(r'<details class="(\w+)"', html_of(error))
    assert len(kinds) > 1
    assert kinds.count("app") == 1
    assert kinds[-1] == "app"


def test_notes_and_reasons_of_a_cancellation_are_there() -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel(reason="late: request")
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                error.add_note("seen in passing")
                text = plain_of(error)
                assert "seen in passing" in text
                assert "reason: late: request" in text
                raise

    trio.run(main)


def test_local_variables_are_not_shown_and_secrets_in_messages_are_masked() -> None:
    def fail() -> None:
        hidden = secret.upper()
        raise ValueError(f"no login with password={hidden}")

    secret = "hunter"
    error = raised(fail)
    assert secret.upper() not in html_of(error) + plain_of(error)
    assert "password=***" in plain_of(error)


# -- nothing comes alive -------------------------------------------------------------------------------------


class Named(Exception):
    """An exception whose class is called as an attacker likes."""


def test_whatever_is_in_messages_notes_names_and_source_is_text() -> None:
    Named.__qualname__ = Named.__name__ = EVIL
    namespace: dict[str, Any] = {"Named": Named}
    exec(compile(f"def fail(): raise Named({EVIL!r})  # {EVIL}", f"/{EVIL}.py", "exec"), namespace)
    namespace["fail"].__code__ = namespace["fail"].__code__.replace(co_name=EVIL, co_qualname=EVIL)
    error = raised(namespace["fail"])
    error.add_note(EVIL)
    _, body = traceback_page(error, "the app raised", f"GET /{EVIL}", AS_HTML)
    parsed = check_harmless(body.decode())
    assert parsed.text.count("alert") >= 2 * 5


def test_source_with_markup_is_text(tmp_path: Path) -> None:
    file = tmp_path / "evil.py"
    file.write_text(f"# {EVIL}\n# \x1b]0;title\x07\u202e\ndef fail():\n    raise ValueError({EVIL!r})\n")
    namespace: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    error = raised(namespace["fail"])
    parsed = check_harmless(html_of(error))
    assert f"# {EVIL}" in parsed.text
    for text in (html_of(error), plain_of(error)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("message", ["\ud800", "\x00", "a\rb\x1b[2J", "\u2028", "x" * 10_000, ""])
@pytest.mark.parametrize("render", [html_of, plain_of])
def test_odd_messages_do_no_harm(message: str, render: Callable[[BaseException], str]) -> None:
    text = render(ValueError(message))
    assert "ValueError" in text
    assert "\x1b" not in text
    if render is html_of:
        check_harmless(text)


def test_what_cannot_be_shown_is_said_to_be_so() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

        @property
        def __notes__(self) -> list[str]:
            raise RuntimeError("no notes either")

    text = plain_of(Broken())
    assert "Broken" in text
    assert "RuntimeError" in text


def test_its_policy_allows_its_own_style_and_nothing_else() -> None:
    page = html_of(ValueError())
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(rb"content-security-policy: (.*)\r\n", FIELDS)
    assert policy
    assert policy[1].decode() == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert "url(" not in style
    assert "@import" not in style


# -- its size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [AS_HTML, []])
def test_its_size_is_bounded_and_it_says_what_is_missing(fields: list[tuple[bytes, bytes]]) -> None:
    request = "GET /x" + "y" * 9000
    _, body = traceback_page(many_that_are_deep(), "the app raised", request, fields)
    assert len(body) <= SIZE_LIMIT
    if fields:
        assert len(body) > SIZE_LIMIT // 2
        check_harmless(body.decode())
        assert "Something was left out" in body.decode()
    assert "exceptions are not shown" in body.decode()


def many_that_are_deep() -> ExceptionGroup[Exception]:
    def descend(levels: int, number: int) -> None:
        if levels:
            descend(levels - 1, number)
        raise ValueError(f"{number} " + "<" * 1000)

    errors = [raised(lambda number=number: descend(20, number)) for number in range(300)]  # type: ignore[misc]
    return ExceptionGroup("many", [error for error in errors if isinstance(error, Exception)])


def test_a_deep_recursion_is_cut_in_the_middle() -> None:
    def recurse() -> None:
        recurse()

    text = plain_of(raised(recurse))
    assert "more frames" in text
    assert text.count(" in ") < 100


# -- who gets which ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (b"text/html", True),
        (b"TEXT/HTML;q=0.1", True),
        (b"application/json, text/html ; q=0.9", True),
        (b"application/xhtml+xml", True),
        (b"text/html;q=0", False),
        (b"text/html; q=0.000, text/plain", False),
        (b"text/html;q=0.01", True),
        (b"*/*", False),
        (b"text/plain", False),
        (b"", False),
        (b"text/htmlx,;,=,q", False),
    ],
)
def test_html_is_for_those_who_name_it(accept: bytes, html: bool) -> None:
    assert accepts_html([(b"host", b"x"), (b"Accept", accept)]) is html
    assert not accepts_html([(b"host", b"text/html")])


App = Callable[[Any, Any, Any], Awaitable[None]]


async def raises(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        raise LookupError("not <b>there</b>")


async def raises_late(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise LookupError("too late")


async def answers_itself(scope: Any, receive: Any, send: Any) -> None:
    """As frameworks do."""
    if scope["type"] == "http":
        await respond(send, b"my own", 500)
        raise LookupError("after its own answer")


async def says_nothing(scope: Any, receive: Any, send: Any) -> None:
    pass


async def exits(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        raise SystemExit(1)


async def ask(app: App, headers: Any = BROWSER, *, development: bool = True, method: str = "GET") -> Response:
    async with serving(app, on_app_error="contain", lifespan="off") as server:
        server.worker.context.development = development
        async with server.connect() as client:
            return await client.request(method, "/a?secret=1", headers=headers)


async def test_in_development_a_browser_gets_the_page() -> None:
    response = await ask(raises)
    headers = dict(response.headers)
    assert response.status == 500
    assert headers[b"content-type"] == b"text/html; charset=utf-8"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"connection"] == b"close"
    assert b"default-src 'none'" in headers[b"content-security-policy"]
    parsed = check_harmless(response.body.decode())
    assert "not <b>there</b>" in parsed.text
    assert "GET /a:" in parsed.text
    assert "secret=1" not in parsed.text


async def test_in_development_a_program_gets_plain_text() -> None:
    response = await ask(raises, [("accept", "*/*")])
    assert (b"content-type", b"text/plain; charset=utf-8") in response.headers
    assert b"LookupError: not <b>there</b>\n" in response.body


async def test_head_gets_the_head_alone() -> None:
    response = await ask(raises, method="HEAD")
    assert response.status == 500
    assert response.body == b""
    assert int(dict(response.headers)[b"content-length"]) > 1000


async def test_an_app_that_says_nothing_is_told_so() -> None:
    assert b"returned without sending a response" in (await ask(says_nothing)).body


async def test_in_production_nobody_gets_any_of_it() -> None:
    response = await ask(raises, development=False)
    assert response.body == b"500 Internal Server Error\n"
    assert b"content-security-policy" not in dict(response.headers)


async def test_in_a_library_use_reloader_shows_nothing() -> None:
    async with serving(raises, use_reloader=True, on_app_error="contain") as server:
        assert (await server.get("/", BROWSER)).body == b"500 Internal Server Error\n"


async def test_a_response_of_the_apps_own_is_left_alone() -> None:
    assert (await ask(answers_itself)).body == b"my own"


async def test_a_response_that_has_begun_is_cut_and_nothing_put_into_it() -> None:
    async with serving(raises_late, on_app_error="contain") as server:
        server.worker.context.development = True
        async with server.connect() as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\n\r\n")
            received = b""
            while data := await client.receive():
                received += data
    assert received.endswith(b"4\r\nhalf\r\n")


async def test_what_is_no_error_of_the_apps_gets_no_page() -> None:
    response = await ask(exits)
    assert response.status == 503
    assert response.body == b"503 Service Unavailable\n"


async def test_a_client_that_reads_slowly_gets_all_of_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raise many_that_are_deep()

    async with serving(app, on_app_error="contain") as server:
        server.worker.context.development = True
        async with server.connect(receive_buffer=4096) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\n\r\n")
            received = b""
            while data := await client.receive():
                received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length
    assert len(body) == int(length[1]) > 100_000
