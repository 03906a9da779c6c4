"""Listening sockets: what each kind of address gives, and what is said where it cannot be had."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from trioserve.config import Config
from trioserve.errors import EXIT_OS, BindError
from trioserve.net.bind import Listeners, describe, open_listeners, split_host_port


def _has_v6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_v6 = pytest.mark.skipif(not _has_v6(), reason="no IPv6 loopback on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")

ROOT = Path(__file__).parents[2]


def descriptors() -> set[str]:
    folder = Path("/proc/self/fd")
    return set(os.listdir(folder)) if folder.exists() else set()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert len(descriptors()) <= len(before)


def opened(*binds: str, **options: object) -> closing[Listeners]:
    return closing(open_listeners(binds, **options))  # type: ignore[arg-type]


def refused(*binds: str, **options: object) -> str:
    """The message of the `BindError`; nothing stays open."""
    before = descriptors()
    with pytest.raises(BindError) as raised:
        open_listeners(binds, **options)  # type: ignore[arg-type]
    assert len(descriptors()) == len(before)
    assert raised.value.exit_code == EXIT_OS
    return str(raised.value)


# -- the spelling of TCP addresses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("127.0.0.1", ("127.0.0.1", 8000)),
        ("localhost:0", ("localhost", 0)),
        ("localhost:", ("localhost", 8000)),
        (":8080", ("", 8080)),
        ("tcp://127.0.0.1:81", ("127.0.0.1", 81)),
        ("[::1]:82", ("::1", 82)),
        ("[::1]", ("::1", 8000)),
        ("::1", ("::1", 8000)),
        ("[::]:65535", ("::", 65535)),
    ],
)
def test_host_and_port(bind: str, expected: tuple[str, int]) -> None:
    assert split_host_port(bind) == expected


@pytest.mark.parametrize("port", ["65536", "x", "-1", "80x", "8 0", "٨٠", "9" * 5000], ids=range(7))
def test_a_port_that_is_none_is_refused_by_name(port: str) -> None:
    message = refused(f"127.0.0.1:{port}")
    assert port in message
    assert "from 0 to 65535" in message


def test_a_port_alone_and_a_url_are_told_what_to_write() -> None:
    assert "write :8000 for all addresses, or 127.0.0.1:8000" in refused("8000")
    for url in ("http://127.0.0.1:8000", "http://[::1]:8000"):
        assert "without 'http://'" in refused(*Config.from_mapping(bind=url).bind)


def test_a_path_that_no_socket_can_have_is_told_by_its_length() -> None:
    assert "bytes at most, this one 200" in refused(f"unix:{'a' * 200}")


def test_text_after_the_bracket_is_refused() -> None:
    assert "'x'" in refused("[::1]x")


# -- TCP -----------------------------------------------------------------------------------------------------


def test_port_0_is_reported_as_the_real_one() -> None:
    with opened("127.0.0.1:0") as listeners:
        (address,) = listeners.addresses()
        port = listeners.sockets[0].getsockname()[1]
        assert port
        assert address == f"http://127.0.0.1:{port}"
        assert repr(listeners) == f"<Listeners {address}>"


@needs_v6
def test_an_ipv6_address_is_bound_for_ipv6_only_and_shown_in_brackets() -> None:
    with opened("[::1]:0") as listeners:
        (sock,) = listeners.sockets
        assert sock.family == socket.AF_INET6
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        assert listeners.addresses()[0].startswith("http://[::1]:")


@needs_v6
@pytest.mark.parametrize("_", range(20))
def test_a_name_with_several_addresses_gets_one_port_for_all(_: int) -> None:
    with opened("localhost:0") as listeners:
        assert {sock.family for sock in listeners.sockets} <= {socket.AF_INET, socket.AF_INET6}
        assert len({sock.getsockname()[1] for sock in listeners.sockets}) == 1


@needs_v6
def test_a_port_that_is_taken_in_the_other_family_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's choice for one family may be in use in the other: choose again."""
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        first = [True]
        bind = socket.socket.bind

        def bind_badly_once(sock: socket.socket, address: tuple[object, ...]) -> None:
            if first and sock.family == socket.AF_INET6 and address[1] == 0:
                first.clear()
                address = (address[0], taken, *address[2:])
            bind(sock, address)

        found = [
            (family, socket.SOCK_STREAM, 6, "", address)
            for family, address in ((socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0)))
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
        monkeypatch.setattr(socket.socket, "bind", bind_badly_once)
        listeners = stack.enter_context(opened("both:0"))
        ports = {sock.getsockname()[1] for sock in listeners.sockets}
        assert len(listeners.sockets) == 2
        assert len(ports) == 1
        assert taken not in ports


@pytest.mark.parametrize("bind", ["0.0.0.0:0", ":0"])
def test_a_wildcard_takes_connections_to_any_address(bind: str) -> None:
    with opened(bind) as listeners:
        listeners.listen(5)
        v4 = next(sock for sock in listeners.sockets if sock.family == socket.AF_INET)
        with socket.create_connection(("127.0.0.1", v4.getsockname()[1])):
            accepted, _ = v4.accept()
            accepted.close()


def test_several_binds_are_all_opened(tmp_path: Path) -> None:
    with opened("127.0.0.1:0", f"unix:{tmp_path / 's'}", "127.0.0.1:0") as listeners:
        assert [address.partition(":")[0] for address in listeners.addresses()] == ["http", "unix", "http"]
        assert len(set(listeners.addresses())) == 3


def test_nobody_can_connect_before_listen() -> None:
    with opened("127.0.0.1:0") as listeners:
        address = listeners.sockets[0].getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        listeners.listen(5)
        listeners.listen(5)
        socket.create_connection(address).close()


def test_options_are_set_once_and_inherited_by_connections() -> None:
    with opened("127.0.0.1:0") as listeners:
        listeners.listen(5)
        (listener,) = listeners.sockets
        assert listener.gettimeout() == 0
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                for sock in (listener, accepted):
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 3)):
                        if hasattr(socket, name):
                            assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_a_just_closed_address_can_be_bound_again() -> None:
    with opened("127.0.0.1:0") as listeners:
        listeners.listen(5)
        address = listeners.sockets[0].getsockname()
        client = socket.create_connection(address)
        accepted, _ = listeners.sockets[0].accept()
        accepted.close()  # ours goes into TIME_WAIT
        client.close()
    with opened(f"{address[0]}:{address[1]}") as again:
        again.listen(5)


# -- TCP addresses that cannot be had -------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70])
def test_a_name_that_does_not_resolve_is_refused_by_name(host: str) -> None:
    message = refused(f"{host}:0")
    assert host in message
    assert "cannot resolve" in message


def test_an_address_in_use_is_refused_with_advice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = describe(other).removeprefix("http://")
        message = refused(bind)
    assert bind in message
    assert "in use; stop what listens there, or choose another port" in message


def test_an_address_that_another_begins_to_listen_on_meanwhile_is_refused_at_listen() -> None:
    with opened("127.0.0.1:0") as first:
        bind = first.addresses()[0].removeprefix("http://")
        with opened(bind) as second:
            first.listen(5)
            with pytest.raises(BindError, match=f"cannot listen on http://{bind}: the address is in use"):
                second.listen(5)


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    assert "this machine has no such address" in refused("203.0.113.1:0")


@pytest.mark.parametrize("ours", [True, False])
def test_of_several_addresses_those_of_this_machine_are_bound(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ["203.0.113.1", "127.0.0.1" if ours else "203.0.113.2"]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
    if ours:
        with opened("several:0") as listeners:
            assert listeners.addresses()[0].startswith("http://127.0.0.1:")
    else:
        assert refused("several:0") == "no address of 'several:0' could be bound"


def test_a_failure_closes_what_was_opened_before_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    refused("127.0.0.1:0", f"unix:{path}", "127.0.0.1:x")
    assert not path.exists()


_AS_NOBODY = """
import encodings.idna, os, sys
from trioserve.net.bind import open_listeners
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
open_listeners([sys.argv[1]], user=0 if sys.argv[2:] else None)
"""


def _refused_as_nobody(bind: str, *args: str) -> str:
    """The message that a process without privileges gets."""
    command = [sys.executable, "-W", "error", "-c", _AS_NOBODY, bind, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 0:
        pytest.skip("this machine lets everybody do it")
    # Not always the last line: a coverage tool may complain that this user cannot write its data.
    found = re.search(r"^trioserve\.errors\.BindError: (.*)$", done.stderr, re.MULTILINE)
    assert found, done.stderr
    return found[1]


def test_a_privileged_port_is_refused_with_advice() -> None:
    message = _refused_as_nobody("127.0.0.1:81")
    assert "'127.0.0.1:81': permission denied; ports below 1024 need CAP_NET_BIND_SERVICE" in message


def test_a_folder_that_may_not_be_written_is_refused_by_path() -> None:
    message = _refused_as_nobody("unix:/trioserve.sock")
    assert "cannot bind unix:/trioserve.sock: Permission denied" in message


# -- unix ----------------------------------------------------------------------------------------------------


def test_a_unix_socket_is_made_and_removed_again(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(f"unix:{path}") as listeners:
        listeners.listen(5)
        assert listeners.addresses() == [f"unix:{path}"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_the_umask_decides_the_mode_and_is_put_back(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for umask, mode in ((0o077, 0o700), (0o000, 0o777), (None, 0o755)):
            with opened(f"unix:{tmp_path / 's'}", umask=umask):
                assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


@needs_root
def test_user_and_group_own_the_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for user, group, expected in ((12, 34, (12, 34)), (None, 34, (0, 34)), (12, None, (12, os.getegid()))):
        with opened(f"unix:{path}", user=user, group=group):
            found = path.stat()
            assert (found.st_uid, found.st_gid) == expected


def test_a_user_that_cannot_be_given_is_refused_and_the_file_removed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder, "s")
        assert f"cannot give unix:{path} to user 0, group None: " in _refused_as_nobody(f"unix:{path}", "0")
        assert not path.exists()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with opened(f"unix:{path}") as listeners:
        listeners.listen(5)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_live_socket_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(f"unix:{path}") as first:
        first.listen(5)
        message = refused(f"unix:{path}")
        assert message == f"cannot bind unix:{path}: another process is listening there"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_live_socket_file_with_a_full_queue_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(f"unix:{path}") as first, ExitStack() as stack:
        first.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        assert "another process is listening there" in refused(f"unix:{path}")
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file"])
def test_what_is_no_socket_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "precious").write_text("precious")
        path.symlink_to(tmp_path / "precious")
    message = refused(f"unix:{path}")
    assert "the file exists and is no socket; remove it or choose another path" in message
    assert path.exists()


@pytest.mark.parametrize("still_listens", [True, False])
def test_a_successors_socket_file_is_not_removed(tmp_path: Path, still_listens: bool) -> None:
    """Once we have stopped to listen many file systems give it the number that ours had."""
    path = tmp_path / "s"
    with opened(f"unix:{path}") as first:
        first.listen(5)
        if still_listens:
            path.unlink()
        else:
            first.close_sockets()
        with opened(f"unix:{path}") as second:
            second.listen(5)
            first.close()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        assert not path.exists()


def test_a_file_that_others_listen_behind_is_removed_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(f"unix:{path}") as listeners:
        for _ in range(2):
            listeners.close_sockets()
            assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("name", ["missing/s", "x" * 200])
def test_a_path_that_cannot_be_a_socket_is_refused_by_path(tmp_path: Path, name: str) -> None:
    assert refused(f"unix:{tmp_path / name}").startswith(f"cannot bind unix:{tmp_path / name}: ")


def test_a_path_below_a_file_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(f"unix:{tmp_path / 'file' / 's'}").startswith(
        f"cannot bind unix:{tmp_path / 'file' / 's'}: "
    )


# -- inherited -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listening", [True, False])
def test_an_inherited_socket_serves_and_is_ours_to_close(listening: bool) -> None:
    given = socket.socket()
    given.bind(("127.0.0.1", 0))
    if listening:
        given.listen(5)
    address = given.getsockname()
    number = given.detach()
    os.set_inheritable(number, True)
    with opened(f"fd://{number}") as listeners:
        listeners.listen(5)
        (sock,) = listeners.sockets
        assert sock.gettimeout() == 0
        assert not sock.get_inheritable()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert listeners.addresses() == [f"http://{address[0]}:{address[1]}"]
        socket.create_connection(address).close()
    with pytest.raises(OSError):
        os.fstat(number)


def test_an_inherited_unix_socket_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(path))
        number = os.dup(given.fileno())
    with opened(f"fd://{number}") as listeners:
        assert listeners.addresses() == [f"unix:{path}"]
    assert path.exists()  # whoever made it removes it


@pytest.mark.parametrize("number", ["", "x", "-1", "3.0", "٣", "1 "])
def test_what_is_no_descriptor_number_is_refused(number: str) -> None:
    message = refused(f"fd://{number}")
    assert repr(number) in message
    assert "fd://3" in message


@pytest.mark.parametrize("number", [9999, 2**70, int("9" * 4000)], ids=range(3))
def test_a_descriptor_that_is_not_open_is_refused(number: int) -> None:
    assert f"bind 'fd://{number}': descriptor {number} is no socket (" in refused(f"fd://{number}")


def test_a_file_is_refused_and_stays_open() -> None:
    with open(os.devnull) as file:
        number = file.fileno()
        assert f"descriptor {number} is no socket" in refused(f"fd://{number}")
        os.fstat(number)


def test_a_datagram_socket_is_refused_and_stays_open() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as given:
        message = refused(f"fd://{given.fileno()}")
        assert f"descriptor {given.fileno()} is a SOCK_DGRAM socket; a stream socket is needed" in message
        os.fstat(given.fileno())


def test_a_connection_is_refused_at_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        with opened(f"fd://{client.detach()}") as listeners:
            with pytest.raises(BindError, match="connected already"):
                listeners.listen(5)


# -- given ---------------------------------------------------------------------------------------------------


def test_given_sockets_are_used_instead_of_the_binds_and_stay_open(tmp_path: Path) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        listeners = open_listeners(["127.0.0.1:x"], sockets=[tcp, unix])
        assert listeners.sockets == [tcp, unix]
        listeners.listen(5)
        assert listeners.addresses() == [describe(tcp), f"unix:{tmp_path / 's'}"]
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        listeners.close()
        assert listeners.addresses() == []
        socket.create_connection(tcp.getsockname()).close()
        assert (tmp_path / "s").exists()


def test_given_sockets_that_listen_keep_their_backlog() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=7) as given, ExitStack() as stack:
        listeners = open_listeners([], sockets=[given])
        listeners.listen(0)
        for _ in range(7):
            stack.enter_context(socket.create_connection(given.getsockname(), timeout=0.5))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_given_socket_must_be_bound(family: int) -> None:
    with socket.socket(family) as given:
        assert "call bind() first" in refused(sockets=[given])
        assert given.fileno() >= 0


def test_a_given_socket_must_be_a_stream() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as given:
        given.bind(("127.0.0.1", 0))
        assert "sockets= needs stream sockets, not SOCK_DGRAM" in refused(sockets=[given])
