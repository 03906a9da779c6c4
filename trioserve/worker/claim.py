"""What a process takes before it imports anything of the app: its sockets, its user, its service manager.

    sockets     those that systemd passes, or those that `bind` names
    user        root is given up once the sockets are bound: the app is imported, and every file opened, without it
    notifier    how the service manager is told

Called by `worker/command.py` for a process that owns itself; a supervisor says the same of its sockets. Nothing here
waits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field

from trioserve.config import Config
from trioserve.config.provenance import Origin
from trioserve.net.activation import (
    ACTIVATION_VARIABLES,
    PLAIN_NAME,
    ActivatedSocket,
    activated_sockets,
    split_activated,
)
from trioserve.net.bind import Listeners, bind_config, describe, open_listeners
from trioserve.observe.notify import NOTIFY_VARIABLES, Notifier
from trioserve.observe.privileges import drop_privileges


@dataclass(slots=True)
class Claim:
    """What a process has taken.

    Attributes:
        listeners: its sockets, bound but not listening where they are its own.
        notifier: to the service manager.
        remarks: what the error log should say of this, once there is one.
    """

    listeners: Listeners
    notifier: Notifier
    remarks: list[str] = field(default_factory=list)


def claim_process(config: Config, environ: MutableMapping[str, str] = os.environ) -> Claim:
    """Take all of it, once, before the app is imported.

    Raises:
        BindError: a socket cannot be had.
        ConfigError: the process may not become `user` or `group`.
    """
    listeners, remarks = open_process_sockets(config, environ)
    try:
        if drop_privileges(config.user, config.group):
            config.check_places()
            remarks.append(f"no longer root: running as user {os.getuid()}, group {os.getgid()}")
        # Its log is the worker's as soon as there is one.
        notifier = Notifier(environ, logging.getLogger(__name__))
        for name in (*NOTIFY_VARIABLES, *ACTIVATION_VARIABLES):
            environ.pop(name, None)  # not for the app's own children
    except BaseException:
        listeners.close()
        raise
    return Claim(listeners, notifier, remarks)


def open_process_sockets(
    config: Config, environ: MutableMapping[str, str] = os.environ
) -> tuple[Listeners, list[str]]:
    """The sockets that systemd passes instead of those that `bind` names; and remarks for the log.

    As in gunicorn, what is passed replaces `bind`: one configuration then serves on a developer's machine and under
    a socket unit that has taken the same port.

    Raises:
        BindError: a socket cannot be had.
    """
    activated = [] if chooses_by_number(config) else activated_sockets(environ, os.getpid())
    if not activated:
        return bind_config(config), []
    remarks = activation_remarks(config, activated)
    secure, plain = split_activated(activated)
    # From here on they are as other inherited descriptors: this process's to close, with nothing to remove.
    listeners = open_listeners([f"fd://{number}" for number in secure])
    listeners.secure = config.ssl_enabled
    listeners.add_plain(open_listeners([f"fd://{number}" for number in plain]))
    return listeners, remarks


def activation_remarks(config: Config, activated: Sequence[ActivatedSocket]) -> list[str]:
    """What the log should say of sockets that the service manager has passed."""
    # "unknown" is what systemd calls a socket that has no FileDescriptorName (sd_listen_fds_with_names(3)).
    names = ", ".join(
        f"{'unnamed' if sock.name == 'unknown' else sock.name} ({describe(sock, _scheme(config, sock))})"
        for sock in activated
    )
    remarks = [f"socket activation: {names}"]
    for name in ("bind", "insecure_bind"):
        source = config.source_of(name)
        if source.origin is not Origin.DEFAULT:
            binds = ", ".join(getattr(config, name))
            remarks.append(f"{source.place(name)} = {binds} is not used: the sockets above replace it")
    return remarks


def _scheme(config: Config, sock: ActivatedSocket) -> str:
    return "https" if config.ssl_enabled and sock.name != PLAIN_NAME else "http"


def chooses_by_number(config: Config) -> bool:
    """Whether `bind` says with `fd://` which descriptors it wants: it is taken at its word then, and nothing else."""
    return any(bind.startswith("fd://") for bind in config.bind)
