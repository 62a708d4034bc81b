"""Files behind a URL through fsspec: their sizes, listings, and ranges of their bytes.

http(s) is asked for ranges directly, so that one answer tells size, tag and whether the server can do it; all
else (s3, gs, memory, ...) goes through the methods of its file system. Endpoints and credentials are fsspec's
and botocore's own: AWS_ENDPOINT_URL, AWS_PROFILE, FSSPEC_S3_ANON=true, ~/.config/fsspec/*.json.
fsspec runs one event loop in a thread, which does not live on in a forked process: a file system is made in
the process that uses it, and never handed over.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from typing import Any, NamedTuple

from ldm.errors import InputError

WEB = ("http", "https")
THREADS = 32  # requests at a time, when many files are asked for
LISTING_TIMEOUT = 600.0  # seconds, for a whole folder
PAUSES = (0.2, 1.0)  # seconds before asking again for a size
LIST_FROM = 8  # names in one folder from which it is rather listed than asked for each


class Stat(NamedTuple):
    """Bytes of a shard, and a text that changes when the content may have (time of change, ETag)."""

    size: int
    tag: str


class ChangedError(OSError):
    """A shard is not the file that was indexed or opened."""


def public(url: str) -> str:
    """The url without what may be a secret: user, password, query, a command."""
    if url.startswith("pipe:"):
        return "pipe:..."
    return re.sub(r"(\w://)[^/\s]*@", r"\1", url).partition("?")[0] if "://" in url else url


def is_web(url: str) -> bool:
    return url.partition("://")[0].lower() in WEB


_systems: dict[tuple[int, str], Any] = {}  # process, protocol; kept, as closing a fork's copy would hang


def system(url: str) -> Any:
    """This process's fsspec file system for the url; raises `InputError` if there is none."""
    protocol = url.partition("://")[0].lower()
    key = os.getpid(), protocol
    if key not in _systems:
        try:
            import fsspec

            made = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            what = f"{protocol}:// needs a package that is not installed ({error})"
            raise InputError(public(url), what, 'pip install "ldm[remote]"') from None
        except ValueError:
            fix = "use a local path, http://, https://, s3:// or another protocol of fsspec"
            raise InputError(public(url), f"unknown protocol {protocol}://", fix) from None
        _systems.setdefault(key, made)  # no lock: one held during a fork would never be released
    return _systems[key]


def look(url: str, timeout: float) -> Stat:
    """Size and tag; raises as `fetch` does, but a server that is only busy is asked again."""
    for pause in PAUSES:
        try:
            return _look(url, timeout)
        except OSError as error:
            if error.errno != errno.EIO:  # that it is not there, may not be read, or took too long
                raise
            time.sleep(pause)
    return _look(url, timeout)


def _look(url: str, timeout: float) -> Stat:
    if is_web(url):
        return _web(url, 0, 1, timeout)[1]
    return _stat(url, _call(url, timeout, "info", system(url)._strip_protocol(url)))


def fetch(url: str, start: int, size: int, timeout: float, known: Stat) -> bytes:
    """Bytes [start, start + size), all of them.

    Raises OSError: FileNotFoundError (404), PermissionError (401, 403), TimeoutError after `timeout` seconds,
    `ChangedError` if the file is not `known` any more, else OSError itself.
    """
    if is_web(url):
        data, now = _web(url, start, size, timeout)
        if now != known:
            raise ChangedError(errno.ESTALE, "the file has changed on the server", public(url))
    else:
        name = system(url)._strip_protocol(url)
        data = _call(url, timeout, "cat_file", name, start=start, end=start + size)
    if len(data) != size:
        raise OSError(errno.EIO, f"got {len(data):,} of {size:,} bytes at {start:,}", public(url))
    return bytes(data)


def put(url: str, data: bytes, timeout: float) -> None:
    """Write a whole file; object stores show it when it is complete."""
    _call(url, timeout, "pipe_file", system(url)._strip_protocol(url), data)


def find(candidates: Sequence[str], timeout: float) -> list[tuple[str, Stat]]:
    """Those of the urls (of one protocol) that exist, in order.

    Globs and folders (their *.tar) are listed, except on the web, where nothing can be.
    """
    if is_web(candidates[0]):
        asked = zip(candidates, looks(candidates, timeout), strict=True)
        return [(url, stat) for url, stat in asked if stat is not None]
    fs = system(candidates[0])
    found: list[tuple[str, Mapping[str, Any]]] = []
    names = [fs._strip_protocol(url) for url in candidates]
    crowds = {folder for folder, count in Counter(map(fs._parent, names)).items() if count >= LIST_FROM}
    listings = {folder: _listing(candidates[0], folder) for folder in crowds}
    for url, name in zip(candidates, names, strict=True):
        folder = fs._parent(name)
        if has_magic(name):
            infos = _call(url, LISTING_TIMEOUT, "glob", name, detail=True)
            found += [(n, info) for n, info in sorted(infos.items()) if info["type"] == "file"]
            continue
        info = listings[folder].get(name) if folder in crowds else _info(url, name, timeout)
        if info is not None and info["type"] == "directory":
            inside = sorted(_listing(url, name).items())
            found += [(n, i) for n, i in inside if i["type"] == "file" and fnmatch.fnmatch(n, "*.tar")]
        elif info is not None:
            found.append((name, info))
    return [(fs.unstrip_protocol(name), _stat(fs.unstrip_protocol(name), info)) for name, info in found]


def looks(urls: Sequence[str], timeout: float) -> list[Stat | None]:
    """`look` at many urls at a time; None: there is no such file."""

    def one(url: str) -> Stat | None:
        try:
            return look(url, timeout)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(min(THREADS, max(1, len(urls)))) as pool:
        return list(pool.map(one, urls))


def _info(url: str, name: str, timeout: float) -> Mapping[str, Any] | None:
    try:
        return _call(url, timeout, "info", name)
    except FileNotFoundError:
        return None


def _listing(url: str, folder: str) -> dict[str, Mapping[str, Any]]:
    try:
        infos = _call(url, LISTING_TIMEOUT, "ls", folder, detail=True)
    except FileNotFoundError:
        return {}
    return {info["name"].rstrip("/"): info for info in infos}


def _stat(url: str, info: Mapping[str, Any]) -> Stat:
    if info["type"] != "file" or info.get("size") is None:
        raise OSError(errno.EISDIR, "not a file", public(url))
    names = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")
    return Stat(int(info["size"]), next((str(info[name]) for name in names if info.get(name)), ""))


def _call(url: str, timeout: float, method: str, *args: Any, **options: Any) -> Any:
    """What a method of the url's file system returns; what goes wrong is an OSError that names the url.

    File systems that are not asynchronous know no time limit.
    """
    fs = system(url)
    try:
        if not fs.async_impl:
            return getattr(fs, method)(*args, **options)
        from fsspec.asyn import sync

        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=timeout, **options)
    except Exception as error:
        raise _as_os_error(error, url, timeout) from error


def _web(url: str, start: int, size: int, timeout: float) -> tuple[bytes, Stat]:
    """A range of a file on a web server, and the facts that came with it."""
    fs = system(url)
    try:
        from fsspec.asyn import sync

        return sync(fs.loop, _range, fs, url, start, size, timeout=timeout)
    except Exception as error:
        raise _as_os_error(error, url, timeout) from error


async def _range(fs: Any, url: str, start: int, size: int) -> tuple[bytes, Stat]:
    import aiohttp

    session = await fs.set_session()
    options = dict(fs.kwargs)
    asked = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    options["headers"] = {**options.get("headers", {}), **asked}
    options["timeout"] = aiohttp.ClientTimeout(total=None)  # the caller has its own
    async with session.get(fs.encode_url(url), **options) as answer:
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
        extent = answer.headers.get("Content-Range", "")
        if (
            answer.status == 416
            and extent == "bytes */0"
            or answer.status == 200
            and not answer.content_length
        ):
            if await answer.read():
                raise OSError(errno.ENOTSUP, "the server does not tell the size")
            return b"", Stat(0, tag)
        if answer.status == 200:  # leaving here closes the connection, before the whole file has come
            raise OSError(errno.ENOTSUP, "the server gives whole files only, and no ranges of bytes")
        if answer.status != 206 or not re.fullmatch(rf"bytes {start}-\d+/\d+", extent):
            codes = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
            raise OSError(codes.get(answer.status, errno.EIO), f"HTTP {answer.status} {answer.reason}")
        return await answer.read(), Stat(int(extent.rpartition("/")[2]), tag)


def _as_os_error(error: Exception, url: str, timeout: float) -> OSError:
    """Of the same kind if that is one that callers tell apart, with a text for one line and the url."""
    if isinstance(error, TimeoutError):
        return OSError(errno.ETIMEDOUT, f"no answer in {timeout:g} s", public(url))
    if isinstance(error, FileNotFoundError):
        return OSError(errno.ENOENT, error.strerror or "no such file", public(url))
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return OSError(errno.EACCES, error_text(error), public(url))
    code = error.errno if isinstance(error, OSError) and error.errno == errno.ENOTSUP else errno.EIO
    return OSError(code, error_text(error), public(url))


def error_text(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
