"""The process that serves: one `trio.run`, one tree of tasks. Start reading in `worker.py`."""
