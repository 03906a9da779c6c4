"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background makes them, and every process they start, ignore SIGINT; servers
# that are started here must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
