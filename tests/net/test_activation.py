"""Socket activation: what is taken over, what is not for us, and what is said of what cannot be served."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from trioserve.errors import EXIT_OS, BindError
from trioserve.net import activation
from trioserve.net.activation import ActivatedSocket, activated_sockets, adopt_sockets

ROOT = Path(__file__).parents[2]

# In a test's own process the numbers from 3 on are taken.
FIRST = 300


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.fixture(autouse=True)
def numbers_from_300(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "FIRST_DESCRIPTOR", FIRST)


def listening(family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family)
    if family == socket.AF_INET:
        sock.bind(("127.0.0.1", 0))
    else:
        sock.bind(f"\0trioserve-test-{os.getpid()}-{sock.fileno()}")
    sock.listen(5)
    return sock


@contextmanager
def passed(*socks: socket.socket) -> Iterator[list[tuple[str, int]]]:
    """The sockets as descriptors from `FIRST` on, inheritable as after exec; their addresses. `socks` are closed."""
    with ExitStack() as stack:
        for number, sock in enumerate(socks, FIRST):
            stack.callback(_close_if_open, number)
            os.dup2(sock.fileno(), number)
        addresses = [sock.getsockname() for sock in socks]
        for sock in socks:
            sock.close()
        yield addresses


def _close_if_open(number: int) -> None:
    try:
        os.close(number)
    except OSError:
        pass


def announcing(count: object, *, pid: object = None, names: str | None = None) -> dict[str, str]:
    environ = {"LISTEN_PID": str(os.getpid() if pid is None else pid), "LISTEN_FDS": str(count), "OTHER": "1"}
    if names is not None:
        environ["LISTEN_FDNAMES"] = names
    return environ


def taken(environ: dict[str, str]) -> list[ActivatedSocket]:
    try:
        return activated_sockets(environ, os.getpid())
    finally:
        assert environ == {"OTHER": "1"}, "the variables are consumed, and no others"


def refused(environ: dict[str, str]) -> str:
    with pytest.raises(BindError) as raised:
        taken(environ)
    assert raised.value.exit_code == EXIT_OS
    return str(raised.value)


# -- what is taken ------------------------------------------------------------------------------------------------


def test_all_sockets_in_their_order_with_their_names() -> None:
    with passed(listening(), listening(socket.AF_UNIX)) as addresses:
        socks = taken(announcing(2, names="web:local"))
        assert [(sock.name, sock.getsockname()) for sock in socks] == [
            ("web", addresses[0]),
            ("local", os.fsencode(addresses[1]) if isinstance(addresses[1], str) else addresses[1]),
        ]
        for sock in socks:
            assert not sock.get_inheritable()
            assert not sock.getblocking()
            sock.close()


def test_names_are_unknown_where_none_were_said() -> None:
    with passed(listening()):
        (sock,) = taken(announcing(1))
        assert sock.name == "unknown"
        sock.close()


def test_a_socket_that_is_bound_but_does_not_listen_yet_is_taken() -> None:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    with passed(bound):
        (sock,) = taken(announcing(1))
        sock.close()


def test_the_sockets_accept() -> None:
    with passed(listening()) as (address,):
        (sock,) = taken(announcing(1))
        with sock, socket.create_connection(address):
            accepted, _ = sock.accept()
            accepted.close()


def test_in_a_process_of_its_own_they_begin_at_3() -> None:
    code = (
        "import os\n"
        "from trioserve.net.activation import activated_sockets\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "print([s.getsockname()[1] for s in activated_sockets(os.environ, os.getpid())], 'LISTEN_FDS' in os.environ)\n"
    )
    with listening() as sock:
        port = sock.getsockname()[1]
        found = subprocess.run(
            ["/bin/sh", "-c", 'exec 3<&0 </dev/null; exec "$0" "$@"', sys.executable, "-c", code],
            stdin=sock,
            env={**os.environ, "LISTEN_FDS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert found.stdout == f"[{port}] False\n", found.stderr


# -- what is not for us -------------------------------------------------------------------------------------------


def test_nothing_announced_is_no_error() -> None:
    assert taken({"OTHER": "1"}) == []


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_FDS": "1", "OTHER": "1"},
        {"LISTEN_PID": str(os.getpid()), "OTHER": "1"},
        announcing(0),
        announcing(0, names=""),
        announcing(3, pid=os.getpid() + 1),
        announcing("nonsense", pid=1),
    ],
    ids=["no pid", "no number", "none", "none, no names", "another process", "nonsense for another process"],
)
def test_what_is_not_meant_for_us_is_left_alone(environ: dict[str, str]) -> None:
    assert taken(environ.copy()) == []


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", " 1", "\u0661", "1" * 8, "1" * 5000])
def test_a_number_that_is_none_is_refused_with_its_variable(value: str) -> None:
    message = refused(announcing(value))
    assert message.startswith(
        f"LISTEN_FDS={value!r} in the environment: expected how many sockets were passed"
    )
    message = refused(announcing(1, pid=value))
    assert message.startswith(f"LISTEN_PID={value!r} in the environment: expected the number of a process")


@pytest.mark.parametrize("names", ["", "a", "a:b:c"])
def test_too_few_or_too_many_names_are_refused(names: str) -> None:
    with passed(listening(), listening()):
        message = refused(announcing(2, names=names))
    assert message.startswith(f"LISTEN_FDNAMES={names!r} in the environment: expected a name for each")
    assert message.endswith("but LISTEN_FDS=2")


def test_more_sockets_than_there_are_descriptors() -> None:
    with passed(listening()):
        message = refused(announcing(2, names="web:more"))
    assert message == (
        f"descriptor {FIRST + 1} (more) of socket activation is no socket (Bad file descriptor); is LISTEN_FDS right?"
    )


def test_a_pipe_is_no_socket() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(BindError, match=rf"descriptor {read} \(fifo\) of socket activation is no socket"):
            adopt_sockets([read], ["fifo"])
    finally:
        os.close(read)
        os.close(write)


def _datagram() -> socket.socket:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def _connected() -> socket.socket:
    with listening() as listener:
        client = socket.create_connection(listener.getsockname())
        listener.accept()[0].close()
    return client


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_datagram, "is a SOCK_DGRAM socket; a stream socket is needed (ListenStream= in the socket unit)"),
        (_connected, "is a connection; a listening socket is needed (Accept=no in the socket unit)"),
        (socket.socket, "is bound to no address"),
        (lambda: socket.socket(socket.AF_UNIX), "is bound to no address"),
    ],
)
def test_what_nobody_can_connect_to_is_refused(make, message) -> None:
    with passed(make()):
        assert (
            refused(announcing(1, names="web")) == f"descriptor {FIRST} (web) of socket activation {message}"
        )


def test_when_one_is_refused_those_before_it_are_closed() -> None:
    with passed(listening(), _datagram()):
        refused(announcing(2))
        open_numbers: Sequence[str] = os.listdir("/proc/self/fd")
        assert str(FIRST) not in open_numbers


def test_a_family_that_http_does_not_know_is_refused() -> None:
    try:
        sock = socket.socket(socket.AF_VSOCK)
    except (AttributeError, OSError):
        pytest.skip("no AF_VSOCK on this machine")
    with passed(sock):
        assert refused(announcing(1)).endswith("is of the family AF_VSOCK; IPv4, IPv6 or unix is needed")
