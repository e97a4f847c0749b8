"""A stand-in for the Hugging Face hub on loopback, with the ways in which the real one fails."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandInHub:
    """Serves ``/REPOSITORY/resolve/main/FILE`` as the hub does.

    Attributes:
        files: ``REPOSITORY/FILE`` to content; what is not there is a 404.
        mode: ``ok``, ``500``, ``hang`` (heads are answered, contents never come), ``dead`` (nothing is answered),
            ``truncated`` (the connection closes half-way) or ``wrong`` (other bytes of the same length).
        requests: Method and path of what was asked for.
        url: What HF_ENDPOINT has to be.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.mode = "ok"
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        self.url = ""


def handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    """Make the handler's class."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, send_content: bool) -> None:
            hub.requests.append((self.command, self.path))
            if hub.mode == "dead":
                hub.released.wait()
                return
            content = hub.files.get(self.path.strip("/").replace("/resolve/main/", "/"))
            status = 500 if hub.mode == "500" and content is not None else 404 if content is None else 200
            self.send_response(status)
            self.send_header("X-Repo-Commit", "0" * 40)
            if content is None or status == 500:
                self.send_header("Content-Length", "0")
                if status == 404 and "/resolve/" in self.path:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not send_content:
                return
            if hub.mode == "hang":
                hub.released.wait()
            elif hub.mode == "truncated":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(bytes(len(content)) if hub.mode == "wrong" else content)

        def do_HEAD(self) -> None:
            self.answer(send_content=False)

        def do_GET(self) -> None:
            self.answer(send_content=True)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def serve() -> Iterator[StandInHub]:
    """Run a stand-in hub on a free port of the loopback device."""
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
