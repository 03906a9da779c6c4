"""`examples/chat` as its users have it: several workers, a Redis, pages in a browser, and things that go wrong.

`../test_examples.py` has the protocol it speaks, with the history in the worker.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.certificates import Certificates
from tests.websocket_client import Closed, WebSocketClient, open_websocket

from .chromium import Browser, Page, open_browser
from .process import ServerProcess, require_tool, run_to_end, serve_command, start_process, trioserve_command
from .test_supervisor import children, until

pytestmark = pytest.mark.slow

APP = "examples.chat.app:app"

ONLINE = "document.querySelector('#status').dataset.state === 'online'"
TEXTS = "[...document.querySelectorAll('#log .text')].map(text => text.textContent)"
PENDING = "document.querySelectorAll('#log .pending').length"


@asynccontextmanager
async def start_redis(folder: Path) -> AsyncIterator[ServerProcess]:
    """A Redis of our own on a socket in the folder; it keeps nothing on disk."""
    redis, path = require_tool("redis-server"), folder / "redis"
    flags = ("--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder))
    async with start_process(redis, *flags) as process:
        await process.stdout.wait_for("eady to accept connections")
        process.address = f"unix://{path}"
        yield process


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[str]:
    pytest.importorskip("coredis")
    async with start_redis(tmp_path) as process:
        yield process.address


@asynccontextmanager
async def serve_chat(
    redis: str, *flags: str, workers: int = 2, binding: str = "127.0.0.1:0", app: str = APP
) -> AsyncIterator[ServerProcess]:
    async with serve_command(app, *flags, bind=binding, workers=workers, env={"CHAT_STORE": redis}) as server:
        yield server


async def come(browser: Browser, url: str, name: str, **look: Any) -> Page:
    """Open the page and say who we are."""
    page = await browser.open(url, **look)
    await page.wait_for(ONLINE)
    await page.type("#name", name)
    return page


async def say(page: Page, *texts: str) -> None:
    for text in texts:
        await page.type("#text", f"{text}\n")


async def see(texts: list[str], *pages: Page) -> None:
    """All of it, in this order, each once, and nothing that is still to be sent."""
    for page in pages:
        await page.wait_for(f"{TEXTS}.length >= {len(texts)} && {PENDING} === 0")
        assert await page.evaluate(TEXTS) == texts


# -- two pages -----------------------------------------------------------------------------------------------


async def test_two_pages_talk_to_each_other(redis: str, tmp_path: Path) -> None:
    async with serve_chat(redis) as server, open_browser() as browser:
        ada = await come(browser, f"{server.url}/", "Ada Lovelace")
        bob = await come(browser, f"{server.url}/", "Bob", size=(390, 844), phone=True, dark=True)
        other = await come(browser, f"{server.url}/?room=coffee", "Cy")
        await say(ada, "Good morning!", "Is anybody here?")
        await see(["Good morning!", "Is anybody here?"], ada, bob)
        await say(bob, "<b>Me</b> &amp; my phone")
        await see(["Good morning!", "Is anybody here?", "<b>Me</b> &amp; my phone"], ada, bob)
        for page in (ada, bob):
            await page.wait_for("document.querySelector('#status').textContent === '2 here'")
            assert (await page.screenshot(tmp_path / "page.png")).startswith(b"\x89PNG")
        assert await ada.evaluate("document.querySelectorAll('#log .mine').length") == 2
        assert await bob.evaluate("document.querySelectorAll('#log .mine').length") == 1
        assert await bob.evaluate("document.documentElement.scrollWidth") == 390
        await see([], other)
        for page in (ada, bob, other):
            assert page.handshakes == [101]
            assert set(page.protocols) == {"http/1.1"}
            assert page.complaints == []


async def test_two_pages_talk_over_http_2(redis: str, certificates: Certificates) -> None:
    trusted = f"--ignore-certificate-errors-spki-list={fingerprint(certificates.certfile)}"
    async with serve_chat(redis, *certificates.flags) as server, open_browser(trusted) as browser:
        url = f"https://{server.address}/"
        ada, bob = await come(browser, url, "Ada"), await come(browser, url, "Bob")
        await say(ada, "over one connection")
        await see(["over one connection"], ada, bob)
        await say(bob, "with the page itself")
        await see(["over one connection", "with the page itself"], ada, bob)
        for page in (ada, bob):
            # RFC 8441: a stream of the connection that the page came over, opened with 200.
            assert page.handshakes == [200]
            assert set(page.protocols) == {"h2"}
            assert page.complaints == []


def fingerprint(certfile: Path) -> str:
    """Of the public key, as Chromium wants it."""
    key = x509.load_pem_x509_certificate(certfile.read_bytes()).public_key()
    public = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(public).digest()).decode()


# -- workers that end ------------------------------------------------------------------------------------------


async def test_nothing_is_lost_when_workers_are_killed_while_two_talk(redis: str) -> None:
    async with serve_chat(redis) as server, open_browser() as browser:
        ada, bob = await come(browser, f"{server.url}/", "Ada"), await come(browser, f"{server.url}/", "Bob")
        said = []
        for number in range(8):
            if number in (2, 5):
                for worker in children(server.pid):
                    os.kill(worker, signal.SIGKILL)
            page = (ada, bob)[number % 2]
            said.append(f"{number}: {'Ada' if page is ada else 'Bob'}")
            await say(page, said[-1])
        for page in (ada, bob):
            await page.wait_for(f"{TEXTS}.length >= {len(said)} && {PENDING} === 0")
            # Two may be told in another order than they were said in while both were away; each is there, once.
            assert sorted(await page.evaluate(TEXTS)) == sorted(said)
        assert await ada.evaluate(TEXTS) == await bob.evaluate(TEXTS)
        assert len(ada.handshakes) > 1
        # A newcomer is told the same.
        cy = await come(browser, f"{server.url}/", "Cy")
        await see(await ada.evaluate(TEXTS), cy)


async def test_a_reload_sends_pages_to_the_new_workers(redis: str) -> None:
    async with serve_chat(redis) as server, open_browser() as browser:
        ada, bob = await come(browser, f"{server.url}/", "Ada"), await come(browser, f"{server.url}/", "Bob")
        await say(ada, "before")
        await see(["before"], ada, bob)
        old = set(children(server.pid))
        server.send_signal(signal.SIGHUP)
        await say(bob, *(f"meanwhile {number}" for number in range(5)))
        await until(lambda: not old & set(children(server.pid)), "the end of the old workers")
        await say(ada, "afterwards")
        texts = ["before", *(f"meanwhile {number}" for number in range(5)), "afterwards"]
        for page in (ada, bob):
            await see(texts, page)
            # Workers go one by one: who comes back to the one that goes next comes back twice.
            assert page.handshakes in ([101, 101], [101, 101, 101])


async def test_a_drain_closes_with_1012(redis: str) -> None:
    async with serve_chat(redis, workers=0) as server:
        async with await open_websocket(server.address, "/rooms/tea") as ada:
            assert await hear(ada) == {"ready": True}
            server.send_signal(signal.SIGTERM)
            with pytest.raises(Closed) as closed:
                while True:
                    await ada.receive()
            assert closed.value.code == 1012
            assert await server.wait() == 0


# -- members that do not read ------------------------------------------------------------------------------------


async def hear(client: WebSocketClient) -> dict[str, Any]:
    """The next messages; how many are here is said in between."""
    while "here" in (frame := json.loads(await client.receive())):
        pass
    assert isinstance(frame, dict)
    return frame


async def enter(
    server: ServerProcess, after: str = "", *, receive_buffer: int | None = None
) -> WebSocketClient:
    return await open_websocket(server.address, f"/rooms/tea?after={after}", receive_buffer=receive_buffer)


async def test_a_member_that_does_not_read_stalls_nobody_and_is_sent_away(redis: str) -> None:
    """Everybody else is told at once; the one who reads again is told why he was sent away, and misses nothing."""
    count, big = 1200, "x" * 10_000
    async with AsyncExitStack() as stack:
        # The slow one is told when all has been said, which may be long after it was sent away.
        server = await stack.enter_async_context(
            serve_chat(redis, workers=0, app="tests.e2e.patient_chat:app")
        )
        slow = await stack.enter_async_context(await enter(server, receive_buffer=4096))
        quick = await stack.enter_async_context(await enter(server))
        assert await hear(quick) == {"ready": True}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, redis, count, big)
            heard = []
            while len(heard) < count:
                heard += [message["key"] for message in (await hear(quick))["messages"]]
        assert heard == [str(number) for number in range(count)]

        got: list[dict[str, str]] = []
        assert await hear(slow) == {"ready": True}
        with pytest.raises(Closed) as closed:
            while True:
                got += (await hear(slow))["messages"]
        assert (closed.value.code, closed.value.reason) == (4008, "100 messages behind")
        assert 0 < len(got) < count
        back = await stack.enter_async_context(await enter(server, got[-1]["id"]))
        while "ready" not in (frame := await hear(back)):
            got += frame["messages"]
        assert [message["key"] for message in got] == heard


async def fill(redis: str, count: int, text: str) -> None:
    """Say so much as no member may: past the server, for members may not talk so fast."""
    from examples.chat.redis_store import open_redis

    async with open_redis(redis) as store:
        for number in range(count):
            await store.add("tea", name="Ada", text=text, key=str(number))


# -- where the history is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "redis"])
async def test_both_stores_answer_alike(tmp_path: Path, where: str) -> None:
    from examples.chat.store import Message, open_store

    pytest.importorskip("coredis")
    async with AsyncExitStack() as stack:
        if where == "redis":
            where = (await stack.enter_async_context(start_redis(tmp_path))).address
        store = await stack.enter_async_context(open_store(where))
        assert await store.recent("tea", 10) == await store.after("tea", "0-0", 10) == []
        for number in range(5):
            await store.add("tea", name="Ada", text=f"grüße {number}", key=str(number))
        await store.add("coffee", name="Bob", text="elsewhere", key="x")
        messages = await store.recent("tea", 10)
        assert [(m.name, m.text, m.key) for m in messages] == [
            ("Ada", f"grüße {number}", str(number)) for number in range(5)
        ]
        assert sorted(messages, key=lambda message: message.place) == messages
        assert await store.recent("tea", 2) == messages[3:]
        assert await store.after("tea", messages[1].id, 2) == messages[2:4]

        told, news = trio.open_memory_channel[Message](10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.follow, "tea", messages[2].id, told.send_nowait)
            assert [await news.receive() for _ in range(2)] == messages[3:]
            await store.add("tea", name="Bob", text="new", key="5")
            assert (await news.receive()).text == "new"
            nursery.cancel_scope.cancel()
        assert await store.count("tea", 3) == 3
        assert await store.count("tea", 1) == 1
        if where != "memory":
            async with open_store(where) as other:  # another worker's
                assert await other.count("tea", 4) == 5


# -- Redis that is not there ---------------------------------------------------------------------------------------


async def test_without_redis_it_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("coredis")
    command = trioserve_command("--bind", "127.0.0.1:0", "--workers", "0", APP)
    process = await run_to_end(*command, env={"CHAT_STORE": f"unix://{tmp_path}/nothing"})
    assert process.returncode == 3
    assert f"no Redis at unix://{tmp_path}/nothing" in process.stderr.text
    assert "apt-get install redis-server" in process.stderr.text
    assert "CHAT_STORE=memory" in process.stderr.text


async def test_pages_come_back_when_redis_does(tmp_path: Path) -> None:
    pytest.importorskip("coredis")
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(start_redis(tmp_path))
        server = await stack.enter_async_context(serve_chat(redis.address, workers=0))
        browser = await stack.enter_async_context(open_browser())
        ada = await come(browser, f"{server.url}/", "Ada")
        bob = await come(browser, f"{server.url}/", "Bob")
        await say(ada, "before")
        await see(["before"], ada, bob)
        redis.kill()
        for page in (ada, bob):
            await page.wait_for(f"!({ONLINE}) && document.body.innerText.includes('not available')")
        await say(bob, "said into the void")
        await redis.wait()
        await stack.enter_async_context(start_redis(tmp_path))
        await see(["before", "said into the void"], ada, bob)
        assert server.returncode is None
        assert server.reports() == []
