"""The settings of HTTP/2, each with its default and the reason for it."""

from __future__ import annotations

from trioserve.config.setting import Setting, under
from trioserve.config.text_values import Choice
from trioserve.config.values import Switch, Whole, WholeOrAuto

HTTP2 = under(
    "HTTP/2",
    Setting(
        "h2c",
        Switch(),
        False,
        help="Serve HTTP/2 on binds without TLS to clients that begin with its preface (prior knowledge)",
        reason="off: no browser speaks it, and behind a proxy it is the operator who knows; HTTP/1 goes on being "
        "served beside it",
    ),
    Setting(
        "http2_engine",
        Choice("own", "h2"),
        "own",
        help="HTTP/2 frames and streams by trioserve's own layer, or by the library h2",
        reason="a request costs it a fraction of what it costs h2; both pass the same tests",
    ),
    Setting(
        "h2_max_concurrent_streams",
        Whole(1),
        100,
        help="HTTP/2: streams at once on a connection; further ones are refused and may be tried again",
        reason="hypercorn's value, and the least that RFC 9113 recommends; each may cost a task and a window of body",
    ),
    Setting(
        "h2_max_header_list_size",
        Whole(1, unit="bytes"),
        2**16,
        help="HTTP/2: largest request head, counted as RFC 9113 does (32 bytes a field besides its own); else 431",
        reason="hypercorn's value, and that of max_head_size",
    ),
    Setting(
        "h2_max_inbound_frame_size",
        Whole(2**14, unit="bytes", maximum=2**24 - 1),
        2**14,
        help="HTTP/2: largest frame taken",
        reason="hypercorn's value, the smallest that RFC 9113 allows; larger ones only hold up what is behind them",
    ),
    Setting(
        "h2_stream_window",
        Whole(1, unit="bytes", maximum=2**31 - 1),
        2**16,
        help="HTTP/2: how much of a request body a client may send ahead of the app, on one stream",
        reason="what an app that does not read costs in memory; at 100 ms of round trip it lets 5 Mbit/s through",
    ),
    Setting(
        "h2_connection_window",
        WholeOrAuto(2**16 - 1, unit="bytes", maximum=2**31 - 1),
        "auto",
        help="HTTP/2: the same, for all streams of a connection together, or auto: h2_max_concurrent_streams times "
        "h2_stream_window",
        reason="auto, 6.25 MiB of memory at most with the other defaults: with less, bodies that the app does not read "
        "yet can hold up those that it waits for",
    ),
)
