"""What the operator sees: access and error logs, StatsD, the task tree. Nothing here decides anything.

Read in this order: `log_writer.py` (the one background thread), `log_file.py`, `access_log.py` (a finished
exchange becomes a line), `statsd.py` (and hypercorn's metrics), `logs.py` (all of them from the Config),
`task_tree.py`, `blocking.py` (the watchdog), `in_flight.py` (what a worker was doing when it died).
"""
