"""The precompressed siblings of a file: `app.js` may have `app.js.br`, `app.js.zst` and `app.js.gz` beside it.

Read by `variants.py`, which serves them, and by `sibling_writer.py`, which makes them. Constants only.
"""

from __future__ import annotations

from typing import Final

#: Content coding -> what its sibling's name has at the end; in our order of preference where the client has none.
#: Siblings are made once at the highest level, where brotli is the smallest on text, and bytes are what the client
#: waits for; `middleware/compression.py`, which pays for each response anew, weighs speed and may order otherwise.
SUFFIXES: Final[dict[bytes, bytes]] = {b"br": b".br", b"zstd": b".zst", b"gzip": b".gz"}
