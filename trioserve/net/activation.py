"""Socket activation: the listening sockets that systemd, or what acts like it, has opened for us (sd_listen_fds(3)).

Asked by the process that owns itself (`worker/claim.py`) and by the supervisor, once, before anything is bound. The
sockets stay the service manager's: it keeps a descriptor of its own, so their queues outlive us, and socket files are
not ours to remove. Nothing here waits.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping, Sequence

from trioserve.errors import BindError

# Where the descriptors begin (SD_LISTEN_FDS_START).
FIRST_DESCRIPTOR = 3

# All that the protocol has ever put into an environment; nobody below us is to take it for a message to them.
ACTIVATION_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

# `FileDescriptorName=` of a socket unit whose sockets are what `insecure_bind` names elsewhere.
PLAIN_NAME = "insecure"

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class ActivatedSocket(socket.socket):
    """A listening socket that was handed to us.

    Attributes:
        name: what `FileDescriptorName=` of the socket unit says; "unknown" where nothing was said.
    """

    name = "unknown"


def activated_sockets(environ: MutableMapping[str, str], pid: int) -> list[ActivatedSocket]:
    """Take over the sockets that `environ` announces to the process `pid`, in their order; none is no error.

    The variables are consumed in any case: whom else could they be meant for?

    Raises:
        BindError: a variable or a descriptor is not what the protocol asks for.
    """
    said = {name: environ.pop(name, None) for name in ACTIVATION_VARIABLES}
    addressee, count = said["LISTEN_PID"], said["LISTEN_FDS"]
    if addressee is None or count is None:
        return []
    if _number("LISTEN_PID", addressee, "the number of a process") != pid:
        return []  # for a parent of ours that has passed its environment on
    wanted = _number("LISTEN_FDS", count, "how many sockets were passed")
    names = _names(said["LISTEN_FDNAMES"], wanted)
    return adopt_sockets(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + wanted), names)


def split_activated(sockets: Sequence[ActivatedSocket]) -> tuple[list[int], list[int]]:
    """Give up the sockets for their descriptors: those for `bind`, and those that were named for plain HTTP."""
    secure: list[int] = []
    plain: list[int] = []
    for sock in sockets:
        (plain if sock.name == PLAIN_NAME else secure).append(sock.detach())
    return secure, plain


def adopt_sockets(descriptors: Sequence[int], names: Sequence[str]) -> list[ActivatedSocket]:
    """Make sockets of inherited descriptors: stream sockets that listen or are bound, closed on exec, non-blocking.

    Raises:
        BindError: says which descriptor is wrong, and how. It stays open, since it may be no business of ours; those
            before it are closed.
    """
    adopted: list[ActivatedSocket] = []
    try:
        for number, name in zip(descriptors, names, strict=True):
            adopted.append(_adopt(number, name))
    except BindError:
        for sock in adopted:
            sock.close()
        raise
    return adopted


def _number(variable: str, value: str, meaning: str) -> int:
    # Process numbers and descriptors have seven digits at most (proc(5)); Python refuses to read thousands.
    if not value.isascii() or not value.isdigit() or len(value) > 7:
        raise BindError(f"{variable}={value!r} in the environment: expected {meaning}; see sd_listen_fds(3)")
    return int(value)


def _names(value: str | None, count: int) -> list[str]:
    if value is None:
        return [ActivatedSocket.name] * count
    names = value.split(":") if count else []
    if len(names) != count:
        raise BindError(
            f"LISTEN_FDNAMES={value!r} in the environment: expected a name for each socket, with colons between, "
            f"but LISTEN_FDS={count}"
        )
    return names


def _adopt(number: int, name: str) -> ActivatedSocket:
    which = f"descriptor {number} ({name}) of socket activation"
    try:
        sock = ActivatedSocket(fileno=number)
    except OSError as error:
        raise BindError(f"{which} is no socket ({error.strerror}); is LISTEN_FDS right?") from None
    problem = _problem(sock)
    if problem:
        sock.detach()
        raise BindError(f"{which} {problem}")
    sock.name = name
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _problem(sock: socket.socket) -> str:
    """Why nobody can be accepted here, or ""."""
    if sock.type != socket.SOCK_STREAM:
        return f"is a {sock.type.name} socket; a stream socket is needed (ListenStream= in the socket unit)"
    if sock.family not in _FAMILIES:
        return f"is of the family {getattr(sock.family, 'name', sock.family)}; IPv4, IPv6 or unix is needed"
    try:
        sock.getpeername()
    except OSError:
        pass
    else:
        return "is a connection; a listening socket is needed (Accept=no in the socket unit)"
    name = sock.getsockname()
    is_bound = bool(name) if sock.family == socket.AF_UNIX else name[1] != 0
    return "" if is_bound else "is bound to no address"
