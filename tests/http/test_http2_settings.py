"""What each HTTP/2 setting does to a connection."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.apps import hello, respond
from tests.http.http2_client import POST, data_frame, headers
from tests.http.http2_serving import connected, get, read_all, served
from trioserve.config import Config
from trioserve.errors import ConfigError
from trioserve.http import engines
from trioserve.http.h2_engine import H2Engine
from trioserve.http.http2_codes import (
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
)
from trioserve.testing import serving

REFUSED_STREAM = 7


async def test_the_client_is_told_the_limits(http2_engine: str) -> None:
    async with served(
        hello, http2_engine=http2_engine, h2_max_concurrent_streams=7, h2_max_header_list_size=5000,
        h2_max_inbound_frame_size=20000, h2_stream_window=1000, h2_connection_window=100_000,
    ) as (_, client):  # fmt: skip
        told = client.peer.settings
        assert told is not None
        assert told[MAX_CONCURRENT_STREAMS] == 7
        assert told[MAX_HEADER_LIST_SIZE] == 5000
        assert told[MAX_FRAME_SIZE] == 20000
        assert told[INITIAL_WINDOW_SIZE] == 1000
        assert client.peer.connection.outbound_flow_control_window == 100_000


async def test_streams_beyond_the_limit_are_refused_and_may_be_tried_again(http2_engine: str) -> None:
    go_on = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await go_on.wait()
            await respond(send)

    async with served(app, http2_engine=http2_engine, h2_max_concurrent_streams=2) as (server, client):
        theirs = client.peer.connection.remote_settings
        theirs[MAX_CONCURRENT_STREAMS] = 100
        theirs.acknowledge()
        first, second, third = [await client.open() for _ in range(3)]
        assert (await client.response(third)).reset == REFUSED_STREAM
        assert server.worker.context.in_flight == 2
        go_on.set()
        assert (await client.response(first)).status == 200
        assert (await client.response(second)).status == 200
        assert (await client.request()).status == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (get(b"/", (b"a", b"x" * 2000)), 431),
        (get(b"/", *[(b"a%d" % n, b"") for n in range(11)]), 431),
        (get(b"/" + b"a" * 200), 414),
    ],
)
async def test_a_head_that_is_too_large_is_refused_on_its_stream(
    http2_engine: str, fields: Any, status: int
) -> None:
    async with served(
        hello,
        http2_engine=http2_engine,
        h2_max_header_list_size=1500,
        max_header_count=10,
        max_target_size=100,
    ) as (server, client):
        assert (await client.request(fields)).status == status
        assert (await client.request()).status == 200
        assert server.worker.context.counters.refused == {str(status): 1}


async def test_a_frame_that_is_too_large_ends_the_connection(http2_engine: str) -> None:
    async with serving(hello, h2c=True, http2_engine=http2_engine) as server, connected(server) as client:
        await client.send_raw(headers(1, POST, end=False) + data_frame(1, b"x" * 16385))
        await read_all(client.stream)
        await wait_all_tasks_blocked(0.02)
        assert server.worker.context.counters.refused == {"h2 FRAME_SIZE_ERROR": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("h2_max_inbound_frame_size", 2**14 - 1),
        ("h2_max_inbound_frame_size", 2**24),
        ("h2_stream_window", 2**31),
        ("h2_connection_window", 65534),
        ("h2_max_concurrent_streams", 0),
        ("http2_engine", "nghttp2"),
        ("h2c", "yes"),
    ],
)
def test_values_that_the_protocol_does_not_know_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        setattr(Config(), name, value)


def test_the_engine_is_what_the_setting_says() -> None:
    config = Config()
    config.http2_engine = "h2"
    assert type(engines.http2_factory(config)(None)) is H2Engine  # type: ignore[arg-type]
    config.http2_engine = "own"
    assert type(engines.http2_factory(config)(None)).__name__ == "FrameEngine"  # type: ignore[arg-type]
