"""Servers on loopback for tests: a web server with ranges (werkzeug's) and an S3 (moto's)."""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from werkzeug.exceptions import Forbidden, HTTPException, NotFound, ServiceUnavailable
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

HOWS = ("whole", "secret", "stalled", "cut", "busy")  # first folders of paths, see `Web`


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open

    def log(self, *args: object) -> None:
        pass


class Web:
    """Serves the files under `folder`; folders of the first level that are not there misbehave.

    /whole/ gives no ranges, /secret/ forbids, /stalled/ never answers, /cut/ ends half way through a range,
    /busy/ serves each other request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, Counter[str]()
        self.stop = threading.Event()
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, environ, start_response):
        request = Request(environ)
        self.requests[request.path] += 1
        try:
            response = self.answer(request)
        except HTTPException as error:
            response = error
        return response(environ, start_response)

    def answer(self, request: Request) -> Response:
        how, _, rest = request.path[1:].partition("/")
        path = self.folder / (rest if how in HOWS else request.path[1:])
        if how == "secret":
            raise Forbidden
        if how == "busy" and self.requests[request.path] % 2 == 0:
            raise ServiceUnavailable
        if how == "stalled":
            self.stop.wait(60)
        if not path.is_file():
            raise NotFound
        if how == "whole":
            return Response(path.read_bytes(), headers={"ETag": '"1"'})
        if how == "cut" and request.range.ranges[0] != (0, 1):  # fewer bytes than the header says
            headers = {"Content-Range": request.range.make_content_range(path.stat().st_size).to_header()}
            headers |= {"ETag": '"1"', "Content-Length": "9000", "Connection": "close"}
            return Response([b"x" * 5000], 206, headers)
        facts = path.stat()  # not the path itself: a client that goes away would leave the file open
        etag, kind = f"{facts.st_mtime_ns}-{facts.st_size}", "application/octet-stream"
        data = io.BytesIO(path.read_bytes())
        return send_file(
            data, request.environ, kind, etag=etag, last_modified=facts.st_mtime, conditional=True
        )


def web_server(folder: Path) -> AbstractContextManager[Web]:
    return serving(Web(folder))


@contextmanager
def serving(web: Web) -> Iterator[Web]:
    thread = threading.Thread(target=web.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield web
    web.stop.set()
    web.server.shutdown()
    thread.join()
    web.server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """Endpoint of an empty S3; the environment that boto clients and child processes read points to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    yield names["AWS_ENDPOINT_URL"]
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()
