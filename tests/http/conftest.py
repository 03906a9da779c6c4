"""Fixtures for files on the wire."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.http.large_file import SIZE


@pytest.fixture(scope="session")
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture
def large(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "large.bin"
    path.write_bytes(content)
    return path
