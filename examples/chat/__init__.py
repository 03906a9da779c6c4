"""A chat room in the browser: history outside the process, members that cannot stall each other.

`app.py` is what the server calls, and where to start reading. `room.py` is who hears what, `said.py` what may be said,
`store.py` what was said, which outlives us. `page/` is what the browser gets.
"""
