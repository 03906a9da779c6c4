import pytest

from trioserve.testing import no_leaks, serving

from . import apps


@pytest.mark.parametrize("engine", ["httptools", "h11"])
@pytest.mark.parametrize("hub", ["epoll", "portable"])
async def test_a_connection_serves_request_after_request(engine, hub):
    async with no_leaks(), serving(apps.echo, http_engine=engine, hub=hub) as server:
        async with server.connect() as client:
            for n in range(3):
                body = b"x" * n * 10
                response = await client.request("POST", "/", body=body)
                assert (response.status, response.body) == (200, body)
            assert (await client.get()).body == b""
    assert server.failure is None
