"""A live state that many watch: `app.py` serves it, `world.py` is what moves, `page/` draws it."""
