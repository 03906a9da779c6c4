"""The listening sockets of a supervisor: opened once, kept over reloads, handed on in an upgrade.

`supervisor.py` owns one `SocketStore`; workers inherit what is in it. A socket is known by what `bind` called it, so a
reload opens only what is new and closes only what is gone, and no queued connection is lost. Nothing here waits.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from trioserve.config import Config
from trioserve.errors import BindError
from trioserve.net.activation import ActivatedSocket, split_activated
from trioserve.net.bind import Listeners, open_listeners

# The keys of sockets that the service manager has opened: for `bind`, and for what is `insecure_bind` elsewhere.
ACTIVATED = "systemd"
ACTIVATED_PLAIN = "systemd insecure"


class SocketStore:
    """Listening sockets by the address that asked for them."""

    def __init__(self) -> None:
        self._opened: dict[str, Listeners] = {}
        self._left: list[str] = []  # addresses on which only workers still listen
        # Binds of which we have only the files, until the workers that listen there have ended.
        self._retired: set[str] = set()

    def __repr__(self) -> str:
        return f"<SocketStore {', '.join(self._opened)}>"

    def sockets_for(self, config: Config) -> list[socket.socket]:
        """Those that `config` binds: a worker must not hold one that is about to be closed."""
        return [sock for bind in self._binds(config) for sock in self._opened[bind].sockets]

    def plain_for(self, config: Config) -> list[int]:
        """Which of `sockets_for` speak plain HTTP although there is TLS, by their place in the list."""
        if not config.ssl_enabled:
            return []
        sockets = [bind for bind in self._binds(config) for _ in self._opened[bind].sockets]
        return [place for place, bind in enumerate(sockets) if not _speaks_tls(bind, config)]

    @property
    def is_activated(self) -> bool:
        """The service manager has opened them, so what `bind` says does not count."""
        return ACTIVATED in self._opened or ACTIVATED_PLAIN in self._opened

    def addresses(self, config: Config) -> list[str]:
        """Where they can be reached, by what `config` has spoken there."""
        found = list(self._left)
        for bind in self._binds(config):
            listeners = self._opened.get(bind)
            if listeners is not None:  # else it was handed over
                listeners.secure = _speaks_tls(bind, config)
                found += listeners.addresses()
        return found

    def _binds(self, config: Config) -> list[str]:
        """Those of ours that count for `config`: others are about to be closed, or a predecessor's."""
        return list(self._opened) if self.is_activated else _binds(config)

    def adopt(self, key: str, descriptors: Iterable[int]) -> None:
        """Take sockets that somebody else has opened; the file of a unix socket becomes ours to remove."""
        listeners = open_listeners([f"fd://{number}" for number in descriptors])
        if key.startswith("unix:"):
            # Somebody has removed it; or the path is relative, and the working directory is another one now.
            with suppress(FileNotFoundError):
                listeners.add_file(Path(key[5:]))
        self._opened[key] = listeners

    def adopt_activated(self, sockets: Sequence[ActivatedSocket]) -> None:
        """Take sockets that the service manager has opened, some of them for plain HTTP."""
        for key, descriptors in zip((ACTIVATED, ACTIVATED_PLAIN), split_activated(sockets), strict=True):
            if descriptors:
                self.adopt(key, descriptors)

    def open(self, config: Config) -> dict[str, Listeners]:
        """Open what `config` binds and is not open yet; returns what was opened, for `drop` if all comes to nothing.

        Raises:
            BindError: one cannot be had; what was opened before it is closed again.
        """
        opened: dict[str, Listeners] = {}
        try:
            for bind in _binds(config):
                if bind not in self._opened:
                    opened[bind] = open_listeners(
                        [bind], umask=config.umask, user=config.user, group=config.group
                    )
        except BindError:
            for listeners in opened.values():
                listeners.close()
            raise
        self._opened.update(opened)
        return opened

    def drop(self, binds: Iterable[str]) -> list[socket.socket]:
        """Give these up and remove their socket files; returns sockets to be closed, as `retire_others`."""
        released: list[socket.socket] = []
        for bind in list(binds):
            if bind in self._opened:
                released += self._release(bind)
                self._opened.pop(bind).close()
                self._retired.discard(bind)
        return released

    def drop_others(self, config: Config) -> list[socket.socket]:
        """As `drop`: what `config` does not bind any more; what the service manager has opened stays."""
        return self.drop(self._others(config))

    def retire_others(self, config: Config) -> list[socket.socket]:
        """Give up the sockets of what `config` does not bind any more; their files stay for who still listens there.

        Returns those that are for nobody but our workers: the caller closes them, and may end their listening for all.
        """
        others = self._others(config)
        self._retired.update(others)
        return [sock for bind in others for sock in self._release(bind)]

    def _others(self, config: Config) -> list[str]:
        kept = (*_binds(config), ACTIVATED, ACTIVATED_PLAIN)
        return [bind for bind in self._opened if bind not in kept]

    def _release(self, bind: str) -> list[socket.socket]:
        released = self._opened[bind].release_sockets()
        if bind not in (ACTIVATED, ACTIVATED_PLAIN) and not bind.startswith("fd://"):
            return released
        for sock in released:  # who has passed them to us listens on, or means to
            sock.close()
        return []

    def unserved(self, served: set[socket.socket]) -> list[str]:
        """Those of which no socket is among the `served`."""
        return [bind for bind, found in self._opened.items() if served.isdisjoint(found.sockets)]

    def leave_to_workers(self, config: Config) -> list[socket.socket]:
        """An address is given up with the last worker that listens on it. Socket files stay.

        Returns our copies, for the caller to close, as `retire_others`.
        """
        self._left = self.addresses(config)
        return [sock for bind in self._opened for sock in self._release(bind)]

    def close(self) -> None:
        """Close all of them and remove socket files."""
        for sock in self.drop(list(self._opened)):
            sock.close()

    def hand_over(self, dropped: Iterable[str] = ()) -> list[socket.socket]:
        """A successor serves on all but what it has `dropped`: close our copies, and leave the socket files to it.

        Returns those that it serves on.
        """
        taken = [
            sock for bind, found in self._opened.items() if bind not in dropped for sock in found.sockets
        ]
        for bind, listeners in self._opened.items():
            if bind not in self._retired:  # of those a successor knows nothing
                listeners.forget_files()
        self.close()
        return taken

    # -- an upgrade ------------------------------------------------------------------------------------------

    def describe_for_upgrade(self, first: int) -> tuple[list[int], dict[str, list[int]]]:
        """Descriptors to be inherited, and which numbers they will have from `first` on, by bind."""
        descriptors: list[int] = []
        numbers: dict[str, list[int]] = {}
        for bind, listeners in self._opened.items():
            if bind in self._retired:
                continue
            numbers[bind] = [first + len(descriptors) + index for index in range(len(listeners.sockets))]
            descriptors += [sock.fileno() for sock in listeners.sockets]
        return descriptors, numbers

    def take_over(self, numbers: Mapping[str, Sequence[int]]) -> None:
        """Take what a predecessor has handed down."""
        for bind, descriptors in numbers.items():
            self.adopt(bind, descriptors)


def _binds(config: Config) -> list[str]:
    """The addresses of `config`, those for plain HTTP last: they are bound only where there is TLS beside them."""
    insecure = config.insecure_bind if config.ssl_enabled else []
    return list(dict.fromkeys((*config.bind, *insecure)))


def _speaks_tls(bind: str, config: Config) -> bool:
    return config.ssl_enabled and bind not in (ACTIVATED_PLAIN, *config.insecure_bind)
