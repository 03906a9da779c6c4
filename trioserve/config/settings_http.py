"""The settings of connections, requests and the way errors are met: time, size, number, protocol, policy.

Each declares its default with the reason for it. When the clock of a time-out starts stands in its help, as
what "late" leads to.
"""

from __future__ import annotations

from trioserve.config.setting import Setting, under
from trioserve.config.text_values import Choice, ErrorClasses, Text, TextList
from trioserve.config.values import Rate, Seconds, Switch, Whole

#: What gunicorn_h1c can take, whatever it is asked.
H1C_MOST_FIELDS = 256

TIMEOUTS = under(
    "Timeouts",
    Setting(
        "first_byte_timeout",
        Seconds(above=True, off=True),
        10.0,
        help="A new connection must send its first byte within this time of being accepted; else it is "
        "closed silently",
        reason="health checks and port scans that never speak should not hold a descriptor; slow mobile "
        "links take seconds",
    ),
    Setting(
        "request_head_timeout",
        Seconds(above=True, off=True),
        10.0,
        help="The whole request head must arrive within this time of its first byte; else 408 and close",
        reason="further bytes do not extend it, so a head that trickles in costs a connection 10 s at most",
    ),
    Setting(
        "request_body_timeout",
        Seconds(above=True, off=True),
        30.0,
        help="Longest gap between two parts of a request body, counted only while the app waits for one; "
        "else 408 and close",
        reason="an upload survives a mobile hand-over; an app that is busy is not held against the client",
    ),
    Setting(
        "request_body_min_rate",
        Rate("bytes/s"),
        240.0,
        help="Slowest average at which a request body may arrive while the app waits for it; else 408 and "
        "close; 0 is off",
        reason="far below any real link, but it ends an upload that sends one byte before every gap runs out",
    ),
    Setting(
        "request_body_min_rate_grace",
        Seconds(above=True),
        30.0,
        help="How long a body may take before request_body_min_rate is looked at",
        reason="an average over less than this says little: slow start, a lost packet",
    ),
    Setting(
        "read_timeout",
        Seconds(above=True, off=True),
        None,
        help="hypercorn's limit on each read; here an upper bound on request_head_timeout and "
        "request_body_timeout",
        reason="off as in hypercorn: the two phases have limits of their own",
    ),
    Setting(
        "response_write_timeout",
        Seconds(above=True, off=True),
        30.0,
        help="Longest time a response may wait without the client taking a byte; then the connection is "
        "aborted",
        reason="a client that does not read must not hold memory, a handler, or a shutdown",
    ),
    Setting(
        "request_timeout",
        Seconds(above=True, off=True),
        None,
        help="Longest time for the app to complete a response once the request is complete; else 503 if "
        "nothing has been sent, or abort",
        reason="off: streams and long polls are legitimate, and only the app knows which of its routes are",
    ),
    Setting(
        "disconnect_grace",
        Seconds(off=True),
        3.0,
        help="How long a handler may go on after its client has gone before it is cancelled; off never "
        "cancels it",
        reason="work for nobody is waste, yet a handler that asks is_disconnected() should have the time to "
        "end by itself",
    ),
    Setting(
        "keep_alive_timeout",
        Seconds(),
        5.0,
        help="How long an idle connection is kept after a response; 0 closes after each response",
        reason="hypercorn's value; put it above the keep-alive of a proxy in front, or the proxy will meet "
        "closed connections",
        flags=("--keep-alive",),
    ),
    Setting(
        "linger_timeout",
        Seconds(),
        2.0,
        help="How long a connection that closes early goes on reading, so that the client sees the response "
        "before the reset",
        reason="longer than a round trip anywhere on earth, short enough to be no burden",
    ),
)

LIMITS = under(
    "Limits",
    Setting(
        "max_head_size",
        Whole(256, unit="bytes"),
        65536,
        help="Largest request head (request line and headers), however it is split; else 431",
        reason="cookies and tokens behind single sign-on reach 30 kB; more is an attack or a bug",
    ),
    Setting(
        "max_header_count",
        Whole(1),
        100,
        help="Most header lines in a request; else 431",
        reason="browsers send 15 to 25, proxies add 10; each costs the app a tuple",
    ),
    Setting(
        "max_target_size",
        Whole(16, unit="bytes"),
        8192,
        help="Longest request target (path and query); else 414",
        reason="RFC 9110 asks for at least 8000",
    ),
    Setting(
        "max_body_size",
        Whole(0, unit="bytes", off=True),
        None,
        help="Largest request body; else 413, before the app is called where Content-Length says so",
        reason="off: bodies are streamed with back-pressure, so size costs no memory here; the app or a "
        "proxy knows its limit",
    ),
    Setting(
        "max_connections",
        Whole(1, off=True),
        None,
        help="Most connections at once; further ones wait in the kernel's backlog",
        reason="off: an idle connection is a few kB, and the descriptor limit is met by pausing",
    ),
    Setting(
        "max_concurrent_requests",
        Whole(1, off=True),
        None,
        help="Most requests inside the app at once; further ones wait in a queue",
        reason="off: the right number depends on what the app shares (a database pool, say)",
    ),
    Setting(
        "request_queue_size",
        Whole(0),
        100,
        help="With max_concurrent_requests: most requests that wait for a place; else 503 with Retry-After",
        reason="a queue longer than what is served in a second only adds delay",
    ),
    Setting(
        "request_queue_timeout",
        Seconds(),
        1.0,
        help="With max_concurrent_requests: how long a request waits for a place; else 503 with Retry-After",
        reason="an early 503 can be retried elsewhere; a late one cannot",
    ),
    Setting(
        "keep_alive_max_requests",
        Whole(0),
        1000,
        help="Requests served on one connection before it is closed; 0 and 1 both close after the first",
        reason="hypercorn's value; spreads connections over workers again from time to time",
    ),
    Setting(
        "h11_max_incomplete_size",
        Whole(1, unit="bytes"),
        16 * 1024,
        help="hypercorn's limit on a request head; when set, and max_head_size is not, it becomes "
        "max_head_size",
        reason="hypercorn's value; unlike there the limit is exact, with any engine",
    ),
    Setting(
        "max_app_queue_size",
        Whole(1),
        10,
        help="Accepted for hypercorn's sake, without effect",
        reason="hypercorn's value",
        without_effect="the app is never more than one read ahead of what it asked for, so there is no "
        "queue to bound",
    ),
)

HTTP = under(
    "HTTP",
    Setting(
        "http_engine",
        Choice("auto", "h1c", "httptools", "h11"),
        "auto",
        help="Parser for HTTP/1: h1c (gunicorn_h1c, in C), httptools (C), h11 (Python), or auto: the first of "
        "them that is installed",
        reason="all obey the same rules and tests; the first is the fastest. h1c takes up to 256 fields: auto "
        "passes over it where max_header_count allows more",
    ),
    Setting(
        "server_names",
        TextList("HOST"),
        [],
        help="Host names that are served, each as Host sends it (with the port if there is one); others get "
        "404",
        reason="none given: all are served",
        flags=("--server-name",),
    ),
    Setting(
        "root_path",
        Text(metavar="PREFIX"),
        "",
        help="ASGI root_path (WSGI SCRIPT_NAME): where a proxy has mounted the app",
        reason="mounted at /",
    ),
    Setting(
        "include_date_header",
        Switch(),
        True,
        help="Send a Date header",
        reason="RFC 9110 asks an origin server with a clock to",
    ),
    Setting(
        "include_server_header",
        Switch(),
        True,
        help="Send `Server: trioserve`",
        reason="as in hypercorn; it names no version",
    ),
    Setting(
        "h11_pass_raw_headers",
        Switch(),
        False,
        help="Hand header names to the app in the case in which they arrived",
        reason="ASGI asks for lower case",
    ),
    Setting(
        "alt_svc_headers",
        TextList("VALUE"),
        [],
        help="Alt-Svc headers to send with each response",
        reason="none: nothing else is served here",
        flags=("--alt-svc-header",),
    ),
    Setting(
        "debug_extension",
        Switch(),
        False,
        help="Offer the ASGI extension http.response.debug",
        reason="for test clients; a production client has no use for it",
    ),
)

ERRORS = under(
    "Errors",
    Setting(
        "on_app_error",
        Choice("replace", "contain", "crash"),
        "replace",
        help="An exception that leaves the app: replace (answer 500, drain, exit 75), contain (answer 500, "
        "serve on), or crash (exit at once)",
        reason="after an error nobody expected, the state of the process is unknown; a fresh one is known "
        "to be good",
    ),
    Setting(
        "contain_errors",
        ErrorClasses(),
        [],
        help="Exceptions, subclasses included, that are contained whatever on_app_error says",
        reason="none: only the app's authors know which errors leave it sound",
        flags=("--contain-error",),
    ),
    Setting(
        "fatal_errors",
        ErrorClasses(),
        [],
        help="Exceptions, subclasses included, that end the worker after a short drain; trioserve.Fatal "
        "always does",
        reason="none: only the app's authors know which errors mean that it is beyond repair",
        flags=("--fatal-error",),
    ),
    Setting(
        "crash_dir",
        Text(optional=True, metavar="PATH"),
        None,
        help="Directory for crash reports, one JSON file each; they go to stderr in any case",
        reason="not set: a container's log collector reads stderr",
    ),
    Setting(
        "block_warn",
        Seconds(above=True, off=True),
        1.0,
        help="A turn of the event loop that lasts this long is logged, with the request and the stack; no shorter "
        "one is",
        reason="every client feels it, and code that gives way as it should takes a thousandth of it",
    ),
    Setting(
        "block_kill",
        Seconds(above=True, off=True),
        60.0,
        help="A turn of the event loop that lasts this long ends the process with a report (exit 80); the command "
        "only",
        reason="twice gunicorn's, since all requests in flight are lost; by then most clients have gone",
    ),
)
