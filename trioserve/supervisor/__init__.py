"""The parent process: it owns the listening sockets, starts the workers, and keeps as many of them alive as asked.

Read `supervisor.py` first: the whole life, top to bottom. What it decides is decided in pure modules that know
neither processes nor clocks: `restart_policy.py` (what follows a worker's death or taint), `recycling.py` (when a
healthy worker has served enough), `autoscale.py` (how many there should be); `machine.py` reads the figures.
"""
