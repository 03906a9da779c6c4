"""Listening sockets: created from `bind` addresses, inherited, or given; and removed again.

`worker.py` calls `open_listeners` before anything else, so that an address that cannot be had is told at once, and
`Listeners.listen` when the app is ready, so that nobody can connect before. Nothing here waits.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trioserve.config import Config
from trioserve.errors import BindError

# A dead peer (power cut, cable) on an idle or receiving connection is noticed by the kernel after about 1 + 3 * 0.5
# minutes, whatever phase deadlines say; accepted sockets inherit all of these from the listener (tcp(7), socket(7)).
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 3))

# The port that the kernel chooses for one family may be taken in the other; it will hardly happen this often in a row.
_PORT_ATTEMPTS = 8

# sockaddr_un(7), less the NUL at the end: Linux, and the BSDs with macOS.
_UNIX_PATH_LIMIT = 107 if sys.platform == "linux" else 103


class _SocketFile:
    """A socket file that was created here. Whether it is still there is told by its inode's number.

    As long as a socket is bound to it no other file gets that number; afterwards one may at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()  # by the end the working directory may be another one
        self._created = path.lstat()
        self._descriptor: int | None = None

    def keep(self) -> bool:
        """Keep the number when our socket is about to be closed; False if the file is gone, or cannot be kept."""
        if sys.platform == "linux" and self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_PATH | os.O_NOFOLLOW)
            except OSError:
                return False
            if not os.path.samestat(os.fstat(self._descriptor), self._created):
                self.forget()
                return False
        return True

    def remove(self) -> None:
        """Only if it is still ours: a successor may have bound the same path."""
        with suppress(OSError):
            if os.path.samestat(self._path.lstat(), self._created):
                self._path.unlink()
        self.forget()

    def forget(self) -> None:
        """Leave it to somebody else."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Listeners:
    """The bound sockets of one server, and the socket files that are ours to remove.

    Attributes:
        sockets: all of them.
        secure: those that speak TLS are the others than `plain`.
        plain: by `id`, those that speak plain HTTP although there is TLS.
    """

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.secure = False
        self.plain: set[int] = set()
        self._files: list[_SocketFile] = []
        self._borrowed: set[int] = set()

    def __repr__(self) -> str:
        return f"<Listeners {', '.join(self.addresses())}>"

    def listen(self, backlog: int) -> None:
        """Begin to queue connections (listen(2)); sockets that listen already keep their backlog.

        Raises:
            BindError: somebody else has come to listen on the same address since it was bound.
        """
        for sock in self.sockets:
            if not _is_listening(sock):
                try:
                    sock.listen(backlog)
                except OSError as error:
                    raise BindError(f"cannot listen on {describe(sock)}: {_advice(error)}") from None

    def addresses(self) -> list[str]:
        """Where the server can be reached: `http(s)://host:port` or `unix:path`, with the real port for port 0."""
        return [describe(sock, "https" if self.is_secure(sock) else "http") for sock in self.sockets]

    def is_secure(self, sock: socket.socket) -> bool:
        """Whether TLS is spoken on it."""
        return self.secure and id(sock) not in self.plain

    def add_plain(self, others: Listeners) -> None:
        """Take over the sockets of `others`, for plain HTTP."""
        self.plain.update(map(id, others.sockets))
        self.sockets += others.sockets
        self._files += others._files
        self._borrowed |= others._borrowed

    def close(self) -> None:
        """Close what was opened here (given sockets stay open for their owner) and remove our socket files."""
        for file in self._files:
            file.remove()
        self._files.clear()
        self.close_sockets()

    def close_sockets(self) -> None:
        """As `close`, but leave the socket files for as long as others listen behind them."""
        for sock in self.release_sockets():
            sock.close()

    def release_sockets(self) -> list[socket.socket]:
        """As `close_sockets`, but leave the closing to the caller: those that were opened here."""
        self._files = [file for file in self._files if file.keep()]
        released = [sock for sock in self.sockets if id(sock) not in self._borrowed]
        self.sockets.clear()
        self.plain.clear()
        return released

    def add_file(self, path: Path) -> None:
        """Remember a socket file that was created here."""
        self._files.append(_SocketFile(path))

    def forget_files(self) -> None:
        """Leave the socket files to somebody else."""
        for file in self._files:
            file.forget()
        self._files.clear()

    def borrow(self, sock: socket.socket) -> None:
        """Use a socket that belongs to the caller."""
        self._borrowed.add(id(sock))
        self.sockets.append(sock)


def open_listeners(
    binds: Sequence[str],
    *,
    umask: int | None = None,
    user: int | None = None,
    group: int | None = None,
    sockets: Iterable[socket.socket] | None = None,
) -> Listeners:
    """Bind every address of `binds`, or take the given `sockets` instead.

    Args:
        binds: `host:port`, `host` (port 8000), `[v6]:port`, `unix:path`, `fd://number`; port 0 lets the kernel choose.
        umask: permission mask for socket files; None keeps the process's own.
        user: owner of socket files; None leaves it.
        group: group of socket files; None leaves it.
        sockets: bound stream sockets of the caller, listening or not.

    Raises:
        BindError: names the address and what to do; nothing stays open.
    """
    listeners = Listeners()
    try:
        if sockets is not None:
            for sock in sockets:
                listeners.borrow(_prepare_given(sock))
            return listeners
        for bind in binds:
            if bind.startswith("unix:"):
                _check_length(bind)
                _bind_unix(listeners, Path(bind[5:]), umask, user, group)
            elif bind.startswith("fd://"):
                listeners.sockets.append(_inherit(bind))
            else:
                listeners.sockets += _bind_tcp(bind)
    except BaseException:
        listeners.close()
        raise
    return listeners


def bind_config(config: Config, sockets: Iterable[socket.socket] | None = None) -> Listeners:
    """Bind what `config` names: `bind`, or `sockets` instead of all, and where there is TLS `insecure_bind` as well.

    Raises:
        BindError: as `open_listeners`.
    """
    listeners = open_listeners(
        config.bind, umask=config.umask, user=config.user, group=config.group, sockets=sockets
    )
    listeners.secure = config.ssl_enabled
    if listeners.secure and sockets is None:
        try:
            plain = open_listeners(
                config.insecure_bind, umask=config.umask, user=config.user, group=config.group
            )
        except BaseException:
            listeners.close()
            raise
        listeners.add_plain(plain)
    return listeners


def check_binds(config: Config) -> None:
    """Raise BindError for an address that no machine could bind; nothing is resolved, opened or looked for."""
    for bind in (*config.bind, *config.insecure_bind):
        if bind.startswith("unix:"):
            _check_length(bind)
        elif not bind.startswith("fd://"):
            split_host_port(bind)


# -- TCP -----------------------------------------------------------------------------------------------------


def _bind_tcp(bind: str) -> list[socket.socket]:
    host, port = split_host_port(bind)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BindError(f"cannot resolve {host!r} of bind {bind!r}: {reason}") from None
    # A name may stand for several addresses ("localhost": v6 and v4); the empty host means all of them.
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(_PORT_ATTEMPTS if port == 0 else 0):
        with suppress(_PortTaken):
            return _bind_all(addresses, bind)
    return _bind_all(addresses, bind)


class _PortTaken(BindError):
    """The address is in use."""


def _bind_all(addresses: Sequence[tuple[int, tuple[Any, ...]]], bind: str) -> list[socket.socket]:
    """One socket for each address, all with the same port."""
    opened: list[socket.socket] = []
    try:
        for family, address in addresses:
            port = opened[0].getsockname()[1] if opened else address[1]
            sock = _bind_one(family, (address[0], port, *address[2:]), bind, optional=len(addresses) > 1)
            if sock is not None:
                opened.append(sock)
        if not opened:
            raise BindError(f"no address of {bind!r} could be bound")
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return opened


def split_host_port(bind: str) -> tuple[str, int]:
    """`host:port` with hypercorn's defaults; the brackets of an IPv6 literal are taken off.

    Raises:
        BindError: the port is no number from 0 to 65535.
    """
    bind = bind.removeprefix("tcp://")
    if bind.startswith("["):
        host, _, rest = bind[1:].partition("]")
        port = rest.removeprefix(":")
    elif bind.count(":") > 1:
        host, port = bind, ""
    else:
        host, _, port = bind.partition(":")
    if "://" in bind:
        raise BindError(f"bind {bind!r}: give host:port, without {bind[: bind.index('://') + 3]!r}")
    if not port:
        if host.isascii() and host.isdigit():
            raise BindError(
                f"bind {bind!r}: a port alone; write :{host} for all addresses, or 127.0.0.1:{host}"
            )
        return host, 8000
    if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        raise BindError(f"bind {bind!r}: {port!r} is no port; give host:port with a port from 0 to 65535")
    return host, int(port)


def _bind_one(family: int, address: tuple[object, ...], bind: str, *, optional: bool) -> socket.socket | None:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if optional and error.errno == errno.EAFNOSUPPORT:
            return None
        raise BindError(f"bind {bind!r}: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Each family gets a socket of its own; a dual one would collide with the other.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _set_tcp_options(sock)
        sock.setblocking(False)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if optional and error.errno == errno.EADDRNOTAVAIL:
            return None
        kind = _PortTaken if error.errno == errno.EADDRINUSE else BindError
        raise kind(f"cannot bind {bind!r}: {_advice(error)}") from None
    return sock


def _set_tcp_options(sock: socket.socket) -> None:
    """Set once on the listener what every accepted connection is to have."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the address is in use; stop what listens there, or choose another port"
    if error.errno == errno.EACCES:
        return "permission denied; ports below 1024 need CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if error.errno == errno.EINVAL:
        return "the socket is connected already; a listening or a bound one is needed"
    return error.strerror or str(error)


# -- unix ----------------------------------------------------------------------------------------------------


def _check_length(bind: str) -> None:
    size = len(os.fsencode(bind)) - len("unix:")
    if size > _UNIX_PATH_LIMIT:
        raise BindError(
            f"cannot bind {bind}: the path of a unix socket has {_UNIX_PATH_LIMIT} bytes at most, this one {size}"
        )


def _bind_unix(
    listeners: Listeners, path: Path, umask: int | None, user: int | None, group: int | None
) -> None:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    # The umask decides the file's mode at the moment of its creation; changing it later would leave a gap.
    previous = os.umask(umask) if umask is not None else None
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise BindError(f"cannot bind unix:{path}: {error.strerror or error}") from None
    finally:
        if previous is not None:
            os.umask(previous)
    listeners.sockets.append(sock)
    listeners.add_file(path)
    if user is not None or group is not None:
        try:
            os.chown(path, -1 if user is None else user, -1 if group is None else group)
        except OSError as error:
            raise BindError(
                f"cannot give unix:{path} to user {user}, group {group}: {error.strerror}"
            ) from None


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on; refuse a live one and anything that is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise BindError(f"cannot bind unix:{path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise BindError(
            f"cannot bind unix:{path}: the file exists and is no socket; remove it or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (BlockingIOError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                return
    raise BindError(f"cannot bind unix:{path}: another process is listening there")


# -- inherited and given -------------------------------------------------------------------------------------


def _inherit(bind: str) -> socket.socket:
    number = bind[5:]
    if not number.isascii() or not number.isdigit():
        raise BindError(f"bind {bind!r}: {number!r} is no descriptor number; give fd://3")
    try:
        sock = socket.socket(fileno=int(number))
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BindError(f"bind {bind!r}: descriptor {number} is no socket ({reason})") from None
    if sock.type != socket.SOCK_STREAM:
        kind = sock.type.name
        sock.detach()
        raise BindError(f"bind {bind!r}: descriptor {number} is a {kind} socket; a stream socket is needed")
    sock.setblocking(False)
    # It had to be inheritable to reach us; a child of the app that kept it would keep the address too.
    sock.set_inheritable(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _set_tcp_options(sock)
    return sock


def _prepare_given(sock: socket.socket) -> socket.socket:
    if sock.type != socket.SOCK_STREAM:
        raise BindError(f"sockets= needs stream sockets, not {sock.type.name}")
    name = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        if name[1] == 0:
            raise BindError("sockets= needs bound sockets; call bind() first")
        _set_tcp_options(sock)
    elif not name:
        raise BindError("sockets= needs bound sockets; call bind() first")
    sock.setblocking(False)
    return sock


def _is_listening(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False  # not every system can say (macOS for unix sockets); listening twice does no harm


def describe(sock: socket.socket, scheme: str = "http") -> str:
    """`http://host:port`, with brackets round IPv6, or `unix:path`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"{scheme}://{host}:{name[1]}"
