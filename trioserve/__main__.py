"""`python -m trioserve`, and the `trioserve` command, which calls `main` as well."""

from __future__ import annotations

import sys

from trioserve import signals, streams


def main() -> int:
    """Run the command and return its exit code."""
    streams.open_missing()
    signals.enter_process()
    signals.interrupts_end()
    # Not before: it takes some time, in which the process must be able to end.
    from trioserve.cli import main as run

    return signals.end_with(run())


if __name__ == "__main__":
    sys.exit(main())
