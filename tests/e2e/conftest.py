"""Real processes: most of these tests may have company, but not those that measure how long something takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.certificates import Certificates, make_certificates

_HERE = Path(__file__).parent

# Whole files, and parts of names.
_ALONE_FILES = frozenset({"test_blocking.py", "test_chaos.py", "test_cold_files.py"})
_ALONE_NAMES = ("sleeps",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == _HERE and (
            item.path.name in _ALONE_FILES or any(name in item.name for name in _ALONE_NAMES)
        ):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))
