"""A loopback server that speaks as much of the hub's protocol as its real client needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, slots=True)
class Sent:
    """One answer of the hub: to which method and path, and how many bytes its body had."""

    method: str
    path: str
    status: int
    body_bytes: int

    @property
    def file(self) -> str | None:
        """The name of the file that was asked for, or None."""
        _, is_file, rest = self.path.partition("/resolve/")
        return rest.partition("/")[2] if is_file else None


@dataclass
class Hub:
    """A running hub with one repository, the files of `folder`.

    `sent` is every answer so far. The next `breaks[name]` downloads of that file break off
    halfway.
    """

    folder: Path
    endpoint: str = ""
    sent: list[Sent] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self, cache: Path) -> dict[str, str]:
        """What points huggingface_hub here, with its cache in `cache`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }

    @property
    def files(self) -> set[str]:
        """The files that were asked for, in whole, in part or by HEAD."""
        return {answer.file for answer in self.sent if answer.file is not None}

    def whole(self, name: str) -> int:
        """How often all of this file was sent at once."""
        size_bytes = (self.folder / name).stat().st_size
        return sum(a.file == name and a.body_bytes >= size_bytes for a in self.sent)

    def bytes_of(self, name: str) -> int:
        """How many bytes of this file were sent, over all answers."""
        return sum(answer.body_bytes for answer in self.sent if answer.file == name)

    def is_to_break(self, name: str) -> bool:
        """Whether this download of the file breaks off. Counts it."""
        with self.lock:
            left = self.breaks.get(name, 0)
            self.breaks[name] = max(0, left - 1)
            return left > 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}/") or path == f"/api/models/{REPO}":
            self._send(200, self._listing("/tree/" in path), {"Content-Type": "application/json"})
            return
        prefix = f"/{REPO}/resolve/"
        name = path.removeprefix(prefix).partition("/")[2]
        if not path.startswith(prefix):
            # As the hub answers who is not logged in, for the repository may be private.
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif not (self.hub.folder / name).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._file(name, (self.hub.folder / name).read_bytes())

    def _listing(self, is_tree: bool) -> bytes:
        names = sorted(p.name for p in self.hub.folder.iterdir())
        if not is_tree:
            siblings = [{"rfilename": name} for name in names]
            return json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        sizes = [(name, (self.hub.folder / name).stat().st_size) for name in names]
        return json.dumps(
            [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes]
        ).encode()

    def _file(self, name: str, data: bytes) -> None:
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, total = 200, len(data)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else total, total)
            status, data = 206, data[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        # A range with an end is for the header.
        is_download = self.command == "GET" and not (wanted and not wanted.endswith("-"))
        if is_download and self.hub.is_to_break(name):
            self._send(status, data[: len(data) // 2], headers, length=len(data))
            self.close_connection = True
        else:
            self._send(status, data, headers)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        with self.hub.lock:
            self.hub.sent.append(Sent(self.command, self.path, status, len(body)))
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve `folder` as the repository `owner/model` on a free loopback port."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
