"""The settings of WebSocket sessions, each with its default and the reason for it."""

from __future__ import annotations

from trioserve.config.setting import Setting, under
from trioserve.config.text_values import Choice
from trioserve.config.values import Seconds, Whole

WEBSOCKET = under(
    "WebSocket",
    Setting(
        "websocket_max_message_size",
        Whole(1, unit="bytes"),
        16 * 1024 * 1024,
        help="Largest message taken, in however many frames, and after decompression; else the session is closed with "
        "1009",
        reason="hypercorn's value; a message is handed to the app whole, so a session may hold this much",
    ),
    Setting(
        "websocket_ping_interval",
        Seconds(above=True, off=True),
        20.0,
        help="Time between the pings that a client is sent; off sends none, and does not notice clients that vanish",
        reason="proxies and NAT drop what is silent for 30 to 60 s; uvicorn's value (hypercorn sends none)",
    ),
    Setting(
        "websocket_ping_timeout",
        Seconds(above=True, off=True),
        20.0,
        help="With websocket_ping_interval: how long a client may be silent after a ping before it counts as gone",
        reason="whatever it sends is a sign of life; longer than a mobile hand-over; uvicorn's value",
    ),
    Setting(
        "websocket_close_timeout",
        Seconds(above=True),
        5.0,
        help="How long a session that we close waits for the client's close frame; then its connection is closed",
        reason="a few round trips on the worst of links; a client that has not answered by then never will",
    ),
    Setting(
        "websocket_compression",
        Choice("off", "on", "contextless"),
        "off",
        help="permessage-deflate for who offers it: on keeps 45 kB a session and compresses best; contextless keeps "
        "nothing between messages",
        reason="off: on makes five times of what an idle session holds (11 kB), either triples the CPU time of a "
        "message of 1 KiB, and sizes betray secrets that stand beside what an attacker chooses",
    ),
)
