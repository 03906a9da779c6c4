"""Where compression runs, what load and cancellation do to it, and that it runs on asyncio as well."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
import trio
import trio.testing

from tests.middleware.calling import CODINGS, PROSE, Answer, app_sending, body, call, http_scope, start, text
from trioserve.errors import ConcurrentCall
from trioserve.middleware.compression import Compression
from trioserve.middleware.encoders import Ending

LARGE = PROSE * 6  # 180 kB
assert len(LARGE) > 2 * 64 * 1024


class Watched:
    """An encoder that notes in which thread it is called, stops where it is told to, and must never be shared."""

    def __init__(self, encoder, gate=None):
        self.encoder = encoder
        self.gate = gate
        self.calls = []
        self._lock = threading.Lock()

    def encode(self, data, ending):
        assert self._lock.acquire(blocking=False), "two threads in one encoder"
        try:
            self.calls.append((len(data), threading.current_thread() is threading.main_thread()))
            if self.gate is not None:
                self.gate.entered.set()
                assert self.gate.go.wait(10)
            return self.encoder.encode(data, ending)
        finally:
            self._lock.release()


class Gate:
    def __init__(self):
        self.entered, self.go = threading.Event(), threading.Event()

    async def wait_entered(self):
        assert await trio.to_thread.run_sync(self.entered.wait, 10)


def watch(app: Compression, coding: str, gate: Gate | None = None) -> list[Watched]:
    """Have `app` use watched encoders for `coding`; they are put into the list as they are made."""
    codec, made = app.codecs[coding.encode()], []

    def watched():
        made.append(Watched(codec.open(), gate))
        return made[-1]

    app.codecs[coding.encode()] = dataclasses.replace(
        codec, open=watched, encode_whole=lambda data: watched().encode(data, Ending.FINISH)
    )
    return made


# -- the loop or a thread ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
async def test_large_bodies_are_coded_in_threads_and_small_ones_on_the_loop(coding):
    app = Compression(text(LARGE))
    made = watch(app, coding)
    assert (await call(app, coding)).body == LARGE
    app.app = text(PROSE)
    assert (await call(app, coding)).body == PROSE
    assert [encoder.calls for encoder in made] == [[(len(LARGE), False)], [(len(PROSE), True)]]


async def test_each_part_of_a_stream_goes_where_its_size_belongs():
    app = Compression(
        app_sending(start(), body(PROSE, True), body(LARGE, True), body(PROSE, True), body(b""))
    )
    (made,) = [watch(app, "br")]
    assert (await call(app, "br")).body == PROSE + LARGE + PROSE
    assert [on_loop for _size, on_loop in made[0].calls] == [True, False, True, True]


async def test_a_part_of_many_megabytes_goes_to_threads_slice_by_slice():
    huge = LARGE * 15
    app = Compression(app_sending(start(), body(huge, True), body(b"")))
    made = watch(app, "gzip")
    assert (await call(app, "gzip")).body == huge
    sizes = [size for size, _on_loop in made[0].calls]
    assert sum(sizes) == len(huge)
    assert max(sizes) == 512 * 1024
    assert not any(on_loop for _size, on_loop in made[0].calls[:-1])


async def test_what_waits_unflushed_in_the_encoder_counts():
    """Ten parts that are small one by one, but are compressed together."""
    parts = [body(PROSE[:20_000], True) for _ in range(10)]
    app = Compression(app_sending(start(), *parts, body(b"")), flush=False, threaded_size=60_000)
    made = watch(app, "br")
    assert (await call(app, "br")).body == PROSE[:20_000] * 10
    assert [on_loop for _size, on_loop in made[0].calls] == [True, True, False] * 3 + [True, True]


async def test_slow_levels_leave_the_loop_earlier():
    app = Compression(text(PROSE), brotli_level=9)
    made = watch(app, "br")
    assert (await call(app, "br")).body == PROSE
    assert made[0].calls == [(len(PROSE), False)]


async def test_threads_settings_are_kept():
    app = Compression(text(PROSE), threads=3, threaded_size=100)
    assert app.offload.threads == 3
    made = watch(app, "gzip")
    await call(app, "gzip")
    assert made[0].calls == [(len(PROSE), False)]


# -- load ----------------------------------------------------------------------------------------------------


async def test_when_the_threads_have_a_queue_new_responses_leave_plain_and_are_counted():
    app = Compression(text(LARGE), threads=1)
    gate = Gate()
    made = watch(app, "gzip", gate)
    answers = []

    async def get(accept):
        answers.append(await call(app, accept))

    async with trio.open_nursery() as nursery:
        admitted = 1 + 8 + 1  # one runs, eight may wait, and the next one finds out
        for _ in range(admitted):
            nursery.start_soon(get, "gzip")
        await gate.wait_entered()
        await trio.testing.wait_all_tasks_blocked()
        assert (app.offload.overloaded, app.shed, answers) == (True, 0, [])
        plain = await call(app, "gzip")
        assert (plain.coding, plain.raw, plain.fields["vary"]) == (None, LARGE, "accept-encoding")
        assert app.shed == 1
        nursery.start_soon(get, "gzip, identity;q=0")  # has no use for the plain form, and waits
        await trio.testing.wait_all_tasks_blocked()
        assert answers == []
        gate.go.set()
    assert [answer.coding for answer in answers] == ["gzip"] * (admitted + 1)
    assert len(made) == admitted + 1
    assert (await call(app, "gzip")).coding == "gzip"
    assert app.shed == 1


async def test_only_so_many_streams_are_coded_at_once():
    app = Compression(None, streams=2)
    hold, begun = trio.Event(), []

    async def stream(scope, receive, send):
        await send(start())
        await send(body(PROSE, more=True))
        begun.append(1)
        await hold.wait()
        await send(body(b""))

    app.app = stream
    answers = [Answer() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for answer in answers:
            nursery.start_soon(app, http_scope("gzip"), None, answer.send)
        await trio.testing.wait_all_tasks_blocked()
        assert (len(begun), app.open_streams, app.shed) == (3, 2, 1)
        assert repr(app).endswith("; 2 streams open, 1 shed>")
        app.app = text(PROSE)
        assert (await call(app, "gzip")).coding == "gzip", "one message needs no stream"
        hold.set()
    assert sorted(str(answer.coding) for answer in answers) == ["None", "gzip", "gzip"]
    assert [answer.body for answer in answers] == [PROSE] * 3
    assert app.open_streams == 0


async def test_a_stream_whose_app_fails_or_returns_early_gives_its_place_back():
    async def failing(scope, receive, send):
        await send(start())
        await send(body(PROSE, more=True))
        if scope["path"] == "/":
            raise LookupError("a bug")

    app, answer = Compression(failing), Answer()
    with pytest.raises(LookupError):
        await app(http_scope("gzip"), None, answer.send)
    await app({**http_scope("gzip"), "path": "/early"}, None, Answer().send)
    assert answer.messages[-1]["more_body"] is True, "the server sees that it is not complete"
    assert app.open_streams == 0


# -- cancellation --------------------------------------------------------------------------------------------


async def test_a_cancelled_response_leaves_no_thread_in_its_encoder_and_the_next_one_works():
    gate = Gate()
    app = Compression(app_sending(start(), body(LARGE, True), body(LARGE)))
    made = watch(app, "br", gate)
    scope, over = trio.CancelScope(), trio.Event()
    answer = Answer()

    async def send(message):
        await trio.lowlevel.checkpoint()
        await answer.send(message)

    async def get():
        with scope:
            await app(http_scope("br"), None, send)
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        await gate.wait_entered()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not over.is_set(), "the thread still has the encoder"
        gate.go.set()
        with trio.fail_after(30):
            await over.wait()
    assert scope.cancelled_caught
    assert (answer.messages, len(made[0].calls)) == ([], 1)
    assert (app.open_streams, app.offload.calls) == (0, 0)
    assert (await call(app, "br")).body == LARGE * 2


async def test_after_a_cancelled_send_a_stream_does_not_go_on_as_if_nothing_were_missing():
    stuck = trio.Event()
    sent = []

    async def send(message):
        sent.append(message)
        if len(sent) == 3:
            await stuck.wait()

    async def app(scope, receive, send):
        await send(start())
        await send(body(PROSE, more=True))
        with trio.CancelScope() as patience:
            patience.cancel()
            await send(body(PROSE, more=True))
        assert patience.cancelled_caught
        with pytest.raises(ConcurrentCall, match="after it was cancelled"):
            await send(body(PROSE))

    await Compression(app)(http_scope("gzip"), None, send)
    assert len(sent) == 3
    assert all(message.get("more_body", True) for message in sent)


async def test_what_is_sent_while_a_cancellation_goes_on_is_cancelled_too():
    """An app's `finally: await send(…)`: the cancellation must come out, not a complaint."""
    scope = trio.CancelScope()

    async def send(message):
        if message.get("body"):
            scope.cancel()
            await trio.sleep_forever()

    async def app(scope, receive, send):
        await send(start())
        try:
            await send(body(PROSE, more=True))
        finally:
            await send(body(b""))

    with scope:
        await Compression(app)(http_scope("gzip"), None, send)
    assert scope.cancelled_caught


async def test_two_tasks_in_send_are_refused():
    gate = Gate()

    async def app(scope, receive, send):
        await send(start())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, body(LARGE, more=True))
            await gate.wait_entered()
            with pytest.raises(ConcurrentCall):
                await send(body(b"x", more=True))
            gate.go.set()
        await send(body(b""))

    middleware = Compression(app)
    watch(middleware, "br", gate)
    assert (await call(middleware, "br")).body == LARGE


# -- asyncio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
def test_it_runs_on_asyncio(coding):
    async def main():
        app = Compression(text(LARGE))
        made = watch(app, coding)
        answers = await asyncio.gather(*(call(app, coding) for _ in range(5)))
        assert [encoder.calls for encoder in made] == [[(len(LARGE), False)]] * 5
        streaming = Compression(app_sending(start(), body(PROSE, True), body(LARGE, True), body(b"")))
        return *answers, await call(streaming, coding)

    *answers, streamed = asyncio.run(main())
    assert [(answer.coding, answer.body) for answer in answers] == [(coding, LARGE)] * 5
    assert (streamed.coding, streamed.body) == (coding, PROSE + LARGE)


def test_a_cancelled_response_on_asyncio_leaves_nothing_behind():
    async def main():
        task = asyncio.create_task(call(app, "br"))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        gate.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (app.open_streams, app.offload.calls, len(made[0].calls)) == (0, 0, 1)
        assert (await call(app, "br")).body == LARGE * 2

    gate = Gate()
    app = Compression(app_sending(start(), body(LARGE, True), body(LARGE)))
    made = watch(app, "br", gate)
    asyncio.run(main())


def test_a_send_after_a_cancelled_one_is_refused_on_asyncio():
    async def send(message):
        if message.get("body"):
            await asyncio.Event().wait()

    async def app(scope, receive, send):
        await send(start())
        task = asyncio.create_task(send(body(PROSE, more=True)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        with pytest.raises(ConcurrentCall):
            await send(body(b""))

    asyncio.run(Compression(app)(http_scope("gzip"), None, send))
