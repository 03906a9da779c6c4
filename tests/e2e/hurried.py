"""`python -m tests.e2e.hurried ...` is trioserve whose supervisor takes a second for what takes it a minute otherwise.

For tests: no setting says how long a load must last before there is one worker more, since nobody should need it.
"""

from __future__ import annotations

import functools
import sys

from trioserve.cli import main
from trioserve.supervisor import recycler, scaling, supervisor
from trioserve.supervisor.autoscale import AutoscaleLimits, Autoscaler
from trioserve.supervisor.recycling import RecyclingLimits
from trioserve.supervisor.restart_policy import RestartLimits, RestartPolicy

# Thresholds that a worker passes, too, that gets no more than a fifth of a CPU.
LIMITS = AutoscaleLimits(busy=0.15, busy_for=0.6, spare=0.1, spare_for=0.6, cooldown=0.5)

# A worker has lasted by the time at which five others have failed to start, however fast the machine.
RESTART_LIMITS = RestartLimits(min_uptime=0.2, max_delay=0.5)

if __name__ == "__main__":
    scaling._INTERVAL = scaling._IDLE_INTERVAL = 0.2
    scaling.Autoscaler = functools.partial(Autoscaler, limits=LIMITS)  # type: ignore[misc, assignment]
    recycler.RecyclingLimits = functools.partial(RecyclingLimits, settling=0.0)  # type: ignore[misc, assignment]
    supervisor.RestartPolicy = functools.partial(RestartPolicy, RESTART_LIMITS)  # type: ignore[misc, assignment]
    sys.exit(main())
