"""What is made of a worker's words, whoever may have got hold of its link."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trioserve.supervisor.conversation import announced_code, figures_of


@pytest.mark.parametrize(
    "said, code",
    [
        ({"exit_code": 75}, 75),
        ({"exit_code": 0}, 0),
        ({}, 0),
        ({"exit_code": "75"}, 0),
        ({"exit_code": None}, 0),
        ({"exit_code": 75.0}, 0),
        # As the kernel would cut it: never a signal, and never more than the supervisor can end with itself.
        ({"exit_code": -9}, 247),
        ({"exit_code": 2**70 + 3}, 3),
    ],
)
def test_the_code_with_which_a_worker_says_that_it_will_end(said: dict[str, Any], code: int) -> None:
    assert announced_code(said) == code


def test_only_numbers_are_figures() -> None:
    said = {
        "requests": 3,
        "cpu": 0.5,
        "rss": "much",
        "in_flight": True,
        "a": math.inf,
        "b": math.nan,
        "c": None,
    }
    assert figures_of(said) == {"requests": 3, "cpu": 0.5}
