"""A documentation site: Markdown built once into files (`build.py`), and `StaticFiles` to serve them (`app.py`)."""

from __future__ import annotations

from pathlib import Path

# Where the site is built and looked for when nothing else is said.
OUT = Path("build/docs_site")
