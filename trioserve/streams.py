"""The standard streams of a process: there always are three, so that nothing else gets their numbers.

What is started without one (`2>&-`, some service managers) would have the next socket or file that it opens as
descriptor 2, and write its crash reports to that. Imported before anything else, so it imports next to nothing itself.
"""

from __future__ import annotations

import os


def open_missing() -> None:
    """Have descriptors 0 to 2 be something, /dev/null if need be; to be called before anything is opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free, which is this one.
            opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(opened, True)
