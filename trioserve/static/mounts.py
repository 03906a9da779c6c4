"""Directories beside an app: the setting `static_mounts` (`--static /assets=DIR`).

`worker.py` puts a `StaticMounts` between the exchange and the app, only where the setting is given, so that it costs
nothing elsewhere, and closes it when it has drained. Prefixes match whole segments, the longest first; what is below
one is answered here, found or not, and the app sees everything else. Cancelling cancels whichever answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trioserve.static.answers import Answer
from trioserve.static.handler import StaticFiles
from trioserve.static.mount_path import path_of, strip_prefix
from trioserve.structure.context import ASGIApp, Receive, Scope, Send


class StaticMounts:
    """An app with directories beside it.

    Attributes:
        mounts: prefix and handler, the longest prefix first.
    """

    def __init__(self, app: ASGIApp, mounts: Iterable[str]) -> None:
        """`mounts` as in the setting: "/prefix=DIR"; raises `ConfigError` for a directory that cannot be opened."""
        self._app = app
        self.mounts: list[tuple[str, StaticFiles]] = []
        try:
            for mount in mounts:
                prefix, _, directory = mount.partition("=")
                self.mounts.append((prefix, StaticFiles(directory)))
        except BaseException:
            self.close()
            raise
        self.mounts.sort(key=lambda mount: mount[0].count("/"), reverse=True)
        self._quick = [(prefix, files.quick_answer) for prefix, files in self.mounts]
        # Most requests are for something else: what any of ours begins with, as far as can be told without decoding.
        self._starts = tuple(prefix.encode("utf-8") for prefix, _ in self.mounts)

    def __repr__(self) -> str:
        return f"<StaticMounts {', '.join(f'{prefix}={files.directory}' for prefix, files in self.mounts)}>"

    def close(self) -> None:
        """Give back the descriptors."""
        for _, files in self.mounts:
            files.close()

    def quick_answer(
        self,
        method: str,
        raw_path: bytes,
        fields: Mapping[bytes, bytes],
        root_path: str = "",
    ) -> Answer | None:
        """As `StaticFiles.quick_answer`; None also for all that is the app's."""
        if root_path or raw_path.startswith(self._starts):
            for prefix, quick_answer in self._quick:
                # Each knows the paths that were its own before: nothing has to be taken apart to tell whose this is.
                answer = quick_answer(method, raw_path, fields, root_path + prefix if root_path else prefix)
                if answer is not None:
                    return answer
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is below a prefix, or have the app do it."""
        if scope["type"] == "http":
            root_path = scope.get("root_path") or ""
            raw_path = path_of(scope)
            if root_path or b"%" in raw_path or raw_path.startswith(self._starts):
                # A proxy may have removed the root path.
                inner = strip_prefix(raw_path, root_path) if root_path else raw_path
                stripped = root_path if inner is not None else ""
                for prefix, files in self.mounts:
                    if strip_prefix(raw_path if inner is None else inner, prefix) is not None:
                        await files({**scope, "root_path": stripped + prefix}, receive, send)
                        return
        await self._app(scope, receive, send)
