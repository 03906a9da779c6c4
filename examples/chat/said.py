"""What a client may say, and what it is told if it says something else. Called by `Member.listen`."""

from __future__ import annotations

import json

# Close codes of RFC 6455.
INVALID = 1007
TOO_BIG = 1009

# Characters; the page does not let anybody type more.
LONGEST = {"name": 40, "text": 2000, "key": 64}


class SaidWrong(Exception):
    """A client sent what no page of ours sends."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def parse(text: str | None) -> dict[str, str]:
    """What a client said: `{"name": ..., "text": ..., "key": ...}`."""
    try:
        said = json.loads(text or "")
        fields = {name: said[name] for name in LONGEST}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SaidWrong(INVALID, "not a message") from None
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip() or not is_text(value):
            raise SaidWrong(INVALID, f"a message needs a {name}")
        if len(value) > LONGEST[name]:
            raise SaidWrong(TOO_BIG, f"a {name} has at most {LONGEST[name]} characters")
    return fields


def is_text(value: str) -> bool:
    """Whether it can be written down: JSON can escape half of a character that needs two."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
