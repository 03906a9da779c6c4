"""Configuration: one table of settings, the `Config` they live in, and the sources they come from.

Read in this order: `setting.py` (what a setting is), `settings_http.py` and `settings_server.py` (all of
them), `values.py` (what a value may be), `config.py` (`Config`: hypercorn's, with checks), `checks.py`
(combinations), `sources.py` (files, environment, flags). The lowest tier: it imports nothing of ours but
`errors`.
"""

from __future__ import annotations

from trioserve.config.checks import resolve_exceptions
from trioserve.config.config import Config
from trioserve.config.setting import Setting
from trioserve.config.settings import SETTINGS, settings_table_markdown
from trioserve.config.sources import load_config

__all__ = [
    "SETTINGS",
    "Config",
    "Setting",
    "load_config",
    "resolve_exceptions",
    "settings_table_markdown",
]
