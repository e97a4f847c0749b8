"""A stand-in for the Hugging Face hub on loopback, with the ways in which the real one fails."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandInHub:
    """Serves ``/REPOSITORY/resolve/main/FILE`` as the hub does, and takes commits to repositories.

    Attributes:
        files: ``REPOSITORY/FILE`` to content; what is not there is a 404.
        mode: ``ok``, ``500``, ``hang`` (heads are answered, contents never come), ``dead`` (nothing is answered),
            ``truncated`` (the connection closes half-way) or ``wrong`` (other bytes of the same length).
        token: What a writer has to show.
        created: Whether a repository was created.
        role: What the token may: ``write`` or ``read``.
        requests: Method and path of what was asked for.
        url: What HF_ENDPOINT has to be.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.mode = "ok"
        self.token = "hf_good"
        self.role = "write"
        self.created = False
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

        def answer_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def write(self) -> None:
            """Take what a client sends to create a repository, and to commit files in one request."""
            hub.requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer_json(401, {"error": "Invalid credentials"})
            elif hub.mode == "500":
                self.answer_json(500, {"error": "out of order"})
            elif self.path == "/api/repos/create":
                hub.created = True
                self.answer_json(
                    200, {"url": f"{hub.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
                )
            elif self.path == "/api/validate-yaml":  # the head of a README
                self.answer_json(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                self.answer_json(
                    200, {"files": [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in files]}
                )
            elif "/commit/" in self.path:
                repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "deletedFile":
                        del hub.files[f"{repository}/{line['value']['path']}"]
                    elif line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[f"{repository}/{line['value']['path']}"] = content
                self.answer_json(200, {"commitUrl": f"{hub.url}/{repository}/commit/0", "commitOid": "0" * 40})
            else:
                self.answer_json(404, {"error": "unknown"})

        def do_POST(self) -> None:
            self.write()

        def do_HEAD(self) -> None:
            self.answer(send_content=False)

        def do_GET(self) -> None:
            if not self.path.startswith("/api/"):
                self.answer(send_content=True)
            elif self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer_json(401, {"error": "Invalid credentials"})
            elif self.path == "/api/whoami-v2":
                user = {"name": "user", "type": "user", "orgs": [{"name": "lab"}]}
                self.answer_json(200, {**user, "auth": {"accessToken": {"role": hub.role}}})
            elif (files := self.files_of(self.path.removeprefix("/api/models/").partition("/tree/")[0])) or hub.created:
                if "/tree/" in self.path:
                    self.answer_json(200, [{"type": "file", "path": name, "oid": "0", "size": 1} for name in files])
                    return
                siblings = [{"rfilename": name} for name in files]
                self.answer_json(200, {"id": self.path, "sha": "0" * 40, "siblings": siblings})
            else:
                self.answer_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        def files_of(self, repository: str) -> list[str]:
            names = [name for name in hub.files if name.startswith(f"{repository}/")]
            return [name.removeprefix(f"{repository}/") for name in names]

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
