"""Media types: what a file is, by its name, and whether a body of a type is worth compressing.

Used by the static handler, by `trioserve precompress` and by the compression middleware. Pure. The table is part of
the program: Python's `mimetypes` reads what the host has installed, so that the same site would answer differently on
two machines. Types are those of the IANA registry where it has one, otherwise what browsers expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

#: A browser offers such a file for download and, with `nosniff`, does not guess further.
UNKNOWN: Final = b"application/octet-stream"

_NO_EXTRA: Final[Mapping[str, bytes]] = MappingProxyType({})

# Types whose files are UTF-8 text, so that they say so: without it a browser takes text/* for windows-1252. (JSON needs
# no charset, but is read as one more text by older programs.) A site with other text gives its own `extra`.
_TEXTS: Final[dict[str, str]] = {
    "text/html": "html htm",
    "text/css": "css",
    # RFC 9239: the only type of scripts that is not obsolete.
    "text/javascript": "js mjs cjs",
    "text/markdown": "md markdown",
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
    "text/calendar": "ics ifb",
    "text/vcard": "vcf",
    "text/vtt": "vtt",
    "text/xml": "xsl xslt",
    # Source is to be looked at. TypeScript's .ts is missing: it is MPEG's, see below.
    "text/plain": (
        "txt text log asc conf cfg ini env properties diff patch rst adoc tex bib sql sh bash zsh fish bat ps1 "
        "py pyi rb pl php go rs c h cc cpp hpp cs java kt swift lua r jl scala clj ex exs hs ml tsx jsx vue svelte "
        "scss sass less graphql gql proto lock po pot sha256 sha512 md5 sig crontab service"
    ),
    "application/json": "json json5 map har ipynb",
    "application/manifest+json": "webmanifest",
    "application/ld+json": "jsonld",
    "application/geo+json": "geojson",
    "application/feed+json": "jsonfeed",
    "application/importmap+json": "importmap",
    "application/x-ndjson": "ndjson jsonl",
    "application/yaml": "yaml yml",
    "application/toml": "toml",
    "application/xml": "xml xsd rng dtd",
    "application/xhtml+xml": "xhtml xht",
    "application/rss+xml": "rss",
    "application/atom+xml": "atom",
    "application/dash+xml": "mpd",
    "application/gpx+xml": "gpx",
    "application/vnd.google-earth.kml+xml": "kml",
    "application/opensearchdescription+xml": "osdx",
    "application/wsdl+xml": "wsdl",
    "application/mathml+xml": "mathml",
    "application/ttml+xml": "ttml",
    "application/x-subrip": "srt",
    "application/vnd.apple.mpegurl": "m3u8 m3u",
    "image/svg+xml": "svg",
    "model/gltf+json": "gltf",
    "model/obj": "obj",
}

_BINARY: Final[dict[str, str]] = {
    "application/wasm": "wasm",
    "image/png": "png",
    "image/apng": "apng",
    "image/jpeg": "jpg jpeg jpe jfif",
    "image/gif": "gif",
    "image/webp": "webp",
    "image/avif": "avif",
    "image/jxl": "jxl",
    "image/heic": "heic",
    "image/heif": "heif",
    "image/bmp": "bmp",
    "image/tiff": "tif tiff",
    "image/vnd.microsoft.icon": "ico cur",
    "image/vnd.adobe.photoshop": "psd",
    "font/woff2": "woff2",
    "font/woff": "woff",
    "font/ttf": "ttf",
    "font/otf": "otf",
    "font/collection": "ttc otc",
    "application/vnd.ms-fontobject": "eot",
    "video/mp4": "mp4 m4v",
    "video/webm": "webm",
    "video/ogg": "ogv",
    "video/quicktime": "mov qt",
    "video/matroska": "mkv",
    "video/x-msvideo": "avi",
    "video/mpeg": "mpg mpeg",
    "video/x-flv": "flv",
    # Segments of HTTP live streaming. A site that publishes TypeScript says so with `extra`.
    "video/mp2t": "ts m2ts",
    "video/iso.segment": "m4s",
    "video/3gpp": "3gp",
    "audio/mpeg": "mp3",
    "audio/mp4": "m4a m4b",
    "audio/aac": "aac",
    "audio/ogg": "ogg oga opus",
    "audio/wav": "wav",
    "audio/flac": "flac",
    "audio/webm": "weba",
    "audio/matroska": "mka",
    "audio/midi": "mid midi",
    "audio/aiff": "aif aiff",
    "application/pdf": "pdf",
    "application/epub+zip": "epub",
    "application/rtf": "rtf",
    "application/postscript": "ps eps ai",
    "application/zip": "zip",
    "application/gzip": "gz tgz",
    "application/zstd": "zst tzst",
    "application/x-bzip2": "bz2 tbz2",
    "application/x-xz": "xz txz",
    "application/x-7z-compressed": "7z",
    "application/vnd.rar": "rar",
    "application/x-tar": "tar",
    "application/java-archive": "jar",
    "application/vnd.android.package-archive": "apk",
    "application/x-apple-diskimage": "dmg",
    "application/x-iso9660-image": "iso",
    "application/vnd.debian.binary-package": "deb",
    "application/x-rpm": "rpm",
    "application/vnd.microsoft.portable-executable": "exe dll",
    "application/x-msi": "msi",
    "application/x-xpinstall": "xpi",
    "application/vnd.sqlite3": "sqlite sqlite3 db",
    "application/vnd.apache.parquet": "parquet",
    "application/vnd.apache.arrow.file": "arrow feather",
    "application/cbor": "cbor",
    "application/msword": "doc dot",
    "application/vnd.ms-excel": "xls xlt",
    "application/vnd.ms-powerpoint": "ppt pps",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.template": "dotx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.template": "xltx",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": "pptx",
    "application/vnd.openxmlformats-officedocument.presentationml.slideshow": "ppsx",
    "application/vnd.oasis.opendocument.text": "odt",
    "application/vnd.oasis.opendocument.spreadsheet": "ods",
    "application/vnd.oasis.opendocument.presentation": "odp",
    "application/vnd.oasis.opendocument.graphics": "odg",
    "application/pgp-encrypted": "gpg pgp",
    "application/pem-certificate-chain": "pem",
    "application/pkix-cert": "cer crt",
    "application/x-bittorrent": "torrent",
    "application/geopackage+sqlite3": "gpkg",
    "application/vnd.pmtiles": "pmtiles",
    "application/vnd.mapbox-vector-tile": "mvt pbf",
    "application/vnd.google-earth.kmz": "kmz",
    "model/gltf-binary": "glb",
    "model/stl": "stl",
    "model/vnd.usdz+zip": "usdz",
    "model/3mf": "3mf",
}

# Files known by their whole name, in lower case.
_NAMES: Final[dict[str, str]] = {
    "text/plain": (
        "readme license licence copying notice authors contributors changelog changes makefile dockerfile cname"
    ),
    # What Apple's and OpenID's clients ask for below /.well-known; they insist on the type.
    "application/json": "apple-app-site-association openid-configuration",
}


def _with_charset(media_type: str) -> bytes:
    return f"{media_type}; charset=utf-8".encode("ascii")


#: Extension in lower case, without its dot -> value of Content-Type.
TYPES: Final[Mapping[str, bytes]] = MappingProxyType(
    {
        extension: _with_charset(type_)
        for type_, extensions in _TEXTS.items()
        for extension in extensions.split()
    }
    | {
        extension: type_.encode("ascii")
        for type_, extensions in _BINARY.items()
        for extension in extensions.split()
    }
)

#: Whole name in lower case -> value of Content-Type.
TYPES_OF_NAMES: Final[Mapping[str, bytes]] = MappingProxyType(
    {name: _with_charset(type_) for type_, names in _NAMES.items() for name in names.split()}
)


def content_type(name: bytes | str, extra: Mapping[str, bytes] = _NO_EXTRA) -> bytes:
    """The value of Content-Type for a file of this name.

    Args:
        name: the file's name or path; only what follows the last slash counts, and of it the last extension.
        extra: goes before the table. Keys are in lower case, either an extension with its dot (".glb") or a whole name
            ("readme"); values are sent as they are.
    """
    text = name if isinstance(name, str) else name.decode("latin-1")
    text = text.rpartition("/")[2].lower()
    stem, dot, extension = text.rpartition(".")
    # A leading dot begins a name, not an extension, as in `os.path.splitext`.
    if not dot or not stem.strip("."):
        extension = ""
    if extra:
        own = extra.get(text) or (extra.get(f".{extension}") if extension else None)
        if own:
            return own
    found = TYPES.get(extension) if extension else TYPES_OF_NAMES.get(text)
    return UNKNOWN if found is None else found


# -- what is worth compressing -------------------------------------------------------------------------------

# Besides text/*, +json, +xml and +yaml. An allow-list: compressing a type that nobody has thought of is more often a
# waste than a gain. Left out on purpose: PDF, office documents and archives, which are compressed inside, and tar, wav
# and disk images, which are downloads: large, and resumed by ranges.
_COMPRESSIBLE: Final = frozenset(
    b"""
    application/json application/x-ndjson application/ndjson application/jsonl application/json5
    application/json-seq application/csp-report
    application/javascript application/x-javascript application/ecmascript application/typescript
    application/xml application/xml-dtd application/yaml application/x-yaml application/toml
    application/graphql application/sql application/x-sh application/x-httpd-php application/x-subrip
    application/x-www-form-urlencoded application/rtf application/postscript
    application/vnd.apple.mpegurl application/x-mpegurl audio/mpegurl audio/x-mpegurl
    application/wasm application/vnd.ms-fontobject
    font/ttf font/otf font/collection font/sfnt
    application/font-sfnt application/x-font-ttf application/x-font-otf application/x-font-truetype
    image/bmp image/x-ms-bmp image/vnd.microsoft.icon image/x-icon image/svg
    model/gltf-binary model/obj model/stl
    """.split()
)

_COMPRESSIBLE_SUFFIXES: Final = (b"+json", b"+xml", b"+yaml", b"+json-seq")

# An app may make up types without end, multipart boundaries for one: of what is remembered, both the number and the
# length are bounded.
_REMEMBERED: Final = 512
_LONGEST_REMEMBERED: Final = 128


def is_compressible(content_type: bytes) -> bool:
    """Whether bodies of this type usually shrink; parameters and case do not matter.

    `text/event-stream` is among them: it shrinks well, and stays an event stream as long as what compresses it flushes
    after each message. Whoever cannot must leave it alone.
    """
    if len(content_type) > _LONGEST_REMEMBERED:
        return _judge(content_type)
    return _judge_remembered(content_type)


def _judge(content_type: bytes) -> bool:
    essence = content_type.partition(b";")[0].strip().lower()
    return (
        essence in _COMPRESSIBLE or essence.startswith(b"text/") or essence.endswith(_COMPRESSIBLE_SUFFIXES)
    )


_judge_remembered = lru_cache(maxsize=_REMEMBERED)(_judge)
