"""The benchmark: trioserve against its peers, in one run, turn and turn about.

Read in this order: `run.py` (the whole run), `workloads.py` (what is asked of a server), `servers.py` (who is
asked, and how), `process.py` (how each is started and ended), `load.py` (one turn: warm up, load, verify), `memory.py`
(idle connections and leaks), `tls_load.py`, `h2_load.py` and `websocket_load.py` (the same for what is not plain
HTTP/1.1), `measure.py` (CPU clocks, memory, ratios), `targets.py` and `report.py` (what it comes
to), `chart.py` (the picture). `apps.py` runs inside the servers, `wrk.lua` inside wrk.
"""
