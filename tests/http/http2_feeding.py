"""Feed bytes to an HTTP/2 engine as the driver does, and note what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.http.http2_client import OPENING, Fields, Frame, frames_of
from trioserve.http.frame_engine import FrameEngine
from trioserve.http.h2_engine import H2Engine
from trioserve.http.http2_codes import ACK, GOAWAY, RST_STREAM, SETTINGS, WINDOW_UPDATE
from trioserve.http.http2_engine import Http2Engine, Http2Fault, Http2Limits, RequestHead

HTTP2_ENGINES = ("h2", "own")
_CLASSES = {"h2": H2Engine, "own": FrameEngine}


@dataclass
class Outcome:
    """What came of a connection's bytes.

    Attributes:
        requests, refused: heads by stream; for the refused with the status. bodies: what has arrived, by stream.
        ended: trailers by stream. told_resets: (stream, code) that the sink heard. sent_resets: RST_STREAM in `out`.
        fault: the code that ended the connection, and the GOAWAY's.
    """

    requests: dict[int, RequestHead] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)
    bodies: dict[int, bytes] = field(default_factory=dict)
    ended: dict[int, Fields] = field(default_factory=dict)
    told_resets: list[tuple[int, int]] = field(default_factory=list)
    sent_resets: list[tuple[int, int]] = field(default_factory=list)
    priorities: list[tuple[int, int, bool]] = field(default_factory=list)
    going_away: list[tuple[int, int]] = field(default_factory=list)
    fault: int | None = None
    last_stream_id: int = 0

    def comparable(self) -> dict[str, Any]:
        """Everything in a form that can be compared and printed."""
        return {name: repr(value) for name, value in vars(self).items()}


class Connection:
    """An engine, its sink, and what it wrote.

    Attributes:
        engine, outcome. answer: called with the engine and a stream's id when a request has begun or was refused.
        frames: all that the engine has put out. windows: the streams of `window_opened`, in order.
        acknowledge: give DATA back at once. order: what the sink was told, in order. now: the time, for the engine.
    """

    def __init__(
        self,
        kind: str,
        *,
        answer: Callable[[Http2Engine, int], None] | None = None,
        acknowledge: bool = True,
        **limits: Any,
    ) -> None:
        self.outcome = Outcome()
        self.answer = answer
        self.acknowledge = acknowledge
        self.now = 0.0
        self.windows: list[int] = []
        self.order: list[tuple[str, int]] = []
        self.written: list[bytes] = []
        self.engine: Http2Engine = _CLASSES[kind](self, Http2Limits(**limits))
        self.engine.start()
        self.take()

    # -- the sink --------------------------------------------------------------------------------------------

    def request_begun(self, stream_id: int, head: RequestHead) -> None:
        assert stream_id not in self.outcome.requests
        self.outcome.requests[stream_id] = head
        self.order.append(("begun", stream_id))
        if self.answer is not None:
            self.answer(self.engine, stream_id)

    def request_refused(self, stream_id: int, head: RequestHead, status: int, reason: str) -> None:
        assert reason
        assert isinstance(head, RequestHead)
        self.outcome.refused[stream_id] = status
        self.order.append(("refused", stream_id))
        if self.answer is not None:
            self.answer(self.engine, stream_id)

    def data_received(self, stream_id: int, data: bytes, flow_size: int) -> None:
        assert data, "an empty part of a body"
        assert type(data) is bytes
        assert stream_id in self.outcome.requests
        assert stream_id not in self.outcome.ended
        self.outcome.bodies[stream_id] = self.outcome.bodies.get(stream_id, b"") + data
        self.order.append(("data", stream_id))
        if self.acknowledge:
            self.engine.acknowledge(stream_id, flow_size)

    def request_ended(self, stream_id: int, trailers: Fields) -> None:
        assert not self.outcome.requests[stream_id].ended
        assert stream_id not in self.outcome.ended
        self.outcome.ended[stream_id] = trailers
        self.order.append(("ended", stream_id))

    def stream_reset(self, stream_id: int, code: int) -> None:
        assert stream_id in self.outcome.requests or stream_id in self.outcome.refused
        assert stream_id not in dict(self.outcome.told_resets)
        self.outcome.told_resets.append((stream_id, int(code)))
        self.order.append(("reset", stream_id))

    def window_opened(self, stream_id: int) -> None:
        self.windows.append(stream_id)

    def peer_going_away(self, last_stream_id: int, code: int) -> None:
        self.outcome.going_away.append((last_stream_id, code))

    def priority_changed(self, stream_id: int, urgency: int, incremental: bool) -> None:
        self.outcome.priorities.append((stream_id, urgency, incremental))

    # -- what a test does ------------------------------------------------------------------------------------

    @property
    def window_updates(self) -> list[tuple[int, int]]:
        """Stream and size of all that the engine has put out."""
        return [
            (each.stream_id, int.from_bytes(each.payload, "big"))
            for each in self.frames
            if each.kind == WINDOW_UPDATE
        ]

    def take(self) -> bytes:
        """What the driver would write now."""
        assert self.engine.out_size == sum(map(len, self.engine.out))
        out, self.engine.out = self.engine.out, []
        data = b"".join(out)
        self.written.append(data)
        return data

    def feed(self, *pieces: bytes) -> list[Frame]:
        """Feed pieces until the connection breaks; the frames that were written to them."""
        written = b""
        if self.outcome.fault is not None:
            return []
        for piece in pieces:
            if self.outcome.fault is not None:
                break
            try:
                self.engine.receive(piece, self.now)
                while self.engine.held:
                    self.engine.receive(b"", self.now)
            except Http2Fault as fault:
                self.outcome.fault = int(fault.code)
            assert self.engine.closing or self.outcome.fault is None
            written += self.take()
        frames = frames_of(written)
        goodbyes = [each for each in frames if each.kind == GOAWAY]
        if self.outcome.fault is not None:
            assert frames[-1].kind == GOAWAY, "GOAWAY is the last that is written"
            assert frames[-1].code == self.outcome.fault
            goodbyes.pop()
        assert not goodbyes
        self.outcome.sent_resets += [
            (each.stream_id, each.code) for each in frames if each.kind == RST_STREAM
        ]
        self.outcome.last_stream_id = self.engine.last_stream_id
        return frames

    @property
    def frames(self) -> list[Frame]:
        """All that was written, what still lies in `out` included."""
        self.take()
        return frames_of(b"".join(self.written))


def opened(kind: str, **options: Any) -> Connection:
    """A connection behind its preface and both SETTINGS."""
    connection = Connection(kind, **options)
    frames = connection.feed(OPENING)
    assert [(each.kind, each.flags) for each in frames] == [(SETTINGS, ACK)]
    connection.written.clear()
    connection.windows.clear()
    return connection


def run(kind: str, pieces: bytes | Iterable[bytes], **options: Any) -> Outcome:
    """A whole connection, the preface included; bytes are fed whole."""
    connection = Connection(kind, **options)
    connection.feed(*([pieces] if isinstance(pieces, bytes) else pieces))
    return connection.outcome


def answer_200(engine: Http2Engine, stream_id: int) -> None:
    """A whole response, at once."""
    engine.send_head(stream_id, 200, [(b"content-length", b"2")], False)
    engine.send_data(stream_id, b"ok", True)
