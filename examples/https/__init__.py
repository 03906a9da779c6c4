"""HTTPS while developing: `python -m examples.https` makes a certificate, and `app.py` shows what TLS tells an app."""

from __future__ import annotations

from pathlib import Path

# Where the files are written when nothing else is said; not a place that is committed.
OUT = Path("build/https")
