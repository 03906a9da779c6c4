"""Fixtures of the HTTP/1 tests on the wire."""

from __future__ import annotations

import pytest

from tests.http.feeding import ENGINES

HUBS = ("epoll", "portable")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest) -> str:
    return str(request.param)
