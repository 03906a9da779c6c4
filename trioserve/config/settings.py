"""All settings in one table, finding one by name, and the table as README shows it.

Read by `Config`, the sources, the command line and the README test. Pure.
"""

from __future__ import annotations

import difflib
import itertools

from trioserve.config.setting import ENVIRONMENT_PREFIX, Setting
from trioserve.config.settings_http import ERRORS, HTTP, LIMITS, TIMEOUTS
from trioserve.config.settings_http2 import HTTP2
from trioserve.config.settings_server import APPLICATION, LISTENING, LOGS, PROCESSES, SHUTDOWN
from trioserve.config.settings_tls import TLS
from trioserve.config.settings_websocket import WEBSOCKET

SETTINGS: tuple[Setting, ...] = (
    *APPLICATION,
    *LISTENING,
    *TLS,
    *TIMEOUTS,
    *LIMITS,
    *HTTP,
    *HTTP2,
    *WEBSOCKET,
    *SHUTDOWN,
    *ERRORS,
    *LOGS,
    *PROCESSES,
)

BY_NAME: dict[str, Setting] = {setting.name: setting for setting in SETTINGS}

# What the settings of other servers are called here: people arrive with those in their fingers.
_ELSEWHERE = {
    "host": "bind",
    "port": "bind",
    "uds": "bind",
    "fd": "bind",
    "interface": "application_path",
    "limit_concurrency": "max_concurrent_requests",
    "limit_max_requests": "max_requests",
    "log_config": "logconfig",
    "ssl_ca_certs": "ca_certs",
    "ssl_certfile": "certfile",
    "ssl_ciphers": "ciphers",
    "ssl_keyfile": "keyfile",
    "ssl_keyfile_password": "keyfile_password",
    "timeout": "worker_timeout",
    "timeout_graceful_shutdown": "graceful_timeout",
    "timeout_keep_alive": "keep_alive_timeout",
    "write_timeout": "response_write_timeout",
    "ws_max_size": "websocket_max_message_size",
}


def setting_elsewhere(name: str) -> str | None:
    """The setting that another server calls exactly like this."""
    return _ELSEWHERE.get(name.lower().replace("-", "_"))


def nearest_setting(name: str) -> str | None:
    """The setting that was probably meant, spellings of flags and of other servers included."""
    spellings = {setting.name: setting.name for setting in SETTINGS} | _ELSEWHERE
    for setting in SETTINGS:
        for flag in (*setting.option_strings, *setting.deprecated_flags):
            spellings.setdefault(flag.lstrip("-").replace("-", "_"), setting.name)
    wanted = name.lower().replace("-", "_")
    near = [wanted] if wanted in spellings else difflib.get_close_matches(wanted, spellings, 1)
    return spellings[near[0]] if near else None


def did_you_mean(name: str, prefix: str = "") -> str:
    """The hint that follows "unknown setting", "" when nothing is near."""
    near = nearest_setting(name)
    if near is None:
        return ""
    return f"; did you mean {prefix}{near.upper() if prefix == ENVIRONMENT_PREFIX else near}?"


def settings_table_markdown() -> str:
    """Each setting with flag, default, what and why, under the headings of `--help`; for the README."""
    lines: list[str] = []
    for topic, settings in itertools.groupby(SETTINGS, key=lambda setting: setting.topic):
        lines += [
            "",
            f"**{topic}**",
            "",
            "| setting | flags | default | what | why |",
            "|---|---|---|---|---|",
        ]
        for setting in settings:
            cells = (
                f"`{setting.name}`" + ("" if setting.source == "hypercorn" else " †"),
                " ".join(f"`{flag}`" for flag in setting.option_strings) or "none",
                f"`{default_with_unit(setting)}`",
                setting.help,
                _why(setting),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    legend = (
        "† trioserve's own; the others are hypercorn's. Environment: `TRIOSERVE_` and the name in capitals."
    )
    return "\n".join([legend, *lines]) + "\n"


def default_with_unit(setting: Setting) -> str:
    """The default as people write it, with its unit where it is a number."""
    shown = setting.show(setting.default)
    is_number = isinstance(setting.default, int | float) and not isinstance(setting.default, bool)
    return f"{shown} {setting.unit}" if setting.unit and is_number else shown


def _why(setting: Setting) -> str:
    if setting.refused and setting.refused_when is None:
        return f"refused: {setting.refused}"
    return (
        f"{setting.reason} (no effect: {setting.without_effect})"
        if setting.without_effect
        else setting.reason
    )
