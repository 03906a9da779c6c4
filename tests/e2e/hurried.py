"""`python -m tests.e2e.hurried ...` is trioserve whose supervisor takes a second for what takes it a minute otherwise.

For tests: no setting says how long a load must last before there is one worker more, since nobody should need it.
"""

from __future__ import annotations

import functools
import sys

from trioserve.cli import main
from trioserve.supervisor import pool, scaling
from trioserve.supervisor.autoscale import AutoscaleLimits, Autoscaler
from trioserve.supervisor.recycling import RecyclingLimits

# Thresholds that a worker passes, too, that gets no more than a fifth of a CPU.
LIMITS = AutoscaleLimits(busy=0.15, busy_for=0.6, spare=0.1, spare_for=0.6, cooldown=0.5)

if __name__ == "__main__":
    scaling._INTERVAL = scaling._IDLE_INTERVAL = 0.2
    scaling.Autoscaler = functools.partial(Autoscaler, limits=LIMITS)  # type: ignore[misc, assignment]
    pool.RecyclingLimits = functools.partial(RecyclingLimits, settling=0.0)  # type: ignore[misc, assignment]
    sys.exit(main())
