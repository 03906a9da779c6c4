"""What a supervisor runs: a worker, or (`preloader`) the process that workers are forked from; nobody does it by hand.

Run by its path, as `supervisor/child_process.py` explains, and therefore before anything of ours can be imported. What
the process inherits and is told is described in `supervisor/worker_process.py` and `preloader.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def import_package() -> None:
    """Import the package that this file is in, whatever else may be called so.

    Its directory comes last on `sys.path`, for what the app starts by multiprocessing: that of an installed trioserve
    has all the other packages in it, one of which may be called like a module of the standard library.
    """
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    package = Path(__file__).absolute().parents[1]
    name, home = package.name, str(package.parent)
    spec = PathFinder.find_spec(name, [home])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    if home not in sys.path:
        sys.path.append(home)


def main() -> int:
    """Be what the arguments say; returns the exit code."""
    role, link, *_ = [*sys.argv[1:], "", ""]
    del sys.argv[1:]  # they are not for the app
    if not link.isdigit():
        sys.exit("trioserve: a worker is started by the supervisor; run trioserve instead")
    import_package()
    from trioserve import signals, streams

    streams.open_missing()
    signals.enter_worker()
    if role == "preloader":
        from trioserve.worker.preloader import main as run
    else:
        from trioserve.worker.child import main as run

    return signals.end_with(run(int(link)))


if __name__ == "__main__":
    sys.exit(main())
