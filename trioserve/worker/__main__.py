"""`python -m trioserve.worker`: a worker that a supervisor has started; nobody calls it by hand.

What it inherits and is told is described in `supervisor/worker_process.py`.
"""

from __future__ import annotations

import os
import sys

from trioserve.worker.child import main
from trioserve.worker.parent_link import LINK_VARIABLE

if __name__ == "__main__":
    number = os.environ.pop(LINK_VARIABLE, "")
    if not number.isdigit():
        sys.exit("trioserve: python -m trioserve.worker is started by the supervisor; run trioserve instead")
    sys.exit(main(int(number)))
