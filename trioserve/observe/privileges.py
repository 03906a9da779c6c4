"""Whose the process is: become another user and group, for good.

Called once by a process that was started as root, after its sockets are bound and before the app is imported
(`worker/claim.py`, and each worker of a supervisor). What root has opened by then stays open; what is opened later,
log files and the pid file among it, is opened as the new user, so that it can be opened again.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from trioserve.errors import ConfigError


def drop_privileges(user: int | None, group: int | None) -> bool:
    """Become `user` and `group` with the supplementary groups that go with them; False if there was nothing to do.

    Args:
        user: None stays who we are.
        group: None takes the user's own group. A process that is not root may name one that it is in already: that
            is for its socket files.

    Raises:
        ConfigError: this process may not, or the kernel has not done all of it; nobody may go on then.
    """
    if os.geteuid() != 0:
        _check_is_already(user, group)
        return False
    name, primary = _account(user)
    if group is None:
        group = primary
    wanted_user = 0 if user is None else user
    wanted_group = os.getegid() if group is None else group
    if (wanted_user, wanted_group) == (0, os.getegid()):
        return False
    if group is None:
        raise ConfigError(
            f"user = {user}: this number has no account, so there is no group to take: give group too"
        )
    groups = [group] if name is None else os.getgrouplist(name, group)
    # In this order: who has given up being root may no longer change groups.
    _attempt("setgroups", lambda: os.setgroups(groups), user, group)
    _attempt("setgid", lambda: _set_group(group), user, group)
    if wanted_user != 0:
        _attempt("setuid", lambda: _set_user(wanted_user), user, group)
    _check_done(wanted_user, group, groups)
    return True


def _account(user: int | None) -> tuple[str | None, int | None]:
    """Name and primary group of a user number; None for what has no entry in the user database."""
    if user is None:
        return None, None
    import pwd  # Unix only, as are the settings that lead here

    try:
        entry = pwd.getpwuid(user)
    except (KeyError, OverflowError):
        return None, None
    return entry.pw_name, entry.pw_gid


def _check_is_already(user: int | None, group: int | None) -> None:
    """Who is not root cannot change, but may be asked to be who he is."""
    own = os.geteuid()
    if user is not None and user != own:
        raise ConfigError(
            f"user = {user}: this process runs as user {own}, and only root may become another user: start it as root, "
            "or remove the setting"
        )
    if group is not None and group not in (os.getegid(), *os.getgroups()):
        raise ConfigError(
            f"group = {group}: this process is not root and not in that group: start it as root, or remove the setting"
        )


def _set_group(group: int) -> None:
    if hasattr(os, "setresgid"):
        os.setresgid(group, group, group)
    else:
        os.setgid(group)


def _set_user(user: int) -> None:
    # All three, or the saved one would be the way back to root.
    if hasattr(os, "setresuid"):
        os.setresuid(user, user, user)
    else:
        os.setuid(user)


def _attempt(what: str, change: Callable[[], None], user: int | None, group: int | None) -> None:
    try:
        change()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"user = {user}, group = {group}: cannot change to them ({what}: {reason}); in a container the process "
            "needs the capabilities SETUID and SETGID"
        ) from None


def _check_done(user: int, group: int, groups: list[int]) -> None:
    """Trust nobody: a process that believes to be harmless and is not is the worst of all."""
    is_user = (os.getuid(), os.geteuid()) == (user, user)
    is_group = (os.getgid(), os.getegid()) == (group, group)
    if not is_user or not is_group or not set(os.getgroups()) <= {*groups, group}:
        raise ConfigError(f"user = {user}, group = {group}: the kernel has not changed to them; not going on")
    if user != 0:
        try:
            os.setuid(0)
        except OSError:
            return
        raise ConfigError(f"user = {user}: this process can become root again; not going on")
