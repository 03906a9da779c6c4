"""Becoming somebody else: all of it, in the right order, or not going on. In processes of their own: it is for good."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from trioserve.errors import EXIT_CONFIG, ConfigError
from trioserve.observe.privileges import drop_privileges

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

NOBODY = pwd.getpwnam("nobody").pw_uid
NOGROUP = pwd.getpwnam("nobody").pw_gid

# A user and a group without an entry in any database.
STRANGER = 54321

SHOW = "print(drop_privileges({user}, {group}), os.getresuid(), os.getresgid(), os.getgroups())"


def child(*steps: str, groups: list[int] | None = None) -> str:
    """What a process that begins as root, in `groups`, prints; or the message of the error that ends it."""
    code = "\n".join(
        [
            "import os, sys",
            "from trioserve.errors import ConfigError",
            "from trioserve.observe.privileges import drop_privileges",
            f"os.setgroups({groups or [0, 4]})",
            "try:",
            *(f"    {step}" for step in steps),
            "except ConfigError as error:",
            "    print(error)",
        ]
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return found.stdout.strip()


def show(user: int | None, group: int | None) -> str:
    return SHOW.format(user=user, group=group)


# -- root ---------------------------------------------------------------------------------------------------------


def test_a_user_alone_brings_its_own_group() -> None:
    assert child(show(NOBODY, None)) == (
        f"True {(NOBODY,) * 3} {(NOGROUP,) * 3} {sorted({NOGROUP, *os.getgrouplist('nobody', NOGROUP)})}"
    )


def test_the_supplementary_groups_are_the_users_and_none_of_roots() -> None:
    group = grp.getgrnam("daemon").gr_gid
    assert (
        child(show(NOBODY, group))
        == f"True {(NOBODY,) * 3} {(group,) * 3} {os.getgrouplist('nobody', group)}"
    )


def test_a_group_alone_leaves_root_root() -> None:
    assert child(show(None, STRANGER)) == f"True (0, 0, 0) {(STRANGER,) * 3} [{STRANGER}]"


def test_numbers_without_an_account_do() -> None:
    assert child(show(STRANGER, STRANGER)) == f"True {(STRANGER,) * 3} {(STRANGER,) * 3} [{STRANGER}]"


def test_a_user_without_an_account_needs_a_group() -> None:
    assert child(show(STRANGER, None)) == (
        f"user = {STRANGER}: this number has no account, so there is no group to take: give group too"
    )


@pytest.mark.parametrize(("user", "group"), [(None, None), (0, None), (0, 0), (None, 0)])
def test_who_stays_root_keeps_everything(user: int | None, group: int | None) -> None:
    assert child(show(user, group)) == "False (0, 0, 0) (0, 0, 0) [0, 4]"


def test_there_is_no_way_back() -> None:
    attempts = [
        f"try: os.{call}\n    except PermissionError: print('no')" for call in ("setuid(0)", "seteuid(0)")
    ]
    assert child(f"drop_privileges({NOBODY}, None)", *attempts) == "no\nno"


def test_the_number_that_means_unchanged_is_no_user() -> None:
    """setresuid(2) leaves alone what is 2**32 - 1."""
    unchanged = 2**32 - 1
    assert child(show(unchanged, STRANGER)).endswith("the kernel has not changed to them; not going on")


@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid"])
def test_root_without_the_capability_is_told_which_one_it_lacks(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("setgroups", "setresgid", "setresuid"):
        # Nothing may change in the tests' own process.
        monkeypatch.setattr(os, name, refuse if name == call else lambda *_: None)
    with pytest.raises(ConfigError) as raised:
        drop_privileges(NOBODY, NOGROUP)
    assert raised.value.exit_code == EXIT_CONFIG
    assert f"cannot change to them ({call.replace('res', '')}: Operation not permitted)" in str(raised.value)
    assert "capabilities SETUID and SETGID" in str(raised.value)


def test_a_kernel_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *_: None)
    with pytest.raises(ConfigError, match="the kernel has not changed to them"):
        drop_privileges(NOBODY, NOGROUP)


# -- anybody else -------------------------------------------------------------------------------------------------

BECOME = f"drop_privileges({NOBODY}, {NOGROUP})"


@pytest.mark.parametrize(
    ("user", "group"), [(NOBODY, None), (None, None), (NOBODY, NOGROUP), (None, NOGROUP)]
)
def test_who_is_that_user_already_has_nothing_to_do(user: int | None, group: int | None) -> None:
    assert child(BECOME, show(user, group)).startswith(f"False {(NOBODY,) * 3} {(NOGROUP,) * 3} ")


def test_another_user_needs_root() -> None:
    assert child(BECOME, show(0, None)) == (
        f"user = 0: this process runs as user {NOBODY}, and only root may become another user: start it as root, or "
        "remove the setting"
    )


@pytest.mark.parametrize("user", [None, NOBODY])
def test_a_strange_group_needs_root(user: int | None) -> None:
    assert child(BECOME, show(user, STRANGER)) == (
        f"group = {STRANGER}: this process is not root and not in that group: start it as root, or remove the setting"
    )


def test_a_group_that_it_is_in_is_for_its_socket_files() -> None:
    steps = (f"os.setgroups([{STRANGER}])", f"os.setuid({NOBODY})", show(None, STRANGER))
    assert child(*steps) == f"False {(NOBODY,) * 3} (0, 0, 0) [{STRANGER}]"
