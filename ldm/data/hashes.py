"""What the index and the opt-out lists call the same thing: 64 bits of a URL, a host or a picture's digest.

Collisions: a list of 1e8 lines against 1e9 samples meets one false match in 200 such runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import xxhash

HASHES = ("url", "domain", "picture")  # columns of the index, uint64, 0 where there is nothing
DIGESTS = ("sha256", "md5", "sha512")  # hexadecimal digests of a picture's bytes that img2dataset may write


def hash_text(text: str) -> int:
    """An unsigned 64-bit number; texts are compared to the letter."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def host_of(url: str) -> str:
    """The host of a URL or of a bare name, lower case, without port and leading `www.`; empty if none.

    Not the registered domain: `images.example.org` and `example.org` are two hosts.
    """
    try:
        host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:
        return ""
    return host.rstrip(".").removeprefix("www.")


def hashes_of(meta: Mapping[str, Any]) -> dict[str, int]:
    """HASHES of a sample's json: of its URL, of the host in it, of the first digest it has."""
    url = meta.get("url")
    url = url.strip() if isinstance(url, str) else ""
    digests = (meta.get(name) for name in DIGESTS)
    digest = next((value for value in digests if isinstance(value, str) and value), "")
    texts = (url, host_of(url), digest.strip().lower())
    return {name: hash_text(text) if text else 0 for name, text in zip(HASHES, texts, strict=True)}
