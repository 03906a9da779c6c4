"""Serve the documentation site that `build.py` has built; nothing is left to do but to send files.

Build it and run it:

    python -m examples.docs_site.build && trioserve examples.docs_site.app:app

`DOCS_SITE=OUT` names a site that was built elsewhere. Serving needs neither Markdown nor the sources.

What it teaches: index files, a 404 page of one's own, and caching in two rules. Browsers ask again for a page each
time (304 if it is the same), and never again for an asset, whose name has a hash in it. Compressed variants lie beside
the files, so no middleware is needed: what the client accepts decides which file is sent.
"""

from __future__ import annotations

import os
from pathlib import Path

from examples.docs_site import OUT
from trioserve import StaticFiles

SITE = Path(os.environ.get("DOCS_SITE", OUT))

if not SITE.is_dir():
    raise RuntimeError(f"there is no site in {SITE}: run python -m examples.docs_site.build {SITE}")

# Nothing but this site's own files. It has no inline styles and scripts, so none that get in by a mistake will run.
POLICY = b"default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'"

app = StaticFiles(
    SITE,
    not_found="404.html",
    cache_control=[("assets/*", "public, max-age=31536000, immutable"), ("*", "no-cache")],
    headers=[(b"content-security-policy", POLICY), (b"referrer-policy", b"same-origin")],
)
